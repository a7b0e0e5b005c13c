"""DICOM: what a file says beside its pixels, and series whose slices are checked one by one."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from io import BytesIO
from math import ceil, inf, prod
from pathlib import Path
from struct import calcsize, error, unpack
from threading import Lock
from typing import IO, Any, NamedTuple

import numpy as np

from dissect_monai.common import Array, InputError, shorten

warn_once = cache(logging.getLogger(__name__).warning)  # as a folder is read several times
# By keyword: a text, a number, the entries of a table (an array), or a list of items, which are such mappings.
Tags = Mapping[str, Any]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from DICOM's and ITK's world to that of NIfTI and MONAI
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# What is read of a file; all else is skipped. A DICOMDIR has only the class of its media.
_KEYWORDS = {
    0x00020002: "SOPClassUID", 0x00020010: "TransferSyntaxUID", 0x00080008: "ImageType", 0x00080016: "SOPClassUID",
    0x00080032: "AcquisitionTime", 0x00080060: "Modality", 0x0008103E: "SeriesDescription", 0x00100020: "PatientID",
    0x00180010: "ContrastBolusAgent", 0x00180060: "KVP", 0x00180081: "EchoTime",
    0x00180082: "InversionTime", 0x00180086: "EchoNumbers", 0x00180088: "SpacingBetweenSlices",
    0x00181060: "TriggerTime", 0x00181164: "ImagerPixelSpacing", 0x00181210: "ConvolutionKernel",
    0x00181314: "FlipAngle",
    0x00189082: "EffectiveEchoTime", 0x00189087: "DiffusionBValue", 0x00189114: "MREchoSequence",
    0x00189117: "MRDiffusionSequence",
    0x0020000E: "SeriesInstanceUID", 0x00200012: "AcquisitionNumber", 0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient", 0x00200100: "TemporalPositionIdentifier", 0x00209111: "FrameContentSequence",
    0x00209113: "PlanePositionSequence", 0x00209116: "PlaneOrientationSequence", 0x00209128: "TemporalPositionIndex",
    0x00280002: "SamplesPerPixel", 0x00280004: "PhotometricInterpretation", 0x00280008: "NumberOfFrames",
    0x00280010: "Rows", 0x00280011: "Columns", 0x00280030: "PixelSpacing", 0x00280100: "BitsAllocated",
    0x00280101: "BitsStored", 0x00280103: "PixelRepresentation", 0x00280120: "PixelPaddingValue",
    0x00280121: "PixelPaddingRangeLimit", 0x00281050: "WindowCenter", 0x00281051: "WindowWidth",
    0x00281052: "RescaleIntercept", 0x00281053: "RescaleSlope", 0x00281056: "VOILUTFunction",
    0x00283000: "ModalityLUTSequence", 0x00283002: "LUTDescriptor", 0x00283006: "LUTData", 0x00283010: "VOILUTSequence",
    0x00289110: "PixelMeasuresSequence", 0x00289145: "PixelValueTransformationSequence",
    0x00540022: "DetectorInformationSequence", 0x00541300: "FrameReferenceTime", 0x20500020: "PresentationLUTShape",
    0x52009229: "SharedFunctionalGroupsSequence", 0x52009230: "PerFrameFunctionalGroupsSequence",
}  # fmt: skip
_INTEGERS = {
    "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit",
}  # fmt: skip
_FORMATS = {b"US": "H", b"SS": "h", b"UL": "I", b"FD": "d"}
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # of floats, of doubles, of integers
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # in 32 bits
_UNDEFINED = 0xFFFFFFFF
# Transfer syntaxes that GDCM decodes, and names of some that it does not.
_DECODED = {f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2", ".5")} | {
    f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 57, 70, 80, 81, 90, 91)
}
_OTHERS = {
    **dict.fromkeys((92, 93), "JPEG 2000 Part 2"), **dict.fromkeys((94, 95, 204, 205), "JPIP"),
    **dict.fromkeys(range(100, 107), "MPEG"), **dict.fromkeys((107, 108), "HEVC"),
    **dict.fromkeys((110, 111, 112), "JPEG XL"), **dict.fromkeys((201, 202, 203), "High-Throughput JPEG 2000"),
}  # fmt: skip
# Objects with pixels that are no images: segmentations, parametric maps, doses.
_NO_IMAGES = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("30", "66.4", "66.7", "481.2")}
# What may tell slices of one place apart, in this order.
_PHASES = (
    "EchoTime", "EchoNumbers", "EffectiveEchoTime", "TemporalPositionIdentifier", "TemporalPositionIndex",
    "TriggerTime", "InversionTime", "FlipAngle", "DiffusionBValue", "FrameReferenceTime", "ConvolutionKernel", "KVP",
    "ContrastBolusAgent", "AcquisitionNumber", "ImageType", "SeriesDescription", "AcquisitionTime",
)  # fmt: skip


# --- one file


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is DICOM."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_tags(path: str | os.PathLike[str]) -> Tags:
    """What a DICOM file says up to its pixels, which are not read.

    "pixels" is there if it has any, "fault" if they, or anything before them, are not whole.
    """
    with open(path, "rb") as file:
        try:
            return _DataSet(file, os.path.getsize(path)).tags
        except (error, zlib.error, RecursionError):
            return {"fault": "is cut off or no DICOM"}


def is_image(tags: Tags) -> bool:
    """Whether a file has pixels of an image, or might have: one that is not whole."""
    return bool({"fault", "pixels"} & tags.keys()) and tags.get("SOPClassUID") not in _NO_IMAGES


class _DataSet:
    """Reads an open file element by element, see DICOM PS3.5 chapter 7."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.order = file, size, "<"
        self.tags: dict[str, Any] = {}
        has_preamble = file.read(132)[128:] == b"DICM"
        file.seek(132 if has_preamble else 0)
        while self._next(2) == b"\2\0":  # the group about the file itself, which has one encoding
            self._element(self.tags, explicit=True)
        syntax = self.tags.get("TransferSyntaxUID", "")
        if syntax == "1.2.840.10008.1.2.1.99":  # deflated
            content = zlib.decompress(file.read(), -zlib.MAX_WBITS)
            self.file, self.size = BytesIO(content), len(content)
        self.order = ">" if syntax == "1.2.840.10008.1.2.2" else "<"
        if not has_preamble and self._next(2) != b"\x08\0":
            raise error
        explicit = self._next(6)[4:].isalpha()  # whatever the syntax says
        while self.file.tell() < self.size and "pixels" not in self.tags:
            self._element(self.tags, explicit)
        is_image = "Rows" in self.tags or "SOPClassUID" not in self.tags
        if self.file.tell() > self.size or (is_image and "pixels" not in self.tags):
            self.tags["fault"] = "is cut off"

    def _next(self, count: int) -> bytes:
        found = self.file.read(count)
        self.file.seek(-len(found), os.SEEK_CUR)
        return found

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return unpack(self.order + form, self.file.read(calcsize(self.order + form)))

    def _element(self, tags: dict[str, Any], explicit: bool) -> int:
        """Read one element into `tags`, and return its tag."""
        (group, element), vr = self._unpack("HH"), self._next(2)
        tag = group << 16 | element
        if explicit and vr.isalpha() and group != 0xFFFE:
            length: int = self._unpack("HHI" if vr in _LONG else "HH")[-1]
        else:
            (length,) = self._unpack("I")
            vr = b"US" if _KEYWORDS.get(tag) in _INTEGERS else b""
        name = _KEYWORDS.get(tag, "")
        if tag in _PIXELS:
            self._pixels(tags, length)
        elif name.endswith("Sequence") or length == _UNDEFINED:
            items = list(self._items(length, explicit and vr != b"UN"))
            tags |= {name: items} if name else {}
        elif name:
            value = self.file.read(length)
            if name.startswith("LUT"):
                tags[name] = np.frombuffer(value, f"{self.order}u2").astype(np.uint16)
            elif vr in _FORMATS:
                size = calcsize(f"={_FORMATS[vr]}")
                tags |= {name: unpack(self.order + _FORMATS[vr], value[:size])[0]} if len(value) >= size else {}
            else:
                tags[name] = value.decode("latin-1").strip(" \0")
        else:
            self.file.seek(length, os.SEEK_CUR)
        return tag

    def _items(self, length: int, explicit: bool) -> Iterator[Tags]:
        end = self.file.tell() + length if length != _UNDEFINED else inf
        while self.file.tell() < end:
            group, element, size = self._unpack("HHI")
            if group << 16 | element != _ITEM:
                return
            stop = self.file.tell() + size if size != _UNDEFINED else inf
            item: dict[str, Any] = {}
            while self.file.tell() < stop and self._element(item, explicit) != _END_OF_ITEM:
                pass
            yield item

    def _pixels(self, tags: dict[str, Any], length: int) -> None:
        """Skip the pixels, or the fragments of compressed ones."""
        tags["pixels"] = True
        if length != _UNDEFINED:
            sizes = [tags.get(name) or 1 for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")]
            needed = ceil(num_frames(tags) * prod(sizes) / 8)
            if "422" in tags.get("PhotometricInterpretation", ""):
                needed = needed * 2 // 3
            if length < needed:
                tags["fault"] = "is cut off"
            self.file.seek(min(length, needed), os.SEEK_CUR)  # what is written after the last pixel may be missing
            return
        count = 0
        while self.file.tell() < self.size:
            group, element, size = self._unpack("HHI")
            if group << 16 | element == _END_OF_SEQUENCE:
                return
            self.file.seek(size, os.SEEK_CUR)
            count += 1
        if count <= num_frames(tags):  # the first is an index of the others
            tags["fault"] = "is cut off"


def numbers(tags: Tags, name: str, count: int = 1) -> Array | None:
    """The first `count` numbers of a text; None if they are missing or no finite numbers."""
    try:
        values = np.array([float(part) for part in str(tags.get(name, "")).split("\\")[:count]])
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def number(tags: Tags, name: str) -> float | None:
    """The first number of a text, see `numbers`."""
    values = numbers(tags, name)
    return None if values is None else float(values[0])


def num_frames(tags: Tags) -> int:
    """Pictures in a file."""
    return int(number(tags, "NumberOfFrames") or 1)


def refuse_unreadable(path: Path, tags: Tags) -> None:
    """Refuse a file that is not whole, has no pixels, or has a transfer syntax that cannot be decoded."""
    problem = tags.get("fault", "" if is_image(tags) else "holds no image")
    if problem:
        raise InputError(
            f"{path} must be an intact image of DICOM, got: a file that {problem}. Replace it or remove it from the "
            "data list."
        )
    syntax = tags.get("TransferSyntaxUID", "")
    if syntax and syntax not in _DECODED:
        name = next((f"{name}, " for end, name in _OTHERS.items() if syntax == f"1.2.840.10008.1.2.4.{end}"), "")
        raise InputError(
            f"{path} must have a transfer syntax that can be decoded, got {name}{syntax}. Decompress it, for example "
            "with gdcmconv --raw, or remove it from the data list."
        )


# --- the files of a folder


class Series(NamedTuple):
    """The files of one picture or volume: those with one SeriesInstanceUID, or one of several frames."""

    files: list[Path]  # by name
    tags: list[Tags]

    @property
    def is_volume(self) -> bool:
        """Whether it has more than one slice."""
        return len(self.files) > 1 or num_frames(self.tags[0]) > 1

    @property
    def is_picture(self) -> bool:
        """Whether each of its files is a picture: it has no other slice, or does not say where it lies."""
        placed = any(numbers(tags, "ImagePositionPatient", 3) is not None for tags in self.tags)
        return not self.is_volume or (num_frames(self.tags[0]) == 1 and not placed)


def find_series(folder: Path) -> list[Series]:
    """The DICOM series in a folder, by their first file; objects without pixels are left out with a warning.

    A file that cannot be read may belong to each of them, and so does. A folder is parsed once for all its series,
    and anew when its files change.
    """
    with os.scandir(folder) as entries:
        files = [(each.name, each.stat()) for each in entries if each.name[0] != "." and each.is_file()]
    with _lock_of(folder):
        return _parsed(folder, tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)))


