"""The classifier bundle: its modes, what it loads and refuses, what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, command_line, read, refused, run_config
from monai.networks.nets import resnet18
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dissect_monai.networks.weights import save_weights
from dissect_monai.phantoms.xray import XRAY_FINDINGS

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = ROOT / "bundles" / "cxr_classify" / "configs"
TINY = {**TINY, "patience": 9}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as the pretraining bundle leaves them."""
    torch.manual_seed(7)
    network = resnet18(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
    path = tmp_path_factory.mktemp("encoder") / "model.pt"
    save_weights(network, path, {"encoder": "resnet18", "image_size": 32})
    return path


# ---- training ----------------------------------------------------------------------------------------------------


def test_a_linear_probe_trains_the_head_alone(dataset_dir: Path, encoder: Path, tmp_path: Path) -> None:
    train(dataset_dir, tmp_path, pretrained=encoder, mode="linear_probe", max_epochs=3)
    given, found = torch.load(encoder, weights_only=True), weights(tmp_path)
    assert set(found) - set(given) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[key], given[key]) for key in given)


def test_fine_tuning_moves_deep_layers_less(dataset_dir: Path, encoder: Path, tmp_path: Path) -> None:
    train(dataset_dir, tmp_path, pretrained=encoder, max_epochs=1, layer_decay=0.1, weight_decay=0)
    given, found = torch.load(encoder, weights_only=True), weights(tmp_path)
    moved = {key: float((found[key] - given[key]).abs().max()) for key in ("conv1.weight", "layer4.0.conv1.weight")}
    assert 0 < moved["conv1.weight"] < moved["layer4.0.conv1.weight"] / 100
    assert read(tmp_path / "models" / "model.json")["mode"] == "finetune"


@pytest.mark.parametrize(
    "knobs",
    [
        {"class_balance": "weighted", "label_fraction": 0.8},
        {"findings": ["cysts", "No finding"], "amp": "true", "device": "cpu"},
        {"cache_dir": "$@output_dir + '/cache'", "num_workers": 2},
    ],
    ids=str,
)
def test_knobs_change_the_run(dataset_dir: Path, tmp_path: Path, knobs: dict[str, Any]) -> None:
    train(dataset_dir, tmp_path, **knobs)
    assert len(weights(tmp_path)["fc.bias"]) == len(knobs.get("findings", XRAY_FINDINGS))


def test_unknown_labels_are_no_obstacle(dataset_dir: Path, tmp_path: Path) -> None:
    spec = read(dataset_dir / "dataset.json")
    for items in (spec["training"], spec["validation"]):
        for index, item in enumerate(items):
            item["image"] = str(dataset_dir / item["image"])
            item["label"][index % 4] = None
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({**spec, "test": []}), encoding="utf-8")
    train(tmp_path / "set", tmp_path / "out")
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())


@pytest.mark.slow
def test_the_smoke_run_is_clearly_above_chance(tmp_path: Path) -> None:
    result = command_line(CONFIGS / "train.json", output_dir=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Smoke run on generated phantoms" in result.stdout + result.stderr
    events = EventAccumulator(str(tmp_path / "eval"))
    events.Reload()
    assert max(event.value for event in events.Scalars("auroc")) > 0.7


# ---- evaluation and inference ------------------------------------------------------------------------------------


def test_prediction_uses_what_the_evaluation_has_fitted(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    knobs = {"dataset_dir": dataset_dir, "output_dir": tmp_path, "pretrained": trained / "models" / "model.pt"}
    run_config(CONFIGS / "evaluate.json", **knobs, num_samples=5, num_workers=0, temperature_scaling=True)
    run_config(CONFIGS / "inference.json", **knobs, num_workers=0, calibration=tmp_path / "eval" / "calibration.json")
    evaluated = {row["image"]: row for row in table(tmp_path / "eval" / "predictions.csv")}
    predicted = {row["image"]: row for row in table(tmp_path / "eval" / "probabilities.csv")}
    thresholds = read(tmp_path / "eval" / "calibration.json")["thresholds"]
    assert len(evaluated) == 16
    for image, row in evaluated.items():
        for name in XRAY_FINDINGS:
            probability = float(row[f"{name} probability"])
            assert float(predicted[image][name]) == pytest.approx(probability, abs=1e-4)
            if abs(probability - thresholds[name]) > 1e-4:
                assert predicted[image][f"{name} called"] == str(int(probability > thresholds[name]))


def test_prediction_does_not_stop_at_a_listed_file_that_is_missing(
    trained: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    present = str(next((dataset_dir / "images").glob("*.png")))
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [present, "gone.png"], "test": [present]}))
    with refused("1 of 3 images could not be read"):
        run_config(
            CONFIGS / "inference.json",
            dataset_dir=tmp_path,
            output_dir=tmp_path,
            pretrained=trained / "models" / "model.pt",
            num_workers=0,
        )
    rows = table(tmp_path / "eval" / "probabilities.csv")
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "gone.png" in rows[1]["error"]


