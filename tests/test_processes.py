from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dissect_monai.bundle import destroy_group, process_device


def test_says_how_to_start_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"python -m torch\.distributed\.run --nproc_per_node"):
        process_device()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert process_device().type in ("cpu", "cuda")


def gloo_threads() -> list[str]:
    return [task.name for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are only listed by Linux")
def test_no_thread_of_the_group_is_left(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    network = DistributedDataParallel(nn.Linear(2, 1))
    network(torch.ones(1, 2)).sum().backward()
    dist.all_reduce(torch.ones(1))
    assert gloo_threads()
    destroy_group(network)
    assert not dist.is_initialized()
    assert not gloo_threads()
