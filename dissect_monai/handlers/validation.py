"""Validation as a network trains: of a classifier, of an encoder by k-NN, and of hierarchical self-supervision."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EpochOutputStore
from monai.data import DataLoader, Dataset
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.common import Array
from dissect_monai.data.datalists import label_matrix
from dissect_monai.data.datasets import items_of, labelled_part
from dissect_monai.data.sampling import part_of_tasks
from dissect_monai.handlers.ending import NOT_SCORED, Result
from dissect_monai.handlers.monitors import level_metrics
from dissect_monai.losses.pretraining import unexplained_variance
from dissect_monai.metrics.classification import (
    auroc,
    average_precision,
    expected_calibration_error,
    macro_auroc,
    usable_findings,
)
from dissect_monai.metrics.probes import extract_features, intensity_histograms, knn_scores
from dissect_monai.metrics.representation import DomainFeatures, collapse_metrics, shortcut_metrics
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.transforms.views import HierarchyViews
from dissect_monai.writing import metric_name

logger = logging.getLogger(__name__)
NUM_BINS = 32  # of the intensity histograms
GROUPS = "surface_dice|dice|hd95|auroc|ap|ece|knn_auroc|reconstruction_error|retrieval|accuracy|shortcut"  # of metrics
METRICS: dict[str, Callable[..., Any]] = {"auroc": auroc, "ap": average_precision, "ece": expected_calibration_error}


def write_scores(engine: Engine, writer: SummaryWriter) -> None:
    """Show the metrics of a validation in TensorBoard by group: `dice_liver` as `dice/liver`, `auroc` as `auroc/mean`.

    It is the `epoch_event_writer` of a `TensorBoardStatsHandler`; the group of other metrics is `validation`.
    """
    for name, value in engine.state.metrics.items():
        found = re.match(f"({GROUPS})(?:_(.+))?$", name)
        tag = f"{found[1]}/{found[2] or 'mean'}" if found else f"validation/{name}"
        writer.add_scalar(tag, value, engine.state.epoch)
    writer.flush()


class Outputs(NamedTuple):
    """What a classifier said of a split, and what is true."""

    logits: Array  # (N, C)
    labels: Array  # (N, C), 1, 0 or NaN (unknown)

    def probabilities(self, temperature: float = 1.0) -> Array:
        """sigmoid(logits / temperature), shape (N, C)."""
        return torch.from_numpy(self.logits / temperature).sigmoid().numpy()


class OutputCollector(EpochOutputStore):
    """Collects the logits and labels of the epoch that an evaluator (`decollate=False`) is in."""

    def __init__(self) -> None:
        super().__init__(
            lambda output: [output[key].detach().as_subclass(Tensor).double().cpu() for key in ("pred", "label")]
        )

    def outputs(self) -> Outputs:
        """All of the epoch so far."""
        return Outputs(*(torch.cat(part).numpy() for part in zip(*self.data, strict=True)))


@dataclass(eq=False)
class ClassificationMetrics:
    """Leaves the validation metrics of a multi-label classifier with the evaluator.

    Metrics are the means `auroc`, `ap` and `ece` over the findings that have both classes, and `auroc_<finding>`,
    `ap_<finding>`, `ece_<finding>`, with _ for blanks. Findings that lack a class are left out and named in the log,
    once; if all do, the means are NaN. The evaluator's output must hold logits, its `decollate` be false.
    """

    label_names: Sequence[str]  # of the C findings
    collector: OutputCollector = field(default_factory=OutputCollector, init=False)
    named_left_out: bool = field(default=False, init=False)

    def attach(self, engine: Engine) -> None:
        """Collect over the epoch; attach before handlers that log or compare the metrics."""
        self.collector.attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compute the metrics of the epoch."""
        outputs = self.collector.outputs()
        probabilities = outputs.probabilities()
        usable = usable_findings(outputs.labels, probabilities)
        names = [name for index, name in enumerate(self.label_names) if index not in usable]
        if names and not self.named_left_out:
            logger.warning("Left out, for lack of positives or negatives in validation: %s.", ", ".join(names))
            self.named_left_out = True
        for metric, function in METRICS.items():
            values = {i: float(function(outputs.labels[:, i], probabilities[:, i])) for i in usable}
            engine.state.metrics[metric] = float(np.mean(list(values.values()))) if values else nan
            engine.state.metrics |= {metric_name(metric, self.label_names[i]): value for i, value in values.items()}
        means = f"AUROC {engine.state.metrics['auroc']:.3f} (guessing: 0.5), a mean over findings, on validation"
        engine.state.result = Result(f"{means}, epoch {engine.state.epoch}" if usable else NOT_SCORED)


