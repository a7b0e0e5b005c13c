from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import resnet10
from monai.transforms import Activationsd, Compose, DeleteItemsd, LoadImaged, ScaleIntensityd
from PIL import Image
from torch import nn

from dissect_monai.data.datasets import ReadableLoader
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.handlers.calibration import Calibration, read_calibration, write_calibration
from dissect_monai.handlers.predictions import PredictionSaver

NAMES = ["Opacity", "Pleural Thickening"]


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


def infer(loader: ReadableLoader, saver: PredictionSaver, network: nn.Module) -> None:
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=loader,
        network=network,
        postprocessing=Compose(
            [Activationsd(keys="pred", sigmoid=True), DeleteItemsd(keys=["image", "image_meta_dict"])]
        ),
        val_handlers=[saver],
        decollate=False,
    )
    evaluator.logger.setLevel(logging.CRITICAL)
    evaluator.run()


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- loader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_yields_the_readable_images_and_names_the_others(tmp_path: Path, num_workers: int) -> None:
    loader = ReadableLoader(folder_of(tmp_path), batch_size=2, num_workers=num_workers)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[0], [2, 3]]
    assert [tuple(batch["image"].shape) for batch in batches] == [(1, 1, 24, 32), (2, 1, 24, 32)]
    assert set(loader.errors) == {1, 4}
    assert "image 4.png must be an intact image" in loader.errors[4]


def test_gives_what_a_stock_loader_gives_when_all_is_well(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, corrupt=())
    pairs = zip(ReadableLoader(dataset, batch_size=2), DataLoader(dataset, batch_size=2), strict=True)
    assert all(torch.equal(ours["image"], theirs["image"]) for ours, theirs in pairs)


def test_every_pass_names_the_unreadable_afresh(tmp_path: Path) -> None:
    loader = ReadableLoader(folder_of(tmp_path))
    list(loader)
    Image.fromarray(np.zeros((32, 24), dtype=np.uint8)).save(tmp_path / "image 1.png")
    list(loader)
    assert set(loader.errors) == {4}


def test_a_missing_package_is_no_fault_of_a_file(tmp_path: Path) -> None:
    def transform(item: dict[str, Any]) -> None:
        raise ImportError("SimpleITK is not installed")

    with pytest.raises(ImportError, match="SimpleITK is not installed"):
        list(ReadableLoader(Dataset(folder_of(tmp_path).data, transform)))


# ---- predictions -------------------------------------------------------------------------------------------------


def test_writes_the_probabilities_of_every_image(tmp_path: Path) -> None:
    dataset, network = folder_of(tmp_path, corrupt=()), classifier()
    loader = ReadableLoader(dataset, batch_size=2)
    infer(loader, PredictionSaver(loader, NAMES, tmp_path / "eval"), network)
    rows = table(tmp_path / "eval" / "probabilities.csv")
    assert list(rows[0]) == ["image", *NAMES, "error"]
    assert [row["image"] for row in rows] == [item["image"] for item in dataset.data]
    images = torch.stack([item["image"] for item in dataset]).as_tensor()
    with torch.no_grad():
        expected = network(images).sigmoid()
    written = torch.tensor([[float(row[name]) for name in NAMES] for row in rows])
    torch.testing.assert_close(written, expected, atol=1e-6, rtol=0)
    assert {row["error"] for row in rows} == {""}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_files_are_named_do_not_stop_the_rest_and_end_the_run_with_an_error(
    tmp_path: Path, num_workers: int
) -> None:
    loader = ReadableLoader(folder_of(tmp_path), batch_size=2, num_workers=num_workers)
    saver = PredictionSaver(loader, NAMES, tmp_path)
    with pytest.raises(ValueError, match=r"2 of 5 images could not be read: .*probabilities\.csv names them"):
        infer(loader, saver, classifier())
    rows = table(tmp_path / "probabilities.csv")
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, True]
    assert [row["Opacity"] == "" for row in rows] == [False, True, False, False, True]


def test_a_folder_of_nothing_but_corrupt_files_is_written_down_too(tmp_path: Path) -> None:
    loader = ReadableLoader(folder_of(tmp_path, corrupt=(0, 1, 2, 3, 4)), batch_size=2)
    with pytest.raises(ValueError, match="5 of 5 images could not be read"):
        infer(loader, PredictionSaver(loader, NAMES, tmp_path), classifier())
    assert all(row["error"] for row in table(tmp_path / "probabilities.csv"))


@pytest.mark.parametrize(("overlays", "number"), [("none", 0), ("top", 3), ("all", 6)])
def test_draws_the_overlays_that_are_wanted(tmp_path: Path, overlays: str, number: int) -> None:
    loader, network = ReadableLoader(folder_of(tmp_path, corrupt=(1, 4)), batch_size=2), classifier()
    with pytest.raises(ValueError, match="2 of 5"):
        infer(loader, PredictionSaver(loader, NAMES, tmp_path, overlays, network), network)
    pictures = sorted((tmp_path / "overlays").glob("*.png"))
    assert len(pictures) == number
    for path in pictures:
        assert Image.open(path).size == (24, 32)  # as wide and high as the file
    if overlays == "all":
        assert pictures[1].name == "00000_image_0_Pleural_Thickening.png"


