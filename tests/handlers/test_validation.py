from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Writer
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from monai.networks.nets import resnet10
from monai.transforms import Compose, EnsureTyped, LoadImaged, ScaleIntensityRanged
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.datasets import cached_dataset
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.handlers.checkpoints import BestWeights, TrainingCheckpoint, newest_checkpoint
from dissect_monai.handlers.training import EpochSeedHandler
from dissect_monai.handlers.validation import ClassificationMetrics, KNNHandler
from dissect_monai.losses.multilabel import MultiLabelLoss, positive_weights
from dissect_monai.metrics.classification import expected_calibration_error
from dissect_monai.metrics.probes import FeatureDataset, extract_features, knn_scores
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.networks.optimizers import adamw
from dissect_monai.networks.weights import trained_part
from dissect_monai.phantoms.xray import write_xray_phantoms
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import AugmentedBatch

NAN = float("nan")
NAMES = ["Opacity", "Pleural Thickening", "Rare"]


def evaluated(network: nn.Module, items: list[dict[str, Any]], handler: Any) -> SupervisedEvaluator:
    """An evaluator that has run once."""
    loader = DataLoader(Dataset(items), batch_size=7)
    evaluator = SupervisedEvaluator("cpu", loader, network, val_handlers=[handler], decollate=False)
    evaluator.logger.setLevel(logging.ERROR)
    evaluator.run()
    return evaluator


# ---- metrics of a classifier -------------------------------------------------------------------------------------


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
    return evaluated(nn.Identity(), items, handler)


def test_metrics_are_those_of_sklearn_over_the_known_labels() -> None:
    logits, labels = drawn()
    metrics = validated(logits, labels, ClassificationMetrics(NAMES)).state.metrics
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


def test_every_validation_starts_afresh_and_names_findings_without_both_classes_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = ClassificationMetrics(NAMES)
    evaluator = validated(*drawn(), handler)
    evaluator.run()
    assert len(handler.collector.outputs().labels) == 40
    assert "auroc_Rare" not in evaluator.state.metrics
    assert caplog.text.count("Left out, for lack of positives or negatives in validation: Rare.") == 1


def test_without_any_judged_finding_the_means_are_nan() -> None:
    logits, labels = drawn()
    metrics = validated(logits, torch.zeros_like(labels), ClassificationMetrics(NAMES)).state.metrics
    assert set(metrics) == {"auroc", "ap", "ece"}
    assert all(np.isnan(value) for value in metrics.values())


def test_draws_curves_at_the_interval() -> None:
    handler = ClassificationMetrics(NAMES, writer := Writer(), interval=2)  # type: ignore[arg-type]
    evaluator = validated(*drawn(), handler)
    for epoch in (2, 3, 4):
        evaluator.run(epoch)
    assert {name: list(images) for name, images in writer.images.items()} == {"roc": [2, 4], "reliability": [2, 4]}
    with pytest.raises(ValueError, match="`interval` must be at least 1, got 0"):
        ClassificationMetrics(NAMES, interval=0)


# ---- k-NN of an encoder ------------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False, widen_factor=0.125)


