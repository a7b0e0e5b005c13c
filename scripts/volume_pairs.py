"""Volumes and their label maps: found, matched by name, and compared in grid and values."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from os import fspath
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from dissect_monai.data.datalists import VOLUME_SUFFIXES
from dissect_monai.data.headers import read_header
from dissect_monai.data.readers import ImageFileReader, explained, image_format, ras_affine, series_files, simpleitk

# Corners of two grids may lie this share of the smallest spacing apart. Formats round an affine to far less, while the
# least real mistake, origins that differ by half a voxel, is far more.
TOLERANCE = 0.1
# Without names, more is taken for an image: label maps are written as bytes.
UNNAMED_VALUES = range(256)


class Grid(NamedTuple):
    """Where the voxels of a volume lie, along the axes of its file."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # (4, 4), to mm in RAS


class Found(NamedTuple):
    """What a label map holds."""

    values: tuple[int, ...] = ()  # without background
    error: str | None = None


def find_volumes(folder: Path, without: Path | None = None) -> dict[str, Path]:
    """Volumes in a folder and below, sorted by name, which is their path in it without suffix.

    A folder with DICOM slices is one volume. Links are followed; what is hidden, such as the ._ files of archives that
    were made on a Mac, is left out.

    Args:
        folder: where to look.
        without: a folder in it to leave out.

    Raises:
        FileNotFoundError: if there are no volumes.
        ValueError: if two have the same name.
    """
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != without]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        formats = {path: image_format(path) for path in files}
        paths += [path for path in files if formats[path] in ("itk", "nifti")]
        if "dicom" in formats.values():
            paths.append(Path(parent))
    if not paths:
        raise FileNotFoundError(
            f"{folder} must be a folder with volumes (NIfTI, MHA, NRRD, folders of DICOM slices), got none. "
            "Correct the path."
        )
    volumes: dict[str, Path] = {}
    for path in sorted(paths):
        other = volumes.setdefault(volume_name(path, folder), path)
        if other != path:
            raise ValueError(f"volumes must have different names, got {other} and {path}. Remove or rename one.")
    return volumes


def volume_name(path: Path, folder: Path) -> str:
    """The path of a volume in a folder, without suffix; the name of the folder if it is a DICOM series itself."""
    if path == folder:
        return folder.name
    name = path.relative_to(folder).as_posix()
    ends = () if path.is_dir() else VOLUME_SUFFIXES
    return next((name[: -len(end)] for end in ends if name.lower().endswith(end)), name)


def without_channels(images: Mapping[str, Path], labels: Collection[str]) -> dict[str, Path]:
    """Images by the name of their label map: that of nnU-Net's case_0000 is case.

    Raises:
        ValueError: if a case has several channels.
    """
    named: dict[str, Path] = {}
    for name, path in images.items():
        case = re.sub(r"_\d{4}$", "", name)
        other = named.setdefault(case if name not in labels and case in labels else name, path)
        if other != path:
            raise ValueError(
                f"a label map must have one image, got {other} and {path}. "
                "If they are channels, move each kind to a folder of its own."
            )
    return named


def read_grid(path: Path) -> Grid:
    """The grid of a NIfTI, MHA or NRRD file or of a folder with a DICOM series, from its header.

    Raises:
        ValueError: if it cannot be read, or is not one volume with one value a voxel.
    """
    channels = read_header(path).channels
    if channels != 1:
        raise ValueError(
            f"{path} must have one value a voxel, got {channels}. Write each channel to a file of its own."
        )
    with explained(path):
        if not path.is_dir() and image_format(path) == "nifti":
            image = nibabel.load(path)
            return Grid(image.shape[:3], image.affine)
        files = series_files(path) if path.is_dir() else [fspath(path)]
        reader = simpleitk(path).ImageFileReader()
        corners = []
        for file in (files[-1], files[0]):
            reader.SetFileName(file)
            reader.ReadImageInformation()
            if reader.GetDimension() != 3:
                raise ValueError(f"it must have 3 dimensions, got {reader.GetDimension()}")
            corners.append(ras_affine(reader))
        last, affine = corners
        shape = reader.GetSize()
        if len(files) > 1:
            # The slices are as far apart as they say, whatever their thickness.
            affine[:3, 2] = (last[:3, 3] - affine[:3, 3]) / (len(files) - 1)
            shape = (*shape[:2], len(files))
        return Grid(shape, affine)


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


def check_grids(image: Path, label: Path | None) -> str | None:
    """Why an image, or it and its label map, cannot be used, as their headers say; None if they can."""
    try:
        grid = read_grid(image)
        differs = difference(grid, read_grid(label)) if label else None
    except ValueError as error:
        return str(error)
    return f"{image} and {label}: {differs}" if differs else None


def check_values(image: Path, label: Path, names: Collection[int]) -> Found:
    """Read which values the voxels of a label map have; they must be whole numbers, and 0 or in `names`."""
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
        return Found(error=f"{image} and {label}: values that are no whole numbers, {some(fractions)}")
    whole = [int(value) for value in values if value != 0]
    unknown = [str(value) for value in whole if value not in names]
    if unknown:
        return Found(error=f"{image} and {label}: values without a name, {some(unknown)}")
    return Found(tuple(whole))


def some(texts: list[str]) -> str:
    """The first of many, and how many more there are."""
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")