def test_the_name_of_an_overlay_says_that_nothing_speaks_for_the_finding(tmp_path: Path) -> None:
    loader, network = ReadableLoader(folder_of(tmp_path, num_images=1, corrupt=())), classifier()
    network.get_parameter("fc.weight").data[1] = 0
    infer(loader, PredictionSaver(loader, NAMES, tmp_path, "all", network), network)
    names = sorted(path.name for path in (tmp_path / "overlays").glob("*.png"))
    assert names == ["00000_image_0_Opacity.png", "00000_image_0_Pleural_Thickening_nothing.png"]


def test_rejects_unknown_overlays() -> None:
    with pytest.raises(ValueError, match="`overlays` must be one of none, top, all, got 'best'"):
        PredictionSaver(ReadableLoader(Dataset([{}])), NAMES, "nowhere", "best")


def test_rejects_overlays_without_a_network() -> None:
    with pytest.raises(ValueError, match="`network` must be given for `overlays`, got None"):
        PredictionSaver(ReadableLoader(Dataset([{}])), NAMES, "nowhere", "top")


def test_rejects_names_that_are_more_or_fewer_than_the_outputs(tmp_path: Path) -> None:
    loader = ReadableLoader(folder_of(tmp_path))
    with pytest.raises(ValueError, match="`label_names` must name the network's 2 outputs, got 1"):
        infer(loader, PredictionSaver(loader, NAMES[:1], tmp_path), classifier())


# ---- label names -------------------------------------------------------------------------------------------------


def test_top_is_the_finding_furthest_above_its_threshold_and_never_no_finding(tmp_path: Path) -> None:
    probabilities = torch.tensor([[0.3, 0.6, 0.9], [0.0, 0.2, 1.0]])
    names = ["Edema", "Effusion", "No finding"]
    loader = ReadableLoader(folder_of(tmp_path))
    plain = PredictionSaver(loader, names, tmp_path)._score(probabilities)
    assert plain.argmax(1).tolist() == [1, 1]
    given = dict(zip(names, (0.1, 0.7, 0.5), strict=True))
    assert PredictionSaver(loader, names, tmp_path, thresholds=given)._score(probabilities).argmax(1).tolist() == [0, 1]
    unknown = PredictionSaver(loader, names, tmp_path, thresholds={**given, "Edema": float("nan")})
    assert unknown._score(probabilities).argmax(1).tolist() == [1, 1]


# ---- calibration -------------------------------------------------------------------------------------------------


def test_calls_what_reaches_its_threshold(tmp_path: Path) -> None:
    loader = ReadableLoader(folder_of(tmp_path), batch_size=2)
    saver = PredictionSaver(loader, NAMES, tmp_path, thresholds={NAMES[0]: 0.5, NAMES[1]: float("nan")})
    with pytest.raises(ValueError, match="2 of 5"):
        infer(loader, saver, classifier())
    rows = table(tmp_path / "probabilities.csv")
    assert list(rows[0]) == ["image", *NAMES, "Opacity called", "Pleural Thickening called", "error"]
    readable = [row for row in rows if not row["error"]]
    assert [row["Opacity called"] for row in readable] == [str(int(float(row["Opacity"]) >= 0.5)) for row in readable]
    assert all(row["Pleural Thickening called"] == "" for row in rows)
    assert all(row["Opacity called"] == "" for row in rows if row["error"])


def test_overlays_of_an_earlier_run_go(tmp_path: Path) -> None:
    old, own = tmp_path / "overlays" / "00009_gone_Opacity.png", tmp_path / "overlays" / "notes.png"
    old.parent.mkdir()
    for path in (old, own):
        path.write_bytes(b"")
    loader = ReadableLoader(folder_of(tmp_path, corrupt=()))
    infer(loader, PredictionSaver(loader, NAMES, tmp_path), classifier())
    assert not old.exists()
    assert own.exists()


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    network, written = classifier(), Calibration(1.5, {NAMES[0]: 0.25, NAMES[1]: float("nan")})
    write_calibration(tmp_path / "calibration.json", written, network)
    found = read_calibration(tmp_path / "calibration.json", NAMES, network)
    assert found.temperature == 1.5
    assert found.thresholds[NAMES[0]] == 0.25
    assert np.isnan(found.thresholds[NAMES[1]])
    assert read_calibration(None, NAMES, network) == Calibration(1.0, {})


def test_refuses_a_calibration_of_other_weights_or_findings(tmp_path: Path) -> None:
    path, network = tmp_path / "calibration.json", classifier()
    write_calibration(path, Calibration(1.0, dict.fromkeys(NAMES, 0.5)), network)
    with pytest.raises(ValueError, match=r"other findings \(Opacity, Pleural Thickening\)"):
        read_calibration(path, NAMES[::-1], network)
    with torch.no_grad():
        network.fc.bias += 0.1  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="other weights: evaluate these weights"):
        read_calibration(path, NAMES, network)
    with pytest.raises(FileNotFoundError, match=r"there is no calibration at .*evaluate first"):
        read_calibration(tmp_path / "none.json", NAMES, network)
    for content in ("{", "[]", '{"temperature": 1}', '{"temperature": 1, "weights": "", "thresholds": {"x": "y"}}'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"must be the calibration\.json of an evaluation"):
            read_calibration(path, NAMES, network)
