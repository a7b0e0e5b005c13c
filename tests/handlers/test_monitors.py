from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.networks.nets import resnet10
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.handlers.monitors import SSLMonitor
from dissect_monai.handlers.training import TargetMomentumHandler
from dissect_monai.losses.pretraining import VQSSLLoss
from dissect_monai.networks.vqssl import VQSSLNet


class Run:
    """A run of two epochs of two iterations over one batch of three images."""

    def __init__(
        self, writer: SummaryWriter | None = None, decode: bool = True, corrupted: bool = False, **kwargs: int
    ) -> None:
        torch.manual_seed(0)
        encoder = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
        self.net = VQSSLNet(
            encoder, stages=(2, 4), num_embeddings=8, embedding_dim=8, hidden_dim=16, out_dim=8, decode=decode
        )
        self.corrupted = corrupted
        self.loss = VQSSLLoss(reconstruction_weight=1 if decode else 0)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.5)
        self.monitor = SSLMonitor(self.net, self.loss, optimizer, writer, **{"interval": 1, **kwargs})
        self.engine = Engine(self.step)
        self.engine.logger.setLevel(logging.CRITICAL)
        TargetMomentumHandler(self.net, 0.9, num_iterations=4).attach(self.engine)
        self.monitor.attach(self.engine)

    def step(self, engine: Engine, batch: int) -> dict[str, object]:
        views = torch.rand(6, 1, 32, 32)
        pred = self.net(views)
        image = views + 0.1 if self.corrupted else views
        return {"image": image, "label": views, "pred": pred, "loss": self.loss(pred, views)}

    def __call__(self) -> None:
        self.engine.run(range(2), max_epochs=2)

    def collapse(self) -> None:
        """Let every target be the same."""
        last = self.net.target.heads["continuous"][-1]
        self.net.projectors["continuous"][-1].weight.data.zero_()
        last.weight.data.zero_()


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    folder = tmp_path_factory.mktemp("events")
    with SummaryWriter(str(folder)) as writer:
        Run(writer)()
    return read(folder)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def values(events: EventAccumulator, name: str) -> Tensor:
    return torch.tensor([event.value for event in events.Scalars(name)])


# ---- what it writes ----------------------------------------------------------------------------------------------


def test_writes_every_term_and_indicator_at_every_look(events: EventAccumulator) -> None:
    losses = ("continuous", "discrete", "commitment", "reconstruction", "total")
    names = [f"loss/{name}" for name in losses]
    names += [f"collapse/{name}" for name in ("feature_std", "target_std", "effective_rank")]
    names += [f"codes/{name}_stage{stage}" for name in ("perplexity", "usage") for stage in (2, 4)]
    names += ["schedule/learning_rate", "schedule/target_momentum"]
    assert set(names) == set(events.Tags()["scalars"])
    for name in names:
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
        assert values(events, name).isfinite().all()


def test_total_is_the_weighted_sum_of_the_terms(events: EventAccumulator) -> None:
    terms = sum(values(events, f"loss/{name}") for name in ("continuous", "discrete", "commitment", "reconstruction"))
    torch.testing.assert_close(values(events, "loss/total"), terms)


def test_schedules_are_those_in_force(events: EventAccumulator) -> None:
    assert (values(events, "schedule/learning_rate") == 0.5).all()
    momentum = values(events, "schedule/target_momentum")
    assert momentum[-1] == 1
    assert (momentum.diff() > 0).all()


def test_indicators_are_in_their_ranges(events: EventAccumulator) -> None:
    assert (values(events, "codes/usage_stage2") <= 1).all()
    assert ((values(events, "codes/perplexity_stage2") >= 1) & (values(events, "codes/perplexity_stage2") <= 8)).all()
    assert (values(events, "collapse/target_std") > 0.1).all()


def test_draws_at_the_end_of_every_epoch(events: EventAccumulator) -> None:
    assert set(events.Tags()["images"]) == {"views", "reconstruction", "codes_of_stages_2_4"}
    for name, columns in (("views", 2), ("reconstruction", 2), ("codes_of_stages_2_4", 3)):
        images = events.Images(name)
        assert [event.step for event in images] == [1, 2]
        assert (images[0].height, images[0].width) == (3 * 128, columns * 128)


def test_reconstructions_stand_beside_input_and_target_where_these_differ(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        Run(writer, corrupted=True)()
    assert read(tmp_path).Images("reconstruction")[0].width == 3 * 128


def test_without_a_decoder_there_is_no_reconstruction(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        Run(writer, decode=False)()
    tags = read(tmp_path).Tags()
    assert not [name for name in tags["scalars"] + tags["images"] if "reconstruction" in name]


def test_looks_at_the_interval_only(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        Run(writer, interval=3)()
    assert [event.step for event in read(tmp_path).Scalars("loss/total")] == [3]


def test_looking_changes_nothing_in_the_run() -> None:
    states = []
    for interval in (1, 99):
        run = Run(interval=interval)
        run()
        states.append(run.net.state_dict())
    ours, theirs = states
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---- when it stops -----------------------------------------------------------------------------------------------


def test_stops_when_the_loss_is_not_finite() -> None:
    run = Run()
    run.net.predictors["continuous"][-1].bias.data.fill_(torch.nan)
    named = r"not finite in epoch 1, iteration 1: loss/continuous = nan, .*loss/total = nan\. Lower --learning_rate"
    with pytest.raises(RuntimeError, match=named):
        run()


def test_stops_before_a_lost_epoch_is_saved() -> None:
    run = Run(interval=99)
    run.net.predictors["continuous"][-1].bias.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite in epoch 1, iteration 2: loss/total = nan"):
        run()


def test_stops_when_the_features_stay_collapsed() -> None:
    run = Run(patience=3)
    run.collapse()
    named = r"collapsed in epoch 2, iteration 3: the targets' standard deviation is 0\.0000 .* at 3 looks in a row"
    with pytest.raises(RuntimeError, match=named):
        run()


def test_forgives_a_short_collapse() -> None:
    run = Run(patience=2)
    run.monitor.collapsed = 1  # one bad look before a good one
    run()
    assert run.monitor.collapsed == 0


@pytest.mark.parametrize("kwargs", [{"interval": 0}, {"patience": 0}])
def test_rejects_counts_below_one(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`interval` and `patience` must be at least 1, got"):
        Run(**kwargs)
