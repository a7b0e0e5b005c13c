"""What happens over time: target momentum, seeds, checkpoints and progress, as ignite handlers."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import re
from collections.abc import Mapping, Sequence
from math import cos, pi
from pathlib import Path
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
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
        weights: module whose plain state dict other bundles load; None leaves that to another, such as `BestWeights`.
        weights_path: where `weights` go, such as `models/model.pt`; `settings` go beside it, as `models/model.json`.
        settings: what the weights depend on, such as encoder and image size; a resumed run must have the same.
        interval: epochs between checkpoints; the last epoch is always saved.
        num_kept: how many checkpoints of this run stay.
        resume_from: checkpoint to load when the run starts, or None.
        rank: rank of this process; all load, rank 0 saves.

    Raises:
        ValueError: if `interval` or `num_kept` is not positive, one of `weights` and `weights_path` is given alone, or
            the checkpoint is of another run.
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        save_dict: Mapping[str, Any],
        weights: nn.Module | None = None,
        weights_path: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        interval: int = 1,
        num_kept: int = 2,
        resume_from: str | None = None,
        rank: int = 0,
    ) -> None:
        if interval < 1 or num_kept < 1:
            raise ValueError(f"`interval` and `num_kept` must be at least 1, got {interval} and {num_kept}.")
        if (weights is None) != (weights_path is None):
            raise ValueError("`weights` and `weights_path` must be given together, got one of them.")
        self.ckpt_dir = Path(ckpt_dir)
        self.save_dict = dict(save_dict)
        self.weights = weights
        self.weights_path = weights_path
        self.settings = dict(settings or {})
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
            engine.add_event_handler(Events.STARTED, self._remove_halves)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save if it is due."""
        epoch = engine.state.epoch
        is_last = epoch == engine.state.max_epochs or engine.should_terminate
        if epoch % self.interval and not is_last:
            return
        path = self.ckpt_dir / f"checkpoint_epoch={epoch}.pt"
        objects = {**self.save_dict, "trainer": engine}
        states = {name: item.state_dict() for name, item in objects.items()}
        save_atomically({**states, "settings": self.settings}, path)
        if self.weights is not None and self.weights_path is not None:
            save_weights(self.weights, self.weights_path, self.settings)
        self.saved = [*(old for old in self.saved if old != path), path]
        while len(self.saved) > self.num_kept:
            self.saved.pop(0).unlink(missing_ok=True)

    def _remove_halves(self, engine: Engine) -> None:
        # What a run that was killed while it saved has left.
        for half in self.ckpt_dir.glob(".checkpoint_epoch=*.pt.*.tmp"):
            half.unlink(missing_ok=True)

    def _resume(self, engine: Engine, path: str) -> None:
        checkpoint = load_torch(path, "give an older one by --resume_from, or start anew with another --output_dir")
        if not isinstance(checkpoint.get("trainer"), dict):
            raise ValueError(f"{path} is no checkpoint of a training run: give a checkpoint_epoch=N.pt.")
        self._refuse_another_run(engine, checkpoint, path)
        max_epochs = engine.state.max_epochs
        Checkpoint.load_objects({**self.save_dict, "trainer": engine}, checkpoint)
        engine.state.max_epochs = max_epochs
        own = [found for found in Path(path).parent.glob("checkpoint_epoch=*.pt") if CHECKPOINT.fullmatch(found.name)]
        self.saved = sorted(own, key=lambda found: found.stat().st_mtime_ns)

    def _refuse_another_run(self, engine: Engine, checkpoint: Mapping[str, Any], path: str) -> None:
        # Ignite would go on with the old length: epochs that end within the data, or go through it twice.
        was, now = (
            {"iterations an epoch": length} for length in (_epoch_length(checkpoint), engine.state.epoch_length)
        )
        was |= checkpoint.get("settings", {})
        now |= self.settings
        other = [
            f"{name} {was.get(name)} (now {now.get(name)})" for name in was | now if was.get(name) != now.get(name)
        ]
        if other:
            raise ValueError(
                f"{path} is of a run with {', '.join(other)}: resume with the same knobs, images and number of "
                "processes, or start anew with another --output_dir."
            )
        epoch = checkpoint["trainer"]["iteration"] // _epoch_length(checkpoint)
        if epoch > engine.state.max_epochs:
            raise ValueError(
                f"{path} has done {epoch} epochs, more than --max_epochs {engine.state.max_epochs}: raise it."
            )


