from __future__ import annotations

import csv
import json
import logging
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from helpers import read
from ignite.engine import Engine
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.transforms import Compose, LoadImaged, Orientationd, SelectItemsd
from torch import Tensor, nn

from dissect_monai.data.datasets import ReadableLoader
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.handlers.label_maps import LabelMapSaver, relative_names, save_label_map
from dissect_monai.transforms.labels import LargestComponentsd, chosen_structures
from dissect_monai.transforms.spatial import OriginalGridd

CLASSES = ["spleen", "liver"]
SHAPE, SPACING = (7, 6, 5), (1.0, 1.4, 2.5)
ORIENTATIONS = list(product(permutations(range(3)), product((1, -1), repeat=3)))


def affine_of(
    axes: tuple[int, ...] = (0, 1, 2), signs: tuple[int, ...] = (1, 1, 1), rotation: np.ndarray | None = None
) -> np.ndarray:
    """Axis i of the array runs along axis `axes[i]` of the patient, or against it; all of that may be rotated."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, column] = sign * SPACING[column]
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12.25, 7.1)
    return affine


def rotation_about(axis: int, degrees: float) -> np.ndarray:
    first, second = (each for each in range(3) if each != axis)
    matrix = np.eye(3)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix[first, first] = matrix[second, second] = cos
    matrix[first, second], matrix[second, first] = -sin, sin
    return matrix


def random_map(high: int = 3, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape)


def blocks() -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1:3, 1:5, 1:4], label[4:6, 2:4, 0:2] = 1, 2
    return label


# --- files


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_a_label_map_comes_back_on_the_same_grid(tmp_path: Path, axes: Any, signs: Any) -> None:
    for rotation in (None, rotation_about(2, 12) @ rotation_about(0, -7)):
        affine = affine_of(axes, signs, rotation)
        save_label_map(MetaTensor(torch.as_tensor(random_map()[None]), affine=affine), tmp_path / "a.nii.gz")
        image = nib.load(tmp_path / "a.nii.gz")
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(image.dataobj), random_map())
        for stored in (image.affine, image.get_qform(), image.get_sform()):
            np.testing.assert_allclose(stored, affine, rtol=0, atol=1e-5)
        np.testing.assert_allclose(image.header.get_zooms(), SPACING, rtol=1e-6)
        itk = SimpleITK.ReadImage(str(tmp_path / "a.nii.gz"))
        np.testing.assert_allclose(itk.GetSpacing(), SPACING, rtol=1e-5)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(itk).T, random_map())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_every_value_of_uint8_can_be_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    values = np.arange(256).reshape(8, 8, 4)
    path = tmp_path / "deep" / "er" / "a.nii.gz"
    save_label_map(MetaTensor(torch.as_tensor(values[None]).to(dtype), affine=torch.eye(4)), path)
    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), values)
    assert np.asarray(image.dataobj).dtype == np.uint8
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
    assert [each.name for each in path.parent.iterdir()] == ["a.nii.gz"]


def test_a_failure_leaves_the_former_label_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    label_map = MetaTensor(torch.as_tensor(random_map()[None]), affine=torch.eye(4))
    save_label_map(label_map, path)

    def fail(image: Any, file: Path) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_label_map(label_map * 0, path)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), random_map())
    assert list(tmp_path.iterdir()) == [path]


# --- names


@pytest.mark.parametrize(
    ("images", "names"),
    [
        ([], []),
        (["/data/scan.nii.gz"], ["scan"]),
        (["/data/scan.NII.GZ"], ["scan"]),
        (["/data/a.nii.gz", "/data/b.mha"], ["a", "b"]),
        (["/data/a/scan.nii.gz", "/data/b/scan.nrrd"], ["a/scan", "b/scan"]),
        (["/data/a/scan.nii.gz", "/data/top.nii"], ["a/scan", "top"]),
        (["/one/scan.nii", "/two/scan.nii"], ["one/scan", "two/scan"]),
        (["/data/p1/series", "/data/p2/series"], ["p1/series", "p2/series"]),
        (["/data/p1", "/data/p2/scan.mha"], ["p1", "p2/scan"]),
        (["/data", "/data/more/scan.mha"], ["data", "data/more/scan"]),
        (["/data/scan.nii.gz", "/data/scan.nrrd"], ["scan.nii.gz", "scan.nrrd"]),
        (["/data/scan", "/data/scan.mha", "/data/b.mha"], ["scan", "scan.mha", "b"]),
        (["/data/1.2.840.113", "/data/1.2.840.114"], ["1.2.840.113", "1.2.840.114"]),
        (["/data/a.mha", "/data/a.nrrd", "/data/a.mha.nii"], ["a.mha", "a.nrrd", "a.mha.nii"]),
    ],
)
def test_every_image_has_a_name_of_its_own(images: list[str], names: list[str]) -> None:
    assert relative_names(images) == names
    assert len(set(names)) == len(images)


@pytest.mark.parametrize(
    ("names", "expected"),
    [("none", []), ("all", CLASSES), ("liver", ["liver"]), (["liver", "spleen"], ["liver", "spleen"]), ([], [])],
)
def test_structures_are_chosen_by_name(names: Any, expected: list[str]) -> None:
    assert chosen_structures(names, CLASSES) == expected


@pytest.mark.parametrize(("names", "got"), [("heart", "heart"), (["liver", "heart", "lung"], "heart, lung"), (3, "3")])
def test_structures_that_are_unknown_are_refused(names: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"must be none, all, or among spleen, liver, got {got}"):
        chosen_structures(names, CLASSES)


# --- cleaning


def islands() -> MetaTensor:
    """Two parts of each structure."""
    label = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    label[0, 0, 0, 0], label[0, 2:5, 0, 0] = 1, 1
    label[0, 0, 4, 4], label[0, 2:5, 4, 4] = 2, 2
    return MetaTensor(label, affine=torch.diag(torch.tensor([*SPACING, 1.0])), meta={"filename_or_obj": "a"})


@pytest.mark.parametrize("structures", [["spleen"], ["liver"], CLASSES, []])
def test_only_the_largest_part_of_the_chosen_structures_stays(structures: list[str]) -> None:
    given = islands()
    item = LargestComponentsd("pred", CLASSES, structures)({"pred": given, "other": 1})
    result = item["pred"]
    for value, name in enumerate(CLASSES, 1):
        assert int((result == value).sum()) == (3 if name in structures else 4)
    assert (result.dtype, item["other"]) == (torch.uint8, 1)
    np.testing.assert_allclose(result.affine, given.affine)
    assert result.meta["filename_or_obj"] == "a"
    assert torch.equal(given.as_tensor(), islands().as_tensor())


def test_unknown_structures_are_refused() -> None:
    with pytest.raises(ValueError, match="'heart' is not in list"):
        LargestComponentsd("pred", CLASSES, ["heart"])


# --- the evaluator


class Oracle(nn.Module):
    """Logits of the class that is the value of the image."""

    def forward(self, images: Tensor) -> Tensor:
        return 10.0 * nn.functional.one_hot(images[:, 0].round().long(), 3).movedim(-1, 1)


def write_volume(path: Path, label: np.ndarray | None = None, affine: np.ndarray | None = None) -> str:
    """An image whose values are its classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(
        nib.Nifti1Image(
            (blocks() if label is None else label).astype(np.float32), affine_of() if affine is None else affine
        ),
        path,
    )
    return str(path)


