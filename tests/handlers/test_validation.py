from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
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
from dissect_monai.handlers.validation import ClassificationMetrics
from dissect_monai.losses.multilabel import MultiLabelLoss, positive_weights
from dissect_monai.metrics.classification import expected_calibration_error
from dissect_monai.metrics.probes import FeatureDataset
from dissect_monai.networks.optimizers import adamw
from dissect_monai.networks.weights import trained_part
from dissect_monai.phantoms.xray import write_xray_phantoms
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import AugmentedBatch

NAN = float("nan")
NAMES = ["Opacity", "Pleural Thickening", "Rare"]


class Writer:
    """Stands in for TensorBoard."""

    def __init__(self) -> None:
        self.images: dict[str, list[tuple[int, torch.Size]]] = {}

    def add_image(self, name: str, image: torch.Tensor, step: int) -> None:
        self.images.setdefault(name, []).append((step, image.shape))

    def flush(self) -> None:
        pass


def validated(logits: torch.Tensor, labels: torch.Tensor, handler: ClassificationMetrics) -> SupervisedEvaluator:
    """An evaluator that has run once; its network returns the "images", which are the logits."""
    data = [{"image": image, "label": label} for image, label in zip(logits, labels, strict=True)]
    loader = DataLoader(Dataset(data), batch_size=7)
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=loader, network=nn.Identity(), val_handlers=[handler], decollate=False
    )
    evaluator.logger.setLevel(logging.ERROR)
    evaluator.run()
    return evaluator


def drawn(num_items: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(num_items, 3, generator=generator) < 0.4).float()
    logits = torch.randn(num_items, 3, generator=generator) + labels
    labels[::5, 1] = NAN
    labels[:, 2] = 0
    return logits, labels


# ---- metrics -----------------------------------------------------------------------------------------------------


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


def test_findings_without_both_classes_are_left_out_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    handler = ClassificationMetrics(NAMES)
    evaluator = validated(*drawn(), handler)
    evaluator.run()
    assert "auroc_Rare" not in evaluator.state.metrics
    assert caplog.text.count("Left out, for lack of positives or negatives in validation: Rare.") == 1


def test_every_validation_starts_afresh() -> None:
    handler = ClassificationMetrics(NAMES)
    evaluator = validated(*drawn(), handler)
    evaluator.run()
    assert len(handler.collector.outputs().labels) == 40


def test_without_any_judged_finding_the_means_are_nan() -> None:
    logits, labels = drawn()
    metrics = validated(logits, torch.zeros_like(labels), ClassificationMetrics(NAMES)).state.metrics
    assert set(metrics) == {"auroc", "ap", "ece"}
    assert all(np.isnan(value) for value in metrics.values())


def test_draws_curves_at_the_interval() -> None:
    writer = Writer()
    handler = ClassificationMetrics(NAMES, writer, interval=2)  # type: ignore[arg-type]
    evaluator = validated(*drawn(), handler)
    for epoch in (2, 3, 4):
        evaluator.run(epoch)
    assert {name: [step for step, _ in images] for name, images in writer.images.items()} == {
        "roc": [2, 4],
        "reliability": [2, 4],
    }
    assert all(shape[0] == 3 for images in writer.images.values() for _, shape in images)


def test_rejects_an_interval_below_1() -> None:
    with pytest.raises(ValueError, match="`interval` must be at least 1, got 0"):
        ClassificationMetrics(NAMES, interval=0)


# ---- best weights and early stop ---------------------------------------------------------------------------------


