"""Data sets that are generated on the spot: written once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from dissect_monai.common import SALT, InputError

SPLITS = ("training", "validation", "test")
Splits = dict[str, list[dict[str, Any]]]


def write_once(
    output_dir: str | Path, spec: Mapping[str, Any], head: Mapping[str, Any], write_files: Callable[[Path], Splits]
) -> Path:
    """Write a data set, unless the folder holds it already, and return the folder.

    A set is known by the `spec` in its dataset.json. Several processes may call this: it appears whole, by renaming.

    Args:
        output_dir: folder to create; one that holds anything else is refused.
        spec: what the set depends on, such as counts and seed; of types that JSON keeps.
        head: what dataset.json says before the items.
        write_files: writes the files into a folder, and returns the items of the splits.
    """
    output_dir = Path(output_dir)
    if _holds(output_dir, spec):
        return output_dir
    partial = output_dir.with_name(f".{output_dir.name}-{uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        dataset = {**head, "spec": spec, **write_files(partial)}
        (partial / "dataset.json").write_text(json.dumps(dataset, indent=1))
        (partial / SALT).write_text(hashlib.sha256(repr(spec).encode()).hexdigest())  # no secret: always the same
        partial.rename(output_dir)
    except OSError:
        if not _holds(output_dir, spec):  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output_dir


def _holds(folder: Path, spec: Mapping[str, Any]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    datalist = folder / "dataset.json"
    found = json.loads(datalist.read_text()).get("spec") if datalist.is_file() else None
    if found != spec:
        raise InputError(
            f"`output_dir` must be new, empty or hold the set {spec}, got {folder} holding "
            f"{found or 'other files'}. "
            "Choose another folder or remove this one."
        )
    return True
