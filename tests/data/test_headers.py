from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers import volume, write_series
from monai.transforms import Compose, LoadImage, Orientation

from dissect_monai.data.headers import read_header
from dissect_monai.data.readers import ImageFileReader


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.mhd", "a.nrrd", "series"])
def test_shape_and_spacing_are_those_of_the_volume_in_patient_axes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "series":
        write_series(path, volume())
    else:
        sitk.WriteImage(volume(), str(path))
    header = read_header(path)
    load = Compose([LoadImage(reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True)])
    expected = Orientation("RAS", labels=None)(load(path))
    assert header.shape == tuple(expected.shape[1:]) == (5, 6, 4)
    np.testing.assert_allclose(header.spacing, expected.pixdim, rtol=1e-5)
    assert header.channels == 1


def test_axes_of_length_one_at_the_end_do_not_count(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 1, 1), np.int16), np.diag([1, 2, 3, 1])), tmp_path / "a.nii.gz")
    assert read_header(tmp_path / "a.nii.gz") == ((4, 5, 6), (1, 2, 3), 1)


def test_values_of_a_voxel_are_counted(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Compose([volume()] * 3), str(tmp_path / "a.mha"))
    assert read_header(tmp_path / "a.mha").channels == 3
    colour = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, np.eye(4)), tmp_path / "a.nii.gz")
    assert read_header(tmp_path / "a.nii.gz").channels == 3


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2)])
def test_what_is_not_three_dimensional_is_refused_with_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(
        ValueError, match=rf"a\.nii\.gz must be one 3-D volume, got shape \({', '.join(map(str, shape))}"
    ):
        read_header(tmp_path / "a.nii.gz")


def test_frames_of_other_formats_are_refused_too(tmp_path: Path) -> None:
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


def test_a_volume_without_spacing_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
    image.header["pixdim"][1:4] = 1
    image.set_sform(np.diag([1, 0, 1, 1]), code=1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii must have a spacing along three axes"):
        read_header(tmp_path / "a.nii")