def write_series(folder: Path) -> str:
    """A DICOM series, a file a slice."""
    folder.mkdir(parents=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    image = SimpleITK.GetImageFromArray(blocks().astype(np.int16).T)
    image.SetSpacing(SPACING)
    for index in range(SHAPE[2]):
        plane = image[:, :, index]
        tags = {
            "0008|0060": "CT", "0020|000e": "1.2.3", "0020|0013": str(index), "0008|0018": f"1.2.3.{index + 1}",
            "0020|0032": "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, index)))),
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }  # fmt: skip
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{index}.dcm"))
        writer.Execute(plane)
    return str(folder)


def segmented(
    paths: list[str], output_dir: Path, num_workers: int = 0, class_names: list[str] = CLASSES
) -> LabelMapSaver:
    """Run an evaluator as the bundle's inference does."""
    steps = Compose(
        [
            LoadImaged("image", reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True),
            Orientationd("image", axcodes="RAS", labels=None),
            SelectItemsd("image"),
        ]
    )
    loader = ReadableLoader(Dataset([{"image": path} for path in paths], steps), num_workers=num_workers)
    saver = LabelMapSaver(loader, class_names, output_dir)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=loader,
        network=Oracle(),
        inferer=SimpleInferer(),
        postprocessing=OriginalGridd("pred"),
        val_handlers=[saver],
    )
    evaluator.logger.setLevel(logging.CRITICAL)
    evaluator.run()
    return saver


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_label_maps_lie_as_their_images_do_with_names_beside_them(tmp_path: Path) -> None:
    turned = affine_of((2, 0, 1), (-1, 1, -1))
    paths = [
        write_volume(tmp_path / "data" / "scan.nii.gz"),
        write_volume(tmp_path / "data" / "sub" / "scan.nii.gz", affine=turned),
        write_series(tmp_path / "data" / "patient" / "series"),
        write_volume(tmp_path / "data" / "two.nii"),
        write_volume(tmp_path / "data" / "two.nii.gz"),
    ]
    segmented(paths, tmp_path / "out")
    stems = ["scan", "sub/scan", "patient/series", "two.nii", "two.nii.gz"]
    expected = {f"{stem}_seg{suffix}" for stem in stems for suffix in (".json", ".nii.gz")}
    assert files(tmp_path / "out") == {*expected, "label_maps.csv"}
    for stem, path in zip(stems, paths, strict=True):
        label_map = nib.load(tmp_path / "out" / f"{stem}_seg.nii.gz")
        np.testing.assert_array_equal(np.asarray(label_map.dataobj), blocks())
        if Path(path).is_file():
            np.testing.assert_allclose(label_map.affine, nib.load(path).affine, atol=1e-5)
        assert read(tmp_path / "out" / f"{stem}_seg.json") == {
            "image": path,
            "label_map": f"{Path(stem).name}_seg.nii.gz",
            "labels": {"0": "background", "1": "spleen", "2": "liver"},
            "volumes_ml": {"spleen": 24 * 3.5 / 1000, "liver": 8 * 3.5 / 1000},
        }
    rows = table(tmp_path / "out" / "label_maps.csv")
    assert [row["image"] for row in rows] == paths
    assert [row["label_map"] for row in rows] == [str(tmp_path / "out" / f"{stem}_seg.nii.gz") for stem in stems]
    assert not any(row["error"] for row in rows)


