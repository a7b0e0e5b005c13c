from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers import volume, write_series
from monai.transforms import LoadImage, Orientation
from monai.utils import optional_import
from PIL import Image

from dissect_monai.data import readers
from dissect_monai.data.readers import ImageFileReader, image_format, read_grid, read_header

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 9), dtype=np.uint8)  # (rows, columns) = (y, x)


def load(path: Path, **kwargs: object) -> np.ndarray:
    reader = ImageFileReader(**kwargs)
    return reader.get_data(reader.read(path))[0]


def write_dicom(path: Path, pixels: np.ndarray) -> Path:
    image = sitk.GetImageFromArray(pixels[None], isVector=pixels.ndim == 3)
    sitk.WriteImage(image, path.with_suffix(".dcm"), imageIO="GDCMImageIO")
    return path.with_suffix(".dcm").rename(path)


@pytest.mark.parametrize(("suffix", "scale"), [("png", 1), ("tif", 1), ("bmp", 1), ("png", 200), ("tif", 200)])
def test_pictures_of_8_and_16_bits_are_read_as_x_y(tmp_path: Path, suffix: str, scale: int) -> None:
    pixels = PICTURE if scale == 1 else PICTURE.astype(np.uint16) * scale
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(load(tmp_path / f"a.{suffix}"), pixels.T)
    Image.fromarray(np.full((6, 9), 100, np.uint8)).save(tmp_path / "a.jpg")
    assert np.abs(load(tmp_path / "a.jpg") - 100.0).max() <= 2


def test_colour_weighs_alike_in_png_and_dicom(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    png, dicom = load(tmp_path / "a.png"), load(write_dicom(tmp_path / "a.dcm", colour))
    np.testing.assert_allclose(png.astype(int), dicom.astype(int), atol=1)
    np.testing.assert_allclose(png, (colour @ [0.299, 0.587, 0.114]).T, atol=1)


@pytest.mark.parametrize("name", ["a.dcm", "a.IMA", "IM0001", "1.2.840.7"])
def test_dicom_equals_the_png_of_the_same_picture(tmp_path: Path, name: str) -> None:
    path = write_dicom(tmp_path / name, PICTURE)
    np.testing.assert_array_equal(load(path), PICTURE.T)
    np.testing.assert_array_equal(LoadImage(reader=ImageFileReader())(path), PICTURE.T)


@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd", "nii", "nii.gz", "series"])
def test_volumes_and_their_headers_agree_with_the_nifti_that_monai_reads(tmp_path: Path, suffix: str) -> None:
    image, path = volume(), tmp_path / f"v.{suffix}"
    sitk.WriteImage(image, tmp_path / "reference.nii")
    if suffix == "series":
        write_series(path, image)
    else:
        sitk.WriteImage(image, path)
    expected = LoadImage(ensure_channel_first=True)(tmp_path / "reference.nii")
    result = LoadImage(reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True)(path)
    assert result.shape == (1, 6, 5, 4)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_allclose(result.affine, expected.affine, atol=1e-4)
    header, turned = read_header(path), Orientation("RAS", labels=None)(expected)
    assert header.shape == tuple(turned.shape[1:]) == (5, 6, 4)
    np.testing.assert_allclose(header.spacing, turned.pixdim, rtol=1e-5)
    assert read_grid(path).channels == 1


def test_trailing_axes_of_length_one_are_dropped_and_others_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(PICTURE[None]), tmp_path / "a.nii.gz")
    result = LoadImage(reader=ImageFileReader(spatial_dims=2), ensure_channel_first=True)(tmp_path / "a.nii.gz")
    assert result.shape == (1, 9, 6)
    sitk.WriteImage(volume(), tmp_path / "v.mha")
    with pytest.raises(ValueError, match=r"v\.mha must have `spatial_dims` = 2 axes, got shape \(6, 5, 4\)"):
        load(tmp_path / "v.mha", spatial_dims=2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.PNG", "picture"), ("a.nii.gz", "nifti"), ("a.nhdr", "itk"), ("a.txt", None), ("DICOMDIR", None), ("a", None)],
)
def test_the_name_tells_the_format(name: str, expected: str | None) -> None:
    assert image_format(name) == expected


