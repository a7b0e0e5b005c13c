from __future__ import annotations

import logging
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.networks.nets import resnet10, resnet18
from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from dissect_monai.augment import BatchAugment, TwoViews
from dissect_monai.handlers import (
    EpochSeedHandler,
    ProgressHandler,
    TargetMomentumHandler,
    TrainingCheckpoint,
    load_encoder,
    newest_checkpoint,
    read_settings,
    save_atomically,
)
from dissect_monai.losses import VQSSLLoss
from dissect_monai.networks import VQSSLNet
from dissect_monai.optimizers import ssl_optimizer

EPOCHS = 4


def counting_engine(max_epochs: int = EPOCHS) -> Engine:
    engine = Engine(lambda engine, batch: {"loss": torch.ones((), requires_grad=True)})
    engine.state.device = torch.device("cpu")
    engine.state.max_epochs = max_epochs
    engine.state.epoch_length = 3
    return engine


def checkpoint(folder: Path, module: nn.Module, **kwargs: Any) -> TrainingCheckpoint:
    return TrainingCheckpoint(folder, {"network": module}, module, folder / "models" / "model.pt", **kwargs)


class Training:
    """The pretraining run of the bundle, in small."""

    def __init__(self, folder: Path, max_epochs: int, resume_from: str | None = None, init_seed: int = 0) -> None:
        torch.manual_seed(init_seed)
        encoder = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
        self.network = VQSSLNet(encoder, num_embeddings=8, embedding_dim=8, hidden_dim=16, out_dim=8, decode=True)
        self.optimizer = ssl_optimizer(self.network, "adamw", 1e-3, 0.05)
        self.schedule = WarmupCosineSchedule(self.optimizer, warmup_steps=3, t_total=3 * EPOCHS)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (13, 1, 32, 32), dtype=torch.uint8, generator=generator)
        dataset = Dataset([{"image": image} for image in images])
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, drop_last=True)
        self.views = TwoViews(BatchAugment(2))
        state = {"network": self.network, "optimizer": self.optimizer, "lr_scheduler": self.schedule}
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=max_epochs,
            train_data_loader=DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=VQSSLLoss(reconstruction_weight=1),
            prepare_batch=self.views,
            decollate=False,
            train_handlers=[
                EpochSeedHandler(0, epoch_seeded=[sampler, self.views]),
                LrScheduleHandler(self.schedule, print_lr=False, epoch_level=False),
                TargetMomentumHandler(self.network, 0.9, num_iterations=3 * EPOCHS),
                TrainingCheckpoint(folder, state, encoder, folder / "model.pt", resume_from=resume_from),
            ],
        )
        self.trainer.logger.setLevel(logging.ERROR)

    def run(self) -> Training:
        self.trainer.run()
        return self


# ---- momentum ----------------------------------------------------------------------------------------------------


def test_momentum_follows_a_half_cosine_to_one() -> None:
    schedule = TargetMomentumHandler(nn.Identity(), momentum=0.996, num_iterations=100)
    assert schedule.momentum_at(0) == pytest.approx(0.996)
    assert schedule.momentum_at(50) == pytest.approx(0.998)
    assert schedule.momentum_at(25) == pytest.approx(1 - 0.004 * (math.cos(math.pi / 4) + 1) / 2)
    assert schedule.momentum_at(100) == 1
    assert schedule.momentum_at(101) == 1


def test_momentum_moves_the_target_after_every_iteration() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given: list[float] = []

        def update_target(self, momentum: float) -> None:
            self.given.append(momentum)

    network, engine = Recorder(), counting_engine(max_epochs=2)
    handler = TargetMomentumHandler(network, momentum=0.5, num_iterations=6)
    handler.attach(engine)
    engine.run(range(3), max_epochs=2)
    assert network.given == [handler.momentum_at(iteration) for iteration in range(1, 7)]
    assert engine.state.target_momentum == 1


@pytest.mark.parametrize("kwargs", [{"momentum": 1.5}, {"momentum": -0.1}])
def test_rejects_a_momentum_out_of_range(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\]"):
        TargetMomentumHandler(nn.Identity(), num_iterations=1, **kwargs)


def test_rejects_a_schedule_without_iterations() -> None:
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1, got 0"):
        TargetMomentumHandler(nn.Identity(), 0.9, num_iterations=0)


# ---- seeds -------------------------------------------------------------------------------------------------------