def test_prediction_needs_no_labels_not_even_of_some(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    images = [str(path) for path in sorted((dataset_dir / "images").glob("*.png"))[:4]]
    items = [
        {"image": image, **({"label": [1, 0, None, 0]} if index % 2 else {})} for index, image in enumerate(images)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": items[:3], "test": items[3:]}), encoding="utf-8")
    knobs = {"dataset_dir": tmp_path, "output_dir": tmp_path, "num_workers": 0}
    run_config(CONFIGS / "inference.json", pretrained=trained / "models" / "model.pt", **knobs)
    rows = table(tmp_path / "eval" / "probabilities.csv")
    assert [row["image"] for row in rows] == images
    assert all(0 <= float(row["cysts"]) <= 1 for row in rows)


def test_one_dicom_file_is_enough(trained: Path, tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    pixels = (np.random.default_rng(0).random((1, 40, 36)) * 4000).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(pixels), tmp_path / "a.dcm")
    knobs = {"dataset_dir": tmp_path / "a.dcm", "output_dir": tmp_path, "num_workers": 0}
    run_config(CONFIGS / "inference.json", pretrained=trained / "models" / "model.pt", **knobs)
    (row,) = table(tmp_path / "eval" / "probabilities.csv")
    assert row["image"] == str(tmp_path / "a.dcm")


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mode": "probe"}, "`--mode` must be one of linear_probe, finetune, scratch"),
        ({"mode": "finetune"}, "needs weights: set .*pretrained"),
        ({"findings": ["cysts", "mass"]}, "the labels must include mass, got nodules"),
        ({"pretrained": "nowhere.pt", "mode": "finetune"}, r"no weights at .*nowhere\.pt"),
        ({"findings": ["cysts", "cysts"]}, "`findings` must be different, got cysts, cysts"),
        ({"class_balance": "focal"}, "`--class_balance` must be one of none, weighted"),
        ({"learning_rat": 1}, "--learning_rat .*learning_rate"),
    ],
)
def test_refuses_bad_knobs_before_training(
    dataset_dir: Path, tmp_path: Path, knobs: dict[str, Any], message: str
) -> None:
    with refused(message):
        train(dataset_dir, tmp_path / "out", **knobs)
    assert not (tmp_path / "out" / "models").exists()


def test_refuses_weights_of_which_one_does_not_fit(dataset_dir: Path, encoder: Path, tmp_path: Path) -> None:
    state = torch.load(encoder, weights_only=True)
    state["conv1.weight"] = state["conv1.weight"][:, :, :3]
    del state["bn1.bias"]
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "model.pt")
    shutil.copy(encoder.with_suffix(".json"), tmp_path / "model.json")
    with refused(r"1 missing \(bn1\.bias\); 1 unexpected \(extra\); 1 of another shape \(conv1\.weight\)"):
        train(dataset_dir, tmp_path / "out", pretrained=tmp_path / "model.pt")


def test_names_of_the_outputs_cannot_be_changed(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    knobs = {"dataset_dir": dataset_dir, "output_dir": tmp_path, "pretrained": trained / "models" / "model.pt"}
    for config in ("evaluate", "inference"):
        with refused(r"`label_names` must be those of .*model\.json"):
            run_config(CONFIGS / f"{config}.json", label_names=list(reversed(XRAY_FINDINGS)), **knobs)


def test_a_trained_classifier_is_no_encoder(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    with refused(r"2 unexpected \(fc\.weight, fc\.bias\)\. They are of a trained classifier"):
        train(dataset_dir, tmp_path, pretrained=trained / "models" / "model.pt")


def test_weights_without_a_head_are_no_classifier(encoder: Path, dataset_dir: Path, tmp_path: Path) -> None:
    with refused(r"2 missing \(fc\.weight, fc\.bias\)\. They have no head: train the classifier first"):
        run_config(CONFIGS / "evaluate.json", dataset_dir=dataset_dir, output_dir=tmp_path, pretrained=encoder)


def test_refuses_data_without_labels(tmp_path: Path) -> None:
    for index in range(9):
        Image.new("L", (32, 32), index).save(tmp_path / f"{index}.png")
    with refused("`dataset_dir` must have labels, got none"):
        train(tmp_path, tmp_path / "out")
