"""Shape and spacing of a volume from its header: quick, since no voxel is read."""

from __future__ import annotations

from math import prod
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes

from dissect_monai.common import InputError
from dissect_monai.data.readers import explained, image_format, ras_affine, series_files, simpleitk


class VolumeHeader(NamedTuple):
    """What the header of a volume says."""

    shape: tuple[int, int, int]  # voxels from left to right, posterior to anterior, inferior to superior
    spacing: tuple[float, float, float]  # mm, in the same order
    channels: int  # values of a voxel


class Grid(NamedTuple):
    """Where the voxels of a volume lie, along the axes of its file."""

    shape: tuple[int, ...]
    affine: np.ndarray  # (4, 4), to mm in RAS
    channels: int = 1


def read_header(path: str | PathLike[str]) -> VolumeHeader:
    """Read the header of a NIfTI, MHA, NRRD or DICOM volume; arguments and errors are those of `read_grid`."""
    shape, affine, channels = read_grid(path)
    order, spacing = np.argsort(nibabel.io_orientation(affine)[:, 0]), voxel_sizes(affine)
    x, y, z = ((int(shape[axis]), float(spacing[axis])) for axis in order)
    return VolumeHeader((x[0], y[0], z[0]), (x[1], y[1], z[1]), channels)


def read_grid(path: str | PathLike[str]) -> Grid:
    """Read the grid of a NIfTI, MHA, NRRD or DICOM volume from its header.

    Args:
        path: file, or folder of one DICOM series.

    Raises:
        ValueError: if the header cannot be read, or is not that of one volume with a spacing; names the file.
        ImportError: if SimpleITK is needed and not installed.
    """
    path = Path(path)
    kind = "series" if path.is_dir() else image_format(path)
    if kind not in ("series", "dicom", "itk", "nifti"):
        raise InputError(f"{path} must be a volume (NIfTI, MHA, NRRD, DICOM): remove it from the data list.")
    with explained(path):
        header = _nifti(path) if kind == "nifti" else _series(path) if kind == "series" else _itk(path)
    shape, affine, _ = header
    # More axes of length 1 are read from NIfTI alone.
    if len(shape) < 3 or prod(shape[3:]) != 1 or (len(shape) > 3 and kind != "nifti"):
        raise InputError(
            f"{path} must be one 3-D volume, got shape {shape}: write every frame or channel to a file of its own, "
            "or remove it from the data list."
        )
    if not np.isfinite(affine).all() or np.isnan(nibabel.io_orientation(affine)).any():
        raise InputError(f"{path} must have a spacing along three axes, got the affine {affine.tolist()}: repair it.")
    return header._replace(shape=tuple(shape[:3]))


def _nifti(path: Path) -> Grid:
    image = nibabel.load(path)
    colours = image.get_data_dtype().fields
    return Grid(image.shape, image.affine, 1 if colours is None else len(colours))


def _itk(path: Path | str) -> Grid:
    image = _information(path)
    # Frames of a fourth axis have no part in the orientation, and are refused anyway.
    affine = ras_affine(image) if image.GetDimension() == 3 else np.eye(4)
    return Grid(image.GetSize(), affine, image.GetNumberOfComponents())


def _series(folder: Path) -> Grid:
    files = series_files(folder)
    first = _itk(files[0])
    if len(files) == 1:
        return first
    affine = first.affine.copy()
    # The slices are as far apart as they say, whatever their thickness.
    affine[:3, 2] = (_itk(files[-1]).affine[:3, 3] - affine[:3, 3]) / (len(files) - 1)
    return first._replace(shape=(*first.shape[:2], len(files)), affine=affine)


def _information(path: Path | str) -> Any:
    reader = simpleitk(Path(path)).ImageFileReader()
    reader.SetFileName(fspath(path))
    reader.ReadImageInformation()
    return reader
