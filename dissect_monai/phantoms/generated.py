"""Data sets that are generated on the spot: written once, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from dissect_monai.common import InputError

SPLITS = ("training", "validation", "test")


def checked_counts(image_size: int, num_training: int, num_validation: int, num_test: int) -> dict[str, int]:
    """How many items each split gets, of images that are large enough to draw."""
    counts = dict(zip(SPLITS, (num_training, num_validation, num_test), strict=True))
    if min(counts.values()) < 0:
        raise InputError(f"The numbers of images must be at least 0, got {counts}.")
    if image_size < 16:
        raise InputError(f"`image_size` must be at least 16, got {image_size}.")
    return counts


def write_once(output_dir: str | Path, spec: Mapping[str, Any], write_set: Callable[[Path], None]) -> Path:
    """Write a data set, unless the folder holds it already, and return the folder.

    A set is known by the `spec` in its dataset.json. One that lacks files is replaced. Processes that call this at once
    do no harm: the set appears whole, by renaming.

    Args:
        output_dir: folder to create.
        spec: what the set depends on, such as counts and seed; of types that JSON keeps.
        write_set: creates the folder that it is given and writes the set there, with `spec` in its dataset.json.

    Raises:
        ValueError: if `output_dir` holds anything else.
    """
    output_dir = Path(output_dir)
    if _holds(output_dir, spec):
        return output_dir
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (output_dir.with_name(f".{output_dir.name}-{uuid4().hex}") for _ in range(2))
    try:
        write_set(partial)
        if output_dir.exists() and not _holds(output_dir, spec):
            output_dir.rename(old)
        partial.rename(output_dir)
    except OSError:
        if not _holds(output_dir, spec):  # else another process was faster
            raise
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
    return output_dir


def _holds(folder: Path, spec: Mapping[str, Any]) -> bool:
    """Whether the whole set is there; False if it is not, or not whole."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    datalist = folder / "dataset.json"
    dataset = json.loads(datalist.read_text()) if datalist.is_file() else {}
    found = dataset.get("spec", "other files")
    if found != spec:
        raise InputError(
            f"`output_dir` must be new, empty or hold the set {spec}, got {folder} holding {found}. "
            "Choose another folder or remove this one."
        )
    items = [item for split in SPLITS for item in dataset.get(split, [])]
    paths = [value for item in items for key in ("image", "label") if isinstance(value := item.get(key), str)]
    return all((folder / path).is_file() for path in paths)