@cache
def _lock_of(folder: Path) -> Lock:
    """One for the threads that read the volumes of a folder."""
    return Lock()


@lru_cache(maxsize=16)
def _parsed(folder: Path, files: Sequence[tuple[Any, ...]]) -> list[Series]:
    found: dict[str, Series] = {}
    broken, left_out = [], []
    for path in (folder / name for name, *_ in files):
        if path.name.lower().endswith(DICOM_SUFFIXES) or is_dicom(path):
            tags = read_tags(path)
            if not is_image(tags):
                left_out.append(path.name)
            elif "fault" in tags and "SeriesInstanceUID" not in tags:
                broken.append((path, tags))
            else:
                key = path.name if num_frames(tags) > 1 else tags.get("SeriesInstanceUID", "")
                series = found.setdefault(key, Series([], []))
                series.files.append(path)
                series.tags.append(tags)
    if left_out:
        warn_once(f"{folder}: left out, as they are no images: {shorten(left_out)}.")
    lost = Series(*map(list, zip(*broken, strict=True))) if broken else Series([], [])
    return [Series(each.files + lost.files, each.tags + lost.tags) for each in found.values() or [lost] if any(each)]


def find_volumes(folder: Path, pictures: bool = False) -> list[Path]:
    """What stands for each DICOM volume in a folder: the folder if it holds but one series, else the first file of it.

    Single slices, such as scouts, are left out with a warning; with `pictures`, each is one.
    """
    series = find_series(folder)
    if pictures and any(each.is_picture for each in series):
        return [file for each in series for file in (each.files if each.is_picture else each.files[:1])]
    single = [each for each in series if not each.is_volume and "fault" not in each.tags[0]]
    if single:
        warn_once(f"{folder}: left out, as they are single slices: {shorten([each.files[0].name for each in single])}.")
    volumes = [each.files[0] for each in series if each not in single]
    return [folder] if len(series) == len(volumes) == 1 else volumes


