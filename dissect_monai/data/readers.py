"""One MONAI image reader for X-rays and volumes (pillow, SimpleITK and nibabel), and headers without voxels."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from PIL import Image, ImageOps

from dissect_monai.common import PICTURE, InputError
from dissect_monai.data import dicom
from dissect_monai.writing import temporary_folder

sitk, _ = optional_import("SimpleITK")  # of 50 MB, which pictures and NIfTI do not need
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
VOLUME_SUFFIXES = dicom.DICOM_SUFFIXES + ITK_SUFFIXES + NIFTI_SUFFIXES
IMAGE_SUFFIX = re.compile(f"({'|'.join(map(re.escape, PICTURE_SUFFIXES + VOLUME_SUFFIXES))})$", re.IGNORECASE)
_UNITS = {1: 1000.0, 3: 0.001}  # mm in the metres and microns of a NIfTI, by their code
_TURNED = 274  # Exif's orientation; over 4, width and height change places
# ITU-R 601, as pillow's mode "L".
LUMINANCE = (0.299, 0.587, 0.114)
_ZERO_SPACING = re.compile(rb"(\x18\0\x88\0(?:DS)?[\x02-\x10]\0(?:\0\0)?)([-+0. ]+)")
_UNDECODED = "Failed to change to Implicit Transfer Syntax"  # what GDCM says of pixels that it cannot decompress
# What SimpleITK says first: its function, source file and line, then its object and where that lies in memory.
ITK_PREFIX = re.compile(r"(.*ERROR: )?(\w+ ?\(0x[0-9a-f]+\): )?", re.DOTALL)


def image_format(path: str | PathLike[str]) -> str | None:
    """Format by file name: "picture" (pillow), "dicom", "itk" (MHA, MHD, NRRD), "nifti", or None for anything else.

    A file without suffix, or with a number for one as in a DICOM UID, is opened to see whether it is DICOM.
    """
    name = Path(path).name.lower()
    kinds = {"picture": PICTURE_SUFFIXES, "dicom": dicom.DICOM_SUFFIXES, "itk": ITK_SUFFIXES, "nifti": NIFTI_SUFFIXES}
    for kind, suffixes in kinds.items():
        if name.endswith(suffixes):
            return kind
    suffix = Path(name).suffix[1:]
    # A DICOMDIR is an index in DICOM's own format: it holds no pixels.
    if (suffix and not suffix.isdigit()) or name == "dicomdir" or not os.path.isfile(path):
        return None
    return "dicom" if dicom.is_dicom(path) else None


def refuse_odd_file(path: str | PathLike[str]) -> None:
    """Refuse what hangs or fills the memory once opened, also in a folder: pipes, sockets, devices, sparse GiB."""
    path = Path(path)
    for each in path.iterdir() if path.is_dir() else [path, *pixel_files(path)]:
        if not each.exists():
            continue
        status = os.stat(each)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise InputError(f"{each} must be a file, got a pipe, a socket or a device: remove it.")
        size, stored = status.st_size, 512 * getattr(status, "st_blocks", status.st_size)
        if size > 2**31 and stored < size / 100 and (stored or _is_hole(each)):
            raise InputError(
                f"{each} must be stored whole, got {size} bytes that are nearly all a hole: copy it again."
            )


def pixel_files(path: Path) -> list[Path]:
    """The files beside a header of MHD or NHDR that may hold its pixels."""
    apart = (".raw", ".zraw", ".raw.gz") if path.suffix.lower() in (".mhd", ".nhdr") else ()
    return [each for each in map(path.with_suffix, apart) if each.exists()]


def _is_hole(path: Path) -> bool:
    """Whether nothing of a file is stored; a mount that counts no blocks does not say so."""
    with open(path, "rb") as file:
        try:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError:
            return True
    return False


@contextmanager
def explained(path: str | PathLike[str]) -> Iterator[None]:
    """Turn whatever a decoder raises into one `ValueError` that names the file."""
    try:
        yield
    except (InputError, ImportError):  # the latter is no fault of the image
        raise
    except Exception as error:  # decoders raise anything: pillow a SyntaxError, nibabel errors of its own
        reason = ITK_PREFIX.sub("", str(error), count=1).strip() or type(error).__name__
        reason = reason.splitlines()[0].rstrip(".:").replace(f" '{fspath(path)}'", "")  # it is named already
        reason = reason.replace(_UNDECODED, "pixels that cannot be decompressed")
        raise InputError(
            f"{fspath(path)} must be an intact image of the format that its name says, got: {reason}. "
            "Replace it or remove it from the data list."
        ) from error


class ImageFileReader(ImageReader):
    """Reads PNG, JPEG, TIFF, BMP, DICOM, MHA/MHD, NRRD and NIfTI for MONAI's `LoadImage`.

    Arrays are (x, y) or (x, y, z), whatever the format, so that a PNG and a DICOM of one X-ray agree; volumes carry
    the RAS affine of the same volume as NIfTI. Colour becomes luminance, 16-bit pictures keep their values, the first
    of several pages is read, and pictures are turned as Exif says. A folder is read as one DICOM series, whose files
    are checked one by one, see `read_volume`; its values, after slope and intercept, are quantities such as HU. A
    single picture in a DICOM file is what a viewer shows, see `_displayed`.

    Args:
        spatial_dims: 2 or 3: drop trailing axes of length 1 down to this number, and refuse other images; None takes
            images as they are. With 3, a DICOM file of one slice stands for the series in its folder.
        channels: with 3, reads pictures, too, as volumes of one slice (x, y, 1), of luminance (1) or RGB (3, grey
            repeated), whose affine has the pixel spacing of DICOM, or 1 where there is none. None refuses pictures.

    Raises:
        ValueError: if a file is corrupt, has another number of spatial dimensions or, with 2, one value everywhere;
            names the file.
    """

    def __init__(self, spatial_dims: int | None = None, channels: int | None = None) -> None:
        self.spatial_dims, self.channels = spatial_dims, channels

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
        refuse_odd_file(img)
        if not img.is_dir() and image_format(img) is None:
            suffixes = " ".join(PICTURE_SUFFIXES + VOLUME_SUFFIXES)
            raise InputError(f"{img} must be an image ({suffixes}): rename it, or remove it from the data list.")
        with explained(img):
            array, meta = self._decode(img)
        if array.dtype.kind not in "biuf":
            kind = array.dtype if array.dtype.names is None else f"colour ({'/'.join(array.dtype.names)})"
            raise InputError(f"{img} must hold one real number a voxel, got {kind}: convert it, or remove it.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{img} must hold finite values, got NaN or infinity. Repair or remove it.")
        if self.spatial_dims != 2 and MetaKeys.AFFINE in meta:
            _with_spacing(img, np.asarray(meta[MetaKeys.AFFINE]))
        if PICTURE in meta and array.min() == array.max():
            raise InputError(f"{img} must show something, got the value {array.flat[0]:g} everywhere. Remove it.")
        has_channels = array.ndim > len(meta[MetaKeys.SPATIAL_SHAPE])
        if self.spatial_dims is None or has_channels:
            return array, meta
        if self.channels and array.ndim == 2:
            array = array[..., None]
        while array.ndim > self.spatial_dims and array.shape[-1] == 1:
            array = array[..., 0]
        if array.ndim != self.spatial_dims:
            raise InputError(f"{img} must have `spatial_dims` = {self.spatial_dims} axes, got shape {array.shape}.")
        if self.spatial_dims == 2 and array.min() == array.max():
            raise InputError(f"{img} must show something, got the value {array.flat[0]:g} everywhere. Remove it.")
        return array, {**meta, MetaKeys.SPATIAL_SHAPE: np.array(array.shape)}

    def _decode(self, path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
        kind = "dicom" if path.is_dir() else image_format(path)
        if kind == "dicom":
            alone = path.is_file() and self.spatial_dims != 3
            series = dicom.Series([path], [dicom.read_tags(path)]) if alone else dicom.series_of(path)
            if self.channels and path.is_file() and series.is_picture:
                tags = series.tags[series.files.index(path)]
                return _as_slice(_read_film(path, tags, self.channels == 3), _film_spacing(tags), self.channels)
            if not series.is_volume and self.spatial_dims != 3:
                return _with_meta(_read_film(series.files[0], series.tags[0]))
            if self.spatial_dims == 2:
                raise InputError(f"{path} must have `spatial_dims` = 2 axes, got several slices or frames.")
            return _read_slices(path, series)
        if kind == "picture":
            picture = _read_picture(path, self.channels == 3)
            return _as_slice(picture, (1.0, 1.0), self.channels) if self.channels else _with_meta(picture)
        return _read_nifti(path) if kind == "nifti" else _from_itk(sitk.ReadImage(fspath(path)))


def _as_slice(array: NDArray[Any], spacing: tuple[float, float], channels: int) -> tuple[NDArray[Any], dict[str, Any]]:
    """A picture (x, y) or (x, y, 3) as a volume of one slice, whose channels come last."""
    if array.ndim == 2 and channels == 3:
        array = np.stack([array] * 3, -1)
    volume, meta = _with_meta(array[:, :, None], np.diag([*spacing, 1.0, 1.0]))
    meta |= {MetaKeys.SPATIAL_SHAPE: np.array(volume.shape[:3]), PICTURE: 255 if array.dtype == np.uint8 else 0}
    return volume, {**meta, MetaKeys.ORIGINAL_CHANNEL_DIM: -1} if channels == 3 else meta


def _read_picture(path: Path, colour: bool = False) -> NDArray[Any]:
    with Image.open(path) as image:
        # Pillow inverts white-is-zero of 8 bits alone (tag 262 of TIFF).
        negative = getattr(image, "tag_v2", {}).get(262) == 0 and image.mode not in ("L", "1")
        if image.format == "TIFF":
            image.filename = ""  # pillow would map it into memory, and scramble one that it turns by a quarter
        upright = ImageOps.exif_transpose(image)
        # Pillow would clip 16-bit and float pictures to 255 on converting them to "L".
        is_grey = upright.mode in ("L", "I", "F") or upright.mode.startswith("I;")
        array = np.asarray(upright if is_grey else upright.convert("RGB" if colour else "L"))
    if negative:
        array = np.iinfo(array.dtype).max - array if array.dtype.kind == "u" else -array
    return array.astype(array.dtype.newbyteorder("="), copy=False).swapaxes(0, 1)


def _read_slices(path: Path, series: dicom.Series) -> tuple[NDArray[Any], dict[str, Any]]:
    """A DICOM volume, see `read_volume`. Its values are quantities, which no window clips."""
    volume = dicom.read_volume(path, series)
    with temporary_folder() as folder:
        files = [fspath(file) for file in volume.files]
        if any(dicom.number(tags, "SpacingBetweenSlices") == 0 for tags in volume.slices):
            files = [_repaired(file, Path(folder, f"{index}.dcm")) for index, file in enumerate(volume.files)]
        # One by one: of a series, ITK takes the dtype of the first slice, and warns of jitter that we allow.
        slices = [_from_itk(sitk.ReadImage(file, imageIO="GDCMImageIO"))[0] for file in files]
    uninverted = [_uninverted(each, tags)[0].T for each, tags in zip(slices, volume.slices, strict=False)]
    array = np.concatenate(uninverted).T
    if volume.frames != sorted(volume.frames):
        array = array[..., volume.frames]
    return _with_meta(array, volume.affine)


def _repaired(path: Path, copy: Path) -> str:
    """A copy of a DICOM file whose SpacingBetweenSlices of 0, which ITK refuses, is 1; nobody reads it."""
    content = _ZERO_SPACING.sub(lambda found: found[1] + b"1".ljust(len(found[2])), path.read_bytes(), count=1)
    copy.write_bytes(content)
    return fspath(copy)


def _read_film(path: Path, tags: dicom.Tags, colour: bool = False) -> NDArray[Any]:
    """A picture in one DICOM file, as a viewer shows it: see `_displayed`."""
    dicom.refuse_unreadable(path, tags)
    array, _ = _from_itk(sitk.ReadImage(fspath(path), imageIO="GDCMImageIO"), colour)
    array = array[:, :, 0] if array.ndim > 2 and array.shape[2] == 1 else array
    return _displayed(array, tags) if tags.get("SamplesPerPixel", 1) == 1 and array.ndim == 2 else array


def _film_spacing(tags: dicom.Tags) -> tuple[float, float]:
    """In mm along x and y; 1 if there is none."""
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        found = dicom.numbers(tags, name, 2)
        if found is not None and found.min() > 0:
            return float(found[1]), float(found[0])
    return 1.0, 1.0


def _displayed(array: NDArray[Any], tags: dicom.Tags) -> NDArray[Any]:
    """What a viewer makes of values that ITK has rescaled, and inverted if they are MONOCHROME1.

    In the order of DICOM PS3.4 N.2: the table of the Modality LUT, which takes the place of slope and intercept; the
    window, or else the table of the VOI LUT; PresentationLUTShape. Padding becomes the darkest of the other values.
    """
    slope, intercept = _scale(tags)
    values, total = _uninverted(array, tags)
    inverted, signed = values is not array, bool(tags.get("PixelRepresentation"))
    padding = np.zeros(array.shape, dtype=bool)
    if tags.get("PixelPaddingValue") is not None:
        padding = _is_padding((values - intercept) / (slope or 1.0), tags, signed)
    shown = values
    if table := _table(tags, "ModalityLUTSequence", signed):
        shown, total = table(shown)
    window = _window(shown, tags, padding)
    if window is not None:
        shown = window
    elif table := _table(tags, "VOILUTSequence", signed):
        shown, total = table(shown)
    if inverted or tags.get("PresentationLUTShape") == "INVERSE":
        shown = array if inverted and shown is values else total - shown
    if padding.any() and not padding.all():
        shown = np.where(padding, shown[~padding].min(), shown)
    return shown


def _scale(tags: dicom.Tags) -> tuple[float, float]:
    slope, intercept = (dicom.number(tags, name) for name in ("RescaleSlope", "RescaleIntercept"))
    return 1.0 if slope is None else slope, intercept or 0.0


def _uninverted(array: NDArray[Any], tags: dicom.Tags) -> tuple[NDArray[Any], float]:
    """The values that a file means, without ITK's inversion of MONOCHROME1, and what it has subtracted them from."""
    slope, intercept = _scale(tags)
    # Lowest plus highest value of the stored bits.
    total = (-1 if tags.get("PixelRepresentation") else 2 ** (tags.get("BitsStored") or 8) - 1) * slope + 2 * intercept
    return (total - array if tags.get("PhotometricInterpretation") == "MONOCHROME1" else array), total


