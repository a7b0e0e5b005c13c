from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import pytest
import torch
from helpers import ROOT, TINY_BUNDLE, write

from dissect_monai.phantoms.xray import write_xray_phantoms


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


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, few and small."""
    return write_xray_phantoms(tmp_path_factory.mktemp("phantoms") / "set", 24, 16, 16, image_size=32)


@pytest.fixture
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the README runs its commands."""
    monkeypatch.chdir(ROOT)
