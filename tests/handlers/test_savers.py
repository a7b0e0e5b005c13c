import logging
from collections.abc import Callable, Sequence
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from helpers import Oracle, evaluated, read, small_resnet, table, write_series
from monai.data import Dataset, MetaTensor
from monai.transforms import (
    Activationsd,
    Compose,
    DeleteItemsd,
    LoadImaged,
    Orientationd,
    ScaleIntensityd,
    SelectItemsd,
)
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from dissect_monai.common import PICTURE
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
    steps = after if decollate else Compose([after, DeleteItemsd(["image", "image_meta_dict"])])
    evaluated(network, loader, saver, postprocessing=steps, decollate=decollate)


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
    return small_resnet(num_classes=len(NAMES)).eval()


def predict(loader: ReadableLoader, saver: Saver, network: nn.Module | None = None) -> None:
    infer(loader, saver, network or classifier(), Activationsd(keys="pred", sigmoid=True))


def expected(dataset: Dataset, indices: list[int], network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(torch.stack([dataset[index]["image"] for index in indices]).as_tensor())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_yields_the_readable_images_and_names_the_others(tmp_path: Path, num_workers: int) -> None:
    dataset = folder_of(tmp_path)
    loader = ReadableLoader(dataset, batch_size=2, num_workers=num_workers)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[0], [2, 3]]
    assert torch.equal(batches[1]["image"], torch.stack([dataset[index]["image"] for index in (2, 3)]))
    assert set(loader.errors) == {1, 4}
    assert "image 4.png must be an intact image" in loader.errors[4]
    Image.fromarray(np.eye(32, 24, dtype=np.uint8)).save(tmp_path / "image 1.png")
    list(loader)
    assert set(loader.errors) == {4}


