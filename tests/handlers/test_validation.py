from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Writer, evaluated, small_resnet
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from dissect_monai.handlers.ending import NOT_SCORED
from dissect_monai.handlers.validation import ClassificationMetrics, KNNHandler, write_scores
from dissect_monai.metrics.classification import expected_calibration_error
from dissect_monai.metrics.probes import extract_features, knn_scores
from dissect_monai.networks.encoders import feature_maps

NAN = float("nan")
NAMES = ["Opacity", "Pleural Thickening", "Rare"]


def drawn(num_items: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(num_items, 3, generator=generator) < 0.4).float()
    logits = torch.randn(num_items, 3, generator=generator) + labels
    labels[::5, 1] = NAN
    labels[:, 2] = 0
    return logits, labels


def validated(logits: torch.Tensor, labels: torch.Tensor, handler: ClassificationMetrics) -> SupervisedEvaluator:
    """By a network that returns the "images", which are the logits."""
    items = [{"image": image, "label": label} for image, label in zip(logits, labels, strict=True)]
    return evaluated(nn.Identity(), DataLoader(Dataset(items), batch_size=7), handler)


def test_metrics_are_those_of_sklearn_over_the_known_labels() -> None:
    logits, labels = drawn()
    state = validated(logits, labels, ClassificationMetrics(NAMES)).state
    metrics = state.metrics
    found = {"auroc": [], "ap": [], "ece": []}
    for index, name in enumerate(["Opacity", "Pleural_Thickening"]):
        known = ~labels[:, index].isnan()
        label, probability = labels[known, index].numpy(), logits[known, index].double().sigmoid().numpy()
        found["auroc"].append(roc_auc_score(label, probability))
        found["ap"].append(average_precision_score(label, probability))
        found["ece"].append(float(expected_calibration_error(label, probability)))
        for metric, values in found.items():
            assert metrics[f"{metric}_{name}"] == pytest.approx(values[-1])
    for metric, values in found.items():
        assert metrics[metric] == pytest.approx(np.mean(values))
    assert len(metrics) == 9
    assert (
        state.result.text
        == f"AUROC {metrics['auroc']:.3f} (guessing: 0.5), a mean over findings, on validation, epoch 1"
    )


def test_every_validation_starts_afresh_and_names_what_lacks_a_class_once(caplog: pytest.LogCaptureFixture) -> None:
    handler = ClassificationMetrics(NAMES)
    evaluator = validated(*drawn(), handler)
    evaluator.run()
    assert len(handler.collector.outputs().labels) == 40
    assert "auroc_Rare" not in evaluator.state.metrics
    assert caplog.text.count("Left out, for lack of positives or negatives in validation: Rare.") == 1


def test_without_any_judged_finding_the_means_are_nan() -> None:
    logits, labels = drawn()
    state = validated(logits, torch.zeros_like(labels), ClassificationMetrics(NAMES)).state
    metrics = state.metrics
    assert state.result.text == NOT_SCORED
    assert set(metrics) == {"auroc", "ap", "ece"}
    assert all(np.isnan(value) for value in metrics.values())


def labelled_images(seed: int) -> list[dict[str, Any]]:
    """Opacities are bright, thickenings as far as they are known show nothing, and nothing is rare."""
    _, labels = drawn()
    images = torch.rand(40, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 0.6
    images += 0.05 * labels[:, :1, None, None]
    return [{"image": image, "label": label.tolist()} for image, label in zip(images, labels, strict=True)]


def test_knn_is_the_mean_over_the_findings_of_what_sklearn_says() -> None:
    network = small_resnet()
    training, validation = (Dataset(labelled_images(seed), lambda item: {"image": item["image"]}) for seed in (0, 1))
    handler = KNNHandler(training, NAMES)
    state = evaluated(network, DataLoader(validation, batch_size=7), handler).state
    metrics, said = state.metrics, f"k-NN AUROC of all stages {state.metrics['knn_auroc_stages']:.3f}"
    assert state.result.text == f"{said} (guessing: 0.5) on validation, epoch 1"
    state.epoch = 0
    handler(SimpleNamespace(network=network, data_loader=DataLoader(validation, batch_size=7), state=state))
    assert state.result.text == f"{said} (guessing: 0.5) before training; no epoch was validated"
    images = [[{"image": item["image"][None]} for item in labelled_images(seed)] for seed in (0, 1)]
    train, val = (extract_features(network, each, "cpu", feature_maps) for each in images)
    labels = drawn()[1].numpy()
    for name, bank, queries in (("knn_auroc", train.last, val.last), ("knn_auroc_stages", train.stages, val.stages)):
        scores = knn_scores(bank, labels, queries)
        known = ~np.isnan(labels)
        expected = [roc_auc_score(labels[known[:, i], i], scores[known[:, i], i]) for i in range(2)]
        assert metrics[name] == pytest.approx(np.mean(expected))
    assert set(metrics) == {"knn_auroc", "knn_auroc_stages", "embedding_collapse"}


def test_scores_are_shown_by_group_and_keep_their_names() -> None:
    shown = {
        "dice_mean": "dice/mean", "dice_mean_low": "dice/mean_low", "dice_left_kidney": "dice/left_kidney",
        "surface_dice_mean": "surface_dice/mean", "auroc": "auroc/mean", "auroc_Effusion": "auroc/Effusion",
        "ap_No_finding": "ap/No_finding", "knn_auroc": "knn_auroc/mean", "knn_auroc_stages": "knn_auroc/stages",
        "reconstruction_error_head_mr": "reconstruction_error/head_mr", "apex": "validation/apex",
        "missed": "validation/missed", "collapse_effective_rank": "validation/collapse_effective_rank",
    }  # fmt: skip
    engine, writer = Engine(lambda engine, batch: None), Writer()
    engine.state.metrics, engine.state.epoch = dict.fromkeys(shown, 0.5), 3
    write_scores(engine, writer)
    assert writer.scalars == {tag: {3: 0.5} for tag in shown.values()}
    assert [*engine.state.metrics] == [*shown]
