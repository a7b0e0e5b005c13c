"""What happens over time: target momentum, seeds, checkpoints and progress, as ignite handlers."""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from math import cos, pi
from pathlib import Path
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader
from torch import nn
from tqdm.auto import tqdm

from dissect_monai.networks import VQSSLNet

logger = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"checkpoint_epoch=\d+\.pt")


class SetsEpoch(Protocol):
    """Anything whose random draws follow from the epoch: a `DistributedSampler`, `TwoViews`."""

    def set_epoch(self, epoch: int) -> None:
        """Reseed for the epoch."""


class TargetMomentumHandler:
    """Moves the target network after every iteration, with a momentum that rises from `momentum` to 1.

    Args:
        network: the network whose `update_target` is called; not its DDP or compiled wrapper.
        momentum: τ at the first iteration, in [0, 1].
        num_iterations: iterations over which τ follows a half cosine to 1.

    Raises:
        ValueError: if `momentum` or `num_iterations` is out of range.

    Reference:
        Grill et al., BYOL, NeurIPS 2020, Appendix J: τ = 1 − (1 − τ_base)·(cos(πk/K) + 1)/2.
    """

    def __init__(self, network: VQSSLNet, momentum: float, num_iterations: int) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` must be in [0, 1], got {momentum}.")
        if num_iterations < 1:
            raise ValueError(f"`num_iterations` must be at least 1, got {num_iterations}.")
        self.network = network
        self.momentum = momentum
        self.num_iterations = num_iterations

    def attach(self, engine: Engine) -> None:
        """Run after every iteration of `engine`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Update the target with the momentum of this iteration, left as `engine.state.target_momentum`."""
        engine.state.target_momentum = self.momentum_at(engine.state.iteration)
        self.network.update_target(engine.state.target_momentum)

    def momentum_at(self, iteration: int) -> float:
        """τ after `iteration` iterations."""
        progress = min(1.0, iteration / self.num_iterations)
        return 1 - (1 - self.momentum) * (cos(pi * progress) + 1) / 2


class EpochSeedHandler:
    """Makes the draws of python, torch and `epoch_seeded` in an epoch a function of seed, rank and epoch alone.

    A run resumed at epoch n thereby draws what an uninterrupted run draws, on any number of ranks, without random
    state in the checkpoint. MONAI's random transforms keep a state of their own, which this leaves alone.

    Args:
        seed: seed of the run.
        rank: rank of this process; ranks draw differently.
        epoch_seeded: samplers and augmentations with `set_epoch`.
    """

    def __init__(self, seed: int, rank: int = 0, epoch_seeded: Sequence[SetsEpoch] = ()) -> None:
        self.seed = seed
        self.rank = rank
        self.epoch_seeded = epoch_seeded

    def attach(self, engine: Engine) -> None:
        """Run before the first batch of every epoch is fetched."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed python and torch, and whatever has an epoch."""
        epoch = engine.state.epoch
        # Odd factors keep neighbouring seeds, epochs and ranks apart.
        seed = (self.seed * 1_000_003 + epoch * 8_191 + self.rank) % 2**31
        random.seed(seed)
        torch.manual_seed(seed)
        for drawer in self.epoch_seeded:
            drawer.set_epoch(epoch)


class TrainingCheckpoint:
    """Saves everything a run needs to go on, and the encoder's weights, at the end of epochs; resumes from it.

    Both are written to a temporary file and renamed, so a run killed at any moment leaves the newest complete files
    intact; MONAI's `CheckpointSaver` writes in place. Random state needs no saving: see `EpochSeedHandler`.
    Attach it before handlers that look at the network when the run starts, such as a `ValidationHandler`, and after
    those that change what is saved at the end of epochs.

    Args:
        ckpt_dir: folder for `checkpoint_epoch=N.pt`.
        save_dict: objects with `state_dict`, by name; the engine's own state is added as `trainer`.
        weights: module whose plain state dict other bundles load.
        weights_path: where `weights` go, such as `models/model.pt`.
        interval: epochs between checkpoints; the last epoch is always saved.
        num_kept: how many checkpoints of this run stay.
        resume_from: checkpoint to load when the run starts, or None.
        rank: rank of this process; all load, rank 0 saves.

    Raises:
        ValueError: if `interval` or `num_kept` is not positive, or the checkpoint is beyond the last epoch.
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        save_dict: Mapping[str, Any],
        weights: nn.Module,
        weights_path: str | Path,
        interval: int = 1,
        num_kept: int = 2,
        resume_from: str | None = None,
        rank: int = 0,
    ) -> None:
        if interval < 1 or num_kept < 1:
            raise ValueError(f"`interval` and `num_kept` must be at least 1, got {interval} and {num_kept}.")
        self.ckpt_dir = Path(ckpt_dir)
        self.save_dict = dict(save_dict)
        self.weights = weights
        self.weights_path = Path(weights_path)
        self.interval = interval
        self.num_kept = num_kept
        self.resume_from = resume_from
        self.rank = rank
        self.saved: list[Path] = []

    def attach(self, engine: Engine) -> None:
        """Load at the start, save at the end of epochs."""
        if self.resume_from is not None:
            engine.add_event_handler(Events.STARTED, self._resume, self.resume_from)
        if self.rank == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save if it is due."""
        epoch = engine.state.epoch
        if epoch % self.interval and epoch != engine.state.max_epochs:
            return
        path = self.ckpt_dir / f"checkpoint_epoch={epoch}.pt"
        objects = {**self.save_dict, "trainer": engine}
        save_atomically({name: item.state_dict() for name, item in objects.items()}, path)
        save_atomically(self.weights.state_dict(), self.weights_path)
        self.saved = [*(old for old in self.saved if old != path), path]
        while len(self.saved) > self.num_kept:
            self.saved.pop(0).unlink(missing_ok=True)

    def _resume(self, engine: Engine, path: str) -> None:
        epoch_length = engine.state.epoch_length
        CheckpointLoader(path, {**self.save_dict, "trainer": engine}, map_location=engine.state.device)(engine)
        # Ignite would go on with the old length: epochs that end within the data, or go through it twice.
        if engine.state.epoch_length != epoch_length:
            raise ValueError(
                f"{path} is of a run with {engine.state.epoch_length} iterations an epoch, this one has "
                f"{epoch_length}: resume with the same images, --batch_size and number of processes."
            )


def save_atomically(state: Any, path: str | Path) -> None:
    """`torch.save` to a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def newest_checkpoint(ckpt_dir: str | Path) -> str:
    """Path of the checkpoint written last in `ckpt_dir`.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(ckpt_dir)
    found = [path for path in folder.glob("checkpoint_epoch=*.pt") if CHECKPOINT.fullmatch(path.name)]
    if not found:
        raise FileNotFoundError(
            f"there is no checkpoint_epoch=N.pt in {folder.absolute()} to resume from: "
            "check --output_dir, or start without --resume."
        )
    return str(max(found, key=lambda path: path.stat().st_mtime_ns))


class ProgressHandler:
    """One progress bar over the whole run: epoch, loss, time gone and time left.

    Args:
        interval: iterations between updates of the loss; reading it waits for the device.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.bar: tqdm[Any] | None = None

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
        if engine.state.iteration % self.interval == 0:
            loss = float(engine.state.output["loss"].detach())
            self.bar.set_postfix_str(f"epoch {engine.state.epoch}/{engine.state.max_epochs}, loss {loss:.3f}")

    def _open(self, engine: Engine) -> None:
        if self.bar is None:
            total = engine.state.max_epochs * engine.state.epoch_length
            self.bar = tqdm(total=total, initial=engine.state.iteration, unit="it", desc="pretraining")

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        # Ignite leaves an exception to its handlers once there is one.
        if error is not None:
            raise error


def load_encoder(encoder: nn.Module, path: str | Path) -> nn.Module:
    """Load a plain state dict into an encoder, every key or none.

    Args:
        encoder: the module to fill.
        path: a `model.pt` as `TrainingCheckpoint` writes it.

    Returns:
        the same module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if keys are missing, unexpected or of another shape; up to five of each are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path.absolute()}: pretrain first, or check the path.")
    state, own = torch.load(path, map_location="cpu", weights_only=True), encoder.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:5])})" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"the weights in {path} do not fit the {type(encoder).__name__}: {'; '.join(found)}. "
            "Is it the same encoder (--encoder)?"
        )
    encoder.load_state_dict(state)
    return encoder
