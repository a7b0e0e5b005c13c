"""Volumes and their label maps: found, matched by name, and compared in grid and values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from datalists.source import Record
from dissect_monai import ImageFileReader
from dissect_monai.data import dicom
from dissect_monai.data.datalists import walk, without_labels
from dissect_monai.data.readers import image_format, read_grid
from dissect_monai.transforms.labels import integer_map
from dissect_monai.transforms.spatial import describe_grid, same_grid

SUFFIX = re.compile(r"\.(nii|nii\.gz|mha|mhd|nrrd|nhdr)$", re.IGNORECASE)


def pair_volumes(image_dir: Path, label_dir: Path) -> tuple[list[Record], list[str]]:
    """Records of all images that have a label map of their name, and what is wrong with the others.

    The subject is the name. BTCV's img0001 and label0001 are both called 0001, and nnU-Net's case_0000 is called case
    where that is a label map.
    """
    labels = find_volumes(label_dir, of_labels=True)

    def label_name(name: str) -> str:
        case = re.sub(r"_\d{4}$", "", name)
        return case if name not in labels and case in labels else name

    images = by_name((label_name(name), path) for name, path in find_volumes(image_dir).items())
    problems = [f"{path} has no label map" for name, path in images.items() if name not in labels]
    problems += [f"{path} has no image" for name, path in labels.items() if name not in images]
    pairs = [(name, path) for name, path in images.items() if name in labels]
    return [Record(path, None, name, label_map=labels[name]) for name, path in pairs], problems


def find_volumes(folder: Path, of_labels: bool = False) -> dict[str, Path]:
    """Volumes in a folder and below, sorted, by their path in it without suffix; a series of DICOM slices is one.

    Unless they are asked for, label maps beside images are left out, see `without_labels`.
    """
    paths: list[Path] = []
    for parent, files in walk(folder):
        formats = {path: image_format(path) for path in files}
        paths += [path for path in files if formats[path] in ("itk", "nifti")]
        if "dicom" in formats.values():
            paths += dicom.find_volumes(parent)
    if not paths:
        raise FileNotFoundError(
            f"{folder} must be a folder with volumes (NIfTI, MHA, NRRD, folders of DICOM slices), got none. "
            "Correct the path."
        )
    chosen = paths if of_labels else without_labels(paths, folder)
    return by_name((volume_name(path, folder), path) for path in sorted(chosen))


def volume_name(path: Path, folder: Path) -> str:
    """The path of a volume in a folder, without suffix, and without what tells BTCV's images and label maps apart."""
    name = folder.name if path == folder else SUFFIX.sub("", path.relative_to(folder).as_posix())
    return re.sub(r"^(img|label)(?=\d{4}$)", "", name)


def by_name(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Paths by their name, which must be different for each."""
    found: dict[str, Path] = {}
    for name, path in named:
        if (other := found.setdefault(name, path)) != path:
            raise ValueError(
                f"volumes must have different names, got {other} and {path}. Rename one, or, if they are channels, "
                "move each kind to a folder of its own."
            )
    return found


def check_grids(record: Record) -> Record:
    """The record, if its image and label map have one value a voxel and one grid, as their headers say."""
    grids = {path: read_grid(path) for path in (record.image, record.label_map) if path}
    for path, grid in grids.items():
        if grid.channels != 1:
            raise ValueError(
                f"{path} must have one value a voxel, got {grid.channels}. Write each channel to a file of its own."
            )
    image, label = grids[record.image], grids.get(record.label_map or record.image)
    if label and not same_grid(*image[:2], *label[:2]):
        both = (f"{path} ({describe_grid(*grid[:2])})" for path, grid in grids.items())
        raise ValueError(" and ".join(both) + " differ")
    return record


def check_values(record: Record, names: Collection[int]) -> Record:
    """The record with the values of its label map, which must be whole numbers, and 0 or named."""
    reader = ImageFileReader(spatial_dims=3)
    label_map, _ = reader.get_data(reader.read(str(record.label_map)))
    voxels = integer_map(f"label map {record.label_map}", label_map).ravel(order="K")
    # Label maps are made of runs of equal voxels: their first voxels show all values, and are few to sort.
    starts = np.append(0, np.flatnonzero(voxels[1:] != voxels[:-1]) + 1)
    values = np.unique(voxels[starts])
    unknown = [f"{value:g}" for value in values if value not in {0, *names}]
    if unknown:
        raise ValueError(f"{record.label_map} has values without a name: {', '.join(unknown[:5])}")
    return record._replace(values=tuple(int(value) for value in values if value))