def series_of(path: Path) -> Series:
    """The one series in a folder, or that in its folder to which a file belongs."""
    if not path.is_dir():
        tags = read_tags(path)
        refuse_unreadable(path, tags)
        others = [] if num_frames(tags) > 1 else find_series(path.parent)
        return next((each for each in others if path in each.files), Series([path], [tags]))
    series = find_series(path)
    if not series:
        raise ValueError("the folder must hold one DICOM series, got 0")
    if len(series) > 1:
        first, second = (each.files[0].name for each in series[:2])
        raise InputError(
            f"{path} must hold one DICOM series, got {len(series)} (see {first} and {second}): move each to its "
            "own folder, or name a file of each in place of the folder."
        )
    return series[0]


# --- the slices of a series


class Volume(NamedTuple):
    """Where the slices of a series lie."""

    files: list[Path]  # in the order of the slices
    frames: list[int]  # of the one file, in the order of the slices; none if each file is a slice
    slices: list[Tags]
    shape: tuple[int, int, int]
    affine: Array  # (4, 4), to mm in RAS


def read_volume(path: Path, series: Series) -> Volume:
    """The slices of a DICOM series, which is called `path` in messages, or the frames of its one file.

    Nothing is trusted: every file must be whole, and slices must have one orientation, matrix and pixel spacing (up to
    a fifth that have not are left out with a warning, as scouts are) and lie at even distances, each within 0.1 mm, or
    a fifth of the distance, of its place. They may be shifted along each other, as a tilted gantry does it: then the
    affine has a shear.

    Raises:
        ValueError: saying what is wrong.
    """
    for file, tags in zip(*series, strict=True):
        refuse_unreadable(file, tags)
    frames = _frames(series.tags[0]) if len(series.files) == 1 else []
    slices = frames or series.tags
    names = [f"frame {index}" for index in range(1, len(frames) + 1)] or [file.name for file in series.files]
    if len(slices) < 2:
        raise InputError(f"{path} must hold several slices, got one, which has no thickness. Remove it.")
    places, axes, spacings = (
        _of_all(path, keyword, count, slices, names)
        for keyword, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    )
    sizes = np.array([[tags.get(name, 0) for name in ("Columns", "Rows", "SamplesPerPixel")] for tags in slices])
    kept = _of_one_stack(path, np.hstack([axes, spacings, sizes]), names)
    row, column, (vertical, horizontal) = axes[kept[0], :3], axes[kept[0], 3:], spacings[kept[0]]
    heights = places @ np.cross(row, column)
    order = sorted(kept, key=lambda index: float(heights[index]))
    places, slices = places[order], [slices[index] for index in order]
    _refuse_uneven(path, slices, [names[index] for index in order], places, heights[order])
    if any(tags.get("ModalityLUTSequence") for tags in slices):
        raise InputError(
            f"{path} must have a slope and an intercept, got a table (ModalityLUTSequence): convert it to NIfTI."
        )
    for name in ("RescaleIntercept", "RescaleSlope"):
        values = {number(tags, name) for tags in slices}
        if len(values) > 1 and (frames or None in values):
            got = shorten(sorted(map(str, values)))
            raise InputError(f"{path} must have one {name}, or one in each file, got {got}: convert it to NIfTI.")
    affine = np.eye(4)
    affine[:3] = np.stack(
        [row * horizontal, column * vertical, (places[-1] - places[0]) / (len(order) - 1), places[0]], 1
    )
    files = series.files if frames else [series.files[index] for index in order]
    shape = (int(sizes[order[0], 0]), int(sizes[order[0], 1]), len(order))
    return Volume(files, order if frames else [], slices, shape, LPS_TO_RAS @ affine)


