"""What happens in every training: target momentum, seeds, progress, and what stops it or keeps a part as it is."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import cos, isfinite, pi
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from dissect_monai.common import InputError, rank
from dissect_monai.handlers.ending import Result
from dissect_monai.networks.vqssl import VQSSLNet
from dissect_monai.networks.weights import parts_of

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TargetMomentumHandler:
    """Moves the target network after every iteration, with a momentum that rises from `momentum` to 1.

    The momentum of an iteration is left as `engine.state.target_momentum`. Without `momentum`, it starts at
    max(0, min(0.996, 1 − 2·E/K)) for K iterations, so that the target turns over in a short run, too: of the weights
    that it starts with, a share of exp(−E) is left.

    Reference:
        Grill et al., BYOL, NeurIPS 2020, Appendix J: τ = 1 − (1 − τ_base)·(cos(πk/K) + 1)/2.
    """

    network: VQSSLNet  # not its DDP or compiled wrapper
    momentum: float | None  # τ at the first iteration, in [0, 1]
    num_iterations: int  # K, over which τ follows a half cosine to 1
    e_foldings: float = 8  # E

    def __post_init__(self) -> None:
        shortest = max(0.0, min(0.996, 1 - 2 * self.e_foldings / self.num_iterations))
        self.first = shortest if self.momentum is None else self.momentum

    def attach(self, engine: Engine) -> None:
        """Run after every iteration."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Update the target."""
        progress = min(1.0, engine.state.iteration / self.num_iterations)
        engine.state.target_momentum = 1 - (1 - self.first) * (cos(pi * progress) + 1) / 2
        self.network.update_target(engine.state.target_momentum)


@dataclass(eq=False)
class EpochSeedHandler:
    """Makes the draws of python, torch and `epoch_seeded` in an epoch a function of seed, rank and epoch alone.

    So a run resumed at epoch n draws what an uninterrupted run draws, without random state in the checkpoint. The
    state that MONAI's random transforms keep is not touched.
    """

    seed: int
    epoch_seeded: Sequence[Any] = ()  # samplers and augmentations with `set_epoch`

    def attach(self, engine: Engine) -> None:
        """Run before the first batch of every epoch is fetched."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed them all."""
        epoch = engine.state.epoch
        # Odd factors keep neighbouring seeds, epochs and ranks apart.
        seed = (self.seed * 1_000_003 + epoch * 8_191 + rank()) % 2**31
        random.seed(seed)
        torch.manual_seed(seed)
        for drawer in self.epoch_seeded:
            drawer.set_epoch(epoch)


@dataclass(eq=False)
class ProgressHandler:
    """One progress bar over the whole run, in the first process: epoch, loss if there is one, time gone and left.

    The loss, beside the first one, is the result of a training without validation.
    """

    interval: int = 10  # iterations between updates of the loss, as at the end of an epoch; each waits for the device
    description: str = "pretraining"
    bar: tqdm[Any] | None = field(default=None, init=False)
    first: str = field(default="", init=False)  # loss that was looked at first

    def attach(self, engine: Engine) -> None:
        """Follow `engine` from its start, or from where it resumes."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.EXCEPTION_RAISED):
            engine.add_event_handler(event, self._close)

    def __call__(self, engine: Engine) -> None:
        """Advance by one iteration."""
        if self.bar is None:
            return
        self.bar.update()
        state = engine.state
        steps = self.interval, state.epoch_length or self.interval
        is_due = not self.first or any(state.iteration % each == 0 for each in steps)
        if is_due and isinstance(state.output, Mapping) and "loss" in state.output:
            loss = f"{state.output['loss'].item():.3f}"
            self.bar.set_postfix_str(f"epoch {state.epoch}/{state.max_epochs}, loss {loss}")
            self.first = self.first or f"{loss} in iteration {state.iteration}"
            text = f"loss {loss} in iteration {state.iteration}, {self.first}; nothing was validated"
            state.result = Result(text)

    def _open(self, engine: Engine) -> None:
        if self.bar is None and rank() == 0:
            length = engine.state.epoch_length  # None as long as nobody knows it
            total = None if length is None else engine.state.max_epochs * length
            self.bar = tqdm(total=total, initial=engine.state.iteration, unit="it", desc=self.description)

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if error is not None:  # ignite leaves an exception to its handlers once there is one
            raise error


@dataclass(eq=False)
class FiniteLoss:
    """Writes the loss, and refuses one that is not finite by a `ValueError`; attach it before what saves weights."""

    interval: int = 10  # iterations between looks; each waits for the device
    writer: SummaryWriter | None = None  # gets `loss/train`

    def attach(self, engine: Engine) -> None:
        """Look every `interval` iterations, and at the end of every epoch."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.EPOCH_COMPLETED(lambda engine, _: engine.state.iteration % self.interval), self)

    def __call__(self, engine: Engine) -> None:
        """Look at the last iteration."""
        (loss,) = refuse_nonfinite(engine, {"loss": engine.state.output["loss"]}).values()
        if self.writer is not None:
            self.writer.add_scalar("loss/train", loss, engine.state.iteration)