def _is_padding(stored: NDArray[Any], tags: dicom.Tags, signed: bool) -> NDArray[np.bool_]:
    value, limit = tags["PixelPaddingValue"], tags.get("PixelPaddingRangeLimit")
    ends = [end - 2**16 if signed and end >= 2**15 else end for end in (value, value if limit is None else limit)]
    return (stored > min(ends) - 0.5) & (stored < max(ends) + 0.5)


def _table(tags: dicom.Tags, name: str, signed: bool) -> Callable[[NDArray[Any]], tuple[NDArray[Any], float]] | None:
    """The table of a LUT sequence as a function, which gives what it makes of values, and its lowest plus highest."""
    item = (tags.get(name) or [{}])[0]
    descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
    if descriptor is None or data is None or len(descriptor) < 3:
        return None
    count, first, bits = int(descriptor[0]) or 2**16, int(descriptor[1]), int(descriptor[2])
    first -= 2**16 if signed and first >= 2**15 else 0
    if len(data) < count:  # two entries in a word
        data = data.view(np.uint8)
    if len(data) < count:
        raise ValueError(f"its {name} must have {count} entries, got {len(data)}")
    return lambda values: (data[:count][np.clip(np.rint(values) - first, 0, count - 1).astype(int)], 2**bits - 1)


