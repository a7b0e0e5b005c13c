"""Volumes and their label maps: found, matched by name, and compared in grid and values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import nibabel
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from datalists.source import walk
from dissect_monai import ImageFileReader
from dissect_monai.common import shorten
from dissect_monai.data.readers import VOLUME_SUFFIXES, Grid, image_format, read_grid

K = TypeVar("K")
# Corners of two grids may lie this share of the smallest spacing apart. Formats round an affine to far less, while the
# least real mistake, origins that differ by half a voxel, is far more.
TOLERANCE = 0.1
# Without names, more is taken for an image: label maps are written as bytes.
UNNAMED_VALUES = range(256)


class Found(NamedTuple):
    """What is known of an image and its label map."""

    values: tuple[int, ...] = ()  # of the label map, without background
    error: str = ""  # why they cannot be used


def find_volumes(folder: Path, without: Path | None = None) -> dict[str, Path]:
    """Volumes in a folder and below, sorted by name, which is their path in it without suffix.

    A folder with DICOM slices is one volume. What is hidden, such as the ._ files of archives that were made on a Mac,
    and the folder `without` are left out.
    """
    paths: list[Path] = []
    for parent, files in walk(folder, without):
        formats = {path: image_format(path) for path in files}
        paths += [path for path in files if formats[path] in ("itk", "nifti")]
        if "dicom" in formats.values():
            paths.append(parent)
    if not paths:
        raise FileNotFoundError(
            f"{folder} must be a folder with volumes (NIfTI, MHA, NRRD, folders of DICOM slices), got none. "
            "Correct the path."
        )
    named = ((volume_name(path, folder), path) for path in sorted(paths))
    return by_key(named, "volumes must have different names, got {} and {}. Remove or rename one.")


def by_key(pairs: Iterable[tuple[K, Path]], message: str) -> dict[K, Path]:
    """Paths by what must be different for each; `message` takes the two that share it."""
    found: dict[K, Path] = {}
    for key, path in pairs:
        if (other := found.setdefault(key, path)) != path:
            raise ValueError(message.format(other, path))
    return found


def volume_name(path: Path, folder: Path) -> str:
    """The path of a volume in a folder, without suffix; the name of the folder if it is a DICOM series itself."""
    if path == folder:
        return folder.name
    name = path.relative_to(folder).as_posix()
    ends = () if path.is_dir() else VOLUME_SUFFIXES
    return next((name[: -len(end)] for end in ends if name.lower().endswith(end)), name)


def without_channels(images: Mapping[str, Path], labels: Collection[str]) -> dict[str, Path]:
    """Images by the name of their label map: that of nnU-Net's case_0000 is case."""

    def label_name(name: str) -> str:
        case = re.sub(r"_\d{4}$", "", name)
        return case if name not in labels and case in labels else name

    message = (
        "a label map must have one image, got {} and {}. If they are channels, move each kind to a folder of its own."
    )
    return by_key(((label_name(name), path) for name, path in images.items()), message)


def one_channel_grid(path: Path) -> Grid:
    """The grid of a volume with one value a voxel."""
    grid = read_grid(path)
    if grid.channels != 1:
        raise ValueError(
            f"{path} must have one value a voxel, got {grid.channels}. Write each channel to a file of its own."
        )
    return grid


def check_grids(image: Path, label: Path | None) -> Found:
    """Whether an image, or it and its label map, can be used, as their headers say."""
    try:
        grid = one_channel_grid(image)
        differs = difference(grid, one_channel_grid(label)) if label else None
    except ValueError as error:
        return Found(error=str(error))
    return Found(error=f"{image} and {label}: {differs}" if differs else "")


def difference(image: Grid, label: Grid) -> str | None:
    """What differs between two grids, or None if they agree within `TOLERANCE`."""
    apart = np.inf
    if image.shape == label.shape:
        corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(image.shape) - 1)
        shifts = apply_affine(image.affine, corners) - apply_affine(label.affine, corners)
        apart = float(np.linalg.norm(shifts, axis=1).max())
    if apart <= TOLERANCE * min(voxel_sizes(image.affine).min(), voxel_sizes(label.affine).min()):
        return None
    first, second = describe(image), describe(label)
    parts = [f"{part} {first[part]} and {second[part]}" for part in first if first[part] != second[part]]
    if np.isfinite(apart):
        parts.append(f"corners up to {apart:.3g} mm apart")
    return ", ".join(parts)


def describe(grid: Grid) -> dict[str, str]:
    """A grid in words, part by part."""

    def numbers(values: np.ndarray) -> str:
        # Adding 0 turns -0 into 0.
        return f"({', '.join(f'{value:g}' for value in np.round(values, 3) + 0.0)})"

    return {
        "shape": str(grid.shape),
        "spacing": numbers(voxel_sizes(grid.affine)),
        "orientation": "".join(nibabel.aff2axcodes(grid.affine)),
        "origin": numbers(grid.affine[:3, 3]),
    }


def check_values(image: Path, label: Path | None, names: Collection[int] | None) -> Found:
    """Read which values the voxels of a label map have; they must be whole numbers, and 0 or named."""
    if label is None:
        return Found()
    reader = ImageFileReader(spatial_dims=3)
    try:
        voxels = reader.get_data(reader.read(label))[0].ravel(order="K")
    except ValueError as error:
        return Found(error=str(error))
    # Label maps are made of runs of equal voxels: their first voxels show all values, and are few to sort.
    starts = np.append(0, np.flatnonzero(voxels[1:] != voxels[:-1]) + 1)
    values = np.unique(voxels[starts])
    fractions = [f"{value:g}" for value in values if value != np.rint(value)]
    if fractions:
        return Found(error=f"{image} and {label}: values that are no whole numbers, {shorten(fractions, 5)}")
    whole = [int(value) for value in values if value != 0]
    unknown = [value for value in whole if value not in (UNNAMED_VALUES if names is None else names)]
    if unknown:
        return Found(error=f"{image} and {label}: values without a name, {shorten(unknown, 5)}")
    return Found(tuple(whole))