def _frames(tags: Tags) -> list[Tags]:
    """The tags of every frame of a file: its own, those that all share, and those of the file."""

    def flat(groups: Tags) -> Tags:
        items = (sequence[0] for sequence in groups.values() if isinstance(sequence, list) and sequence)
        return {name: value for item in items for name, value in item.items()}

    count = num_frames(tags)
    detector = (tags.get("DetectorInformationSequence") or [{}])[0]
    shared = {**tags, **detector, **flat((tags.get("SharedFunctionalGroupsSequence") or [{}])[0])}
    own = tags.get("PerFrameFunctionalGroupsSequence")
    place, axes = numbers(shared, "ImagePositionPatient", 3), numbers(shared, "ImageOrientationPatient", 6)
    step = number(shared, "SpacingBetweenSlices")
    if count < 2 or own or place is None or axes is None or not step:
        return [{**shared, **flat(group)} for group in own or [{}] * count] if count > 1 else []
    # Nuclear medicine gives the place of the first frame alone.
    places = [place + index * step * np.cross(axes[:3], axes[3:]) for index in range(count)]
    return [{**shared, "ImagePositionPatient": "\\".join(map(str, each))} for each in places]


def _of_all(path: Path, keyword: str, count: int, slices: Sequence[Tags], names: Sequence[str]) -> Array:
    found = [numbers(tags, keyword, count) for tags in slices]
    for values, name in zip(found, names, strict=True):
        if values is None or (count == 6 and not values.any()) or (count == 2 and values.min() <= 0):
            raise InputError(
                f"{path} must say where its slices lie, got no {keyword} in {name}: convert it to NIfTI with the right "
                "affine, or remove it."
            )
    return np.array(found)


