"""Small things that several rooms share: version, text of a list, what processes tell each other, shared names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

__version__ = "0.2.0"
Array = NDArray[np.floating[Any]]
Item = dict[str, Any]
T = TypeVar("T")
NO_FINDING = "No finding"
PICTURE = "picture"  # in the metadata of a picture that is read as a slice: its whitest value, 0 if none is known
SALT = ".salt"  # file in a data folder: the key of the pseudonyms of its subjects
LEVELS = ("image", "task", "group")  # of the hierarchical contrast
# Of slices: the patient's axes (0 left to right, 1 back to front, 2 foot to head) in their order, the one across last.
PLANES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
BTCV_ORGANS = (  # in the order of their values
    "spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "portal_and_splenic_veins", "pancreas", "right_adrenal_gland", "left_adrenal_gland",
)  # fmt: skip


_APART = 1.5  # least spacing of slices as a multiple of that of their pixels
NO_MEMORY = re.compile(  # of torch, NumPy, SimpleITK
    r"MemoryError|(can't|not|Failed to|Unable to) allocate|out of memory|enough memory|calculation overflowed|"
    r"multiplication overflow|array is too (big|large)|Maximum allowed (dimension|size)|bad_alloc"
)


class InputError(ValueError):
    """Bad input: the message names it, says what it must be and what to do, and is all that a user needs to see."""


class Interval(NamedTuple):
    """A statistic and its 95 % interval."""

    value: float
    low: float
    high: float


def bad_input(error: BaseException | None) -> BaseException | None:
    """The error in a chain of causes that says what was wrong with the input, or None: MONAI wraps it several times."""
    while error is not None and not isinstance(error, (InputError, OSError)):
        error = error.__cause__
    return error


def memory_fault(error: BaseException | None) -> BaseException | None:
    """The error in a chain of causes, or behind it, that says that memory does not suffice, or None."""
    while error is not None and not isinstance(error, (MemoryError, OverflowError)):
        if isinstance(error, (RuntimeError, ValueError)) and NO_MEMORY.search(str(error)):
            break
        error = error.__cause__ or error.__context__
    return error


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def shorten(values: Sequence[Any], count: int = 8) -> str:
    """The first values as a text, with dots if there are more."""
    return ", ".join(map(str, values[:count])) + ", ..." * (len(values) > count)


def acquired_plane(shape: Sequence[int], spacing: Sequence[float]) -> str:
    """Plane in which a volume in RAS was acquired: that of its only slice, or across its coarsest axis, or axial.

    The coarsest axis counts if its spacing is at least 1.5 times that of each other one.
    """
    coarse = sorted(spacing)
    single, across = list(shape).count(1) == 1, coarse[2] >= _APART * coarse[1]
    axis = list(shape).index(1) if single else int(np.argmax(spacing)) if across else 2
    return next(plane for plane, axes in PLANES.items() if axes[2] == axis)


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all_processes(value: Any) -> list[Any]:
    """The values of all processes, by rank; all of them must call it."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def of_first_process(step: Callable[[], T]) -> T:
    """What a step returns that the first process alone takes, in all of them; what it refuses, all refuse."""
    found: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            found = step()
        except (InputError, OSError) as refusal:
            error = refusal
    found, error = of_all_processes((found, error))[0]
    if error is not None:
        raise error
    return found


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, complete: bool) -> Tensor:
        ctx.own, ctx.complete = slice(rank() * len(rows), (rank() + 1) * len(rows)), complete
        return gather(rows) if world_size() > 1 else rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.complete:
            return grad[ctx.own] * world_size(), None  # over which the gradients of the parameters will be averaged
        if world_size() > 1:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad)
        return grad[ctx.own], None


def gather_rows(rows: Tensor, complete: bool = True) -> Tensor:
    """Rows (N, D) of all processes, (world_size·N, D), for a loss of the joined batch, which all of them compute.

    Its gradient becomes that of the joined batch when `DistributedDataParallel` averages the parameters' gradients.
    `complete` says that each process finds all of the gradient of its own rows; else the parts of all are summed.
    """
    gathered: Tensor = _GatherRows.apply(rows, complete)
    return gathered


def gather(tensor: Tensor) -> Tensor:
    """The same without a gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
