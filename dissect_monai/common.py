"""Small things that several rooms share: text of a list, rank and world size, shared names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

Item = dict[str, Any]
NO_FINDING = "No finding"


def few(values: Sequence[Any], count: int = 8) -> str:
    """The first values as a text, with dots if there are more."""
    return ", ".join(map(str, values[:count])) + ", ..." * (len(values) > count)


LEVELS = ("image", "task", "group")


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
