from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TINY_BUNDLE, write


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On tensors this small threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle, run from the folder above `bundles`."""
    folder = tmp_path / "bundles" / "tiny"
    write(folder / "configs" / "train.json", TINY_BUNDLE)
    write(folder / "configs" / "metadata.json", {"version": "0.1.0"})
    monkeypatch.chdir(tmp_path)
    return folder
