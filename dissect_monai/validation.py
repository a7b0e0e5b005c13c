"""Validation of a classifier as it trains: metrics, figures, the best weights, and when to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EpochOutputStore
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.calibration import expected_calibration_error
from dissect_monai.metrics import auroc, average_precision
from dissect_monai.plots import figure_to_tensor, reliability_plot, roc_plot
from dissect_monai.weights import save_weights

Array = NDArray[np.floating[Any]]
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
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
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
        names = left_out(self.label_names, usable)
        if names and not self.named_left_out:
            logger.warning("Left out, for lack of positives or negatives in validation: %s.", ", ".join(names))
            self.named_left_out = True
        for metric, function in METRICS.items():
            values = {i: float(function(outputs.labels[:, i], probabilities[:, i])) for i in usable}
            engine.state.metrics[metric] = float(np.mean(list(values.values()))) if values else nan
            engine.state.metrics |= {metric_name(metric, self.label_names[i]): value for i, value in values.items()}
        if self.writer is not None and engine.state.epoch % self.interval == 0:
            self._draw(self.writer, outputs.labels, probabilities, engine.state.epoch)

    def _draw(self, writer: SummaryWriter, labels: Array, probabilities: Array, epoch: int) -> None:
        for name, plot in (("roc", roc_plot), ("reliability", reliability_plot)):
            writer.add_image(name, figure_to_tensor(plot(labels, probabilities, self.label_names)), epoch)
        writer.flush()


class BestWeights:
    """Keeps the weights of the best validation, and ends the run when validation has not improved for long.

    Unlike MONAI's `CheckpointSaver` and `EarlyStopHandler` it writes atomically, stops all processes of a distributed
    run together although one of them validates, and goes on where it was: `best_metric`, `best_epoch` and `num_worse`
    are part of the trainer's state. As long as the metric is NaN, since validation cannot judge any finding, the latest
    weights are the best.

    Attach it to the trainer, in every process: after the `ValidationHandler` (which must not run at the start, since a
    resumed run would count that validation twice) and before the `TrainingCheckpoint`.

    Args:
        evaluator: the validator; it may validate in one process alone.
        weights: module whose plain state dict is written.
        weights_path: where it goes, such as `models/model.pt`; `settings` go beside it, as `models/model.json`.
        settings: what the weights depend on, such as encoder, image size and the names of the findings.
        metric: the evaluator's metric, larger is better.
        patience: validations in a row without improvement after which the run ends.
        rank: of this process, if every process validates; 0 writes.

    Raises:
        ValueError: if `patience` is not positive; during the run, if the evaluator has no such metric.
    """

    def __init__(
        self,
        evaluator: Engine,
        weights: nn.Module,
        weights_path: str | Path,
        settings: Mapping[str, Any] | None = None,
        metric: str = "auroc",
        patience: int = 10,
        rank: int = 0,
    ) -> None:
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {patience}.")
        self.evaluator = evaluator
        self.weights = weights
        self.weights_path = weights_path
        self.settings = dict(settings or {})
        self.metric = metric
        self.patience = patience
        self.rank = rank
        self.trainer: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Compare after every validation, stop at the end of the trainer's epoch."""
        self.trainer = engine
        for name, value in {"best_metric": nan, "best_epoch": 0, "num_worse": 0}.items():
            setattr(engine.state, name, value)
            engine.state_dict_user_keys.append(name)
        self.evaluator.add_event_handler(Events.COMPLETED, self)
        # At the start, too: a run that has stopped and is resumed stays stopped, unless `patience` is raised.
        engine.add_event_handler(Events.EPOCH_STARTED | Events.EPOCH_COMPLETED, self._stop)

    def __call__(self, evaluator: Engine) -> None:
        """Write the weights if the validation that has ended is the best so far."""
        if self.metric not in evaluator.state.metrics:
            found = ", ".join(evaluator.state.metrics) or "none"
            raise ValueError(f"`metric` must be one of the evaluator's ({found}), got {self.metric!r}.")
        if self.trainer is None:
            raise ValueError("`BestWeights` must be attached to a trainer before the evaluator runs.")
        score, state = float(evaluator.state.metrics[self.metric]), self.trainer.state
        if score > state.best_metric or isnan(state.best_metric):
            state.best_metric, state.best_epoch, state.num_worse = score, evaluator.state.epoch, 0
            if self.rank == 0:
                save_weights(self.weights, self.weights_path, self.settings)
        else:
            state.num_worse += 1

    def _stop(self, engine: Engine) -> None:
        state = engine.state
        # Every process must leave the loop in the same epoch, else the others wait for its gradients for ever.
        if idist.all_reduce(float(state.num_worse >= self.patience), "MAX"):
            logger.info(
                "No better %s than %.4f of epoch %d: stopped.", self.metric, state.best_metric, state.best_epoch
            )
            engine.terminate()


class FiniteLoss:
    """Stops a run whose loss is not finite, with an error; attach it before what saves the network.

    Args:
        interval: iterations between looks; each waits for the device.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Look every `interval` iterations, and at the end of every epoch."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Look at the last iteration."""
        loss = float(engine.state.output["loss"].detach())
        if not isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} in epoch {engine.state.epoch}, iteration {engine.state.iteration}: lower "
                "--learning_rate, or set --amp false; checkpoints of earlier epochs are intact."
            )


def usable_findings(labels: Array, scores: Array) -> list[int]:
    """Columns of `labels` and `scores`, both (N, C), in which both classes are known."""
    columns = zip(labels.T, scores.T, strict=True)
    return [index for index, (label, score) in enumerate(columns) if not isnan(auroc(label, score))]


def left_out(label_names: Sequence[str], usable: Sequence[int]) -> list[str]:
    """Names of the findings whose index is not among the usable ones."""
    return [name for index, name in enumerate(label_names) if index not in usable]


def metric_name(metric: str, finding: str) -> str:
    """Name of a finding's metric, without blanks and commas, as a CSV holds it: `auroc_Pleural_Thickening`."""
    return f"{metric}_{finding}".replace(" ", "_").replace(",", "")


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().as_subclass(Tensor).double().cpu()
