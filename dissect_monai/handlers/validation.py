"""Validation of an encoder or a classifier as it trains, by metrics and figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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

from dissect_monai.common import Array, InputError
from dissect_monai.data.datalists import label_matrix
from dissect_monai.data.datasets import items_of, labelled_part
from dissect_monai.metrics.classification import (
    auroc,
    average_precision,
    expected_calibration_error,
    macro_auroc,
    usable_findings,
)
from dissect_monai.metrics.probes import extract_features, knn_scores
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.visualize.classifier import figure_to_tensor, reliability_plot, roc_plot
from dissect_monai.writing import metric_name

logger = logging.getLogger(__name__)
METRICS: dict[str, Callable[..., Any]] = {"auroc": auroc, "ap": average_precision, "ece": expected_calibration_error}


class Outputs(NamedTuple):
    """What a classifier said of a split, and what is true."""

    logits: Array  # (N, C)
    labels: Array  # (N, C), 1, 0 or NaN (unknown)

    def probabilities(self, temperature: float = 1.0) -> Array:
        """sigmoid(logits / temperature), shape (N, C)."""
        return torch.from_numpy(self.logits / temperature).sigmoid().numpy()


class OutputCollector:
    """Collects the logits and labels of the epoch that an evaluator (`decollate=False`) is in."""

    def __init__(self) -> None:
        self.store = EpochOutputStore(lambda output: (_on_cpu(output["pred"]), _on_cpu(output["label"])))

    def attach(self, engine: Engine) -> None:
        """Start afresh at every epoch, collect after every batch."""
        self.store.attach(engine)

    def outputs(self) -> Outputs:
        """All of the epoch so far."""
        return Outputs(*(torch.cat(part).numpy() for part in zip(*self.store.data, strict=True)))


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().as_subclass(Tensor).double().cpu()


class ClassificationMetrics:
    """Leaves the validation metrics of a multi-label classifier with the evaluator, and draws its curves.

    Metrics are the means `auroc`, `ap` and `ece` over the findings that have both classes, and `auroc_<finding>`,
    `ap_<finding>`, `ece_<finding>`, with _ for blanks. Findings that lack a class are left out and named in the log,
    once; if all do, the means are NaN. The evaluator's output must hold logits, its `decollate` be false.

    Args:
        label_names: names of the C findings.
        writer: TensorBoard for the ROC and reliability figures; None draws none.
        interval: epochs of the trainer between figures.

    Raises:
        ValueError: if `interval` is not positive.
    """

    def __init__(self, label_names: Sequence[str], writer: SummaryWriter | None = None, interval: int = 1) -> None:
        if interval < 1:
            raise InputError(f"`interval` must be at least 1, got {interval}.")
        self.label_names = list(label_names)
        self.writer = writer
        self.interval = interval
        self.collector = OutputCollector()
        self.named_left_out = False

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
        if self.writer is not None and engine.state.epoch % self.interval == 0:
            for name, plot in (("roc", roc_plot), ("reliability", reliability_plot)):
                figure = plot(outputs.labels, probabilities, self.label_names)
                self.writer.add_image(name, figure_to_tensor(figure), engine.state.epoch)
            self.writer.flush()


class KNNHandler:
    """Leaves the k-NN AUROC and the collapse of the embedding with the evaluator, whose network is the encoder.

    The metrics are `knn_auroc` (last stage), `knn_auroc_stages` (all stages), both left out if no finding has both
    classes, and `embedding_collapse` (MONAI's effective-rank score, 1 is collapsed).

    Args:
        encoder: encoder as it trains.
        training: data set of the training images, with a data list; the labelled ones vote.
        validation: loader of the labelled validation images, of a data set with a data list.
        label_names: names of the findings.
        fraction: share in (0, 1] of the labelled training subjects that vote.
        seed: draws other subjects.
    """

    def __init__(
        self,
        encoder: nn.Module,
        training: Dataset,
        validation: DataLoader,
        label_names: Sequence[str],
        fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.encoder = encoder
        bank = labelled_part(training, fraction, seed, label_names)
        self.loaders = DataLoader(bank, batch_size=validation.batch_size), validation
        self.labels = [label_matrix(items_of(each.dataset), label_names) for each in self.loaders]
        self.collapse = EmbeddingCollapseMetric(include_indicators=["effective_rank"])

    def attach(self, engine: Engine) -> None:
        """Run when `engine` has seen the validation split."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Extract features, let the neighbours vote, and leave the metrics."""
        train, val = (extract_features(self.encoder, each, engine.state.device, feature_maps) for each in self.loaders)
        banks = {"knn_auroc": (train.last, val.last), "knn_auroc_stages": (train.stages, val.stages)}
        for name, (bank, queries) in banks.items():
            scores = knn_scores(bank, self.labels[0], queries)
            value = macro_auroc(self.labels[1], scores)
            if not isnan(value):
                engine.state.metrics[name] = value
        collapse = self.collapse(embeddings=torch.from_numpy(val.last))["effective_rank_score"]
        engine.state.metrics["embedding_collapse"] = float(collapse)
