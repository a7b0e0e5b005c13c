"""What a folder may hold that is no image: links in circles, pipes, holes, broken lists."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import refused, write_images

from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.readers import ImageFileReader, read_grid

Make = Callable[[Path], object]


def names(folder: Path, spatial_dims: int = 2) -> list[str]:
    return [os.path.relpath(item["image"], folder) for item in read_datalist(folder, spatial_dims).training]


# --- folders without a list


def test_files_come_once_whatever_links_there_are_and_pipes_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "other" / "deep", 1)
    write_images(tmp_path / "set" / "images", 2)
    os.mkfifo(tmp_path / "set" / "pipe.png")
    for link, target in {
        "images/up": "..", "a": "images", "images/above": "../..", "images/twin.png": "0.png", "self": "self",
        "z": "../other/deep", "y": "../other/deep", "images/2.png": "../../other/deep/0.png", "zero.png": "/dev/zero",
        "annex.png": "gone",
    }.items():  # fmt: skip
        (tmp_path / "set" / link).symlink_to(target)
    # What a link to nothing stands for is missing, which is said when it is read.
    assert names(tmp_path / "set") == ["annex.png", "images/0.png", "images/1.png", "y/0.png"]
    assert "Left out, as they are no files: " in caplog.text
    assert "links to files of the same folder: " in caplog.text


def test_links_to_one_file_elsewhere_are_files(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / ".annex", 1)
    for index in range(3):
        (tmp_path / "set" / f"{index}.png").symlink_to(".annex/0.png")
    assert names(tmp_path / "set") == ["0.png", "1.png", "2.png"]


BESIDE = {
    "imagesTr/c_{}_0000.nii.gz": "labelsTr/c_{}.nii.gz", "s{}/ct.nii.gz": "s{}/segmentations/liver.nii.gz",
    "p{}/t1.nii": "p{}/p_seg.nii", "volume-{}.nii": "segmentation-{}.nii", "img000{}.nii.gz": "label000{}.nii.gz",
    "a{}.nrrd": "a{}.seg.nrrd", "a{}/T1.nii": "a{}/aparc+aseg.nii", "b{}/ct.nii": "b{}/roi_left.nii",
    "c/sub-{}_T1w.nii": "c/sub-{}_dseg.nii", "d{}.png": "contours/d{}.png", "e{}.png": "leftMask/e{}.png",
    "CXR_{}.png": "CXR_{}_mask.png", "COVID/images/{}.png": "COVID/masks/{}.png",
}  # fmt: skip


@pytest.mark.parametrize(("image", "label"), BESIDE.items())
def test_label_maps_beside_images_are_left_out(
    tmp_path: Path, image: str, label: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (each.format(index) for each in (image, label) for index in range(2)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    dims = 2 if image.endswith("png") else 3
    assert names(tmp_path, dims) == [image.format(0), image.format(1)]
    assert "Left out, as they are called like label maps: 2 files" in caplog.text
    if label.startswith("labelsTr/"):  # named itself, a folder of label maps is what is meant
        assert len(names(tmp_path / "labelsTr", dims)) == 2


# --- what is no file


def hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


ODD = {
    "must be a file, got a pipe": os.mkfifo,
    "must be a file, got a pipe, a socket or a device": lambda path: path.symlink_to("/dev/zero"),
    "must be stored whole, got 1099511627776 bytes": hole,
}


NAMES = ("a.png", "a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "a.dcm", "series")
PIPE, *OTHERS = ODD.items()


@pytest.mark.parametrize(
    ("name", "message", "make"), [*((name, *PIPE) for name in NAMES), *(("a.nii", *other) for other in OTHERS)]
)
def test_what_would_hang_is_refused_unopened(tmp_path: Path, name: str, make: Make, message: str) -> None:
    path = tmp_path / name
    if name == "series":
        path.mkdir()
    elif name == "a.mhd":  # whose voxels are in a file of their own
        path.write_text("NDims = 3\nDimSize = 4 4 4\nElementType = MET_CHAR\nElementDataFile = a.raw")
    make({"series": path / "1.dcm", "a.mhd": tmp_path / "a.raw"}.get(name, path))
    for read in (ImageFileReader().get_data, *([] if name == "a.png" else [read_grid])):
        with refused(message):
            read(path)


@pytest.mark.parametrize("sform", [[0] * 12, [np.nan] * 12, [np.inf] * 12, [1, *[0] * 9, 1, 0]])
def test_an_affine_without_spacing_is_refused_by_header_and_reader_alike(tmp_path: Path, sform: list[float]) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<hh", content, 252, 0, 1)  # codes of qform and sform
    struct.pack_into("<3f", content, 80, *[sform[0]] * 3)  # spacing
    struct.pack_into("<12f", content, 280, *sform)
    (tmp_path / "a.nii").write_bytes(content)
    for read in (read_grid, ImageFileReader(3).get_data):
        with refused("a.nii must have a spacing along three axes"):
            read(tmp_path / "a.nii")


# --- lists


BROKEN = {
    "got: .*recursion": "[" * 10**5 + "]" * 10**5,
    "got: .*surrogates": '{"training": ["\\udcff.png"]}',
}


@pytest.mark.parametrize(("message", "make"), [*ODD.items(), *BROKEN.items()])
def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path, make: Make | str, message: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(make) if isinstance(make, str) else make(path)
    with refused(f"dataset.json must be .*{message.removeprefix('must be ')}"):
        read_datalist(tmp_path)


def test_splits_must_not_share_an_image_by_a_link_either(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 2)
    (tmp_path / "a" / "v.png").symlink_to("0.png")
    (tmp_path / "b").symlink_to("a")
    for other in ("a/v.png", "b/0.png"):
        (tmp_path / "dataset.json").write_text(json.dumps({"training": ["a/0.png"], "validation": [other]}))
        with pytest.raises(ValueError, match=rf"must share no image, got 1 in both: .*a/0\.png \(see .*{other}\)"):
            read_datalist(tmp_path)
    with pytest.raises(ValueError, match="one folder or several different ones"):
        read_datalist([tmp_path / "a", tmp_path / "b"])