def test_a_missing_package_is_no_fault_of_a_file(tmp_path: Path) -> None:
    def transform(item: dict[str, Any]) -> None:
        raise ImportError("SimpleITK is not installed")

    with pytest.raises(ImportError, match="SimpleITK is not installed"):
        list(ReadableLoader(Dataset(folder_of(tmp_path).data, transform)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_probabilities_and_calls_are_written_before_corrupt_files_end_the_run(tmp_path: Path, num_workers: int) -> None:
    dataset, network = folder_of(tmp_path), classifier()
    loader = ReadableLoader(dataset, batch_size=2, num_workers=num_workers)
    thresholds = {NAMES[0]: 0.5, NAMES[1]: float("nan")}
    with pytest.raises(ValueError, match=r"2 of 5 images could not be read: .*probabilities\.csv names them"):
        predict(loader, PredictionSaver(NAMES, tmp_path / "eval", thresholds=thresholds), network)
    rows = table(tmp_path / "eval" / "probabilities.csv")
    assert list(rows[0]) == ["image", *NAMES, *(f"{name} called" for name in NAMES), "error"]
    assert [row["image"] for row in rows] == [item["image"] for item in dataset.data]
    assert [bool(row["error"]) for row in rows] == [row["Opacity"] == "" for row in rows] == [0, 1, 0, 0, 1]
    readable = [row for row in rows if not row["error"]]
    written = torch.tensor([[float(row[name]) for name in NAMES] for row in readable])
    torch.testing.assert_close(written, expected(dataset, [0, 2, 3], network).sigmoid(), atol=1e-6, rtol=0)
    assert [row["Opacity called"] for row in readable] == [str(int(float(row["Opacity"]) >= 0.5)) for row in readable]
    assert all(row["Pleural Thickening called"] == "" for row in rows)
    assert all(row["Opacity called"] == "" for row in rows if row["error"])


@pytest.mark.parametrize("output_format", ["csv", "npz"])
def test_embeddings_are_written_and_corrupt_files_named(tmp_path: Path, output_format: str) -> None:
    dataset, network = folder_of(tmp_path), classifier()
    loader = ReadableLoader(dataset, batch_size=2)
    with pytest.raises(ValueError, match=rf"2 of 5 images could not be read: .*embeddings\.{output_format} names them"):
        infer(loader, EmbeddingSaver(tmp_path, output_format), network, Activationsd(keys="pred"))
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
    np.testing.assert_allclose(found, embeddings, rtol=1e-4)  # a batch of another size is summed in another order


@pytest.mark.parametrize("saver", [PredictionSaver, EmbeddingSaver])
def test_a_folder_of_nothing_but_corrupt_files_is_written_down_too(tmp_path: Path, saver: Any) -> None:
    loader = ReadableLoader(folder_of(tmp_path, corrupt=(0, 1, 2, 3, 4)), batch_size=2)
    made = saver(*[NAMES] * (saver is PredictionSaver), tmp_path)
    with pytest.raises(ValueError, match="5 of 5 images could not be read"):
        predict(loader, made)
    assert [bool(row["error"]) for row in table(made.path)] == [True] * 5


@pytest.mark.parametrize(("overlays", "number"), [("none", 0), ("top", 3), ("all", 6)])
def test_draws_the_overlays_that_are_wanted(tmp_path: Path, overlays: str, number: int) -> None:
    loader = ReadableLoader(folder_of(tmp_path), batch_size=2)
    with pytest.raises(ValueError, match="2 of 5"):
        predict(loader, PredictionSaver(NAMES, tmp_path, overlays))
    pictures = sorted((tmp_path / "overlays").glob("*.png"))
    assert len(pictures) == number
    for path in pictures:
        width, height = Image.open(path).size
        assert (width, height > 512) == (384, True)  # the file, enlarged, below finding and probability
    if overlays == "all":
        assert pictures[1].name == "00000_image_0_Pleural_Thickening.png"


def test_a_second_run_knows_its_own_results_alone(tmp_path: Path) -> None:
    loader, saver = ReadableLoader(folder_of(tmp_path, corrupt=())), PredictionSaver(NAMES, tmp_path)
    predict(loader, saver)
    (tmp_path / "image 1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 5"):
        predict(loader, saver)
    assert [row["Opacity"] == "" for row in table(saver.path)] == [False, True, False, False, False]


def test_top_is_the_finding_furthest_above_its_threshold_and_never_no_finding(tmp_path: Path) -> None:
    probabilities = torch.tensor([[0.3, 0.6, 0.9], [0.0, 0.2, 1.0]])
    names = ["Edema", "Effusion", "No finding"]
    given = dict(zip(names, (0.1, 0.7, 0.5), strict=True))
    for thresholds, top in ((None, [1, 1]), (given, [0, 1]), ({**given, "Edema": float("nan")}, [1, 1])):
        saver = PredictionSaver(names, tmp_path, thresholds=thresholds)
        assert saver._score(probabilities).argmax(1).tolist() == top


def test_refuses_more_classes_than_uint8_has_thresholds_of_others_and_codes_in_a_csv() -> None:
    with pytest.raises(ValueError, match=r"`class_names` must be at most 255, .* got 256"):
        LabelMapSaver(["x"] * 256, "no")
    with pytest.raises(ValueError, match="`thresholds` must be of a, b, in"):
        PredictionSaver(["a", "b"], "no", thresholds={"b": 0.5, "a": 0.1})
    with pytest.raises(ValueError, match="`output_format` must be npz for codes"):
        EmbeddingSaver("no", codes=SimpleNamespace())


def test_overlays_of_an_earlier_run_are_deleted(tmp_path: Path) -> None:
    old, others = tmp_path / "overlays" / "00007_old_Opacity.png", tmp_path / "overlays" / "notes.txt"
    for path in (old, others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    predict(ReadableLoader(folder_of(tmp_path, num_images=1, corrupt=())), PredictionSaver(NAMES, tmp_path))
    assert not old.exists()
    assert others.exists()


def test_rejects_names_that_are_more_or_fewer_than_the_outputs(tmp_path: Path) -> None:
    loader = ReadableLoader(folder_of(tmp_path))
    with pytest.raises(ValueError, match="`label_names` must name the network's 2 outputs, got 1"):
        predict(loader, PredictionSaver(NAMES[:1], tmp_path))


# --- files of label maps


ROTATIONS = [np.eye(3), Rotation.from_euler("xz", [-7, 12], degrees=True).as_matrix()]


def affine_of(axes: Sequence[int] = (0, 1, 2), signs: Sequence[int] = (1, 1, 1), rotation: Any = ROTATIONS[0]) -> Any:
    """Axis i of the array runs along axis `axes[i]` of the patient, or against it; all of that may be rotated."""
    directions = np.eye(3)[:, list(axes)] * signs * SPACING
    return nib.affines.from_matvec(rotation @ directions, (-31.5, 12.25, 7.1))


def blocks() -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1:3, 1:5, 1:4], label[4:6, 2:4, 0:2] = 1, 2
    return label


def store(folder: Path, values: np.ndarray, affine: Any = None) -> Path:
    path = folder / "deep" / "er" / "a.nii.gz"
    save_label_map(MetaTensor(torch.as_tensor(values[None]), affine=affine_of() if affine is None else affine), path)
    return path


@pytest.mark.parametrize(("axes", "signs"), [*product(permutations(range(3)), product((1, -1), repeat=3))])
def test_a_label_map_comes_back_on_the_same_grid(tmp_path: Path, axes: Any, signs: Any) -> None:
    values = np.random.default_rng(0).integers(0, 3, SHAPE)
    for rotation in ROTATIONS:
        affine = affine_of(axes, signs, rotation)
        path = store(tmp_path, values, affine)
        image, itk = nib.load(path), SimpleITK.ReadImage(str(path))
        for stored in (image.affine, image.get_qform(), image.get_sform()):
            np.testing.assert_allclose(stored, affine, rtol=0, atol=1e-5)
        np.testing.assert_allclose(image.header.get_zooms(), SPACING, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(image.dataobj), values)
        np.testing.assert_allclose(itk.GetSpacing(), SPACING, rtol=1e-5)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(itk).T, values)


def test_every_value_of_uint8_can_be_stored(tmp_path: Path) -> None:
    values = np.arange(256).reshape(8, 8, 4)
    image = nib.load(store(tmp_path, values))
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj), values)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)


