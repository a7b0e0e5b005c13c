from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import monai.data
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    MediaStorageDirectoryStorage,
    RLELossless,
    RTDoseStorage,
    SegmentationStorage,
    generate_uid,
)

from dissect_monai.data import dicom
from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.datasets import read_all
from dissect_monai.data.dicom import read_tags
from dissect_monai.data.readers import ImageFileReader, read_grid

RNG = np.random.default_rng(0)
ROWS, COLUMNS, SLICES = 5, 6, 8
VOXELS = RNG.integers(0, 4096, (SLICES, ROWS, COLUMNS)).astype(np.uint16)
HEIGHTS = 2.5 * np.arange(SLICES)


def load(path: Path, spatial_dims: int | None = 3) -> tuple[np.ndarray, np.ndarray]:
    """Values, and the affine of a volume."""
    reader = ImageFileReader(spatial_dims)
    array, meta = reader.get_data(reader.read(path))
    return array, np.asarray(meta.get("affine"))


def write(path: Path, pixels: np.ndarray | None, bits: int = 16, uid: str = CTImageStorage, **tags: Any) -> Dataset:
    """A file with these tags, of which None is none; without pixels, any object."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    if pixels is not None:
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = pixels.shape[-2:]
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * pixels.itemsize, bits, bits - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        if pixels.ndim == 3:
            ds.NumberOfFrames = len(pixels)
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(path, ds, **tags)


def save(path: Path, ds: Dataset, **tags: Any) -> Dataset:
    for name, value in tags.items():
        if value is not None:
            setattr(ds, name, value)
        elif name in ds:
            delattr(ds, name)
    ds.save_as(path, enforce_file_format=True)
    return ds


Change = Callable[[int], dict[str, Any]]


def same(index: int) -> dict[str, Any]:
    return {}


def series(folder: Path, heights: Any = HEIGHTS, change: Change = same, uid: str = "1.2.3", name: str = "a") -> Path:
    """An axial series of `VOXELS`, a file for each height."""
    for index, height in enumerate(heights):
        tags = {
            "SeriesInstanceUID": uid, "PixelSpacing": [0.5, 0.75], "ImagePositionPatient": [-10, 20, float(height)],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "RescaleSlope": 1, "RescaleIntercept": -1024,
        }  # fmt: skip
        write(folder / f"{name}{index}.dcm", VOXELS[index % SLICES], **{**tags, **change(index)})
    return folder


EXPECTED = VOXELS.T.astype(int) - 1024
AFFINE = np.array([[-0.75, 0, 0, 10], [0, -0.5, 0, -20], [0, 0, 2.5, 0], [0, 0, 0, 1]])


# --- what is read


def tilted(index: int) -> dict[str, Any]:
    return {"ImageOrientationPatient": [1, 0, 0, 0, 0.96, 0.28]}


TILTED = np.array([[-0.75, 0, 0, 10], [0, -0.48, 0, -20], [0, 0.14, 2.5, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("heights", "change", "affine"),
    [
        (HEIGHTS, same, AFFINE),
        (HEIGHTS + RNG.uniform(-5e-3, 5e-3, SLICES) * [0, 1, 1, 1, 1, 1, 1, 0], same, AFFINE),
        (HEIGHTS, tilted, TILTED),
        (HEIGHTS, lambda index: {"SpacingBetweenSlices": 0}, AFFINE),
        (HEIGHTS, lambda index: {"SpacingBetweenSlices": 20, "SliceThickness": 0}, AFFINE),
        (HEIGHTS, lambda index: {"AcquisitionNumber": index // 4}, AFFINE),  # one above the other
        (HEIGHTS, lambda index: {"PhotometricInterpretation": "MONOCHROME1"}, AFFINE),  # of a viewer, not of HU
    ],
    ids=["even", "jitter", "tilted gantry", "spacing of 0", "another spacing", "two runs", "shown inverted"],
)
def test_positions_decide_for_header_and_reader_alike(
    tmp_path: Path, heights: np.ndarray, change: Change, affine: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = series(tmp_path, heights, change)
    array, found = load(folder)
    np.testing.assert_array_equal(array, EXPECTED)
    assert capfd.readouterr().err == ""  # where ITK warns of what is accepted
    np.testing.assert_allclose(found, affine, atol=1e-6)
    grid = read_grid(folder)
    np.testing.assert_array_equal(grid.affine, found)
    assert (grid.shape, grid.channels) == (array.shape, 1)


def test_every_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    slopes, intercepts = [1, 0.5, *[2] * (SLICES - 2)], RNG.integers(-1024, 0, SLICES).tolist()
    scale = zip(slopes, intercepts, strict=True)
    scales = [{"RescaleSlope": slope, "RescaleIntercept": intercept} for slope, intercept in scale]
    array, _ = load(series(tmp_path, change=scales.__getitem__))
    np.testing.assert_array_equal(array, VOXELS.T * slopes + intercepts)


def test_scouts_reports_and_indices_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = series(tmp_path / "scan")
    axes = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "ImagePositionPatient": [0, -100, 50]}
    write(folder / "scout.dcm", VOXELS[0], SeriesInstanceUID="1.2.3", PixelSpacing=[0.5, 0.75], **axes)
    write(folder / "report", None, uid=EnhancedSRStorage, SeriesInstanceUID="1.2.4")
    write(folder / "DICOMDIR", None, uid=MediaStorageDirectoryStorage, SOPClassUID=None)
    (folder / "notes.txt").write_text("nothing")
    np.testing.assert_array_equal(load(folder)[0], EXPECTED)
    own = " ".join(record.message for record in caplog.records if record.name.startswith("dissect_monai"))
    assert "scan: left out, as they are no images: DICOMDIR, report." in own
    assert "orientation, pixel spacing or matrix is another: scout.dcm." in own
    assert "notes" not in own


def test_series_of_one_folder_are_items_with_their_patient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for patient, uid in ("A1", "A2", "B1", "B2"):
        by_id = {"PatientID": f"id {patient}"}
        series(tmp_path / patient, change=lambda index, by_id=by_id: by_id, uid=uid, name=f"{uid}_")
    write(tmp_path / "A" / "topogram.dcm", VOXELS[0], SeriesInstanceUID="3")
    write(tmp_path / "e" / "report.dcm", None, uid=EnhancedSRStorage)
    series(tmp_path / "c" / "d")
    items = read_datalist(tmp_path, spatial_dims=3).training
    assert [{key: item[key] for key in item.keys() - {"origin"}} for item in items] == [
        *({"image": f"{tmp_path}/{each}/{uid}_0.dcm", "subject": f"id {each}"} for each in "AB" for uid in "12"),
        {"image": f"{tmp_path}/c/d"},
    ]
    assert "A: left out, as they are single slices: topogram.dcm." in caplog.text
    np.testing.assert_array_equal(load(Path(items[0]["image"]))[0], EXPECTED)
    assert read_grid(items[0]["image"]).shape == EXPECTED.shape
    with pytest.raises(ValueError, match=r"B must hold one DICOM series, got 2 \(see 1_0\.dcm and 2_0\.dcm\): move"):
        load(tmp_path / "B")


def test_films_of_a_patient_are_of_one_subject(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index, patient in enumerate(["x", "x", None]):
        write(tmp_path / f"{index}.dcm", VOXELS[0], PatientID=patient)
    write(tmp_path / "report.dcm", None, uid=EnhancedSRStorage)
    items = read_datalist(tmp_path).training
    assert [item.get("subject") for item in items] == ["x", "x", None]
    assert "left out, as they are no images: report.dcm." in caplog.text


def test_a_folder_is_parsed_once_for_all_its_series_and_anew_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []
    monkeypatch.setattr(dicom, "read_tags", lambda path: parsed.append(path) or read_tags(path))
    for uid in "1234":
        series(tmp_path, uid=uid, name=f"{uid}_")
    items = read_datalist(tmp_path, spatial_dims=3).training
    read_all(monai.data.Dataset(items, lambda item: read_grid(item["image"])), num_workers=4)
    assert sum(path.name != f"{path.name[0]}_0.dcm" for path in parsed) == 4 * (SLICES - 1)
    content = (tmp_path / "1_1.dcm").read_bytes()
    (tmp_path / "1_1.dcm").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"1_1\.dcm must be an intact image"):
        read_grid(tmp_path / "1_0.dcm")


# --- what is refused


def both(folder: Path, name: str, *values: Any) -> None:
    """Two slices at every place, which differ by a tag."""
    for letter, value in zip("ab", values, strict=True):
        series(folder, change=lambda index, value=value: {name: value}, name=letter)


def cut(folder: Path, kept: float, compressed: bool = False) -> None:
    path = series(folder) / "a4.dcm"
    if compressed:
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])


def copied(folder: Path) -> None:
    shutil.copy(series(folder) / "a3.dcm", folder / "a3 (1).dcm")


def lacking(name: str, *slices: int) -> Callable[[Path], object]:
    return lambda folder: series(folder, change=lambda index: {name: None} if index in slices else {})


def turned(index: int) -> dict[str, Any]:
    return {"ImageOrientationPatient": [1, 0, 0, 0, index % 2, index % 2 - 1]}


def aside(index: int) -> dict[str, Any]:
    return {"ImagePositionPatient": [-9, 20, 7.5]} if index == 3 else {}


CUT = r"a4\.dcm must be an intact image of DICOM, got: a file that is cut off"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: series(f, np.delete(HEIGHTS, [4])), r"1 of those every 2\.5 mm are missing, .* after a3"),
    "several missing": (lambda f: series(f, np.delete(HEIGHTS, [2, 3, 6])), "3 of those every 2.5 mm are missing"),
    "uneven": (lambda f: series(f, HEIGHTS**1.2), r"slices at even distances, got 3\.\d+ to 5\.\d+ mm"),
    "a little": (lambda f: series(f, HEIGHTS + 0.2 * (np.arange(8) == 4)), r"even distances, got 2\.3 to 2\.7"),
    "aside": (lambda f: series(f, change=aside), "slices at even distances"),
    "copies": (copied, r"one slice at each place, got 9 at 8, as a3 \(1\)\.dcm and a3\.dcm are copies"),
    "echoes": (lambda f: both(f, "EchoTime", "10", "80"), r"got 16 at 8, which differ in EchoTime \(10, 80\)"),
    "energies": (lambda f: both(f, "KVP", "80", "140"), r"differ in KVP \(140, 80\)"),
    "table": (
        lambda f: series(f, change=lambda index: {"ModalityLUTSequence": table(0, [*range(256)])}),
        r"must have a slope and an intercept, got a table \(ModalityLUTSequence\)",
    ),
    "phases": (lambda f: both(f, "AcquisitionNumber", None, 2), r"differ in AcquisitionNumber \(2, none\)"),
    "cut off": (lambda f: cut(f, 0.9), CUT),
    "cut short": (lambda f: cut(f, 0.3), CUT),
    "empty": (lambda f: cut(f, 0), f"{CUT} or no DICOM"),
    "compressed and cut off": (lambda f: cut(f, 0.95, compressed=True), CUT),
    "no position": (lacking("ImagePositionPatient", 5), "got no ImagePositionPatient in a5.dcm"),
    "no axes": (lacking("ImageOrientationPatient", 0), "got no ImageOrientationPatient in a0.dcm"),
    "no spacing": (lacking("PixelSpacing", *range(SLICES)), "got no PixelSpacing in a0.dcm"),
    "no intercept": (lacking("RescaleIntercept", 2), r"one RescaleIntercept, .* got -1024\.0, None"),
    "two stacks": (lambda f: series(f, change=turned), r"one orientation, .* got 2 \(see a0\.dcm and a1\.dcm\)"),
    "one slice": (lambda f: series(f, [0]), "must hold several slices, got one"),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_a_series_that_is_no_volume_is_refused_by_header_and_reader(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(tmp_path / "scan")
    for read in (load, read_grid):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "scan")


# --- frames of one file


def group(name: str, **tags: Any) -> Dataset:
    found, item = Dataset(), Dataset()
    for each, value in tags.items():
        setattr(item, each, value)
    setattr(found, name, [item])
    return found


def frames(path: Path, heights: Any = HEIGHTS, order: Any = slice(None), slopes: Sequence[float] = ()) -> Path:
    """An enhanced CT, with a window of the head; slopes are of each frame."""
    ds = write(path, np.ascontiguousarray(VOXELS[order]), uid=EnhancedCTImageStorage, WindowCenter=40, WindowWidth=80)
    shared = group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.update(group("PixelMeasuresSequence", PixelSpacing=[0.5, 0.75]))
    shared.update(group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-1024))
    own = [group("PlanePositionSequence", ImagePositionPatient=[-10, 20, height]) for height in heights[order]]
    for each, slope in zip(own, slopes, strict=False):
        each.update(group("PixelValueTransformationSequence", RescaleSlope=slope, RescaleIntercept=-1024))
    save(path, ds, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=own)
    return path


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), RNG.permutation(SLICES)])
def test_frames_are_a_volume_that_no_window_clips(tmp_path: Path, order: Any) -> None:
    path = frames(tmp_path / "a.dcm", order=order)
    for spatial_dims in (3, None):
        array, affine = load(path, spatial_dims)
        np.testing.assert_array_equal(array, EXPECTED)
        np.testing.assert_allclose(affine, AFFINE, atol=1e-6)
    np.testing.assert_array_equal(read_grid(path).affine, affine)
    with pytest.raises(ValueError, match="must have `spatial_dims` = 2 axes, got several slices or frames"):
        load(path, 2)


def test_frames_that_are_no_volume_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", VOXELS)
    frames(tmp_path / "b.dcm", np.where(HEIGHTS > 10, HEIGHTS + 2.5, HEIGHTS))
    frames(tmp_path / "c.dcm", np.repeat(HEIGHTS[::2], 2))
    frames(tmp_path / "d.dcm", slopes=[1, *[2] * 7])
    for name, message in (
        ("a", "must say where its slices lie, got no ImagePositionPatient in frame 1"),
        ("b", "1 of those every 2.5 mm are missing, the first after frame 5"),
        ("c", "got 8 at 4, as frame 1 and frame 2 are copies"),
        ("d", r"must have one RescaleSlope, .* got 1\.0, 2\.0"),
    ):
        for read in (load, read_grid):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / f"{name}.dcm")


# --- encodings


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("coding", ["implicit", "deflated", "bare", "RLE", "JPEG 2000", "JPEG lossless", "JPEG"])
def test_every_encoding_of_a_picture_is_read_alike(tmp_path: Path, coding: str, bits: int) -> None:
    path, dtype = tmp_path / "a.dcm", np.uint8 if bits == 8 else np.uint16
    pixels = (np.add.outer(np.arange(40), np.arange(30)) * (2**bits - 1) // 68).astype(dtype)
    ds, stream = write(path, pixels, bits), BytesIO()
    if coding == "implicit":
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        ds.save_as(path)
    elif coding == "deflated":
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
    elif coding == "bare":  # no preamble, and no group about the file
        pydicom.dcmwrite(path, Dataset(ds), implicit_vr=True, little_endian=True)
    elif coding == "RLE":
        ds.compress(RLELossless)
        ds.save_as(path)
    elif coding == "JPEG lossless":
        sitk.WriteImage(sitk.GetImageFromArray(pixels[None]), path, useCompression=True, compressor="JPEG")
    elif coding == "JPEG 2000" or bits == 8:
        options = {"no_jp2": True} if coding == "JPEG 2000" else {"quality": 90}
        Image.fromarray(pixels).save(stream, coding.replace(" ", ""), **options)
        ds.PixelData = encapsulate([stream.getvalue()], fragments_per_frame=2 if coding == "JPEG 2000" else 1)
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless if coding == "JPEG 2000" else JPEGBaseline8Bit
        ds.save_as(path)
        pixels = pixels if coding == "JPEG 2000" else np.asarray(Image.open(stream))
    np.testing.assert_array_equal(load(path, 2)[0], pixels.T)


def test_a_compression_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    ds = write(tmp_path / "a.dcm", VOXELS[0])
    ds.PixelData = encapsulate([b"1234"])
    ds["PixelData"].is_undefined_length = True
    for syntax, name in (
        (HTJ2KLossless, f"High-Throughput JPEG 2000, {HTJ2KLossless}. Decompress"),
        ("1.2.3", "1.2.3"),
    ):
        ds.file_meta.TransferSyntaxUID = HTJ2KLossless
        ds.save_as(tmp_path / "a.dcm")
        content = (tmp_path / "a.dcm").read_bytes()
        (tmp_path / "a.dcm").write_bytes(content.replace(HTJ2KLossless.encode(), syntax.encode().ljust(23, b"\0")))
        with pytest.raises(ValueError, match=f"a.dcm must have a transfer syntax that can be decoded, got {name}"):
            load(tmp_path / "a.dcm", 2)


# --- films


def table(first: int, values: Sequence[int], bits: int = 16) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "US", [*values])
    item.add_new("ModalityLUTType", "LO", "US")
    return [item]


FILM = (np.arange(240).reshape(15, 16) * 17).astype(np.uint16)  # 12 bits
CURVE = [int(65535 * (index / 255) ** 2) for index in range(256)]
WINDOWS = [
    {"WindowCenter": 2000, "WindowWidth": 1000},
    {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
    {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
    {"VOILUTSequence": table(1000, CURVE)},
    {"ModalityLUTSequence": table(100, CURVE[::-1])},
    {"ModalityLUTSequence": table(100, CURVE), "WindowCenter": 30000, "WindowWidth": 20000},
    {"RescaleSlope": 2, "RescaleIntercept": -100, "VOILUTSequence": table(500, CURVE)},
]


INVERSE = [{}, {"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("tags", "inverse"),
    [
        *product(WINDOWS, INVERSE[:2]),
        *((WINDOWS[0], each) for each in (INVERSE[2], {**INVERSE[1], **INVERSE[2]})),
    ],
    ids=" ".join,
)
def test_a_film_is_what_pydicom_makes_of_it(
    tmp_path: Path, tags: dict[str, Any], inverse: dict[str, str], signed: bool
) -> None:
    film = FILM.astype(np.int16) - 1000 if signed else FILM
    ds = write(tmp_path / "a.dcm", film, 16 if signed else 12, **tags, **inverse)
    expected = apply_voi_lut(apply_modality_lut(film, ds), ds).T.astype(float)
    expected = -expected if inverse else expected
    found = load(tmp_path / "a.dcm", 2)[0].astype(float)
    # Equal but for the units, which a viewer does not show.
    scale, shift = np.polyfit(found.ravel(), expected.ravel(), 1)
    assert scale > 0
    np.testing.assert_allclose(found * scale + shift, expected, atol=1e-3 * np.ptp(expected))
    np.testing.assert_array_equal(load(tmp_path, None)[0], found)  # a series of one file, too


@pytest.mark.parametrize("inverse", INVERSE[:2])
def test_padding_is_the_darkest_and_has_no_part_in_the_rest(tmp_path: Path, inverse: dict[str, str]) -> None:
    padded = np.hstack([FILM, np.full((15, 4), 65535, np.uint16), np.full((15, 4), 65000, np.uint16)])
    write(tmp_path / "a.dcm", FILM, 16, **inverse)
    write(tmp_path / "b.dcm", padded, 16, PixelPaddingValue=65535, PixelPaddingRangeLimit=65000, **inverse)
    plain, found = load(tmp_path / "a.dcm", 2)[0], load(tmp_path / "b.dcm", 2)[0]
    np.testing.assert_array_equal(found[:16], plain)
    assert (found[16:] == plain.min()).all()


@pytest.mark.parametrize(
    ("center", "width"),
    [("AUTO", "AUTO"), ("2048,5", "4096,0"), ("9000", "100"), ("-500", "20"), ("nan", "1"), ("5", "0")],
)
def test_a_window_that_is_no_number_or_shows_nothing_is_none(tmp_path: Path, center: str, width: str) -> None:
    write(tmp_path / "a.dcm", FILM, 12, WindowCenter="111111", WindowWidth="222222")
    content = (tmp_path / "a.dcm").read_bytes()
    for old, new in ((b"111111", center), (b"222222", width)):
        content = content.replace(old, new.ljust(6).encode())
    (tmp_path / "a.dcm").write_bytes(content)
    np.testing.assert_array_equal(load(tmp_path / "a.dcm", 2)[0], FILM.T)


def test_a_blank_film_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", FILM * 0 + 7, 12)
    with pytest.raises(ValueError, match=r"a\.dcm must show something, got the value 7 everywhere"):
        load(tmp_path / "a.dcm", 2)


def test_fewer_pixels_than_the_header_says_are_a_file_that_is_cut_off(tmp_path: Path) -> None:
    for name, shape in (("film.dcm", VOXELS[0].shape), ("slices.dcm", VOXELS.shape)):
        ds = write(tmp_path / name, np.zeros(shape, np.int16))
        ds.PixelData = ds.PixelData[: len(ds.PixelData) // 2]
        save(tmp_path / name, ds)
        assert read_tags(tmp_path / name)["fault"] == "is cut off"
        with pytest.raises(ValueError, match=rf"{name} must be an intact image of DICOM"):
            load(tmp_path / name)


def test_an_empty_value_is_no_fault(tmp_path: Path) -> None:
    ds = write(tmp_path / "a.dcm", VOXELS[0])
    ds.add_new("PixelPaddingValue", "US", None)
    save(tmp_path / "a.dcm", ds)
    assert {"fault", "PixelPaddingValue"}.isdisjoint(read_tags(tmp_path / "a.dcm"))


def test_segmentations_and_doses_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    series(tmp_path)
    for name, uid in (("Z.dcm", SegmentationStorage), ("dose.dcm", RTDoseStorage)):
        write(tmp_path / name, VOXELS, uid=uid)
    assert [item["image"] for item in read_datalist(tmp_path, spatial_dims=3).training] == [str(tmp_path)]
    assert "left out, as they are no images: Z.dcm, dose.dcm." in caplog.text


def test_one_patient_for_all_images_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(2):
        write(tmp_path / f"{index}.dcm", VOXELS[0], PatientID="anonymous")
    read_datalist(tmp_path)
    assert "2 images have one PatientID, and so are of one subject" in caplog.text