@pytest.mark.parametrize("suffix", ["png", "dcm", "mha", "nrrd", "nii", "nii.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.7])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(RNG.integers(0, 255, (1, 64, 64), dtype=np.uint8)), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    message = rf"a\.{suffix} must be an intact image .*, got: [A-Za-z].*\. Replace it or remove it"
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert not re.search(r"0x|\wImageIO|\.cxx", str(caught.value))  # neither address nor source file


def test_what_holds_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.vol").touch()
    with pytest.raises(ValueError, match=r"a\.vol must be an image \(\.png .* \.nii\.gz\): rename it"):
        ImageFileReader().get_data(tmp_path / "a.vol")
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist"):
        load(tmp_path / "a.png")
    Image.fromarray(np.array([[1, np.nan]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif must hold finite values, got NaN or infinity"):
        load(tmp_path / "a.tif")


BLOCKS = np.kron(PICTURE, np.ones((8, 8), np.uint8))  # which JPEG keeps
SHOWN = [  # of each orientation, see the Exif specification
    BLOCKS, BLOCKS[:, ::-1], BLOCKS[::-1, ::-1], BLOCKS[::-1],
    BLOCKS.T, np.rot90(BLOCKS, -1), BLOCKS[::-1, ::-1].T, np.rot90(BLOCKS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "orientation"), [*(("png", orientation) for orientation in range(1, 9)), ("jpg", 6), ("tif", 6)]
)
def test_a_picture_is_turned_as_its_orientation_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(BLOCKS).save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    found = load(tmp_path / f"a.{suffix}").astype(int)
    np.testing.assert_allclose(found, SHOWN[orientation - 1].T.astype(int), atol=2)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_inverted_at_any_depth(tmp_path: Path, dtype: Any, compression: str | None) -> None:
    pixels = PICTURE.astype(dtype) * (1 if dtype == np.uint8 else 200)
    picture = Image.fromarray(np.iinfo(dtype).max - pixels)
    picture.save(tmp_path / "a.tif", tiffinfo={262: 1}, compression=compression)
    content = (tmp_path / "a.tif").read_bytes()
    field = b"\x06\x01\x03\x00\x01\x00\x00\x00"  # tag 262, one short
    (tmp_path / "a.tif").write_bytes(content.replace(field + b"\x01", field + b"\x00"))
    np.testing.assert_array_equal(load(tmp_path / "a.tif"), pixels.T)


# --- NIfTI


AFFINE = np.array([[-2.0, 0, 0, 39], [0, -2, 0, 47], [0, 0, 3, 5], [0, 0, 0, 1]])
VOXELS = RNG.integers(0, 99, (4, 5, 6)).astype(np.int16)
OTHER, NOTHING = AFFINE @ np.diag([2, 2, 2, 1]), np.diag([0.0, 0, 0, 1])
# sform and its code, qform and its code, and the affine that counts
FORMS = {
    "alike": (AFFINE, 1, AFFINE, 1, AFFINE),
    "the sform alone": (OTHER, 1, AFFINE, 0, OTHER),
    "the qform alone": (OTHER, 0, AFFINE, 1, AFFINE),
    "an sform of zeros": (NOTHING, 1, AFFINE, 1, AFFINE),
    "another place": (AFFINE @ np.diag([-1, 1, 1, 1]), 4, AFFINE, 1, AFFINE @ np.diag([-1, 1, 1, 1])),
    "two spacings": (OTHER, 1, AFFINE, 1, None),
    "nothing": (NOTHING, 1, AFFINE, 0, None),
}


def write_nifti(path: Path, sform: np.ndarray, sform_code: int, qform: np.ndarray, qform_code: int) -> Path:
    image = nib.Nifti1Image(VOXELS, None)
    image.set_qform(qform, qform_code)
    header = image.header
    header["srow_x"], header["srow_y"], header["srow_z"] = sform[:3]
    header["sform_code"], header["vox_offset"] = sform_code, 352
    path.write_bytes(header.binaryblock + b"\0" * 4 + VOXELS.tobytes(order="F"))
    return path


@pytest.mark.parametrize(("sform", "sform_code", "qform", "qform_code", "expected"), FORMS.values(), ids=FORMS)
def test_header_and_reader_agree_on_the_affine(
    tmp_path: Path, sform: Any, sform_code: int, qform: Any, qform_code: int, expected: Any
) -> None:
    path = write_nifti(tmp_path / "a.nii", sform, sform_code, qform, qform_code)
    read = LoadImage(reader=ImageFileReader(spatial_dims=3))
    if expected is None:
        for each in (read_grid, load):
            with pytest.raises(ValueError, match=r"must have (one spacing, got|a spacing along)"):
                each(path)
        return
    np.testing.assert_allclose(read(path).affine, expected, atol=1e-5)
    np.testing.assert_allclose(read_grid(path).affine, expected, atol=1e-5)
    np.testing.assert_array_equal(read(path), VOXELS)


def test_a_quaternion_that_rounding_made_too_long_is_read(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", AFFINE, 0, AFFINE, 1)
    content = bytearray(path.read_bytes())
    struct.pack_into("<3f", content, 256, 0.6, 0.8000004, 0.0)
    path.write_bytes(content)
    image = sitk.ReadImage(path)
    expected = np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    np.testing.assert_allclose(read_grid(path).affine[:3, :3], expected, atol=1e-4)
    np.testing.assert_array_equal(load(path), VOXELS)


@pytest.mark.parametrize(("code", "unit"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (7, 1)])
def test_the_unit_of_a_nifti_counts(tmp_path: Path, code: int, unit: float) -> None:
    path = write_nifti(tmp_path / "a.nii", AFFINE, 1, AFFINE, 1)
    content = bytearray(path.read_bytes())
    content[123] = code + 8  # and seconds
    path.write_bytes(content)
    read = LoadImage(reader=ImageFileReader(spatial_dims=3))
    if unit == 1:
        np.testing.assert_array_equal(read_grid(path).affine, AFFINE)
        return
    for each in (read_grid, load):  # 3 m or 3 µm
        with pytest.raises(ValueError, match=r"spacing in the unit that its header names, got (3000|0\.003) mm"):
            each(path)
    content = bytearray(write_nifti(path, AFFINE / [[unit], [unit], [unit], [1]], 1, AFFINE, 0).read_bytes())
    content[123] = code + 8
    path.write_bytes(content)
    for affine in (read_grid(path).affine, read(path).affine):
        np.testing.assert_allclose(affine, AFFINE, rtol=1e-5)


def test_what_its_name_or_its_voxels_are_not_is_said(tmp_path: Path) -> None:
    colour = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name, values in (("packed", VOXELS), ("plain", VOXELS), ("colour", colour), ("waves", VOXELS * 1j)):
        nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / f"{name}.nii{'.gz' * (name != 'plain')}")
    (tmp_path / "packed.nii.gz").rename(tmp_path / "packed.nii")
    (tmp_path / "plain.nii").rename(tmp_path / "plain.nii.gz")
    for name, message in (
        ("packed.nii", r"packed\.nii is compressed by gzip: rename it to packed\.nii\.gz"),
        ("plain.nii.gz", r"plain\.nii\.gz is not compressed by gzip: rename it to plain\.nii\."),
        ("colour.nii.gz", "must hold one real number a voxel, got colour"),
        ("waves.nii.gz", "must hold one real number a voxel, got complex128"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)


# --- headers


def test_values_of_a_voxel_are_counted_and_axes_of_length_one_are_not(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Compose([volume()] * 3), str(tmp_path / "a.mha"))
    assert read_grid(tmp_path / "a.mha").channels == 3
    colour = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, np.eye(4)), tmp_path / "a.nii.gz")
    assert read_grid(tmp_path / "a.nii.gz").channels == 3
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 1, 1), np.int16), np.diag([1, 2, 3, 1])), tmp_path / "a.nii.gz")
    assert read_header(tmp_path / "a.nii.gz") == ((4, 5, 6), (1, 2, 3))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2)])
