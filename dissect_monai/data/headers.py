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


class _Header(NamedTuple):
    """The same in the file's own axes, of which there may be more than three."""

    shape: tuple[int, ...]
    affine: np.ndarray  # (4, 4), to mm in RAS
    channels: int


def read_header(path: str | PathLike[str]) -> VolumeHeader:
    """Read the header of a NIfTI, MHA, NRRD or DICOM volume.

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
    shape, affine, channels = header
    if len(shape) < 3 or prod(shape[3:]) != 1:
        raise InputError(
            f"{path} must be one 3-D volume, got shape {shape}: write every frame or channel to a file of its own, "
            "or remove it from the data list."
        )
    # Axis of the file that runs along each axis of the patient; NaN where the affine lacks one.
    axes = nibabel.io_orientation(affine)[:, 0] if np.isfinite(affine).all() else np.full(3, np.nan)
    if np.isnan(axes).any():
        raise InputError(f"{path} must have a spacing along three axes, got the affine {affine.tolist()}: repair it.")
    order, spacing = np.argsort(axes), voxel_sizes(affine)
    x, y, z = ((int(shape[axis]), float(spacing[axis])) for axis in order)
    return VolumeHeader((x[0], y[0], z[0]), (x[1], y[1], z[1]), channels)


def _nifti(path: Path) -> _Header:
    image = nibabel.load(path)
    colours = image.get_data_dtype().fields
    return _Header(image.shape, image.affine, 1 if colours is None else len(colours))


def _itk(path: Path | str) -> _Header:
    image = _information(path)
    # Frames of a fourth axis have no part in the orientation, and are refused anyway.
    affine = ras_affine(image) if image.GetDimension() == 3 else np.eye(4)
    return _Header(image.GetSize(), affine, image.GetNumberOfComponents())


def _series(folder: Path) -> _Header:
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
