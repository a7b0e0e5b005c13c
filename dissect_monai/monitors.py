"""What a pretraining run shows while it runs, and when it must stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isnan
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.data import label_matrix
from dissect_monai.datasets import items_of
from dissect_monai.figures import code_figure, view_figure
from dissect_monai.metrics import code_usage, effective_rank, feature_std, macro_auroc, perplexity
from dissect_monai.networks import SSLOutput, VQSSLNet, feature_maps
from dissect_monai.probes import extract_features, knn_scores

COLLAPSED_STD = 0.01  # on a scale on which isotropic features have 1
NUM_PICTURES = 4


class HasTerms(Protocol):
    """A loss that names its terms: `VQSSLLoss`, `HSSLLoss`."""

    def terms(self, output: Any, target: Any, /) -> dict[str, Tensor]:
        """Unweighted terms by name, scalars, of what the network returned and of what it is compared with."""


class Monitor(ABC):
    """Looks at a pretraining run: writes scalars and pictures, and stops a run that is lost.

    What is seen of a network is up to the subclass.

    Args:
        network: the pretraining network, not its wrapper.
        loss: its loss, for the terms by name.
        optimizer: for the learning rate.
        writer: TensorBoard; None on ranks that write nothing, which still stop with the others.
        interval: iterations between looks; each waits for the device.
        patience: looks in a row at which the features must be collapsed before the run stops.

    Raises:
        ValueError: if `interval` or `patience` is not positive.
        RuntimeError: during the run, if the loss is not finite or the features have collapsed.
    """

    spread: str  # scalar on the scale of `feature_std` by which a collapse is judged
    spread_of: str  # what it is called
    collapsed_std = COLLAPSED_STD  # below which it is one
    remedy: str  # against a collapse

    def __init__(
        self,
        network: nn.Module,
        loss: HasTerms,
        optimizer: Optimizer,
        writer: SummaryWriter | None = None,
        interval: int = 10,
        patience: int = 5,
    ) -> None:
        if interval < 1 or patience < 1:
            raise ValueError(f"`interval` and `patience` must be at least 1, got {interval} and {patience}.")
        self.network = network
        self.loss = loss
        self.optimizer = optimizer
        self.writer = writer
        self.interval = interval
        self.patience = patience
        self.collapsed = 0

    def attach(self, engine: Engine) -> None:
        """Look every `interval` iterations, draw at the end of every epoch; attach before what saves the network."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Look at the last iteration."""
        output, target = engine.state.output["pred"], engine.state.output["label"]
        scalars = {f"loss/{name}": term for name, term in self.loss.terms(output, target).items()}
        scalars["loss/total"] = engine.state.output["loss"].detach()
        self._refuse_nonfinite(engine, scalars)
        scalars |= self._indicators(output, target)
        self._refuse_collapse(engine, scalars)
        if self.writer is not None:
            schedules = {"schedule/learning_rate": self.optimizer.param_groups[0]["lr"], **self._schedules(engine)}
            for name, value in {**scalars, **schedules}.items():
                self.writer.add_scalar(name, float(value), engine.state.iteration)

    @abstractmethod
    def _indicators(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Scalars beside the terms of the loss, among them `spread` and "collapse/effective_rank"."""

    def _schedules(self, engine: Engine) -> dict[str, float]:
        """What is in force beside the learning rate."""
        return {}

    @abstractmethod
    def _draw(self, engine: Engine, writer: SummaryWriter) -> None:
        """Write pictures of the last iteration."""

    def _refuse_nonfinite(self, engine: Engine, scalars: dict[str, Tensor]) -> None:
        bad = [f"{name} = {float(value)}" for name, value in scalars.items() if not torch.isfinite(value)]
        if bad:
            raise RuntimeError(
                f"the loss is not finite in epoch {engine.state.epoch}, iteration {engine.state.iteration}: "
                f"{', '.join(bad)}. Lower --learning_rate, lengthen --warmup_epochs, or set --amp false; "
                "checkpoints of earlier epochs are intact."
            )

    def _refuse_collapse(self, engine: Engine, scalars: dict[str, Tensor]) -> None:
        spread = float(scalars[self.spread])
        self.collapsed = self.collapsed + 1 if spread < self.collapsed_std else 0
        if self.collapsed >= self.patience:
            raise RuntimeError(
                f"the features have collapsed in epoch {engine.state.epoch}, iteration {engine.state.iteration}: the "
                f"{self.spread_of} is {spread:.4f} (isotropic: 1), the effective rank of the embedding "
                f"{float(scalars['collapse/effective_rank']):.1f}, at {self.patience} looks in a row. {self.remedy}"
            )

    @torch.no_grad()
    def _end_epoch(self, engine: Engine) -> None:
        # Once more, because an epoch may be shorter than the interval, and its checkpoint is written next.
        self._refuse_nonfinite(engine, {"loss/total": engine.state.output["loss"].detach()})
        if self.writer is not None:
            self._draw(engine, self.writer)
            self.writer.flush()


class SSLMonitor(Monitor):
    """Writes every loss term, rates, codebook and collapse indicators and pictures; stops a run that is lost.

    Attach it after `TargetMomentumHandler`, whose momentum it writes. Arguments and errors are those of `Monitor`; the
    network is a `VQSSLNet`.
    """

    network: VQSSLNet
    spread = "collapse/target_std"
    spread_of = "targets' standard deviation"
    remedy = "Raise --momentum, lower --learning_rate or enlarge --batch_size."

    def _indicators(self, output: SSLOutput, target: Tensor) -> dict[str, Tensor]:
        scalars = {
            "collapse/feature_std": feature_std(output.embedding),
            "collapse/target_std": feature_std(output.targets),
            "collapse/effective_rank": effective_rank(output.embedding),
        }
        for stage, scale, codebook in self._scales(output):
            scalars[f"codes/perplexity_stage{stage}"] = perplexity(scale, len(codebook))
            scalars[f"codes/usage_stage{stage}"] = code_usage(scale, len(codebook))
        return scalars

    def _schedules(self, engine: Engine) -> dict[str, float]:
        return {"schedule/target_momentum": engine.state.target_momentum}

    def _scales(self, output: SSLOutput) -> list[tuple[int, Tensor, Tensor]]:
        books = [codebook.embedding.weight for codebook in self.network.codebooks]
        indices = [scale.indices for scale in output.quantized]
        return list(zip(self.network.stages, indices, books, strict=True))

    def _draw(self, engine: Engine, writer: SummaryWriter) -> None:
        epoch, output = engine.state.epoch, engine.state.output["pred"]
        seen, clean = engine.state.output["image"], engine.state.output["label"]
        first = slice(0, min(NUM_PICTURES, len(seen) // 2))
        second = slice(len(seen) // 2, len(seen) // 2 + first.stop)
        writer.add_image("views", view_figure([seen[first], seen[second]]), epoch)
        if output.reconstruction is not None:
            columns = [clean[first], output.reconstruction[first]]
            if not torch.equal(seen, clean):  # else the input is the target
                columns.insert(0, seen[first])
            writer.add_image("reconstruction", view_figure(columns), epoch)
        _, indices, books = zip(*self._scales(output), strict=True)
        figure = code_figure(seen[first], [scale[first] for scale in indices], books)
        writer.add_image(f"codes_of_stages_{'_'.join(map(str, self.network.stages))}", figure, epoch)


class KNNHandler:
    """Logs the k-NN AUROC and the collapse of the embedding at the end of every validation.

    Attached to an evaluator whose network is the encoder. It sets the metrics `knn_auroc` (last stage),
    `knn_auroc_stages` (all stages) and `embedding_collapse` (MONAI's effective-rank score, 1 is collapsed).

    Args:
        encoder: encoder as it trains.
        training: loader of the labelled training images, a part of a data set with a data list (see `labelled_part`).
        validation: loader of the labelled validation images, of a data set with a data list.
        label_names: names of the findings.
        k: number of neighbours.
    """

    def __init__(
        self,
        encoder: nn.Module,
        training: DataLoader[Any],
        validation: DataLoader[Any],
        label_names: Sequence[str],
        k: int = 20,
    ) -> None:
        self.encoder = encoder
        self.loaders = training, validation
        self.labels = [label_matrix(items_of(each.dataset), label_names) for each in self.loaders]
        self.label_names = label_names
        self.k = k
        self.collapse = EmbeddingCollapseMetric(include_indicators=["effective_rank"])

    def attach(self, engine: Engine) -> None:
        """Run when `engine` has seen the validation split."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Extract, vote, and leave the metrics in the engine's state."""
        train, val = (extract_features(self.encoder, each, engine.state.device, feature_maps) for each in self.loaders)
        banks = {"knn_auroc": (train.last, val.last), "knn_auroc_stages": (train.stages, val.stages)}
        for name, (bank, queries) in banks.items():
            scores = knn_scores(bank, self.labels[0], queries, self.k)
            value = macro_auroc(self.labels[1], scores, self.label_names).value
            if not isnan(value):  # else no finding has both classes here, and there is nothing to log
                engine.state.metrics[name] = value
        collapse = self.collapse(embeddings=torch.from_numpy(val.last))["effective_rank_score"]
        engine.state.metrics["embedding_collapse"] = float(collapse)
