"""What a pretraining run shows while it runs, and when it must stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.common import LEVELS, InputError
from dissect_monai.handlers.training import refuse_nonfinite
from dissect_monai.losses.contrastive import retrieval_accuracy
from dissect_monai.losses.pretraining import HSSLLoss, VQSSLLoss
from dissect_monai.metrics.representation import code_usage, effective_rank, feature_std, perplexity
from dissect_monai.networks.hssl import HSSLOutput
from dissect_monai.networks.vqssl import SSLOutput, VQSSLNet
from dissect_monai.transforms.views import HierarchyTarget
from dissect_monai.visualize.training import code_figure, show_mask, view_figure

NUM_PICTURES = 4
HSSL_PICTURES = ("", ", as the network sees it: what is masked is blue", ", reconstructed")
PATIENCE = 5  # looks in a row at which the features must be collapsed before the run stops


@dataclass(eq=False)
class Monitor(ABC):
    """Writes loss terms, indicators of a collapse and pictures of a pretraining run; stops a run that is lost.

    Raises:
        ValueError: during the run, if the loss is not finite or the features have collapsed.
    """

    network: nn.Module  # not its wrapper
    loss: VQSSLLoss | HSSLLoss  # for the terms by name
    optimizer: Optimizer  # for the learning rate
    writer: SummaryWriter | None = None  # None on ranks that write nothing, which still stop with the others
    interval: int = 10  # iterations between looks; each waits for the device
    draw_interval: int = 1  # epochs between pictures
    collapsed: int = field(default=0, init=False)  # looks in a row

    spread: ClassVar[str]  # scalar on the scale of `feature_std` by which a collapse is judged
    collapsed_std: ClassVar[float] = 0.01  # below which it is one, where isotropic features have 1
    remedy: ClassVar[str]  # against a collapse

    def attach(self, engine: Engine) -> None:
        """Look every `interval` iterations, draw at the end of epochs; attach before what saves the network."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Look at the last iteration."""
        output, target = engine.state.output["pred"], engine.state.output["label"]
        scalars = {f"loss/{name}": term for name, term in self.loss.terms(output, target).items()}
        scalars["loss/total"] = engine.state.output["loss"].detach()
        refuse_nonfinite(engine, scalars)
        scalars |= self._indicators(output, target)
        self._refuse_collapse(engine, scalars)
        if self.writer is not None:
            schedules = {"schedule/learning_rate": self.optimizer.param_groups[0]["lr"]}
            if hasattr(engine.state, "target_momentum"):
                schedules["schedule/target_momentum"] = engine.state.target_momentum
            for name, value in {**scalars, **schedules}.items():
                self.writer.add_scalar(name, float(value), engine.state.iteration)

    @abstractmethod
    def _indicators(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Scalars beside the terms of the loss, among them `spread` and "collapse/effective_rank"."""

    @abstractmethod
    def _draw(self, engine: Engine, writer: SummaryWriter) -> None:
        """Write pictures of the last iteration."""

    def _refuse_collapse(self, engine: Engine, scalars: dict[str, Tensor]) -> None:
        spread = float(scalars[self.spread])
        self.collapsed = self.collapsed + 1 if spread < self.collapsed_std else 0
        if self.collapsed >= PATIENCE:
            raise InputError(
                f"the features have collapsed in epoch {engine.state.epoch}, iteration {engine.state.iteration}: "
                f"{self.spread} is {spread:.4f} (isotropic: 1), the effective rank of the embedding "
                f"{float(scalars['collapse/effective_rank']):.1f}, at {PATIENCE} looks in a row. {self.remedy}"
            )

    @torch.no_grad()
    def _end_epoch(self, engine: Engine) -> None:
        # Once more, because an epoch may be shorter than the interval, and its checkpoint is written next.
        refuse_nonfinite(engine, {"loss/total": engine.state.output["loss"]})
        if self.writer is not None:
            if engine.state.epoch % self.draw_interval == 0:
                self._draw(engine, self.writer)
            self.writer.flush()


class SSLMonitor(Monitor):
    """The `Monitor` of a `VQSSLNet`: codebook indicators, views, reconstructions and codes, too.

    Attach it after `TargetMomentumHandler`, whose momentum it writes.
    """

    network: VQSSLNet
    spread = "collapse/target_std"  # of the projections where there are no targets
    remedy = "Lower `learning_rate`, enlarge `batch_size` or, for byol, raise `momentum`."

    def _indicators(self, output: SSLOutput, target: Tensor) -> dict[str, Tensor]:
        scalars = {
            "collapse/feature_std": feature_std(output.embedding),
            "collapse/target_std": feature_std(output.predictions if output.targets is None else output.targets),
            "collapse/effective_rank": effective_rank(output.embedding),
        }
        for stage, indices, codebook in self._scales(output):
            scalars[f"codes/perplexity_stage{stage}"] = perplexity(indices, len(codebook))
            scalars[f"codes/usage_stage{stage}"] = code_usage(indices, len(codebook))
        return scalars

    def _scales(self, output: SSLOutput) -> list[tuple[int, Tensor, Tensor]]:
        """Stage, indices and codebook of every scale."""
        books = [codebook.embedding.weight for codebook in self.network.codebooks]
        return list(zip(self.network.stages, [scale.indices for scale in output.quantized], books, strict=True))

    def _draw(self, engine: Engine, writer: SummaryWriter) -> None:
        epoch, output, seen = engine.state.epoch, engine.state.output["pred"], engine.state.output["image"]
        first = slice(0, min(NUM_PICTURES, len(seen) // 2))
        second = slice(len(seen) // 2, len(seen) // 2 + first.stop)
        writer.add_image("views", view_figure([seen[first], seen[second]], ("first view", "second view")), epoch)
        if output.reconstruction is not None:
            captions = ["first view", "first view, decoded from its codes"]
            figure = view_figure([seen[first], output.reconstruction[first]], captions)
            writer.add_image("reconstruction", figure, epoch)
        stages, indices, books = zip(*self._scales(output), strict=True)
        captions = ["first view", *(f"codes of stage {stage}, similar codes in similar colours" for stage in stages)]
        figure = code_figure(seen[first], [scale[first] for scale in indices], books, captions)
        writer.add_image(f"codes_of_stages_{'_'.join(map(str, self.network.stages))}", figure, epoch)


class HSSLMonitor(Monitor):
    """The `Monitor` of an `HSSLNet`: retrieval and accuracy at every level, too.

    All processes must attach it, as the contrasts are those of the joined batch. The picture `views` has a row per
    item: the first view as it is, as the network sees it, the masked voxels blue, and reconstructed; then the second.
    """

    spread = "collapse/feature_std"
    # The pooled features of a SegResNet share most of their direction, which `feature_std` does not subtract: it is
    # about 0.07 at the start, and runs that end at 0.2 and more first pass through 0.013.
    collapsed_std = 0.001
    remedy = "Lower `learning_rate`, lengthen `warmup_epochs`, enlarge `batch_size` or raise `reconstruction_weight`."

    def _indicators(self, output: HSSLOutput, target: HierarchyTarget) -> dict[str, Tensor]:
        logits = (output.task_logits, output.group_logits)
        levels = level_metrics(output.embeddings, logits, (target.task, target.group))
        return {
            **{f"batch/{name}": value for name, value in levels.items()},
            "collapse/feature_std": feature_std(output.embedding),
            "collapse/effective_rank": effective_rank(output.embedding),
        }

    def _draw(self, engine: Engine, writer: SummaryWriter) -> None:
        target = engine.state.output["label"]
        num_items = len(target.task)
        shown = [slice(start, start + min(NUM_PICTURES, num_items)) for start in (0, num_items)]
        inputs = show_mask(engine.state.output["image"], target.masked)
        pictures = target.views, inputs, engine.state.output["pred"].reconstruction
        columns = [images[view] for view in shown for images in pictures]
        captions = [f"{view} view{what}" for view in ("first", "second") for what in HSSL_PICTURES]
        writer.add_image("views", view_figure(columns, captions, slices=True), engine.state.epoch)


def level_metrics(
    embeddings: Sequence[Tensor], logits: Sequence[Tensor], labels: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Retrieval at every level, and accuracy of the classifiers of task and group.

    An image must find its other view. For task and group the first views alone are compared, where the other view would
    be too easy an answer, and classified.

    Args:
        embeddings: of the image, task and group level, each (2·B, D): all first views, then all second ones.
        logits: of task and group, each (2·B, number of classes) in that order.
        labels: task and group, each (B,), int64.

    Returns:
        scalars in [0, 1]: `retrieval_image`, `retrieval_task`, `retrieval_group`, `accuracy_task`, `accuracy_group`;
        a single item has no task or group to find.
    """
    num_items = len(labels[0])
    image = torch.arange(num_items, device=embeddings[0].device).repeat(2)
    metrics = {"retrieval_image": retrieval_accuracy(embeddings[0], image)}
    for level, embedding, logit, label in zip(LEVELS[1:], embeddings[1:], logits, labels, strict=True):
        if num_items > 1:
            metrics[f"retrieval_{level}"] = retrieval_accuracy(embedding[:num_items], label)
        metrics[f"accuracy_{level}"] = (logit[:num_items].argmax(1) == label).float().mean()
    return metrics
