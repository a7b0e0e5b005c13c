"""Files that a killed process leaves whole, and CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextmanager
def written_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to beside `path`; at the end it is flushed to disk and renamed to `path`, or deleted on an error.

    Args:
        path: the file that a killed process leaves as it was; its folder is made if need be.
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


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, floats with four decimals.

    Args:
        path: file to write.
        fields: names of the columns.
        rows: values in the order of `fields`.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for row in rows:
            writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in row])


def metric_name(metric: str, finding: str) -> str:
    """Name of a finding's metric, without blanks and commas, as a CSV holds it: `auroc_Pleural_Thickening`."""
    return f"{metric}_{finding}".replace(" ", "_").replace(",", "")
