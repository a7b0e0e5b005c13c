"""Small things that several rooms share: text of a list, rank and world size, shared names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

Item = dict[str, Any]
NO_FINDING = "No finding"
LEVELS = ("image", "task", "group")  # of the hierarchical contrast


class InputError(ValueError):
    """Bad input: the message names it, says what it must be and what to do, and is all that a user needs to see."""


class Interval(NamedTuple):
    """A statistic and its 95 % interval."""

    value: float
    low: float
    high: float


def shorten(values: Sequence[Any], count: int = 8) -> str:
    """The first values as a text, with dots if there are more."""
    return ", ".join(map(str, values[:count])) + ", ..." * (len(values) > count)


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
