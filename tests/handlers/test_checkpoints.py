from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from helpers import as_process, counting_engine
from ignite.engine import Engine, Events
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from dissect_monai import __version__
from dissect_monai.common import InputError
from dissect_monai.handlers.checkpoints import (
    BestWeights,
    TrainingCheckpoint,
    newest_checkpoint,
    newest_whole,
    read_checkpoint,
)
from dissect_monai.handlers.ending import Result
from dissect_monai.networks.weights import read_settings

NAN = float("nan")

# ---- checkpoints -------------------------------------------------------------------------------------------------


def go(folder: Path, max_epochs: int = 1, epoch_length: int = 3, resume: bool = False, **kwargs: Any) -> None:
    """A run of empty steps with checkpoints."""
    engine, module = counting_engine(max_epochs), nn.Linear(1, 1)
    engine.state.epoch_length = epoch_length
    engine.logger.setLevel(logging.CRITICAL)
    kwargs["resume_from"] = newest_checkpoint(folder) if resume else None
    TrainingCheckpoint(folder, {"network": module}, module, folder / "models" / "model.pt", **kwargs).attach(engine)
    engine.run(range(epoch_length), max_epochs=max_epochs)


def test_goes_on_with_what_it_has_saved_and_removes_what_a_killed_run_has_left(tmp_path: Path) -> None:
    go(tmp_path, max_epochs=2)
    state = torch.load(tmp_path / "models" / "model.pt")
    half = tmp_path / ".checkpoint_epoch=3.pt.7.tmp"
    half.touch()
    go(tmp_path, max_epochs=3, resume=True)
    assert not half.exists()
    assert {path.name for path in tmp_path.glob("*.pt")} == {"checkpoint_epoch=2.pt", "checkpoint_epoch=3.pt"}
    resumed = torch.load(tmp_path / "models" / "model.pt")
    assert all(torch.equal(state[key], value) for key, value in resumed.items())


def test_saves_at_the_interval_and_at_the_end_and_keeps_the_newest(tmp_path: Path) -> None:
    for interval, left in ((1, ["4", "5"]), (3, ["3", "5"]), (9, ["5"])):
        folder = tmp_path / str(interval)
        go(folder, max_epochs=5, interval=interval)
        assert sorted(path.name[-4] for path in folder.glob("*.pt")) == left


def test_other_ranks_load_but_do_not_save(tmp_path: Path) -> None:
    with as_process(1):
        go(tmp_path)
    assert not list(tmp_path.iterdir())


def test_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    for age, name in enumerate(["checkpoint_epoch=10.pt", "checkpoint_epoch=3.pt", "checkpoint_epoch=20.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    others = "model.pt", "checkpoint_epoch=best.pt", ".checkpoint_epoch=30.pt.7.tmp", "checkpoint_epoch=9.pt.bak"
    for other in others:
        (tmp_path / other).touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_epoch=10.pt")


def test_says_that_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint_epoch=N\.pt in .*: check `output_dir`"):
        newest_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epoch_length": 5}, r"of a run with iterations an epoch 3 \(now 5\): resume with the same settings, images"),
        ({"settings": {"encoder": "resnet50"}}, r"of a run with encoder resnet18 \(now resnet50\): resume with"),
        ({"max_epochs": 2}, "has done 3 epochs, more than `max_epochs` 2: raise it"),
    ],
)
def test_refuses_to_resume_another_run(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    settings = {"encoder": "resnet18", "stages": [2, 3]}
    go(tmp_path, max_epochs=3, settings=settings)
    assert read_settings(tmp_path / "models" / "model.pt") == settings
    changed["settings"] = {**settings, **changed.get("settings", {})}
    with pytest.raises(ValueError, match=message):
        go(tmp_path, resume=True, **{"max_epochs": 4, **changed})


@pytest.mark.parametrize("version", ["0.0.9", None])
def test_refuses_a_checkpoint_of_another_version_by_its_name(tmp_path: Path, version: str | None) -> None:
    go(tmp_path)
    path = newest_checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)
    assert state.pop("version") == __version__
    torch.save(state if version is None else {**state, "version": version}, path)
    message = f"dissect_monai {version or '0.1.0'}, this is {__version__}: resume with that version, or start anew"
    with pytest.raises(ValueError, match=message):
        go(tmp_path, max_epochs=2, resume=True)


