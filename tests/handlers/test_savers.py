from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from helpers import read, table
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.networks.nets import resnet10
from monai.transforms import (
    Activationsd,
    Compose,
    DeleteItemsd,
    Lambdad,
    LoadImaged,
    Orientationd,
    ScaleIntensityd,
    SelectItemsd,
)
from PIL import Image
from torch import Tensor, nn

from dissect_monai.data.datasets import ReadableLoader
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.handlers.savers import (
    EmbeddingSaver,
    LabelMapSaver,
    PredictionSaver,
    Saver,
    relative_names,
    save_label_map,
)
from dissect_monai.transforms.spatial import OriginalGridd

NAMES = ["Opacity", "Pleural Thickening"]
CLASSES = ["spleen", "liver"]
SHAPE, SPACING = (7, 6, 5), (1.0, 1.4, 2.5)


def infer(
    loader: ReadableLoader, saver: Saver, network: nn.Module, after: Callable[..., Any], decollate: bool = False
) -> None:
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=loader,
        network=network,
        postprocessing=Compose([after, DeleteItemsd(["image", "image_meta_dict"])]) if not decollate else after,
        val_handlers=[saver],
        decollate=decollate,
    )
    evaluator.logger.setLevel(logging.CRITICAL)
    evaluator.run()


# --- predictions and embeddings of pictures