def test_a_series_has_the_affine_of_its_slices(tmp_path: Path) -> None:
    path = write_series(tmp_path / "series")
    segmented([path], tmp_path / "out")
    affine = nib.load(tmp_path / "out" / "series_seg.nii.gz").affine
    np.testing.assert_allclose(affine, np.diag([-1, -1.4, 2.5, 1]), atol=1e-5)  # ITK's axes in RAS


def test_structures_without_voxels_have_no_volume(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "a.nii.gz", blocks() * (blocks() == 2))
    segmented([path], tmp_path / "out")
    assert read(tmp_path / "out" / "a_seg.json")["volumes_ml"] == {"spleen": 0, "liver": 0.028}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_volume_that_cannot_be_read_is_named_when_all_others_are_done(tmp_path: Path, num_workers: int) -> None:
    paths = [str(tmp_path / "data" / f"{name}.nii.gz") for name in "abc"]
    for path in paths:
        write_volume(Path(path))
    Path(paths[1]).write_bytes(b"no image")
    paths.append(str(tmp_path / "data" / "gone.nii.gz"))
    out = tmp_path / "out"
    message = r"2 of 4 images could not be read: .*label_maps\.csv names them and says why\. All others are done"
    with pytest.raises(ValueError, match=message):
        segmented(paths, out, num_workers)
    assert files(out) == {
        "a_seg.nii.gz", "a_seg.json", "c_seg.nii.gz", "c_seg.json", "label_maps.csv",
    }  # fmt: skip
    rows = table(out / "label_maps.csv")
    assert [row["image"] for row in rows] == paths
    assert [bool(row["label_map"]) for row in rows] == [True, False, True, False]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert "b.nii.gz" in rows[1]["error"]


def test_a_table_is_written_even_if_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 1 images could not be read"):
        segmented([str(tmp_path / "a.nii.gz")], tmp_path / "out")
    assert files(tmp_path / "out") == {"label_maps.csv"}
    assert table(tmp_path / "out" / "label_maps.csv")[0]["label_map"] == ""


def test_a_second_run_lists_only_its_own_label_maps(tmp_path: Path) -> None:
    label_map = MetaTensor(torch.as_tensor(blocks()[None]), affine=torch.as_tensor(affine_of()))
    data = [{"image": f"/data/{name}.nii"} for name in "ab"]
    loader: Any = SimpleNamespace(dataset=SimpleNamespace(data=data), errors={}, refuse_unreadable=lambda path: None)
    saver = LabelMapSaver(loader, CLASSES, tmp_path)

    def run(indices: list[int]) -> None:
        def step(engine: Engine, index: int) -> list[dict[str, Any]]:
            engine.state.batch = [{"index": torch.tensor(index)}]
            return [{"pred": label_map}]

        engine = Engine(step)
        saver.attach(engine)
        engine.run(indices, max_epochs=1)

    run([0, 1])
    assert [bool(row["label_map"]) for row in table(tmp_path / "label_maps.csv")] == [True, True]
    run([1])
    assert [bool(row["label_map"]) for row in table(tmp_path / "label_maps.csv")] == [False, True]
    assert json.loads((tmp_path / "a_seg.json").read_text())["image"] == "/data/a.nii"


def test_more_structures_than_uint8_can_number_are_refused(tmp_path: Path) -> None:
    loader: Any = SimpleNamespace()
    LabelMapSaver(loader, [str(index) for index in range(255)], tmp_path)
    with pytest.raises(ValueError, match="`class_names` must be at most 255, which uint8 can number, got 256"):
        LabelMapSaver(loader, [str(index) for index in range(256)], tmp_path)