def labelled_images(seed: int) -> list[dict[str, Any]]:
    """Opacities are bright, thickenings as far as they are known show nothing, and nothing is rare."""
    _, labels = drawn()
    images = torch.rand(40, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 0.6
    images += 0.05 * labels[:, :1, None, None]
    return [
        {"image": image, "label": [None if np.isnan(value) else value for value in label.tolist()]}
        for image, label in zip(images, labels, strict=True)
    ]


def neighbours(network: nn.Module) -> dict[str, float]:
    training, validation = labelled_images(0), labelled_images(1)
    images = [Dataset(items, lambda item: {"image": item["image"]}) for items in (training, validation)]
    handler = KNNHandler(network, *(DataLoader(each, batch_size=16) for each in images), NAMES, k=5)
    return evaluated(network, [{"image": item["image"]} for item in validation], handler).state.metrics


def test_knn_is_the_mean_over_the_findings_of_what_sklearn_says() -> None:
    metrics = neighbours(network := encoder())
    images = [[{"image": item["image"][None]} for item in labelled_images(seed)] for seed in (0, 1)]
    train, val = (extract_features(network, each, "cpu", feature_maps) for each in images)
    labels = drawn()[1].numpy()
    for name, bank, queries in (("knn_auroc", train.last, val.last), ("knn_auroc_stages", train.stages, val.stages)):
        scores = knn_scores(bank, labels, queries, k=5)
        known = ~np.isnan(labels)
        expected = [roc_auc_score(labels[known[:, i], i], scores[known[:, i], i]) for i in range(2)]
        assert metrics[name] == pytest.approx(np.mean(expected))
    assert set(metrics) == {"knn_auroc", "knn_auroc_stages", "embedding_collapse"}


def test_knn_says_when_the_embedding_has_collapsed() -> None:
    class Constant(nn.Module):
        def encode(self, images: torch.Tensor) -> tuple[None, list[torch.Tensor]]:
            return None, [images, images[:, :, :1, :1] * 0 + torch.arange(4.0).view(1, 4, 1, 1)]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    assert 1 >= neighbours(Constant())["embedding_collapse"] > neighbours(encoder())["embedding_collapse"] >= 0


# ---- a training run ----------------------------------------------------------------------------------------------


class Training:
    """The classifier's bundle, in small, on phantoms."""

    def __init__(self, folder: Path, mode: str, max_epochs: int, resume: bool = False, init_seed: int = 0) -> None:
        data = read_datalist(write_xray_phantoms(folder.parent / "phantoms", 48, 24, 0, image_size=32))
        steps = [
            LoadImaged(keys="image", ensure_channel_first=True, reader=ImageFileReader(spatial_dims=2)),
            EnsureTyped(keys="image", dtype=torch.uint8, track_meta=False),
            EnsureTyped(keys="label", dtype=torch.float32, track_meta=False),
        ]
        scale = ScaleIntensityRanged(keys="image", a_min=0, a_max=255, b_min=0, b_max=1)
        images = cached_dataset(data.training, Compose(steps))
        validation = cached_dataset(data.validation, Compose([*steps, scale]))
        torch.manual_seed(init_seed)
        self.network = resnet10(
            spatial_dims=2, n_input_channels=1, conv1_t_stride=2, widen_factor=0.25, num_classes=len(data.label_names)
        )
        self.optimizer = adamw(self.network, 0.01, 0.01, layer_decay=0.7)
        self.evaluator = SupervisedEvaluator(
            device="cpu",
            val_data_loader=DataLoader(validation, batch_size=12),
            network=self.network,
            val_handlers=[ClassificationMetrics(data.label_names)],
            decollate=False,
        )
        part = trained_part(self.network, mode)
        self.path = folder / "models" / "model.pt"
        self.best = BestWeights(self.evaluator, self.network, self.path, patience=50)
        augmented = AugmentedBatch(BatchAugment(crop_scale=(0.8, 1), blur_prob=0), seed=0)
        probe = mode == "linear_probe"
        state = {"network": self.network, "optimizer": self.optimizer}
        resume_from = newest_checkpoint(folder / "checkpoints") if resume else None
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=max_epochs,
            train_data_loader=DataLoader(
                FeatureDataset(images, self.network) if probe else images, batch_size=16, shuffle=True
            ),
            network=part,
            optimizer=self.optimizer,
            loss_function=MultiLabelLoss(positive_weights(data.training, data.label_names)),
            decollate=False,
            train_handlers=[
                EpochSeedHandler(0, epoch_seeded=[augmented]),
                ValidationHandler(interval=1, validator=self.evaluator),
                self.best,
                TrainingCheckpoint(folder / "checkpoints", state, resume_from=resume_from),
            ],
            **({} if probe else {"prepare_batch": augmented}),
        )
        for engine in (self.trainer, self.evaluator):
            engine.logger.setLevel(logging.ERROR)

    def run(self) -> Training:
        self.trainer.run()
        return self


def test_finetuning_learns_and_writes_the_whole_network_of_the_best_epoch(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", "finetune", max_epochs=8).run()
    assert training.trainer.state.best_metric > 0.55
    training.network.load_state_dict(torch.load(training.path, weights_only=True))
    training.evaluator.run()
    assert training.evaluator.state.metrics["auroc"] == pytest.approx(training.trainer.state.best_metric, abs=1e-6)


@pytest.mark.parametrize("mode", ["finetune", "linear_probe"])
def test_two_and_two_epochs_are_four_even_from_other_weights(tmp_path: Path, mode: str) -> None:
    whole = Training(tmp_path / "whole", mode, 4).run()
    Training(tmp_path / "parts", mode, 2).run()
    resumed = Training(tmp_path / "parts", mode, 4, resume=True, init_seed=1).run()
    for first, second in (
        (resumed.network.state_dict(), whole.network.state_dict()),
        (torch.load(resumed.path), torch.load(whole.path)),
    ):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed.trainer.state_dict() == whole.trainer.state_dict()


def test_a_linear_probe_leaves_the_encoder_and_learns(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", "linear_probe", max_epochs=4)
    before: dict[str, Any] = {key: value.clone() for key, value in training.network.state_dict().items()}
    training.run()
    changed = {key for key, value in training.network.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"fc.weight", "fc.bias"}
    assert torch.load(training.path).keys() == before.keys()