@pytest.mark.parametrize(
    ("images", "names"),
    [
        ([], []),
        (["/data/scan.NII.GZ"], ["scan"]),
        (["/data/a/scan.nii.gz", "/data/b/scan.nrrd", "/data/top.nii"], ["a/scan", "b/scan", "top"]),
        (["/data", "/data/more/scan.mha"], ["data", "data/more/scan"]),
        (["/data/scan.nii.gz", "/data/scan.nrrd"], ["scan.nii.gz", "scan.nrrd"]),
        (["/data/1.2.840.113", "/data/1.2.840.114"], ["1.2.840.113", "1.2.840.114"]),
        (["/data/a.mha", "/data/a.nrrd", "/data/a.mha.nii"], ["a.mha", "a.nrrd", "a.mha.nii"]),
        (["/data/a.png", "/data/b.JPG", "/data/b.tif"], ["a", "b.JPG", "b.tif"]),
    ],
)
def test_every_image_has_a_name_of_its_own(images: list[str], names: list[str]) -> None:
    assert relative_names(images) == names
    assert len(set(names)) == len(images)


# --- label maps of volumes


def write_volume(path: Path, label: np.ndarray | None = None, affine: np.ndarray | None = None) -> str:
    """An image whose values are its classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (blocks() if label is None else label).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine_of() if affine is None else affine), path)
    return str(path)


def test_label_maps_lie_as_their_images_do_with_names_beside_them(tmp_path: Path) -> None:
    turned = affine_of((2, 0, 1), (-1, 1, -1))
    dicom = SimpleITK.GetImageFromArray(blocks().astype(np.int16).T)
    dicom.SetSpacing(SPACING)
    paths = [
        write_volume(tmp_path / "data" / "scan.nii.gz"),
        write_volume(tmp_path / "data" / "sub" / "scan.nii.gz", affine=turned),
        str(write_series(tmp_path / "data" / "patient", dicom)),
        write_volume(tmp_path / "data" / "two.nii"),
        write_volume(tmp_path / "data" / "two.nii.gz", blocks() * (blocks() == 2)),
    ]
    load = LoadImaged("image", reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True)
    steps = Compose([load, Orientationd("image", axcodes="RAS", labels=None), SelectItemsd("image")])
    loader = ReadableLoader(Dataset([{"image": path} for path in paths], steps))
    infer(loader, LabelMapSaver(CLASSES, tmp_path / "out"), Oracle(3), OriginalGridd("pred"), decollate=True)
    stems = ["scan", "sub/scan", "patient", "two.nii", "two.nii.gz"]
    expected = {f"{stem}_seg{suffix}" for stem in stems for suffix in (".json", ".nii.gz")}
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*expected, "label_maps.csv"}
    for stem, path in zip(stems, paths, strict=True):
        label_map = nib.load(tmp_path / "out" / f"{stem}_seg.nii.gz")
        lost = stem == "two.nii.gz"
        np.testing.assert_array_equal(np.asarray(label_map.dataobj), blocks() * (blocks() == 2) if lost else blocks())
        # The axes of a series are ITK's.
        affine = nib.load(path).affine if Path(path).is_file() else np.diag([-1, -1.4, 2.5, 1])
        np.testing.assert_allclose(label_map.affine, affine, atol=1e-5)
        assert read(tmp_path / "out" / f"{stem}_seg.json") == {
            "image": path,
            "label_map": f"{Path(stem).name}_seg.nii.gz",
            "labels": {"0": "background", "1": "spleen", "2": "liver"},
            "volumes_ml": {"spleen": 0 if lost else 24 * 3.5 / 1000, "liver": 8 * 3.5 / 1000},
        }
    rows = table(tmp_path / "out" / "label_maps.csv")
    assert [row["image"] for row in rows] == paths
    assert [row["label_map"] for row in rows] == [str(tmp_path / "out" / f"{stem}_seg.nii.gz") for stem in stems]
    assert not any(row["error"] for row in rows)


@pytest.mark.parametrize(
    ("mask_values", "expected"),
    [
        (None, [0, 1, 2]),
        ({"spleen": 255}, [0, 255, 2]),
        ({"spleen": 85, "liver": 300}, [0, 85, 300]),
        ({"spleen": [255, 0, 0], "liver": [0, 0, 9]}, [[0] * 3, [255, 0, 0], [0, 0, 9]]),
        ({"spleen": [255, 0, 0], "liver": [0, 0, 9], "background": [7, 7, 7]}, [[7] * 3, [255, 0, 0], [0, 0, 9]]),
    ],
)
def test_masks_of_pictures_have_the_values_or_colours_of_training(
    tmp_path: Path, mask_values: Any, expected: Any
) -> None:
    classes = np.random.default_rng(0).integers(0, 3, (5, 7))  # rows and columns
    for spacing, key in ((1.0, "areas_pixels"), (0.5, "areas_mm2")):
        saver = LabelMapSaver(CLASSES, tmp_path, mask_values)
        picture = MetaTensor(classes.T[None, ..., None], affine=np.diag([spacing, spacing, 1, 1]), meta={PICTURE: 255})
        saver.loader = SimpleNamespace(dataset=Dataset([{"image": "/data/a.jpg"}]))  # type: ignore[assignment]
        saver.names = ["a"]
        path = saver._save(0, picture)
        assert path == tmp_path / "a_seg.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.array(expected)[classes])
        said = read(tmp_path / "a_seg.json")
        assert said[key] == {name: (classes == index).sum() * spacing**2 for index, name in enumerate(CLASSES, 1)}
        assert len(said["labels"]) == 3