def _of_one_stack(path: Path, planes: Array, names: Sequence[str]) -> list[int]:
    """Indices of the slices with the orientation, the pixel spacing and the matrix that most have, `planes` (N, F)."""
    stacks: list[list[int]] = []
    for index, plane in enumerate(planes):
        near = next((stack for stack in stacks if np.abs(planes[stack[0]] - plane).max() < 1e-3), None)
        if near is None:
            stacks.append([index])
        else:
            near.append(index)
    largest = max(stacks, key=len)
    others = [name for index, name in enumerate(names) if index not in largest]
    if len(others) > len(names) / 5:
        raise InputError(
            f"{path} must hold slices of one orientation, pixel spacing and matrix, got {len(stacks)} (see "
            f"{names[largest[0]]} and {others[0]}): move each to its own folder."
        )
    if others:
        warn_once(f"{path}: left out, as their orientation, pixel spacing or matrix is another: {shorten(others)}.")
    return largest


def _refuse_uneven(path: Path, slices: Sequence[Tags], names: Sequence[str], places: Array, heights: Array) -> None:
    """Refuse slices, sorted by height, that do not lie at even distances, and say why."""
    gaps = np.diff(heights)
    same = gaps <= min(0.05, 0.1 * gaps.max())
    if same.any():
        where = f"{path} must hold one slice at each place, got {len(slices)} at {len(slices) - same.sum()}"
        if phase := _phase(slices, heights):
            values = shorten(sorted({str(tags.get(phase, "none")) for tags in slices}))
            raise InputError(f"{where}, which differ in {phase} ({values}): move each to its own folder.")
        twice = " and ".join(names[same.argmax() :][:2])
        raise InputError(f"{where}, as {twice} are copies: remove what is there twice.")
    away = np.linalg.norm(places - np.linspace(places[0], places[-1], len(places)), axis=1)
    if away.max() <= min(0.1, 0.2 * gaps.mean()):
        return
    smallest, steps = gaps.min(), np.rint(gaps / gaps.min())
    if steps.max() > 1 and np.abs(gaps / smallest - steps).max() < 0.1:
        raise InputError(
            f"{path} must hold all slices, but {int(steps.sum()) - len(gaps)} of those every {smallest:.4g} mm are "
            f"missing, the first after {names[int((steps > 1).argmax())]}: fetch them, or remove the series."
        )
    raise InputError(
        f"{path} must hold slices at even distances, got {smallest:.4g} to {gaps.max():.4g} mm: resample it, or remove "
        "it."
    )


def _phase(slices: Sequence[Tags], heights: Array) -> str | None:
    """The first tag whose values tell apart slices of one place."""
    for name in _PHASES:
        groups: dict[str, list[float]] = {}
        for tags, height in zip(slices, heights, strict=True):
            groups.setdefault(str(tags.get(name)), []).append(float(height))
        if len(groups) < len(slices) and all((np.diff(each) > 0.05).all() for each in groups.values()):
            return name
    return None
