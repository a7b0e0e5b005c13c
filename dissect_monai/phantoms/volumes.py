"""Phantoms of several 3-D data sets with label maps, so that the volume bundles can be tried without a download."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from dissect_monai.phantoms.generated import SPLITS, Splits, write_once
from dissect_monai.phantoms.scans import SCANS, scan_phantom

VOLUME_TASKS = tuple(SCANS)
_VERSION = 3  # raise it when the drawing changes, so that a folder written before is not taken for the same set


def write_volume_phantoms(
    output_dir: str | Path,
    num_training: int = 12,
    num_validation: int = 4,
    num_test: int = 4,
    image_size: int = 48,
    seed: int = 0,
    tasks: Sequence[str] = VOLUME_TASKS,
) -> list[Path]:
    """Write a data set of volume phantoms for each task: NIfTI images, label maps and a Decathlon-style dataset.json.

    dataset.json holds `name`, `description`, `task`, `group`, `modality` and `labels` (value to name) beside the splits
    of {"image", "label", "subject"}, one volume a subject. Numbers of subjects are those of each task; a subject does
    not depend on them. `image_size` voxels lie along the longest side of a field of view, 16 or more; under 40, a small
    organ may be lost. Each of `tasks`, of `VOLUME_TASKS`, has a folder of its name in `output_dir`, see `write_once`;
    they are returned in this order.
    """
    counts = dict(zip(SPLITS, (num_training, num_validation, num_test), strict=True))
    folders = []
    for task in tasks:
        scan = SCANS[task]
        labels = {str(value): name for value, name in enumerate(("background", *scan.labels))}
        head: dict[str, Any] = {"name": task, "description": f"generated phantoms: {scan.description}", "task": task}
        head |= {"group": scan.group, "modality": {"0": scan.modality}, "labels": labels}
        spec = {"version": _VERSION, "task": task, **counts, "image_size": image_size, "seed": seed}
        folders.append(write_once(Path(output_dir) / task, spec, head, partial(_write_files, spec=spec)))
    return folders


def _write_files(folder: Path, spec: dict[str, Any]) -> Splits:
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    task = spec["task"]
    splits: Splits = {split: [] for split in SPLITS}
    for number, split in enumerate(SPLITS):
        for index in range(spec[split]):
            seed = [VOLUME_TASKS.index(task), spec["seed"], number, index]
            phantom = scan_phantom(SCANS[task], seed, spec["image_size"])
            subject = f"{task}_{split}_{index:03d}"
            item = {"image": f"images/{subject}.nii.gz", "label": f"labels/{subject}.nii.gz", "subject": subject}
            _save(phantom.image, phantom.affine, folder / item["image"])
            _save(phantom.label, phantom.affine, folder / item["label"])
            splits[split].append(item)
    return splits


def _save(array: NDArray[np.integer[Any]], affine: NDArray[np.float64], path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")  # some readers look at this one alone
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