@dataclass(eq=False)
class KNNHandler:
    """Leaves the k-NN AUROC and the collapse of the embedding with the evaluator, whose network is the encoder.

    The metrics are `knn_auroc` (last stage), `knn_auroc_stages` (all stages), both left out if no finding has both
    classes, and `embedding_collapse` (MONAI's effective-rank score, 1 is collapsed). The evaluator's data set has a
    data list of labelled images.
    """

    training: Dataset  # with a data list, whose labelled images vote
    label_names: Sequence[str]
    fraction: float = 1.0  # share of the labelled training subjects that vote
    seed: int = 0  # draws other subjects
    before: str = field(default="", init=False)  # what it was before training

    def attach(self, engine: Any) -> None:
        """Run when `engine` has seen the validation split."""
        bank = labelled_part(self.training, self.fraction, self.seed, self.label_names)
        self.bank = DataLoader(bank, batch_size=engine.data_loader.batch_size)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Extract features, let the neighbours vote, and leave the metrics."""
        loaders, device = (self.bank, engine.data_loader), engine.state.device
        train, val = (extract_features(engine.network, loader, device, feature_maps) for loader in loaders)
        known, truth = (label_matrix(items_of(loader.dataset), self.label_names) for loader in loaders)
        banks = {"knn_auroc": (train.last, val.last), "knn_auroc_stages": (train.stages, val.stages)}
        for name, (bank, queries) in banks.items():
            value = macro_auroc(truth, knn_scores(bank, known, queries))
            if not isnan(value):
                engine.state.metrics[name] = value
        found, epoch = engine.state.metrics.get("knn_auroc_stages", nan), engine.state.epoch
        self.before = f"before training: {found:.3f}, " if epoch == 0 else self.before
        when = f"on validation, epoch {epoch}" if epoch else "before training; no epoch was validated"
        text = f"k-NN AUROC of all stages {found:.3f} ({self.before * (epoch > 0)}guessing: 0.5) {when}"
        engine.state.result = Result(NOT_SCORED if isnan(found) else text)
        collapse = EmbeddingCollapseMetric(include_indicators=["effective_rank"])
        scores = collapse(embeddings=torch.from_numpy(val.last))
        engine.state.metrics["embedding_collapse"] = float(scores["effective_rank_score"])


@dataclass(eq=False)
class HSSLValidation:
    """Judges an `HSSLNet` on validation data, among others by how well its features betray the data set.

    Attached to an evaluator whose network is the `HSSLNet` and whose `prepare_batch` is `HierarchyViews` that make two
    views, it leaves in the engine's metrics

    - `retrieval_*` and `accuracy_*`, see `level_metrics`, over all validation images;
    - `reconstruction_error_<task>`, the unexplained variance over the masked voxels (over all, where a batch has none),
      a mean over the views of a task, and `reconstruction_error`, the mean over tasks;
    - `shortcut_*`, see `shortcut_metrics`, of the bottleneck for the images as they are, with a few training images of
      each task as bank;
    - `collapse_*` of the same features, see `collapse_metrics`.

    What cannot be told from the data, with a single task above all, is left out. The loader does not shuffle, and the
    items of both data sets have a "task" and a "group".
    """

    training: Dataset

    def attach(self, engine: Any) -> None:
        """Collect during a validation and judge at its end; attach before what writes the metrics."""
        self.bank = DataLoader(part_of_tasks(self.training), batch_size=engine.data_loader.batch_size)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Any) -> None:
        """Leave the metrics in the engine's state."""
        bank, items = (_features(engine, loader) for loader in (self.bank, engine.data_loader))
        engine.state.metrics |= self._scored() | shortcut_metrics(bank, items) | collapse_metrics(items)
        error, task = (engine.state.metrics[name] for name in ("reconstruction_error", "accuracy_task"))
        commonest = max(map(items.task.count, items.task)) / len(items.task)
        text = f"error {error:.3f} of reconstructed masked voxels (their mean alone: 1), accuracy of the task "
        text += f"{task:.3f} (always the most frequent: {commonest:.3f}), on validation, epoch {engine.state.epoch}"
        engine.state.result = Result(text)

    def _start(self, engine: Any) -> None:
        self.views: HierarchyViews = engine.prepare_batch
        self.views.set_epoch(0)  # all validations have the same views
        # Of each batch: embeddings of three levels, logits of task and group, errors, task and group, all (2·B, ...)
        self.seen: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def _collect(self, engine: Engine) -> None:
        target, output = engine.state.output["label"], engine.state.output["pred"]
        masked = target.masked is not None and target.masked.any()
        regions = target.masked.split(1) if masked else [None] * len(target.views)
        pairs = zip(output.reconstruction.split(1), target.views.split(1), regions, strict=True)
        errors = torch.stack([unexplained_variance(*each) for each in pairs])
        labels = target.task.repeat(2), target.group.repeat(2)
        self.seen.append((*output.embeddings, output.task_logits, output.group_logits, errors, *labels))

    def _scored(self) -> dict[str, float]:
        """Metrics of the views."""
        *embeddings, task_logits, group_logits, errors, tasks, groups = map(_joined, zip(*self.seen, strict=True))
        error = errors.unflatten(0, (2, -1)).mean(0)
        task, group = tasks[: len(error)], groups[: len(error)]
        levels = level_metrics(embeddings, (task_logits, group_logits), (task, group))
        by_task = {
            metric_name("reconstruction_error", name): float(error[task == index].mean())
            for name, index in self.views.numbers["task"].items()
            if (task == index).any()
        }
        metrics = {name: float(value) for name, value in levels.items()}
        return {**metrics, "reconstruction_error": float(np.mean([*by_task.values()])), **by_task}


def _features(engine: Any, loader: DataLoader[Any]) -> DomainFeatures:
    found = extract_features(engine.network.segresnet, loader, engine.state.device, _histograms_and_bottleneck)
    items = items_of(loader.dataset)
    task, group = ([item[key] for item in items] for key in ("task", "group"))
    return DomainFeatures(found.last, found.stages[:, :NUM_BINS], task, group)


def _histograms_and_bottleneck(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Two "stages" for `extract_features`, so that the images are read once."""
    return [intensity_histograms(images, NUM_BINS).unsqueeze(2), feature_maps(encoder, images)[-1]]


def _joined(batches: Sequence[Tensor]) -> Tensor:
    """Batches (2·B, ...) of first views, then second ones, as one that is so, too."""
    return torch.cat([batch.unflatten(0, (2, -1)) for batch in batches], dim=1).flatten(0, 1)
