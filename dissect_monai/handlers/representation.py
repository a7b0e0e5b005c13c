"""How a pretraining does beyond its loss: rank of the features, and which term of the loss drives the encoder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.losses.pretraining import VQSSLLoss
from dissect_monai.metrics.probes import extract_features
from dissect_monai.metrics.representation import effective_rank
from dissect_monai.networks.encoders import feature_maps

logger = logging.getLogger(__name__)
LOW_RANK = 0.1  # share of the highest possible rank under which a representation has next to collapsed


@dataclass(eq=False)
class RepresentationMonitor:
    """Writes, every few epochs, what each term of the loss does to the encoder, and the rank of its features.

    `gradient/<term>` is the norm of the weighted term's gradient at the encoder's weights, as a share of the sum of all
    norms, in the first iteration of the epoch. `collapse/effective_rank_unaugmented` is that of the pooled last stage
    at the end of the epoch, with a warning if it is under a tenth of what is possible.

    Reference:
        Roy & Vetterli, The effective rank, EUSIPCO 2007.
    """

    encoder: nn.Module  # as it trains, not its wrapper
    loss: VQSSLLoss
    images: Iterable[Mapping[str, Any]]  # batches with an "image", unaugmented
    writer: SummaryWriter | None = None  # None where nothing is written; the terms are computed with the others
    interval: int = 1  # epochs between looks

    def attach(self, engine: Engine) -> None:
        """Look in the first epoch and in every `interval`-th one."""
        engine.add_event_handler(Events.STARTED, self._keep_buffers)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._compare_terms)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._measure_rank)

    def _is_due(self, epoch: int) -> bool:
        return epoch == 1 or epoch % self.interval == 0

    def _keep_buffers(self, engine: Engine) -> None:
        if getattr(engine, "compile", False):  # else a compiled backward pass gives away what those of other terms need
            torch._functorch.config.donated_buffer = False

    def _compare_terms(self, engine: Engine) -> None:
        if (engine.state.iteration - 1) % engine.state.epoch_length or not self._is_due(engine.state.epoch):
            return
        output = engine.state.output
        parameters = [each for each in self.encoder.parameters() if each.requires_grad]
        norms = {}
        for name, term in self.loss.terms(output["pred"], output["label"]).items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            squares = [each.float().square().sum() for each in gradients if each is not None]
            norms[name] = self.loss.weights[name] * torch.stack(squares).sum().sqrt()
        if self.writer is not None:
            total = torch.stack([*norms.values()]).sum()
            for name, norm in norms.items():
                self.writer.add_scalar(f"gradient/{name}", float(norm / total), engine.state.iteration)

    def _measure_rank(self, engine: Engine) -> None:
        if self.writer is None or not self._is_due(engine.state.epoch):
            return
        features = torch.from_numpy(extract_features(self.encoder, self.images, engine.state.device, feature_maps).last)
        rank, highest = float(effective_rank(features)), min(features.shape[1], len(features) - 1)
        self.writer.add_scalar("collapse/effective_rank_unaugmented", rank, engine.state.iteration)
        if rank < LOW_RANK * highest:
            logger.warning(
                "The features of epoch %d fill %.1f of %d directions: try `objective` nt_xent, a larger `batch_size`, "
                "or a lower `reconstruction_weight`.", engine.state.epoch, rank, highest,
            )  # fmt: skip