def test_what_is_not_three_dimensional_is_refused_with_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(
        ValueError, match=rf"a\.nii\.gz must be one 3-D volume, got shape \({', '.join(map(str, shape))}"
    ):
        read_header(tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.JoinSeries([volume(), volume()]), str(tmp_path / "a.nrrd"))
    with pytest.raises(ValueError, match=r"a\.nrrd must be one 3-D volume, got shape \(6, 5, 4, 2\)"):
        read_header(tmp_path / "a.nrrd")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    sitk.WriteImage(volume(), str(tmp_path / "whole.nii.gz"))
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:30])
    (tmp_path / "a.mha").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for name in ("a.nii.gz", "a.mha", "empty"):
        with pytest.raises(ValueError, match=f"{name} must be an intact image .* Replace it"):
            read_header(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.png must be a volume"):
        read_header(tmp_path / "a.png")


def test_what_needs_no_simpleitk_is_read_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    nib.save(nib.Nifti1Image(np.ones((2, 3, 4)), np.eye(4)), tmp_path / "a.nii")
    series = write_dicom(tmp_path / "a.dcm", PICTURE)
    monkeypatch.setattr(readers, "sitk", optional_import("simpleitk_that_is_not_there")[0])
    assert load(tmp_path / "a.png").shape == (9, 6)
    assert load(tmp_path / "a.nii").shape == (2, 3, 4)
    with pytest.raises(ImportError, match="simpleitk_that_is_not_there"):
        load(series)
