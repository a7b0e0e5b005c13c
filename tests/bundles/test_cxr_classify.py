"""The classifier bundle: its modes, what it loads and refuses, what it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from helpers import (
    ROOT,
    Recipe,
    Recipes,
    command_line,
    events_of,
    metrics_of,
    read,
    refused,
    settings,
    table,
    two_processes,
    weights,
    write,
)

from dissect_monai.phantoms.xray import XRAY_FINDINGS

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = ROOT / "bundles" / "cxr_classify" / "configs"


@pytest.fixture
def bundle(recipe_of: Recipes) -> Recipe:
    return recipe_of("cxr_classify")


@pytest.fixture
def encoder(recipe_of: Recipes) -> Path:
    """Weights as the pretraining bundle leaves them."""
    return recipe_of("pretrain_vq_ssl").model


def listed(folder: Path, dataset_dir: Path, change: Callable[[int, dict[str, Any]], None], **spec: Any) -> Path:
    """A data list of the phantoms in another folder, with items that are changed."""
    given = read(dataset_dir / "dataset.json")
    for split in ("training", "validation", "test"):
        for index, item in enumerate(given[split]):
            item["image"] = str(dataset_dir / item["image"])
            change(index, item)
    write(folder / "dataset.json", {**given, **spec})
    return folder


def test_the_json_says_what_was_trained(bundle: Recipe) -> None:
    said = settings(bundle.finished)
    assert (said["label_names"], said["mode"], said["pretrained"]) == (list(XRAY_FINDINGS), "scratch", None)
    assert weights(bundle.finished)["fc.weight"].shape == (4, 512)


def test_a_linear_probe_trains_the_head_alone_also_in_processes(bundle: Recipe, encoder: Path, tmp_path: Path) -> None:
    knobs = {"pretrained": encoder, "mode": "linear_probe"}
    bundle.train(tmp_path / "one", **knobs)
    two = {**bundle.knobs, **knobs, "batch_size": 4, "output_dir": tmp_path / "two"}
    result = two_processes(CONFIGS / "train.json", CONFIGS / "multi_gpu_train.json", cwd=tmp_path, **two)
    assert result.returncode == 0, result.stderr[-3000:]
    given = torch.load(encoder, weights_only=True)
    for name in ("one", "two"):
        found = weights(tmp_path / name)
        assert set(found) - set(given) == {"fc.weight", "fc.bias"}
        assert all(torch.equal(found[key], given[key]) for key in given)


def test_fine_tuning_moves_deep_layers_less(bundle: Recipe, encoder: Path, tmp_path: Path) -> None:
    bundle.train(tmp_path, pretrained=encoder, layer_decay=0.1, weight_decay=0)
    given, found = torch.load(encoder, weights_only=True), weights(tmp_path)
    moved = {key: float((found[key] - given[key]).abs().max()) for key in ("conv1.weight", "layer4.0.conv1.weight")}
    assert 0 < moved["conv1.weight"] < moved["layer4.0.conv1.weight"] / 100
    assert settings(tmp_path)["mode"] == "finetune"


def test_findings_are_chosen_and_labels_may_be_unknown(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    def change(index: int, item: dict[str, Any]) -> None:
        item["label"][index % 4] = None

    data = listed(tmp_path / "set", dataset_dir, change, test=[])
    knobs = {"class_balance": "weighted", "label_fraction": 0.8, "findings": ["cysts", "No finding"], "amp": "true"}
    bundle.train(tmp_path / "out", dataset_dir=data, **knobs)
    assert len(weights(tmp_path / "out")["fc.bias"]) == 2
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())


@pytest.mark.slow
def test_a_smoke_run_is_clearly_above_chance(tmp_path: Path) -> None:
    result = command_line(CONFIGS / "train.json", output_dir=tmp_path, encoder="resnet10", max_epochs=5)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Smoke run on generated phantoms" in result.stdout + result.stderr
    assert max(event.value for event in events_of(tmp_path).Scalars("auroc/mean")) > 0.7


def test_evaluation_writes_what_prediction_uses(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    bundle.run("evaluate", tmp_path, num_samples=20, temperature_scaling="true")
    findings = table(tmp_path / "eval" / "findings.csv")
    assert [row["finding"] for row in findings] == ["macro", *XRAY_FINDINGS]
    assert all(float(row["auroc_low"]) <= float(row["auroc"]) <= float(row["auroc_high"]) for row in findings)
    assert "cysts" in (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert metrics_of(tmp_path)["temperature"] > 0
    scored = listed(tmp_path / "set", dataset_dir, lambda index, item: None, training=[], validation=[])
    knobs = {"dataset_dir": scored, "calibration": tmp_path / "eval" / "calibration.json", "overlays": "top"}
    bundle.run("inference", tmp_path, **knobs)
    evaluated = {row["image"]: row for row in table(tmp_path / "eval" / "cases.csv")}
    predicted = {row["image"]: row for row in table(tmp_path / "eval" / "probabilities.csv")}
    thresholds = read(tmp_path / "eval" / "calibration.json")["thresholds"]
    assert len(evaluated) == len(predicted) == 16
    assert len(list((tmp_path / "eval" / "overlays").glob("*.png"))) == 16
    for image, row in evaluated.items():
        for name in XRAY_FINDINGS:
            probability = float(row[f"{name} probability"])
            assert float(predicted[image][name]) == pytest.approx(probability, abs=1e-4)
            if abs(probability - thresholds[name]) > 1e-4:
                assert predicted[image][f"{name} called"] == str(int(probability > thresholds[name]))


def test_findings_that_the_data_does_not_label_are_left_out(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    def change(index: int, item: dict[str, Any]) -> None:
        item["label"] = [*item["label"][2:], 0]

    listed(tmp_path, dataset_dir, change, label_names=[*XRAY_FINDINGS[2:], "fracture"])
    bundle.run("evaluate", tmp_path, dataset_dir=tmp_path, num_samples=5)
    rows = {row["finding"]: row for row in table(tmp_path / "eval" / "findings.csv")}
    assert list(rows) == ["macro", *XRAY_FINDINGS]
    for name in XRAY_FINDINGS:
        labelled = name in XRAY_FINDINGS[2:]
        assert rows[name]["n"] == ("16" if labelled else "0")
        assert (rows[name]["auroc"] != "") == labelled


@pytest.mark.parametrize("name", ["test", "validation"])
def test_patients_of_training_are_not_scored(bundle: Recipe, dataset_dir: Path, tmp_path: Path, name: str) -> None:
    spec = read(listed(tmp_path / "set", dataset_dir, lambda index, item: None) / "dataset.json")
    write(tmp_path / "set" / "dataset.json", {**spec, "training": spec[name], name: spec["training"]})
    with refused(rf"`{name}` must hold no subject that the weights were trained on, got \d+: 00000, "):
        bundle.run("evaluate", tmp_path / "out", dataset_dir=tmp_path / "set")
    assert not (tmp_path / "out").exists()


def test_prediction_needs_no_labels_and_passes_missing_files(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    first, second = sorted(map(str, (dataset_dir / "images").glob("*.png")))[:2]
    partly = {"image": second, "label": [1, 0, None, 0]}
    write(tmp_path / "dataset.json", {"training": [{"image": first}, "gone.png"], "test": [partly]})
    with refused("1 of 3 images could not be read"):
        bundle.run("inference", tmp_path, dataset_dir=tmp_path)
    rows = table(tmp_path / "eval" / "probabilities.csv")
    assert [row["image"] for row in (rows[0], rows[2])] == [first, second]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "gone.png" in rows[1]["error"]
    assert all(0 <= float(row["cysts"]) <= 1 for row in (rows[0], rows[2]))


def test_one_dicom_file_is_enough(bundle: Recipe, tmp_path: Path) -> None:
    pixels = (np.random.default_rng(0).random((1, 40, 36)) * 4000).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(pixels), tmp_path / "a.dcm")
    bundle.run("inference", tmp_path, dataset_dir=tmp_path / "a.dcm")
    (row,) = table(tmp_path / "eval" / "probabilities.csv")
    assert row["image"] == str(tmp_path / "a.dcm")


def test_refuses_bad_knobs_before_training(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    for knobs, message in (
        ({"findings": ["cysts", "mass"]}, "the labels must include the `findings` mass, got nodules"),
        ({"dataset_dir": dataset_dir / "images"}, "`dataset_dir` must have labels, got none"),
    ):
        with refused(message):
            bundle.train(tmp_path / "out", **knobs)
    assert not (tmp_path / "out").exists()


def test_neither_classifier_nor_encoder_passes_for_the_other(bundle: Recipe, encoder: Path, tmp_path: Path) -> None:
    with refused(r"2 unexpected \(fc\.weight, fc\.bias\)\. They are of a trained classifier"):
        bundle.train(tmp_path, pretrained=bundle.model)
    with refused(r"2 missing \(fc\.weight, fc\.bias\)\. They have no head: train the classifier first"):
        bundle.run("evaluate", tmp_path, pretrained=encoder)
