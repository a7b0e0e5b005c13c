"""One MONAI image reader for X-rays and volumes (pillow, SimpleITK and nibabel), and headers without voxels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from monai.data import ImageReader, NibabelReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple, optional_import
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from PIL import Image

from dissect_monai.common import InputError

sitk, _ = optional_import("SimpleITK")  # of 50 MB, which pictures and NIfTI do not need
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
VOLUME_SUFFIXES = DICOM_SUFFIXES + ITK_SUFFIXES + NIFTI_SUFFIXES
# ITU-R 601, as pillow's mode "L".
LUMINANCE = (0.299, 0.587, 0.114)
# What SimpleITK says first: its function, source file and line, then its object and where that lies in memory.
ITK_PREFIX = re.compile(r"(.*ERROR: )?(\w+ ?\(0x[0-9a-f]+\): )?", re.DOTALL)


def image_format(path: str | PathLike[str]) -> str | None:
    """Format by file name: "picture" (pillow), "dicom", "itk" (MHA, MHD, NRRD), "nifti", or None for anything else.

    A file without suffix, or with a number for one as in a DICOM UID, is opened to see whether it is DICOM.
    """
    name = Path(path).name.lower()
    kinds = {"picture": PICTURE_SUFFIXES, "dicom": DICOM_SUFFIXES, "itk": ITK_SUFFIXES, "nifti": NIFTI_SUFFIXES}
    for kind, suffixes in kinds.items():
        if name.endswith(suffixes):
            return kind
    suffix = Path(name).suffix[1:]
    # A DICOMDIR is an index in DICOM's own format: it holds no pixels.
    if (suffix and not suffix.isdigit()) or name == "dicomdir" or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return "dicom" if file.read(132)[128:] == b"DICM" else None


@contextmanager
def explained(path: str | PathLike[str]) -> Iterator[None]:
    """Turn whatever a decoder raises into one `ValueError` that names the file."""
    try:
        yield
    except ImportError:
        raise  # no fault of the image
    except Exception as error:  # decoders raise anything: pillow a SyntaxError, nibabel errors of its own
        reason = ITK_PREFIX.sub("", str(error), count=1).strip() or type(error).__name__
        reason = reason.splitlines()[0].rstrip(".:").replace(f" '{fspath(path)}'", "")  # it is named already
        raise InputError(
            f"{fspath(path)} must be an intact image of the format that its name says, got: {reason}. "
            "Replace it or remove it from the data list."
        ) from error


class ImageFileReader(ImageReader):
    """Reads PNG, JPEG, TIFF, BMP, DICOM, MHA/MHD, NRRD and NIfTI for MONAI's `LoadImage`.

    Arrays are (x, y) or (x, y, z), whatever the format, so that a PNG and a DICOM of one X-ray agree; volumes carry
    the RAS affine of the same volume as NIfTI. Colour becomes luminance, 16-bit pictures keep their values, the first
    of several pages is read. A folder is read as one DICOM series. ITK applies the slope and intercept of DICOM and
    inverts MONOCHROME1 within its stored range. A single DICOM file is clipped to its first window (centre and width),
    as a viewer does; a series never is, since its values (HU) are quantities.

    Args:
        spatial_dims: 2 or 3: drop trailing axes of length 1 down to this number, and refuse other images; None takes
            images as they are.

    Raises:
        ValueError: if a file is corrupt or has another number of spatial dimensions; names the file.
    """

    def __init__(self, spatial_dims: int | None = None) -> None:
        self.spatial_dims = spatial_dims

    def verify_suffix(self, filename: Sequence[str | PathLike[str]] | str | PathLike[str]) -> bool:
        """Always true; MONAI asks it of readers that it chooses itself."""
        return True

    def read(self, data: Sequence[str | PathLike[str]] | str | PathLike[str], **kwargs: Any) -> Path:
        """The path of a file or series folder, which `get_data` decodes: `LoadImage` would hide an error of this."""
        (path,) = ensure_tuple(data)
        return Path(path)

    def get_data(self, img: Path) -> tuple[NDArray[Any], dict[str, Any]]:
        """The array and MONAI's metadata."""
        if not img.exists():
            raise FileNotFoundError(f"{img} does not exist. Correct the path or remove it from the data list.")
        with explained(img):
            array, meta = self._decode(img)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{img} must hold finite values, got NaN or infinity. Repair or remove it.")
        has_channels = array.ndim > len(meta[MetaKeys.SPATIAL_SHAPE])
        if self.spatial_dims is None or has_channels:
            return array, meta
        while array.ndim > self.spatial_dims and array.shape[-1] == 1:
            array = array[..., 0]
        if array.ndim != self.spatial_dims:
            raise InputError(f"{img} must have `spatial_dims` = {self.spatial_dims} axes, got shape {array.shape}.")
        return array, {**meta, MetaKeys.SPATIAL_SHAPE: np.array(array.shape)}

    def _decode(self, path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
        if path.is_dir():
            files = _series_files(path)
            return _read_dicom(files[0]) if len(files) == 1 else _from_itk(sitk.ReadImage(files))
        kind = image_format(path)
        if kind == "picture":
            return _with_meta(_read_picture(path))
        if kind == "nifti":
            reader = NibabelReader(squeeze_non_spatial_dims=True)
            return reader.get_data(reader.read(path))
        return _read_dicom(fspath(path)) if kind == "dicom" else _from_itk(sitk.ReadImage(fspath(path)))


def _read_picture(path: Path) -> NDArray[Any]:
    with Image.open(path) as image:
        # Pillow would clip 16-bit and float pictures to 255 on converting them to "L".
        is_grey = image.mode in ("L", "I", "F") or image.mode.startswith("I;")
        array = np.asarray(image if is_grey else image.convert("L"))
    return array.astype(array.dtype.newbyteorder("="), copy=False).T


def _series_files(folder: Path) -> list[str]:
    """Files of the one DICOM series in a folder, in the order of its slices."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(fspath(folder))
    if len(series) != 1:
        raise InputError(f"the folder must hold one DICOM series, got {len(series)}; move each to its own folder.")
    return list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(fspath(folder), series[0]))


def _read_dicom(path: str) -> tuple[NDArray[Any], dict[str, Any]]:
    image = sitk.ReadImage(path, imageIO="GDCMImageIO")
    array, meta = _from_itk(image)
    if array.ndim == 3 and array.shape[-1] == 1:
        array, meta = _with_meta(array[..., 0])
    center, width = _tag(image, "0028|1050"), _tag(image, "0028|1051")
    if center is not None and width is not None and width >= 1:
        # DICOM PS3.3 C.11.2.1.2.1, the linear function: the window is width - 1 wide, about center - 0.5.
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
        if image.HasMetaDataKey("0028|0004") and image.GetMetaData("0028|0004").strip() == "MONOCHROME1":
            # ITK has inverted the values, but the window speaks of those in the file.
            low, high = _inversion_sum(image) - high, _inversion_sum(image) - low
        array = array.clip(low, high)
    return array, meta


def _inversion_sum(image: Any) -> float:
    """Lowest plus highest value of the stored bits, from which ITK subtracts to invert."""
    bits, signed = int(_tag(image, "0028|0101") or 8), int(_tag(image, "0028|0103") or 0)
    slope, intercept = _tag(image, "0028|1053"), _tag(image, "0028|1052") or 0.0
    return (-1 if signed else 2**bits - 1) * (1.0 if slope is None else slope) + 2 * intercept


def _tag(image: Any, key: str) -> float | None:
    """First number of a DICOM tag; None if it is missing or empty."""
    first = image.GetMetaData(key).split("\\")[0].strip() if image.HasMetaDataKey(key) else ""
    return float(first) if first else None


def _from_itk(image: Any) -> tuple[NDArray[Any], dict[str, Any]]:
    array = sitk.GetArrayFromImage(image)
    components = image.GetNumberOfComponentsPerPixel()
    if components in (3, 4) and array.dtype == np.uint8:
        array = np.rint(array[..., :3] @ np.array(LUMINANCE)).astype(np.uint8)
    elif components != 1:
        raise InputError(f"it must be grey or 8-bit RGB, got {components} components of {array.dtype} per pixel.")
    if array.ndim not in (2, 3):
        raise InputError(f"it must have 2 or 3 dimensions, got shape {array.shape[::-1]}.")
    return _with_meta(array.T, ras_affine(image) if array.ndim == 3 else None)


def ras_affine(image: Any) -> NDArray[Any]:
    """Affine (4, 4) from voxels to mm in RAS, of a 3-D SimpleITK image or of a reader that has read its header."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    # ITK's world is LPS, NIfTI's and MONAI's is RAS.
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _with_meta(array: NDArray[Any], affine: NDArray[Any] | None = None) -> tuple[NDArray[Any], dict[str, Any]]:
    meta = {MetaKeys.SPATIAL_SHAPE: np.array(array.shape), MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan")}
    if affine is not None:
        meta.update({MetaKeys.AFFINE: affine, MetaKeys.ORIGINAL_AFFINE: affine.copy(), MetaKeys.SPACE: SpaceKeys.RAS})
    return array, meta


class VolumeHeader(NamedTuple):
    """What the header of a volume says."""

    shape: tuple[int, int, int]  # voxels from left to right, posterior to anterior, inferior to superior
    spacing: tuple[float, float, float]  # mm, in the same order


class Grid(NamedTuple):
    """Where the voxels of a volume lie, along the axes of its file."""

    shape: tuple[int, ...]
    affine: NDArray[Any]  # (4, 4), to mm in RAS
    channels: int = 1  # values of a voxel


def read_header(path: str | PathLike[str]) -> VolumeHeader:
    """Read the header of a volume, see `read_grid`."""
    shape, affine, _ = read_grid(path)
    x, y, z = np.argsort(nibabel.io_orientation(affine)[:, 0])
    spacing = voxel_sizes(affine).tolist()
    return VolumeHeader((shape[x], shape[y], shape[z]), (spacing[x], spacing[y], spacing[z]))


def read_grid(path: str | PathLike[str]) -> Grid:
    """Read the grid of a NIfTI, MHA or NRRD volume, or of a DICOM series in a folder, from its header.

    A header that cannot be read, or is not that of one volume with a spacing, is a `ValueError` that names the file.
    """
    path = Path(path)
    kind = "series" if path.is_dir() else image_format(path)
    readers = {"series": _series_grid, "dicom": _itk_grid, "itk": _itk_grid, "nifti": _nifti_grid}
    if kind not in readers:
        raise InputError(f"{path} must be a volume (NIfTI, MHA, NRRD, DICOM): remove it from the data list.")
    with explained(path):
        grid = readers[kind](path)
    # More axes of length 1 are read from NIfTI alone.
    if len(grid.shape) < 3 or prod(grid.shape[3:]) != 1 or (len(grid.shape) > 3 and kind != "nifti"):
        raise InputError(
            f"{path} must be one 3-D volume, got shape {grid.shape}: write every frame or channel to its own file, "
            "or remove it from the data list."
        )
    affine = grid.affine
    if not np.isfinite(affine).all() or np.isnan(nibabel.io_orientation(affine)).any():
        raise InputError(f"{path} must have a spacing along three axes, got the affine {affine.tolist()}: repair it.")
    return grid._replace(shape=tuple(map(int, grid.shape[:3])))


def _nifti_grid(path: Path) -> Grid:
    image = nibabel.load(path)
    colours = image.get_data_dtype().fields
    return Grid(image.shape, image.affine, 1 if colours is None else len(colours))


def _itk_grid(path: str | Path) -> Grid:
    reader = sitk.ImageFileReader()
    reader.SetFileName(fspath(path))
    reader.ReadImageInformation()
    # Frames along a fourth axis have no orientation, and are refused anyway.
    affine = ras_affine(reader) if reader.GetDimension() == 3 else np.eye(4)
    return Grid(reader.GetSize(), affine, reader.GetNumberOfComponents())


def _series_grid(folder: Path) -> Grid:
    files = _series_files(folder)
    first = _itk_grid(files[0])
    if len(files) == 1:
        return first
    affine = first.affine.copy()
    # The distance between slices follows from their positions, whatever their thickness.
    affine[:3, 2] = (_itk_grid(files[-1]).affine[:3, 3] - affine[:3, 3]) / (len(files) - 1)
    return first._replace(shape=(*first.shape[:2], len(files)), affine=affine)
