"""Checkpoints that a killed run leaves whole, going on from one, and the best weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn

from dissect_monai.common import InputError, __version__, rank, shorten
from dissect_monai.handlers.ending import Result
from dissect_monai.networks.codes import codes_dir, save_codes
from dissect_monai.networks.vqssl import VQSSLNet
from dissect_monai.networks.weights import load_torch, save_weights
from dissect_monai.writing import remove_halves, save_atomically

logger = logging.getLogger(__name__)
ANEW = "or start anew with another `output_dir`"
NUM_KEPT = 2  # checkpoints of a run


@dataclass(eq=False)
class TrainingCheckpoint:
    """Saves all that a run needs to go on as checkpoint_epoch=N.pt, and its weights; resumes from it.

    All processes load, the first one saves. A run killed at any moment leaves the newest complete files intact, and one
    that goes on writes the weights of its checkpoint again. Random state needs no saving: see `EpochSeedHandler`.
    Attach it before handlers that look at the network when the run starts, such as a `ValidationHandler`, and after
    those that change what is saved at the end of epochs.

    Raises:
        ValueError: when the run starts, if the checkpoint is damaged, or of another run or version of this package.
    """

    ckpt_dir: str | Path
    save_dict: Mapping[str, Any]  # objects with `state_dict`, by name; the engine's own state is added as `trainer`
    weights: nn.Module | None = None  # whose state dict other bundles load; None leaves that to `BestWeights`
    weights_path: str | Path | None = None  # such as models/model.pt; `settings` go beside it, as models/model.json
    codes: VQSSLNet | None = None  # whose codebooks and decoder go to codes/ in the folder that holds models/
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the weights; a resumed run must have the same
    config: Mapping[str, Any] = field(default_factory=dict)  # of the run, for `refuse_other_config`
    interval: int = 1  # epochs between checkpoints, of which the newest two stay; the last epoch is always saved
    resume_from: str | None = None

    def attach(self, engine: Engine) -> None:
        """Load at the start, save at the end of epochs."""
        if self.resume_from is not None:
            engine.add_event_handler(Events.STARTED, self._resume, self.resume_from)
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, lambda: remove_halves(self.ckpt_dir))
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save if it is due."""
        epoch = engine.state.epoch
        is_last = epoch == engine.state.max_epochs or engine.should_terminate
        if epoch % self.interval and not is_last:
            return
        states = {name: item.state_dict() for name, item in {**self.save_dict, "trainer": engine}.items()}
        content = {**states, "settings": dict(self.settings), "config": dict(self.config), "version": __version__}
        save_atomically(content, Path(self.ckpt_dir, f"checkpoint_epoch={epoch}.pt"))
        self._save_weights()
        for old in checkpoints_in(self.ckpt_dir)[:-NUM_KEPT]:
            old.unlink()

    def _save_weights(self) -> None:
        if self.weights is not None and self.weights_path is not None:
            if self.codes is not None:
                save_codes(self.codes, codes_dir(self.weights_path))
            save_weights(self.weights, self.weights_path, self.settings)

    def _resume(self, engine: Engine, path: str) -> None:
        checkpoint = read_checkpoint(path)
        self._refuse_another_run(engine, checkpoint, path)
        max_epochs = engine.state.max_epochs
        schedule = vars(self.save_dict.get("lr_scheduler", object)).items()
        laid_out = {name: value for name, value in schedule if name in ("warmup_steps", "t_total")}
        try:
            Checkpoint.load_objects({**self.save_dict, "trainer": engine}, checkpoint)
        except Exception as error:  # whatever a state dict that lacks something says
            raise InputError(f"{path} does not fit this run ({str(error).strip()}): {_older(path)}.") from error
        vars(self.save_dict.get("lr_scheduler", engine)).update(laid_out)  # of a run that was extended
        engine.state.max_epochs = max_epochs
        if rank() == 0:
            self._save_weights()  # the run may have ended before it had written them
        logger.info("Going on from %s, after epoch %d.", path, engine.state.epoch)

    def _refuse_another_run(self, engine: Engine, checkpoint: Mapping[str, Any], path: str) -> None:
        version = checkpoint.get("version", "0.1.0")  # which did not write it down
        if version != __version__:
            which = f"of dissect_monai {version}, this is {__version__}"
            raise InputError(f"{path} is {which}: resume with that version, {ANEW}.")
        # Ignite would go on with the old length: epochs that end within the data, or go through it twice.
        length = checkpoint["trainer"]["epoch_length"]
        was = {"iterations an epoch": length, **checkpoint["settings"]}
        now = {"iterations an epoch": engine.state.epoch_length, **self.settings}
        # `data` tells of other images; the record of subjects changes with a lost `.salt`, too.
        refuse_other_config(path, was, now, {"trained_on"})
        epoch, last = checkpoint["trainer"]["iteration"] // length, engine.state.max_epochs
        if epoch > last:
            raise InputError(f"{path} has done {epoch} epochs, more than `max_epochs` {last}: raise it.")