def _window(values: NDArray[Any], tags: dicom.Tags, padding: NDArray[np.bool_]) -> NDArray[Any] | None:
    """Values clipped to the first window; None if there is none, it is no number, or it leaves but one value."""
    center, width = dicom.number(tags, "WindowCenter"), dicom.number(tags, "WindowWidth")
    function = tags.get("VOILUTFunction") or "LINEAR"
    if center is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    # DICOM PS3.3 C.11.2.1.2.1: the linear window is width - 1 wide, about center - 0.5; C.11.2.1.3 has the others.
    shift = 0.5 if function == "LINEAR" else 0.0
    middle, half = center - shift, (width - 2 * shift) / 2
    low, high = middle - half, middle + half
    if function == "SIGMOID":
        shown = low + (high - low) / (1 + np.exp(-4 * (values - center) / width))
    else:
        shown = values.clip(low, high)
    seen = shown if padding.all() else shown[~padding]
    return None if seen.min() == seen.max() else shown


def _from_itk(image: Any, colour: bool = False) -> tuple[NDArray[Any], dict[str, Any]]:
    array = sitk.GetArrayFromImage(image)
    components = image.GetNumberOfComponentsPerPixel()
    if components in (3, 4) and array.dtype == np.uint8 and colour:
        return _with_meta(np.moveaxis(array[..., :3], -1, 0).T)
    if components in (3, 4) and array.dtype == np.uint8:
        array = np.rint(array[..., :3] @ np.array(LUMINANCE)).astype(np.uint8)
    elif components != 1:
        raise ValueError(f"it must be grey or 8-bit RGB, got {components} components of {array.dtype} per pixel.")
    if array.ndim not in (2, 3):
        raise ValueError(f"it must have 2 or 3 dimensions, got shape {array.shape[::-1]}.")
    return _with_meta(array.T, ras_affine(image) if array.ndim == 3 else None)