class Run:
    """A trainer of empty steps whose validations score what they are told, epoch by epoch."""

    def __init__(
        self, folder: Path, scores: Sequence[float], patience: int = 2, resume: bool = False, interval: int = 1
    ) -> None:
        self.weights = nn.Linear(1, 1, bias=False)
        self.trainer = Engine(lambda engine, batch: None)
        self.trainer.state.device = torch.device("cpu")
        self.trainer.state.max_epochs, self.trainer.state.epoch_length = len(scores), 1
        self.evaluator = Engine(lambda engine, batch: None)

        @self.evaluator.on(Events.EPOCH_COMPLETED)
        def score(engine: Engine) -> None:
            engine.state.metrics["auroc"] = scores[self.trainer.state.epoch - 1]

        @self.trainer.on(Events.EPOCH_COMPLETED)
        def validate(engine: Engine) -> None:
            nn.init.constant_(self.weights.weight, engine.state.epoch)
            self.evaluator.state.max_epochs, self.evaluator.state.epoch = engine.state.epoch, engine.state.epoch - 1
            self.evaluator.run([0], max_epochs=engine.state.epoch)

        self.best = BestWeights(self.evaluator, self.weights, folder / "models" / "model.pt", patience=patience)
        self.best.attach(self.trainer)
        resume_from = newest_checkpoint(folder) if resume else None
        TrainingCheckpoint(folder, {}, interval=interval, resume_from=resume_from).attach(self.trainer)
        self.path = folder / "models" / "model.pt"

    def run(self) -> Run:
        self.trainer.run([0], max_epochs=self.trainer.state.max_epochs)
        return self

    @property
    def written(self) -> float:
        return torch.load(self.path)["weight"].item()


def test_keeps_the_weights_of_the_best_epoch_and_stops_when_none_is_better(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.5, 0.7, 0.6, 0.7, 0.9]).run()
    assert run.trainer.state.epoch == 4  # epoch 4 is no better than epoch 2
    assert run.written == run.trainer.state.best_epoch == 2
    assert run.trainer.state.best_metric == 0.7


def test_an_improvement_starts_the_patience_again(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.5, 0.4, 0.6, 0.5, 0.7, 0.6]).run()
    assert run.trainer.state.epoch == 6
    assert run.written == 5


def test_a_resumed_run_stops_and_keeps_as_an_uninterrupted_one(tmp_path: Path) -> None:
    scores = [0.5, 0.7, 0.6, 0.65, 0.9]
    Run(tmp_path, scores[:3]).run()
    resumed = Run(tmp_path, scores, resume=True).run()
    assert resumed.trainer.state.epoch == 4
    assert resumed.written == 2
    assert resumed.trainer.state_dict() == Run(tmp_path / "whole", scores).run().trainer.state_dict()
    again = Run(tmp_path, scores, resume=True).run()  # it has stopped, and stays so
    assert again.trainer.state.best_epoch == again.written == 2
    assert Run(tmp_path, scores, resume=True, patience=9).run().written == 5


def test_the_last_epoch_of_a_stopped_run_is_saved(tmp_path: Path) -> None:
    Run(tmp_path, [0.7, 0.6, 0.5, 0.9], interval=10).run()
    assert newest_checkpoint(tmp_path).endswith("checkpoint_epoch=3.pt")


def test_the_latest_weights_are_the_best_as_long_as_nothing_can_be_judged(tmp_path: Path) -> None:
    assert Run(tmp_path, [NAN] * 4).run().written == 4


def test_a_run_that_diverges_does_not_overwrite_the_best_weights(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.5, 0.7, NAN, NAN, 0.8]).run()
    assert run.written == 2
    assert run.trainer.state.epoch == 4


def test_a_process_that_does_not_validate_stops_with_the_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, [0.5, 0.6, 0.7])
    monkeypatch.setattr(idist, "all_reduce", lambda value, op: 1.0 if op == "MAX" else value)
    assert run.run().trainer.state.epoch == 1


def test_rejects_a_metric_that_the_evaluator_lacks(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.5])
    run.best.metric = "acc"
    with pytest.raises(ValueError, match=r"`metric` must be one of the evaluator's \(auroc\), got 'acc'"):
        run.run()


def test_rejects_a_patience_below_1(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`patience` must be at least 1, got 0"):
        Run(tmp_path, [0.5], patience=0)


def test_a_checkpoint_takes_weights_and_their_path_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`weights` and `weights_path` must be given together, got one of them"):
        TrainingCheckpoint(tmp_path, {}, weights=nn.Linear(1, 1))


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
        self.best = BestWeights(self.evaluator, self.network, folder / "models" / "model.pt", patience=50)
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
        self.path = folder / "models" / "model.pt"

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