def refuse_other_config(
    path: str | Path, was: Mapping[str, Any], now: Mapping[str, Any], exempt: Collection[str] = (), longer: bool = True
) -> None:
    """Refuse to go on from the checkpoint at `path` with a config, or settings, that differ from those that it had.

    A schedule that is longer than it was extends the run if that is wanted; the warm-up is over then, and may differ.
    """
    old, new = (each.get("schedule_epochs") for each in (was, now))
    extended = isinstance(old, int) and isinstance(new, int) and new > old
    if extended and longer:
        exempt = {*exempt, "schedule_epochs", "warmup_epochs"}
    names = [name for name in {**was, **now} if was.get(name) != now.get(name) and name not in exempt]
    if names:
        other = shorten([f"{name} {was.get(name)} (now {now.get(name)})" for name in names])
        raise InputError(
            f"{path} is of a run with {other}: resume with the same settings, images and number of processes, {ANEW}."
            + f" To train longer, add --schedule_epochs {new}, over which the learning rate is laid out then."
            * (extended and not longer)
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint of a run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or no checkpoint.
    """
    checkpoint = load_torch(path, _older(path))
    state, settings = checkpoint.get("trainer"), checkpoint.setdefault("settings", {})
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of a training run: give a checkpoint_epoch=N.pt.")
    state.setdefault("best_result", "")  # which older ones lack
    counts = [state.get(name) for name in ("iteration", "epoch_length")]
    parts = settings, checkpoint.setdefault("config", {})
    if not all(type(count) is int and count > 0 for count in counts) or not all(isinstance(e, dict) for e in parts):
        raise InputError(f"{path} lacks parts of a checkpoint: {_older(path)}.")
    return checkpoint


def _older(path: str | Path) -> str:
    others = [str(other) for other in checkpoints_in(Path(path).parent) if other != Path(path)]
    return f"give an older one as `resume_from`{f', such as {others[-1]},' if others else ','} {ANEW}"


def newest_whole(ckpt_dir: str | Path) -> str | None:
    """Path of the newest checkpoint that is not damaged, or None; of the oldest it is not asked, as nothing is left."""
    found = checkpoints_in(ckpt_dir)
    for path in found[:0:-1]:
        try:
            read_checkpoint(path)
        except InputError as error:
            logger.warning("%s", error)
            logger.warning("Going back to the checkpoint before it.")
        else:
            return str(path)
    return str(found[0]) if found else None


def checkpoints_in(ckpt_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, which need not exist, in the order in which they were written."""
    return sorted(Path(ckpt_dir).glob("checkpoint_epoch=[0-9]*.pt"), key=lambda path: path.stat().st_mtime_ns)


def newest_checkpoint(ckpt_dir: str | Path) -> str:
    """Path of the checkpoint written last in `ckpt_dir`; a `FileNotFoundError` if there is none."""
    found = checkpoints_in(ckpt_dir)
    if not found:
        raise FileNotFoundError(
            f"there is no checkpoint_epoch=N.pt in {Path(ckpt_dir).absolute()}: check `output_dir`, or train first."
        )
    return str(found[-1])


@dataclass(eq=False)
class BestWeights:
    """Keeps the weights of the best validation, and ends the run when validation has not improved for long.

    It writes atomically, stops all processes of a distributed run together although one of them validates, and goes on
    where it was: `best_metric`, `best_epoch`, `best_weights`, `best_result` and `num_worse` are part of the trainer's
    state, and the best weights are written once more at the end. As long as the metric is NaN, since validation cannot
    judge any finding, the latest weights are the best.

    Attach it to the trainer, in every process: after the `ValidationHandler` (which must not run at the start, since a
    resumed run would count that validation twice) and before the `TrainingCheckpoint`.
    """

    evaluator: Engine  # it may validate in one process alone
    weights: nn.Module
    weights_path: str | Path  # such as models/model.pt; `settings` go beside it, as models/model.json
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the weights
    metric: str = "auroc"  # of the evaluator, larger is better
    patience: int = 10  # validations in a row without improvement after which the run ends
    pretrained: str | Path | None = None  # weights that the run started from; written beside the weights, too

    def attach(self, engine: Engine) -> None:
        """Compare after every validation, stop at the end of the trainer's epoch."""
        first = {"best_metric": nan, "best_epoch": 0, "num_worse": 0, "best_weights": {}, "best_result": ""}
        for name, value in first.items():
            setattr(engine.state, name, value)
            engine.state_dict_user_keys.append(name)
        self.evaluator.add_event_handler(Events.COMPLETED, self, engine)
        # At the start, too: a run that has stopped and is resumed stays stopped, unless `patience` is raised.
        engine.add_event_handler(Events.EPOCH_STARTED | Events.EPOCH_COMPLETED, self._stop)
        engine.add_event_handler(Events.COMPLETED, self._save)

    def __call__(self, evaluator: Engine, trainer: Engine) -> None:
        """Write the weights if the validation that has ended is the best so far."""
        if self.metric not in evaluator.state.metrics:
            found = ", ".join(evaluator.state.metrics) or "none"
            raise InputError(f"`metric` must be one of the evaluator's ({found}), got {self.metric!r}.")
        score, state = float(evaluator.state.metrics[self.metric]), trainer.state
        if score > state.best_metric or isnan(state.best_metric):
            state.best_metric, state.best_epoch, state.num_worse = score, evaluator.state.epoch, 0
            state.best_result = getattr(evaluator.state, "result", Result("")).text
            weights = self.weights.state_dict()
            state.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
            self._save(trainer)
        else:
            state.num_worse += 1

    def _save(self, trainer: Engine) -> None:
        """At the end of a run, too, which may go on where they are lost."""
        if rank() == 0 and trainer.state.best_weights:
            pretrained = str(self.pretrained) if self.pretrained else None
            settings = {**self.settings, "pretrained": pretrained}
            save_weights(trainer.state.best_weights, self.weights_path, settings)
            best, of = trainer.state.best_metric, f", the best until epoch {trainer.state.epoch}"
            text = trainer.state.best_result or f"{self.metric} {best:.3f} of epoch {trainer.state.best_epoch}"
            self.evaluator.state.result = Result(text + of * (not isnan(best)))

    def _stop(self, engine: Engine) -> None:
        state = engine.state
        # Every process must leave the loop in the same epoch, else the others wait for its gradients for ever.
        if idist.all_reduce(float(state.num_worse >= self.patience), "MAX"):
            logger.info(
                "No better %s than %.4f of epoch %d: stopped.", self.metric, state.best_metric, state.best_epoch
            )
            engine.terminate()