def ras_affine(image: Any) -> NDArray[Any]:
    """Affine (4, 4) from voxels to mm in RAS, of a 3-D SimpleITK image or of a reader that has read its header."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return dicom.LPS_TO_RAS @ affine


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


def read_header(path: str | PathLike[str], pictures: bool = False) -> VolumeHeader:
    """Read the header of a volume, see `read_grid`."""
    shape, affine, _ = read_grid(path, pictures)
    x, y, z = np.argsort(nibabel.io_orientation(affine)[:, 0])
    spacing = voxel_sizes(affine).tolist()
    return VolumeHeader((shape[x], shape[y], shape[z]), (spacing[x], spacing[y], spacing[z]))


def read_grid(path: str | PathLike[str], pictures: bool = False) -> Grid:
    """Read the grid of a NIfTI, MHA or NRRD volume, or of a DICOM series in a folder, from its header.

    With `pictures`, that of a picture, too, as `ImageFileReader` reads it as a slice: 1 channel if it is grey, or 3. A
    header that cannot be read, or is not that of one volume with a spacing, is a `ValueError` that names the file.
    """
    path = Path(path)
    kind = "dicom" if path.is_dir() else image_format(path)
    readers: dict[str | None, Callable[[Path], Grid]] = {"itk": _itk_grid, "nifti": _nifti_grid}
    readers["dicom"] = partial(_dicom_grid, pictures=pictures)
    if pictures:
        readers["picture"] = _picture_grid
    if kind not in readers:
        raise InputError(f"{path} must be a volume (NIfTI, MHA, NRRD, DICOM): remove it from the data list.")
    refuse_odd_file(path)
    with explained(path):
        grid = readers[kind](path)
    # More axes of length 1 are read from NIfTI alone.
    if len(grid.shape) < 3 or prod(grid.shape[3:]) != 1 or (len(grid.shape) > 3 and kind != "nifti"):
        raise InputError(
            f"{path} must be one 3-D volume, got shape {grid.shape}: write every frame or channel to its own file, "
            "or remove it from the data list."
        )
    return grid._replace(shape=tuple(map(int, grid.shape[:3])), affine=_with_spacing(path, grid.affine))


def is_volume(path: str | PathLike[str]) -> bool:
    """Whether a NIfTI, MHA or NRRD file, or a folder of DICOM slices, has three axes longer than 1 by its header."""
    try:
        return (os.path.isdir(path) or image_format(path) in ("itk", "nifti")) and min(read_grid(path).shape) > 1
    except (ValueError, OSError):  # whatever it is
        return False


def is_picture(path: str | PathLike[str]) -> bool:
    """Whether a file is a PNG, JPEG, TIFF or BMP, or by its header a DICOM picture or any other with two axes."""
    path, kind = Path(path), image_format(path)
    grids: dict[str | None, Callable[[Path], Grid]] = {"itk": _itk_grid, "nifti": _nifti_grid}
    grids["dicom"] = partial(_dicom_grid, pictures=True)
    if kind not in grids or not path.is_file():
        return kind == "picture"
    try:
        with explained(path):
            shape = grids[kind](path).shape
    except (ValueError, OSError):  # whatever it is
        return False
    return len(shape) == 2 or (kind == "dicom" and shape[2] == 1)


def _with_spacing(path: Path, affine: NDArray[Any]) -> NDArray[Any]:
    if not np.isfinite(affine).all() or np.isnan(nibabel.io_orientation(affine)).any():
        raise InputError(f"{path} must have a spacing along three axes, got the affine {affine.tolist()}: repair it.")
    return affine


def _nifti_grid(path: Path) -> Grid:
    image = _load_nifti(path)
    colours = image.get_data_dtype().fields
    return Grid(image.shape, _nifti_affine(path, image), 1 if colours is None else len(colours))


class _Header(nibabel.Nifti1Header):
    quaternion_threshold = -1e-5  # by which rounding may make a quaternion longer than 1, as ITK and FSL have it


class _Nifti(nibabel.Nifti1Image):
    header_class = _Header


def _load_nifti(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b" and path.suffix.lower() == ".nii":
        raise InputError(f"{path} is compressed by gzip: rename it to {path.name}.gz.")
    if {348, 540} & {int.from_bytes(start, "little"), int.from_bytes(start, "big")} and path.suffix.lower() == ".gz":
        raise InputError(f"{path} is not compressed by gzip: rename it to {path.stem}.")
    try:
        return nibabel.load(path)
    except ValueError:  # a quaternion that is too long, or what cannot be read either way
        return _Nifti.from_filename(path)


def _nifti_affine(path: Path, image: Any) -> NDArray[Any]:
    """The sform if it has a code and a spacing, else the qform, else voxels of `pixdim` about the middle, in mm.

    They may place a volume differently, in the scanner or in an atlas, but not with two spacings.
    """
    forms = [form for form in (image.get_sform(coded=True)[0], image.get_qform(coded=True)[0]) if form is not None]
    usable = [form for form in forms if np.isfinite(form).all() and abs(np.linalg.det(form[:3, :3])) > 0]
    if len(usable) == 2 and not np.allclose(voxel_sizes(usable[0]), voxel_sizes(usable[1]), rtol=1e-2):
        sizes = " and ".join(str(np.round(voxel_sizes(form), 4).tolist()) for form in usable)
        raise InputError(
            f"{path} must have one spacing, got {sizes} mm in its sform and qform: set the code of the wrong one to 0."
        )
    unit = _UNITS.get(int(image.header["xyzt_units"]) % 8, 1.0)
    affine: NDArray[Any] = (usable or [image.affine])[0] * np.array([[unit], [unit], [unit], [1.0]])
    if unit != 1 and not 0.005 < voxel_sizes(affine).max() < 100:
        raise InputError(
            f"{path} must have a spacing in the unit that its header names, got {voxel_sizes(affine).max():g} mm: "
            "set its xyzt_units to mm if that is meant."
        )
    # A picture needs no spacing across.
    return affine if 1 in image.shape[2:3] or len(image.shape) < 3 else _with_spacing(path, affine)


def _read_nifti(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    image = _load_nifti(path)
    reader = NibabelReader(squeeze_non_spatial_dims=True)
    reader.filenames = (path,)
    array, meta = reader.get_data(image)
    affine = _nifti_affine(path, image)
    return array, {**meta, MetaKeys.AFFINE: affine, MetaKeys.ORIGINAL_AFFINE: affine.copy()}


def _picture_grid(path: Path) -> Grid:
    with Image.open(path) as image:
        size = image.size[:: -1 if image.getexif().get(_TURNED, 1) > 4 else 1]
        palette = np.reshape(image.getpalette() or [], (-1, 3)) if image.mode == "P" else np.eye(3)
        is_grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode[0] == "I" or not np.ptp(palette, 1).any()
    return Grid((*size, 1), np.eye(4), 1 if is_grey else 3)


def _dicom_grid(path: Path, pictures: bool = False) -> Grid:
    series = dicom.series_of(path)
    if pictures and path.is_file() and series.is_picture:
        tags = series.tags[series.files.index(path)]
        is_grey = (tags.get("SamplesPerPixel") or 1) == 1 and "PALETTE" not in tags.get("PhotometricInterpretation", "")
        shape = (tags.get("Columns", 0), tags.get("Rows", 0), 1)
        return Grid(shape, np.diag([*_film_spacing(tags), 1.0, 1.0]), 1 if is_grey else 3)
    volume = dicom.read_volume(path, series)
    return Grid(volume.shape, volume.affine, volume.slices[0].get("SamplesPerPixel") or 1)


def _itk_grid(path: Path) -> Grid:
    reader = sitk.ImageFileReader()
    reader.SetFileName(fspath(path))
    reader.ReadImageInformation()
    # Frames along a fourth axis have no orientation, and are refused anyway.
    affine = ras_affine(reader) if reader.GetDimension() == 3 else np.eye(4)
    return Grid(reader.GetSize(), affine, reader.GetNumberOfComponents())