def folder_of(folder: Path, num_images: int = 5, corrupt: tuple[int, ...] = (1, 4)) -> Dataset:
    """Small pictures, of which some are cut off, under the preprocessing of an inference."""
    items = []
    for index in range(num_images):
        path = folder / f"image {index}.png"
        pixels = np.random.default_rng(index).integers(0, 256, (32, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if index in corrupt:
            path.write_bytes(path.read_bytes()[:200])
        items.append({"image": str(path)})
    reader = ImageFileReader(spatial_dims=2)
    steps = [LoadImaged("image", ensure_channel_first=True, reader=reader), ScaleIntensityd("image")]
    return Dataset(items, Compose(steps))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return resnet10(
        spatial_dims=2, n_input_channels=1, conv1_t_stride=2, widen_factor=0.125, num_classes=len(NAMES)
    ).eval()


def predict(loader: ReadableLoader, saver: Saver, network: nn.Module | None = None) -> None:
    infer(loader, saver, network or classifier(), Activationsd(keys="pred", sigmoid=True))


def expected(dataset: Dataset, indices: list[int], network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(torch.stack([dataset[index]["image"] for index in indices]).as_tensor())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_yields_the_readable_images_and_names_the_others(tmp_path: Path, num_workers: int) -> None:
    loader = ReadableLoader(folder_of(tmp_path), batch_size=2, num_workers=num_workers)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[0], [2, 3]]
    assert [tuple(batch["image"].shape) for batch in batches] == [(1, 1, 24, 32), (2, 1, 24, 32)]
    assert set(loader.errors) == {1, 4}
    assert "image 4.png must be an intact image" in loader.errors[4]
    Image.fromarray(np.zeros((32, 24), dtype=np.uint8)).save(tmp_path / "image 1.png")
    list(loader)
    assert set(loader.errors) == {4}


def test_the_loader_gives_what_a_stock_loader_gives_when_all_is_well(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, corrupt=())
    pairs = zip(ReadableLoader(dataset, batch_size=2), DataLoader(dataset, batch_size=2), strict=True)
    assert all(torch.equal(ours["image"], theirs["image"]) for ours, theirs in pairs)


def test_a_missing_package_is_no_fault_of_a_file(tmp_path: Path) -> None:
    def transform(item: dict[str, Any]) -> None:
        raise ImportError("SimpleITK is not installed")

    with pytest.raises(ImportError, match="SimpleITK is not installed"):
        list(ReadableLoader(Dataset(folder_of(tmp_path).data, transform)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_probabilities_are_written_and_corrupt_files_named_before_they_end_the_run(
    tmp_path: Path, num_workers: int
) -> None:
    dataset, network = folder_of(tmp_path), classifier()
    loader = ReadableLoader(dataset, batch_size=2, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"2 of 5 images could not be read: .*probabilities\.csv names them"):
        predict(loader, PredictionSaver(loader, NAMES, tmp_path / "eval", network), network)
    rows = table(tmp_path / "eval" / "probabilities.csv")
    assert list(rows[0]) == ["image", *NAMES, "error"]
    assert [row["image"] for row in rows] == [item["image"] for item in dataset.data]
    assert [bool(row["error"]) for row in rows] == [row["Opacity"] == "" for row in rows] == [0, 1, 0, 0, 1]
    written = torch.tensor([[float(row[name]) for name in NAMES] for row in rows if not row["error"]])
    torch.testing.assert_close(written, expected(dataset, [0, 2, 3], network).sigmoid(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("output_format", ["csv", "npz"])
def test_embeddings_are_written_and_corrupt_files_named(tmp_path: Path, output_format: str) -> None:
    dataset, network = folder_of(tmp_path), classifier()
    loader = ReadableLoader(dataset, batch_size=2)
    with pytest.raises(ValueError, match=rf"2 of 5 images could not be read: .*embeddings\.{output_format} names them"):
        infer(loader, EmbeddingSaver(loader, tmp_path, output_format), network, Lambdad("pred", lambda pred: pred))
    embeddings, images = expected(dataset, [0, 2, 3], network), [item["image"] for item in dataset.data]
    if output_format == "csv":
        rows = table(tmp_path / "embeddings.csv")
        assert list(rows[0]) == ["image", "error", "e0", "e1"]
        assert [row["image"] for row in rows] == images
        assert [bool(row["error"]) for row in rows] == [0, 1, 0, 0, 1]
        found = np.array([[float(row["e0"]), float(row["e1"])] for row in rows if not row["error"]])
    else:
        with np.load(tmp_path / "embeddings.npz") as arrays:
            assert arrays["image"].tolist() == [images[index] for index in (0, 2, 3)]
            assert arrays["unreadable"].tolist() == [images[1], images[4]]
            assert ["intact image" in error for error in arrays["error"]] == [True, True]
            found = arrays["embedding"]
    np.testing.assert_allclose(found, embeddings, rtol=1e-5)


@pytest.mark.parametrize("saver", [PredictionSaver, EmbeddingSaver])
def test_a_folder_of_nothing_but_corrupt_files_is_written_down_too(tmp_path: Path, saver: Any) -> None:
    loader = ReadableLoader(folder_of(tmp_path, corrupt=(0, 1, 2, 3, 4)), batch_size=2)
    made = (
        PredictionSaver(loader, NAMES, tmp_path, classifier()) if saver is PredictionSaver else saver(loader, tmp_path)
    )
    with pytest.raises(ValueError, match="5 of 5 images could not be read"):
        predict(loader, made)
    assert [bool(row["error"]) for row in table(made.path)] == [True] * 5


@pytest.mark.parametrize(("overlays", "number"), [("none", 0), ("top", 3), ("all", 6)])
def test_draws_the_overlays_that_are_wanted_and_deletes_earlier_ones(
    tmp_path: Path, overlays: str, number: int
) -> None:
    own, old = tmp_path / "overlays" / "notes.png", tmp_path / "overlays" / "00009_gone_Opacity.png"
    own.parent.mkdir()
    for path in (old, own):
        path.write_bytes(b"")
    loader, network = ReadableLoader(folder_of(tmp_path), batch_size=2), classifier()
    with pytest.raises(ValueError, match="2 of 5"):
        predict(loader, PredictionSaver(loader, NAMES, tmp_path, network, overlays), network)
    pictures = sorted((tmp_path / "overlays").glob("0*.png"))
    assert len(pictures) == number
    assert old not in pictures
    assert own.exists()
    for path in pictures:
        assert Image.open(path).size == (24, 32)  # as wide and high as the file
    if overlays == "all":
        assert pictures[1].name == "00000_image_0_Pleural_Thickening.png"


def test_the_name_of_an_overlay_says_that_nothing_speaks_for_the_finding(tmp_path: Path) -> None:
    loader, network = ReadableLoader(folder_of(tmp_path, num_images=1, corrupt=())), classifier()
    network.get_parameter("fc.weight").data[1] = 0
    predict(loader, PredictionSaver(loader, NAMES, tmp_path, network, "all"), network)
    names = sorted(path.name for path in (tmp_path / "overlays").glob("*.png"))
    assert names == ["00000_image_0_Opacity.png", "00000_image_0_Pleural_Thickening_nothing.png"]


def test_top_is_the_finding_furthest_above_its_threshold_and_never_no_finding(tmp_path: Path) -> None:
    probabilities = torch.tensor([[0.3, 0.6, 0.9], [0.0, 0.2, 1.0]])
    names = ["Edema", "Effusion", "No finding"]
    given = dict(zip(names, (0.1, 0.7, 0.5), strict=True))
    for thresholds, top in ((None, [1, 1]), (given, [0, 1]), ({**given, "Edema": float("nan")}, [1, 1])):
        saver = PredictionSaver(ReadableLoader(Dataset([])), names, tmp_path, nn.Identity(), thresholds=thresholds)
        assert saver._score(probabilities).argmax(1).tolist() == top


def test_calls_what_reaches_its_threshold(tmp_path: Path) -> None:
    loader = ReadableLoader(folder_of(tmp_path), batch_size=2)
    thresholds = {NAMES[0]: 0.5, NAMES[1]: float("nan")}
    saver = PredictionSaver(loader, NAMES, tmp_path, classifier(), thresholds=thresholds)
    with pytest.raises(ValueError, match="2 of 5"):
        predict(loader, saver)
    rows = table(tmp_path / "probabilities.csv")
    assert list(rows[0]) == ["image", *NAMES, "Opacity called", "Pleural Thickening called", "error"]
    readable = [row for row in rows if not row["error"]]
    assert [row["Opacity called"] for row in readable] == [str(int(float(row["Opacity"]) >= 0.5)) for row in readable]
    assert all(row["Pleural Thickening called"] == "" for row in rows)
    assert all(row["Opacity called"] == "" for row in rows if row["error"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loader: EmbeddingSaver(loader, "no", checkpoint="x.pt"), "`output_format` must be npz for codes"),
        (lambda loader: LabelMapSaver(loader, ["x"] * 256, "no"), "`class_names` must be at most 255, .* got 256"),
    ],
)
def test_rejects_bad_arguments(make: Callable[[ReadableLoader], Saver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ReadableLoader(Dataset([{}])))


def test_rejects_names_that_are_more_or_fewer_than_the_outputs(tmp_path: Path) -> None:
    loader = ReadableLoader(folder_of(tmp_path))
    with pytest.raises(ValueError, match="`label_names` must name the network's 2 outputs, got 1"):
        predict(loader, PredictionSaver(loader, NAMES[:1], tmp_path, classifier()))


# --- files of label maps


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


def random_map() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, SHAPE)


def blocks() -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1:3, 1:5, 1:4], label[4:6, 2:4, 0:2] = 1, 2
    return label


@pytest.mark.parametrize(("axes", "signs"), product(permutations(range(3)), product((1, -1), repeat=3)))
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
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
    assert [each.name for each in path.parent.iterdir()] == ["a.nii.gz"]


def test_a_failure_leaves_the_former_label_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    label_map = MetaTensor(torch.as_tensor(random_map()[None]), affine=torch.eye(4))
    save_label_map(label_map, path)

    def fail(file: gzip.GzipFile, data: bytes) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(gzip.GzipFile, "write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_label_map(label_map * 0, path)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), random_map())
    assert list(tmp_path.iterdir()) == [path]


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


# --- label maps of volumes


class Oracle(nn.Module):
    """Logits of the class that is the value of the image."""

    def forward(self, images: Tensor) -> Tensor:
        return 10.0 * nn.functional.one_hot(images[:, 0].round().long(), 3).movedim(-1, 1)


def write_volume(path: Path, label: np.ndarray | None = None, affine: np.ndarray | None = None) -> str:
    """An image whose values are its classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (blocks() if label is None else label).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine_of() if affine is None else affine), path)
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


def segment(paths: list[str], output_dir: Path, num_workers: int = 0) -> None:
    """Run an evaluator as the bundle's inference does."""
    steps = Compose(
        [
            LoadImaged("image", reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True),
            Orientationd("image", axcodes="RAS", labels=None),
            SelectItemsd("image"),
        ]
    )
    loader = ReadableLoader(Dataset([{"image": path} for path in paths], steps), num_workers=num_workers)
    infer(loader, LabelMapSaver(loader, CLASSES, output_dir), Oracle(), OriginalGridd("pred"), decollate=True)


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
    segment(paths, tmp_path / "out")
    stems = ["scan", "sub/scan", "patient/series", "two.nii", "two.nii.gz"]
    expected = {f"{stem}_seg{suffix}" for stem in stems for suffix in (".json", ".nii.gz")}
    assert files(tmp_path / "out") == {*expected, "label_maps.csv"}
    for stem, path in zip(stems, paths, strict=True):
        label_map = nib.load(tmp_path / "out" / f"{stem}_seg.nii.gz")
        np.testing.assert_array_equal(np.asarray(label_map.dataobj), blocks())
        # The axes of a series are ITK's.
        affine = nib.load(path).affine if Path(path).is_file() else np.diag([-1, -1.4, 2.5, 1])
        np.testing.assert_allclose(label_map.affine, affine, atol=1e-5)
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


def test_structures_without_voxels_have_no_volume(tmp_path: Path) -> None:
    segment([write_volume(tmp_path / "a.nii.gz", blocks() * (blocks() == 2))], tmp_path / "out")
    assert read(tmp_path / "out" / "a_seg.json")["volumes_ml"] == {"spleen": 0, "liver": 0.028}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_volume_that_cannot_be_read_is_named_when_all_others_are_done(tmp_path: Path, num_workers: int) -> None:
    paths = [write_volume(tmp_path / "data" / f"{name}.nii.gz") for name in "abc"]
    Path(paths[1]).write_bytes(b"no image")
    paths.append(str(tmp_path / "data" / "gone.nii.gz"))
    message = r"2 of 4 images could not be read: .*label_maps\.csv names them and says why\. All others are done"
    with pytest.raises(ValueError, match=message):
        segment(paths, tmp_path / "out", num_workers)
    written = {f"{stem}_seg.{suffix}" for stem in "ac" for suffix in ("nii.gz", "json")}
    assert files(tmp_path / "out") == {*written, "label_maps.csv"}
    rows = table(tmp_path / "out" / "label_maps.csv")
    assert [row["image"] for row in rows] == paths
    assert [bool(row["label_map"]) for row in rows] == [not row["error"] for row in rows] == [1, 0, 1, 0]
    assert "b.nii.gz" in rows[1]["error"]


def test_a_second_run_lists_only_its_own_label_maps(tmp_path: Path) -> None:
    label_map = MetaTensor(torch.as_tensor(blocks()[None]), affine=torch.as_tensor(affine_of()))
    data = [{"image": f"/data/{name}.nii"} for name in "ab"]
    loader: Any = SimpleNamespace(dataset=SimpleNamespace(data=data), errors={}, refuse_unreadable=lambda path: None)
    saver = LabelMapSaver(loader, CLASSES, tmp_path)

    def step(engine: Engine, index: int) -> list[dict[str, Any]]:
        engine.state.batch = [{"index": torch.tensor(index)}]
        return [{"pred": label_map}]

    for indices in ([0, 1], [1]):
        engine = Engine(step)
        saver.attach(engine)
        engine.run(indices, max_epochs=1)
        listed = [bool(row["label_map"]) for row in table(tmp_path / "label_maps.csv")]
        assert listed == [index in indices for index in (0, 1)]
    assert json.loads((tmp_path / "a_seg.json").read_text())["image"] == "/data/a.nii"
