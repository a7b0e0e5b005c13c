from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On tensors this small threads only wait for each other."""
    torch.set_num_threads(1)