def _epoch_length(checkpoint: Mapping[str, Any]) -> int:
    return int(checkpoint["trainer"]["epoch_length"])


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


def save_weights(weights: nn.Module, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a plain state dict, and beside it as JSON what it depends on: `models/model.pt` and `models/model.json`."""
    save_atomically(weights.state_dict(), path)
    described = Path(path).with_suffix(".json")
    temporary = described.with_name(f".{described.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
    temporary.replace(described)


def read_settings(weights_path: str | Path) -> dict[str, Any]:
    """What the weights at a path depend on, as `TrainingCheckpoint` wrote it beside them; nothing without weights.

    Raises:
        FileNotFoundError: if there are weights, and no settings beside them.
        ValueError: if the settings are no JSON object.
    """
    path = Path(weights_path).with_suffix(".json")
    if not path.is_file():
        if Path(weights_path).is_file():
            raise FileNotFoundError(
                f"there is no {path.name} beside {weights_path} to say how it was trained: copy it along, or write it, "
                'such as {"encoder": "resnet50", "image_size": 224}.'
            )
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(settings).__name__}.")
    return settings


def refuse_other_names(label_names: Sequence[str], weights_path: str | Path) -> None:
    """Refuse names for the outputs of a network that are not those that it was trained with.

    Raises:
        ValueError: naming both.
    """
    own = read_settings(weights_path).get("label_names", list(label_names))
    if list(label_names) != own:
        raise ValueError(
            f"`label_names` must be those of {Path(weights_path).with_suffix('.json')}, {', '.join(own)}, "
            f"got {', '.join(label_names)}."
        )


def load_torch(path: str | Path, remedy: str) -> dict[str, Any]:
    """Load a dictionary of plain tensors and values onto the CPU.

    Args:
        path: what `torch.save` wrote.
        remedy: what to do if it cannot be loaded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path.absolute()}: {remedy}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded, it is damaged or no file of torch.save: {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary, got a {type(content).__name__}: {remedy}.")
    return content


def newest_checkpoint(ckpt_dir: str | Path) -> str:
    """Path of the checkpoint written last in `ckpt_dir`.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(ckpt_dir)
    found = [path for path in folder.glob("checkpoint_epoch=*.pt") if CHECKPOINT.fullmatch(path.name)]
    if not found:
        raise FileNotFoundError(
            f"there is no checkpoint_epoch=N.pt in {folder.absolute()}: check --output_dir, or train first."
        )
    return str(max(found, key=lambda path: path.stat().st_mtime_ns))


class ProgressHandler:
    """One progress bar over the whole run: epoch, loss, time gone and time left.

    Args:
        interval: iterations between updates of the loss; reading it waits for the device.
        description: what the bar is of.
    """

    def __init__(self, interval: int = 10, description: str = "pretraining") -> None:
        self.interval = interval
        self.description = description
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
            self.bar = tqdm(total=total, initial=engine.state.iteration, unit="it", desc=self.description)

    def _close(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        # Ignite leaves an exception to its handlers once there is one.
        if error is not None:
            raise error


def load_encoder(encoder: nn.Module, path: str | Path, without: Sequence[str] = ()) -> nn.Module:
    """Load a plain state dict into an encoder, every key or none.

    Args:
        encoder: the module to fill.
        path: a `model.pt` as `TrainingCheckpoint` writes it.
        without: prefixes of the keys of `encoder` that keep their values and that the file must not have: a new head.

    Returns:
        the same module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if keys are missing, unexpected or of another shape; up to five of each are named.
    """
    state = load_torch(path, "pretrain first, or check the path")
    kept = {key: value for key, value in encoder.state_dict().items() if key.startswith(tuple(without))}
    own = {key: value for key, value in encoder.state_dict().items() if key not in kept}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:5])})" for what, keys in problems.items() if keys]
    if found:
        headless = {key for key in own if key not in state} == {"fc.weight", "fc.bias"}
        remedy = "They have no head: train the classifier first." if headless else "Is it the same encoder (--encoder)?"
        raise ValueError(f"the weights in {path} do not fit the {type(encoder).__name__}: {'; '.join(found)}. {remedy}")
    encoder.load_state_dict(state | kept)
    logger.info("Loaded all %d tensors of %s.", len(state), path)
    return encoder