def flip(path: Path) -> None:
    """A bit of a tensor."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["network"]["weight"].numpy().tobytes()
    content[content.find(weight)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["settings", "config", "trainer", "network", "network::weight", "trainer::iteration"])
@pytest.mark.parametrize("value", ["missing", None, 7, {}, []], ids=str)
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path, part: str, value: Any) -> None:
    go(tmp_path)
    path = Path(newest_checkpoint(tmp_path))
    state = torch.load(path, weights_only=True)
    *outer, last = part.split("::")
    inner = state[outer[0]] if outer else state
    inner.pop(last) if value == "missing" else inner.update({last: value})
    torch.save(state, path)
    if (part, value) in [("settings", {}), ("config", {}), ("settings", "missing"), ("config", "missing")]:
        go(tmp_path, max_epochs=2, resume=True)  # as those of before had none
    elif (part, value) == ("trainer::iteration", 7):
        with pytest.raises(ValueError, match="has done 2 epochs, more than `max_epochs` 1"):
            go(tmp_path, resume=True)
    else:
        with pytest.raises(InputError, match=r"epoch=1\.pt (lacks parts|is no checkpoint|does not fit this run)"):
            go(tmp_path, max_epochs=2, resume=True)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named_or_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path, max_epochs=2)
    first, second = (tmp_path / f"checkpoint_epoch={epoch}.pt" for epoch in (1, 2))
    assert newest_whole(tmp_path) == str(second)
    flip(second)
    with pytest.raises(InputError, match=r"epoch=2\.pt cannot be loaded, .*`resume_from`, such as .*epoch=1\.pt"):
        read_checkpoint(second)
    assert newest_whole(tmp_path) == str(first)
    assert "Going back to the checkpoint before it" in caplog.text
    assert newest_whole(tmp_path / "nowhere") is None


def test_a_longer_schedule_extends_a_run(tmp_path: Path) -> None:
    def run(max_epochs: int, schedule: int, resume_from: str | None = None) -> tuple[float, float]:
        engine, module = counting_engine(max_epochs), nn.Linear(1, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=1)
        scheduler = WarmupCosineSchedule(optimizer, warmup_steps=0, t_total=schedule * 3)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: (optimizer.step(), scheduler.step()))
        parts = {"network": module, "optimizer": optimizer, "lr_scheduler": scheduler}
        settings = {"schedule_epochs": schedule, "warmup_epochs": schedule // 10}
        TrainingCheckpoint(tmp_path, parts, settings=settings, resume_from=resume_from).attach(engine)
        engine.run(range(3), max_epochs=max_epochs)
        return optimizer.param_groups[0]["lr"], scheduler.t_total

    assert run(10, 10) == (pytest.approx(0), 30)
    last = newest_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"schedule_epochs 10 \(now 9\)"):
        run(10, 9, last)
    assert run(15, 20, last) == (pytest.approx((1 + math.cos(math.pi * 0.75)) / 2), 60)


# ---- best weights and early stop ---------------------------------------------------------------------------------


class Run:
    """A trainer of empty steps whose validations score what they are told, epoch by epoch."""

    def __init__(
        self, folder: Path, scores: Sequence[float], patience: int = 2, resume: bool = False, interval: int = 1
    ) -> None:
        self.weights = nn.Linear(1, 1, bias=False)
        self.trainer = Engine(lambda engine, batch: None)
        self.trainer.state.device = torch.device("cpu")
        self.trainer.state.max_epochs, self.trainer.state.epoch_length = len(scores), 1
        self.evaluator = Engine(lambda engine, batch: None)

        @self.trainer.on(Events.EPOCH_COMPLETED)
        def validate(engine: Engine) -> None:
            epoch = engine.state.epoch
            nn.init.constant_(self.weights.weight, epoch)
            self.evaluator.state.metrics["auroc"] = scores[epoch - 1]
            self.evaluator.state.epoch = epoch
            self.evaluator.state.result = Result(f"AUROC of epoch {epoch}")
            self.evaluator.fire_event(Events.COMPLETED)

        self.path = folder / "models" / "model.pt"
        self.best = BestWeights(self.evaluator, self.weights, self.path, patience=patience)
        self.best.attach(self.trainer)
        resume_from = newest_checkpoint(folder) if resume else None
        TrainingCheckpoint(folder, {}, interval=interval, resume_from=resume_from).attach(self.trainer)

    def run(self) -> Run:
        self.trainer.run([0], max_epochs=self.trainer.state.max_epochs)
        return self

    @property
    def written(self) -> float:
        return torch.load(self.path)["weight"].item()


@pytest.mark.parametrize(
    ("scores", "stopped", "best"),
    [
        ([0.5, 0.7, 0.6, 0.7, 0.9], 4, 2),  # as good is not better
        ([0.5, 0.4, 0.6, 0.5, 0.7, 0.6], 6, 5),  # an improvement starts the patience again
        ([NAN] * 4, 4, 4),  # where nothing can be judged, the latest are the best
        ([0.5, 0.7, NAN, NAN, 0.8], 4, 2),  # a run that diverges does not overwrite them
    ],
)
def test_keeps_the_best_weights_and_stops_early(tmp_path: Path, scores: list[float], stopped: int, best: int) -> None:
    run = Run(tmp_path, scores).run()
    assert run.trainer.state.epoch == stopped
    assert run.written == run.trainer.state.best_epoch == best
    assert run.trainer.state.best_metric == pytest.approx(scores[best - 1], nan_ok=True)


def test_a_resumed_run_stops_and_keeps_as_an_uninterrupted_one(tmp_path: Path) -> None:
    scores = [0.5, 0.7, 0.6, 0.65, 0.9]
    Run(tmp_path, scores[:3]).run()
    resumed = Run(tmp_path, scores, resume=True).run()
    assert resumed.trainer.state.epoch == 4
    assert resumed.written == 2
    assert resumed.trainer.state_dict() == Run(tmp_path / "whole", scores).run().trainer.state_dict()
    again = Run(tmp_path, scores, resume=True).run()  # it has stopped, and stays so
    assert again.trainer.state.best_epoch == again.written == 2
    assert Run(tmp_path, scores, resume=True, patience=9).run().written == 5


@pytest.mark.parametrize(
    ("scores", "more", "said"),
    [
        ([0.5, 0.7, 0.6], [], "AUROC of epoch 2, the best until epoch 3"),
        ([0.5, 0.7, 0.6], [0.65], "AUROC of epoch 2, the best until epoch 4"),  # of the run before it went on
        ([0.5, 0.7, 0.6], [0.8], "AUROC of epoch 4, the best until epoch 4"),
        ([NAN, NAN], [], "AUROC of epoch 2"),
    ],
)
def test_a_run_ends_with_the_result_of_its_best_weights(
    tmp_path: Path, scores: list[float], more: list[float], said: str
) -> None:
    run = Run(tmp_path, scores, patience=9).run()
    if more:
        run = Run(tmp_path, [*scores, *more], patience=9, resume=True).run()
    assert run.evaluator.state.result.text == said


def test_a_checkpoint_that_knows_no_result_has_its_score(tmp_path: Path) -> None:
    Run(tmp_path, [0.5, 0.7, 0.6]).run()
    content = torch.load(tmp_path / "checkpoint_epoch=3.pt", weights_only=True)
    del content["trainer"]["best_result"]
    torch.save(content, tmp_path / "checkpoint_epoch=3.pt")
    again = Run(tmp_path, [0.5, 0.7, 0.6], resume=True).run()
    assert again.evaluator.state.result.text == "auroc 0.700 of epoch 2, the best until epoch 3"


def test_the_best_weights_outlive_the_loss_of_their_file(tmp_path: Path) -> None:
    Run(tmp_path, [0.5, 0.9, 0.6]).run()
    (tmp_path / "models" / "model.pt").unlink()
    for scores in ([0.5, 0.9, 0.6], [0.5, 0.9, 0.6, 0.7]):
        assert Run(tmp_path, scores, resume=True).run().written == 2


def test_the_last_epoch_of_a_stopped_run_is_saved(tmp_path: Path) -> None:
    Run(tmp_path, [0.7, 0.6, 0.5, 0.9], interval=10).run()
    assert newest_checkpoint(tmp_path).endswith("checkpoint_epoch=3.pt")


def test_all_processes_stop_with_the_one_that_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, [0.5, 0.6, 0.7])
    monkeypatch.setattr(idist, "all_reduce", lambda value, op: 1.0 if op == "MAX" else value)
    assert run.run().trainer.state.epoch == 1


def test_rejects_a_bad_metric(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.5])
    run.best.metric = "acc"
    with pytest.raises(ValueError, match=r"`metric` must be one of the evaluator's \(auroc\), got 'acc'"):
        run.run()