class Drawing(torch.utils.data.Dataset[Tensor]):
    """Items that draw a number wherever they are made, in this process or in a worker."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([torch.tensor([float(index)]), torch.rand(1)])


def draws(num_workers: int, epochs_done: int = 0, seed: int = 0, rank: int = 0) -> dict[int, list[Any]]:
    """What each epoch sees and draws; with `epochs_done` the engine is a resumed one."""
    seen: dict[int, list[Any]] = {}

    def step(engine: Engine, batch: Tensor) -> None:
        own = torch.rand(1).item(), random.random()
        seen.setdefault(engine.state.epoch, []).append((batch.tolist(), own))

    dataset = Drawing()
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=num_workers)
    engine = Engine(step)
    EpochSeedHandler(seed, rank, epoch_seeded=[sampler]).attach(engine)
    torch.manual_seed(epochs_done)  # a resumed process has drawn other numbers before
    if epochs_done:
        engine.load_state_dict({"epoch_length": 3, "max_epochs": 3, "epoch": epochs_done})
    engine.run(loader, max_epochs=3)
    return seen


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_draws_what_it_would_have_drawn(num_workers: int) -> None:
    whole, resumed = draws(num_workers), draws(num_workers, epochs_done=2)
    assert list(resumed) == [3]
    assert resumed[3] == whole[3]
    assert whole[2] != whole[3]


def test_ranks_and_seeds_draw_differently() -> None:
    assert draws(0)[1] != draws(0, rank=1)[1]
    assert draws(0)[1] != draws(0, seed=1)[1]


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_two_and_two_epochs_are_four_bit_for_bit(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", EPOCHS).run()
    Training(tmp_path / "parts", 2).run()
    resumed = Training(tmp_path / "parts", EPOCHS, newest_checkpoint(tmp_path / "parts"), init_seed=1).run()
    assert resumed.trainer.state.iteration == 3 * EPOCHS
    for ours, theirs in (
        (resumed.network.state_dict(), whole.network.state_dict()),
        (torch.load(tmp_path / "parts" / "model.pt"), torch.load(tmp_path / "whole" / "model.pt")),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for ours, theirs in zip(resumed.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()


def test_saves_at_the_interval_and_at_the_end_and_keeps_the_newest(tmp_path: Path) -> None:
    def epochs_left(**kwargs: int) -> list[str]:
        folder = tmp_path / str(kwargs)
        engine, module = counting_engine(max_epochs=5), nn.Linear(1, 1)
        checkpoint(folder, module, **kwargs).attach(engine)
        engine.run(range(3), max_epochs=5)
        return sorted(path.name[-4] for path in folder.glob("*.pt"))

    assert epochs_left(interval=1, num_kept=2) == ["4", "5"]
    assert epochs_left(interval=2, num_kept=9) == ["2", "4", "5"]
    assert epochs_left(interval=9, num_kept=1) == ["5"]


def test_other_ranks_load_but_do_not_save(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module, rank=1).attach(engine)
    engine.run(range(3), max_epochs=1)
    assert not list(tmp_path.iterdir())


def test_a_kill_in_the_middle_of_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_epoch=1.pt"
    save_atomically({"weight": torch.ones(2)}, path)

    def killed(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"weight": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path)["weight"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    for age, name in enumerate(["checkpoint_epoch=10.pt", "checkpoint_epoch=3.pt", "checkpoint_epoch=20.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    for foreign in (
        "model.pt",
        "checkpoint_epoch=best.pt",
        ".checkpoint_epoch=30.pt.7.tmp",
        "checkpoint_epoch=9.pt.bak",
    ):
        (tmp_path / foreign).touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_epoch=10.pt")


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_says_that_there_is_nothing_to_resume_from(tmp_path: Path, folder: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint_epoch=N\.pt in .*: check --output_dir"):
        newest_checkpoint(tmp_path / folder)


def test_refuses_to_resume_a_run_with_other_batches(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module).attach(engine)
    engine.run(range(3), max_epochs=1)
    engine = counting_engine()
    engine.state.epoch_length = 5
    checkpoint(tmp_path, module, resume_from=newest_checkpoint(tmp_path)).attach(engine)
    with pytest.raises(ValueError, match=r"of a run with iterations an epoch 3 \(now 5\): resume with the same knobs"):
        engine.run(range(5), max_epochs=2)


def test_refuses_to_resume_a_run_with_other_knobs(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module, settings={"encoder": "resnet18", "stages": [2, 3]}).attach(engine)
    engine.run(range(3), max_epochs=1)
    newest = newest_checkpoint(tmp_path)
    engine = counting_engine()
    checkpoint(tmp_path, module, settings={"encoder": "resnet50", "stages": [2, 3]}, resume_from=newest).attach(engine)
    with pytest.raises(ValueError, match=r"is of a run with encoder resnet18 \(now resnet50\): resume with"):
        engine.run(range(3), max_epochs=2)


def test_what_the_weights_depend_on_lies_beside_them(tmp_path: Path) -> None:
    engine, settings = counting_engine(), {"encoder": "resnet18", "image_size": 48, "stages": [2, 3]}
    checkpoint(tmp_path, nn.Linear(1, 1), settings=settings).attach(engine)
    engine.run(range(3), max_epochs=1)
    assert read_settings(tmp_path / "models" / "model.pt") == settings


def test_without_weights_there_are_no_settings(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "model.pt") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"there is no model\.json beside"), ("{", "must be JSON"), ("[]", "must hold a JSON object, got a list")],
)
def test_weights_without_readable_settings_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "model.pt").touch()
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_settings(tmp_path / "model.pt")


def test_refuses_to_resume_beyond_the_last_epoch(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module).attach(engine)
    engine.run(range(3), max_epochs=3)
    engine = counting_engine(max_epochs=2)
    checkpoint(tmp_path, module, resume_from=newest_checkpoint(tmp_path)).attach(engine)
    with pytest.raises(ValueError, match="has done 3 epochs, more than --max_epochs 2: raise it"):
        engine.run(range(3), max_epochs=2)


@pytest.mark.parametrize("kwargs", [{"interval": 0}, {"num_kept": 0}])
def test_rejects_counts_below_one(tmp_path: Path, kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`interval` and `num_kept` must be at least 1, got"):
        checkpoint(tmp_path, nn.Linear(1, 1), **kwargs)


# ---- progress ----------------------------------------------------------------------------------------------------


def test_progress_shows_epoch_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    engine = counting_engine(max_epochs=2)
    ProgressHandler(interval=3).attach(engine)
    engine.run(range(3), max_epochs=2)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "epoch 2/2, loss 1.000" in shown


def test_progress_starts_where_the_run_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    engine = counting_engine()
    engine.load_state_dict({"epoch_length": 3, "max_epochs": 4, "epoch": 2})
    handler = ProgressHandler()
    handler.attach(engine)
    engine.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: print(handler.bar.n, handler.bar.total))
    engine.run(range(3), max_epochs=4)
    assert capsys.readouterr().out == "6 12\n"


def test_progress_lets_an_error_pass() -> None:
    def fail(engine: Engine, batch: int) -> None:
        raise RuntimeError("the loss is not finite")

    engine = Engine(fail)
    engine.logger.setLevel(logging.CRITICAL)
    handler = ProgressHandler()
    handler.attach(engine)
    with pytest.raises(RuntimeError, match="the loss is not finite"):
        engine.run(range(3))
    assert handler.bar is None


# ---- encoders ----------------------------------------------------------------------------------------------------


def test_loads_every_weight_of_an_encoder(tmp_path: Path) -> None:
    saved, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    assert load_encoder(fresh, tmp_path / "model.pt") is fresh
    assert torch.equal(fresh.weight, saved.weight)


def test_says_that_there_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*model\.pt: pretrain first"):
        load_encoder(nn.Linear(1, 1), tmp_path / "model.pt")


def test_names_the_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3, 3), "scale": torch.ones(1)}, tmp_path / "model.pt")
    encoder = nn.Linear(2, 2)
    before = encoder.weight.clone()
    named = r"the Linear: 1 missing \(bias\); 1 unexpected \(scale\); 1 of another shape \(weight\)"
    with pytest.raises(ValueError, match=named):
        load_encoder(encoder, tmp_path / "model.pt")
    assert torch.equal(encoder.weight, before)


def test_names_no_more_than_five_weights(tmp_path: Path) -> None:
    torch.save(resnet18(spatial_dims=2, feed_forward=False).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"unexpected \(([\w.]+, ){4}[\w.]+\)\. Is it the same encoder"):
        load_encoder(resnet10(spatial_dims=2, n_input_channels=3, feed_forward=False), tmp_path / "model.pt")
