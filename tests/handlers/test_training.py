import logging
import math
import random
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import as_process, counting_engine, events_of, small_segresnet
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.handlers.training import (
    EpochSeedHandler,
    FiniteLoss,
    FrozenEncoder,
    ProgressHandler,
    TargetMomentumHandler,
    UnseenClasses,
)
from dissect_monai.networks.segmentation import DeepSupervisionNet


def test_momentum_follows_a_half_cosine_to_one_and_moves_the_target_after_every_iteration() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given: list[float] = []

        def update_target(self, momentum: float) -> None:
            self.given.append(momentum)

    network, engine = Recorder(), counting_engine(max_epochs=3)
    TargetMomentumHandler(network, momentum=0.5, num_iterations=6).attach(engine)
    engine.run(range(3), max_epochs=3)
    rising = [1 - 0.5 * (math.cos(math.pi * step / 6) + 1) / 2 for step in range(1, 7)]
    assert network.given == pytest.approx([*rising, 1, 1, 1])
    assert engine.state.target_momentum == 1


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
    EpochSeedHandler(seed, epoch_seeded=[sampler]).attach(engine)
    torch.manual_seed(epochs_done)  # a resumed process has drawn other numbers before
    if epochs_done:
        engine.load_state_dict({"epoch_length": 3, "max_epochs": 3, "epoch": epochs_done})
    with as_process(rank):
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


def test_progress_starts_where_the_run_resumes_and_shows_epoch_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    engine = counting_engine()
    engine.load_state_dict({"epoch_length": 3, "max_epochs": 4, "epoch": 2})
    handler = ProgressHandler(interval=3)
    handler.attach(engine)
    engine.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: print(handler.bar.n, handler.bar.total))
    engine.run(range(3), max_epochs=4)
    shown = capsys.readouterr()
    assert shown.out == "6 12\n"
    assert "12/12" in shown.err
    assert "epoch 4/4, loss 1.000" in shown.err


def test_progress_shows_the_loss_of_an_epoch_that_is_shorter_than_its_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = counting_engine()
    handler = ProgressHandler(interval=10)
    handler.attach(engine)
    engine.run(range(3), max_epochs=1)
    assert "epoch 1/1, loss 1.000" in capsys.readouterr().err


def test_without_a_validation_the_loss_is_the_result_beside_that_of_the_start() -> None:
    losses = torch.arange(12, 0, -1).float()
    engine = Engine(lambda engine, batch: {"loss": losses[engine.state.iteration - 1]})
    ProgressHandler(interval=5).attach(engine)
    engine.run(range(6), max_epochs=2)
    assert engine.state.result.text == "loss 1.000 in iteration 12, 12.000 in iteration 1; nothing was validated"


@pytest.mark.parametrize("output", [None, [{"pred": 1}], {"pred": 1}])
def test_progress_without_a_loss_counts(output: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(lambda engine, batch: output)
    handler = ProgressHandler(interval=1, description="volumes")
    handler.attach(engine)
    engine.run((index for index in range(3)), max_epochs=1)  # whose end nobody knows
    shown = capsys.readouterr().err
    assert "volumes: 3it" in shown
    assert "loss" not in shown
    assert handler.bar is None


@pytest.mark.parametrize(("interval", "iteration"), [(1, 2), (99, 3)])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(interval: int, iteration: int) -> None:
    losses = torch.tensor([1, torch.inf, torch.nan]).requires_grad_()
    engine, saved = Engine(lambda engine, batch: {"loss": losses[batch]}), []
    engine.logger.setLevel(logging.CRITICAL)
    handler = ProgressHandler()
    handler.attach(engine)  # which lets the error pass
    FiniteLoss(interval).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: saved.append(True))
    value = {2: "inf", 3: "nan"}[iteration]
    message = rf"not finite in epoch 1, iteration {iteration}: loss = {value}\. Lower `learning_rate`, .*`amp` to false"
    with pytest.raises(ValueError, match=message):
        engine.run(range(3))
    assert not saved
    assert handler.bar is None


def test_the_loss_is_written_at_intervals_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(float(batch))})
    with SummaryWriter(str(tmp_path / "eval")) as writer:
        FiniteLoss(2, writer).attach(engine)
        engine.run(range(3), max_epochs=2)
    written = [(event.step, event.value) for event in events_of(tmp_path).Scalars("loss/train")]
    assert written == [(2, 1), (3, 2), (4, 0), (6, 2)]


@pytest.mark.parametrize("deep", [False, True])
def test_the_encoder_stays_bit_for_bit_and_then_moves(deep: bool) -> None:
    network = small_segresnet()
    module = DeepSupervisionNet(network, 1) if deep else network
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=[{"image": torch.randn(1, 1, 8, 8), "label": torch.randint(0, 3, (1, 1, 8, 8)).float()}],
        network=module,
        optimizer=torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.5),
        loss_function=DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True)),
        train_handlers=[FrozenEncoder(network, num_epochs=2)],
        decollate=False,
    )
    states = [deepcopy(network.state_dict())]
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: states.append(deepcopy(network.state_dict())))
    trainer.run()
    encoder = {key for key in states[0] if key.startswith(("convInit", "down_layers"))}
    moved = [{key for key in before if not torch.equal(before[key], after[key])} for before, after in pairwise(states)]
    assert moved == [states[0].keys() - encoder] * 2 + [states[0].keys()]


def test_structures_that_no_patch_shows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda engine, batch: None)
    UnseenClasses(["liver", "spleen", "aorta"]).attach(engine)
    engine.run([{"label": torch.tensor([[0.0, 2.0]])}, {"label": torch.tensor([[0.0, 0.0]])}], max_epochs=2)
    assert [record.message for record in caplog.records if "No patch" in record.message] == [
        "No patch of the first epoch shows liver, aorta: with these labels it cannot be learnt."
    ]
