"""The processes of a run on several devices: which device is theirs, what they share, and how they end together."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def process_device() -> torch.device:
    """Device of this process among those that torchrun started on this machine.

    Raises:
        ValueError: if torchrun did not start it.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "multi_gpu_train.json needs one process per GPU: start it by "
            "`python -m torch.distributed.run --nproc_per_node=<GPUs> -m monai.bundle run ...`."
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def of_first_process(value: Any) -> Any:
    """What the first process calls this with, in all processes; the value itself without a process group.

    Args:
        value: anything that can be pickled. All processes must call this.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def fewest(count: int) -> int:
    """The smallest count of all processes; the count itself without a process group.

    Args:
        count: of this process, such as the images that it could read. All processes must call this.
    """
    if not dist.is_initialized():
        return count
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return min(counts)


def leave_group(network: DistributedDataParallel) -> None:
    """Wait until all processes of the run are done, and end what connects them, in each of them.

    Gloo's threads may still hold tensors of the last collective, and abort a process whose interpreter ends before they
    have let go. They are joined with the last reference to the group, which `network` has and gives up here.

    Args:
        network: the wrapped network, which cannot be trained any more.
    """
    device = next(network.parameters()).device
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    for holder in ("reducer", "logger", "process_group"):
        vars(network).pop(holder, None)
    dist.destroy_process_group()
