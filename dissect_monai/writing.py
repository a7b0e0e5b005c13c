"""Files that a killed process leaves whole, tables as CSV, and names of metrics."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import torch

from dissect_monai.common import Interval

_ENDS = ("", "_low", "_high")  # of the columns and metrics of an interval


@contextmanager
def written_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to beside `path`; at the end it is flushed to disk and renamed to `path`, or deleted on an error.

    So a killed process leaves `path` as it was. Its folder is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(state: Any, path: str | Path) -> None:
    """`torch.save` that leaves `path` whole at any moment."""
    with written_atomically(path) as file:
        torch.save(state, file)


def write_csv(path: str | Path, fields: Sequence[str], rows: Iterable[Sequence[Any]], nan: str = "") -> None:
    """Write a table: floats with four decimals, an `Interval` in three columns, other tuples with blanks between.

    Args:
        path: file to write; its folder is made.
        fields: names of the columns, such as `columns` gives them.
        rows: values in the order of `fields`; None is blank.
        nan: what stands for NaN.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows([cell for value in row for cell in _cells(value, nan)] for row in rows)


def _cells(value: Any, nan: str) -> list[Any]:
    if isinstance(value, Interval):
        return [cell for each in value for cell in _cells(each, nan)]
    if isinstance(value, tuple):
        return [" ".join(map(str, value))]
    if isinstance(value, float):
        return [nan if isnan(value) else f"{value:.4f}"]
    return [value]


def columns(row: type) -> list[str]:
    """Columns of a table of such `NamedTuple`s; an `Interval` has three: `dice`, `dice_low`, `dice_high`."""
    kinds = get_type_hints(row)
    return [f"{name}{end}" for name, kind in kinds.items() for end in (_ENDS if kind is Interval else _ENDS[:1])]


def metrics_by_name(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Each interval as three metrics: `auroc`, `auroc_low`, `auroc_high`."""
    return {
        f"{name}{end}": value
        for name, interval in intervals.items()
        for end, value in zip(_ENDS, interval, strict=True)
    }


def metric_name(metric: str, finding: str) -> str:
    """Name of a finding's metric, without blanks and commas, as a CSV holds it: `auroc_Pleural_Thickening`."""
    return f"{metric}_{finding}".replace(" ", "_").replace(",", "")
