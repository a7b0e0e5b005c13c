"""Checkpoints that a killed run leaves whole, and going on from one."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn

from dissect_monai.weights import load_torch, save_atomically, save_weights

logger = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"checkpoint_epoch=\d+\.pt")


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
        logger.info("Going on from %s, after epoch %d.", path, engine.state.epoch)
        self.saved = checkpoints_in(Path(path).parent)

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


def checkpoints_in(ckpt_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, which need not exist, in the order in which they were written."""
    found = [path for path in Path(ckpt_dir).glob("checkpoint_epoch=*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def newest_checkpoint(ckpt_dir: str | Path) -> str:
    """Path of the checkpoint written last in `ckpt_dir`.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = checkpoints_in(ckpt_dir)
    if not found:
        raise FileNotFoundError(
            f"there is no checkpoint_epoch=N.pt in {Path(ckpt_dir).absolute()}: check --output_dir, or train first."
        )
    return str(found[-1])


def _epoch_length(checkpoint: Mapping[str, Any]) -> int:
    return int(checkpoint["trainer"]["epoch_length"])