def refuse_nonfinite(engine: Engine, losses: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of losses, scalars; if one is not finite, refuse to go on."""
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    bad = [f"{name} = {value}" for name, value in values.items() if not isfinite(value)]
    if bad:
        raise InputError(
            f"the loss is not finite in epoch {engine.state.epoch}, iteration {engine.state.iteration}: "
            f"{', '.join(bad)}. Lower `learning_rate`, lengthen `warmup_epochs`, or set `amp` to false; "
            "checkpoints of earlier epochs are intact."
        )
    return values


@dataclass(eq=False)
class UnseenClasses:
    """Says after the first epoch which structures no patch has shown, such as when few labels are left."""

    class_names: Sequence[str]  # structures of the classes 1, 2, ... of the batches' "label"

    def attach(self, engine: Engine) -> None:
        """Look at the first epoch of `engine`."""
        self.seen: set[int] = set()
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), self._report)

    def __call__(self, engine: Engine) -> None:
        """Note the classes of one batch."""
        if engine.state.epoch == 1:
            self.seen |= {*torch.as_tensor(engine.state.batch["label"]).unique().int().tolist()}

    def _report(self) -> None:
        unseen = [name for value, name in enumerate(self.class_names, start=1) if value not in self.seen]
        if unseen and rank() == 0:
            names = ", ".join(unseen)
            logger.warning("No patch of the first epoch shows %s: with these labels it cannot be learnt.", names)


@dataclass(eq=False)
class FrozenEncoder:
    """Keeps the encoder of a segmentation network as it is for the first epochs, so that a new head does not spoil it.

    Its gradients are dropped before the optimiser sees them, which works in any number of processes: optimisers of
    PyTorch leave parameters without gradient alone, weight decay included. Its batch norms normalise by their running
    statistics, which stay.
    """

    network: nn.Module  # a `SegResNet` or `EncoderDecoder`
    num_epochs: int

    def attach(self, engine: Engine) -> None:
        """Run after every backward pass."""
        if not self.num_epochs:
            return
        parts = parts_of(self.network)
        if parts is None:
            raise InputError(f"`freeze_epochs` must be 0 with a {type(self.network).__name__}, got {self.num_epochs}.")
        self.encoder = [each for name, each in self.network.named_modules() if f"{name}.".startswith(parts.encoder)]
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)
        for module in self.encoder:
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(partial(self._keep_statistics, engine))

    def __call__(self, engine: Engine) -> None:
        """Drop the gradients of the encoder, if it is early."""
        if engine.state.epoch <= self.num_epochs:
            for module in self.encoder:
                for parameter in module.parameters(recurse=False):
                    parameter.grad = None

    def _keep_statistics(self, engine: Engine, norm: nn.Module, _: object) -> None:
        if engine.state.epoch <= self.num_epochs:
            norm.eval()
