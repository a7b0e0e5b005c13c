from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.networks.nets import SegResNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.handlers.monitors import GAP, MIN_SIDE, HSSLMonitor, level_metrics
from dissect_monai.losses.contrastive import retrieval_accuracy
from dissect_monai.losses.pretraining import HSSLLoss
from dissect_monai.networks.hssl import HSSLNet
from dissect_monai.transforms.augment import BatchAugment, Corrupt
from dissect_monai.transforms.views import HierarchyViews

TERMS = ("image", "task", "group", "classification", "reconstruction")
BATCH = [f"{name}_{level}" for name in ("retrieval", "accuracy") for level in ("task", "group")] + ["retrieval_image"]
TASKS, GROUPS = ["a", "b", "c"], ["x", "y"]


def make_net(spatial_dims: int = 2) -> HSSLNet:
    torch.manual_seed(0)
    segresnet = SegResNet(
        spatial_dims, init_filters=8, in_channels=1, out_channels=1, blocks_down=(1, 1, 1), blocks_up=(1, 1)
    )
    return HSSLNet(segresnet, len(TASKS), len(GROUPS), hidden_dim=16, out_dim=8)


class Run:
    """A run of two epochs of two iterations over batches of three images."""

    def __init__(self, writer: SummaryWriter | None = None, spatial_dims: int = 2, **kwargs: int) -> None:
        self.net = make_net(spatial_dims)
        loss = HSSLLoss()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)
        self.monitor = HSSLMonitor(self.net, loss, optimizer, writer, **{"interval": 1, **kwargs})
        data = [
            {"image": torch.rand(1, *[8] * spatial_dims), "task": "abc"[i % 3], "group": "xyy"[i % 3]} for i in range(6)
        ]
        augment = BatchAugment(spatial_dims=spatial_dims)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=DataLoader(Dataset(data), batch_size=3),
            network=self.net,
            optimizer=optimizer,
            loss_function=loss,
            prepare_batch=HierarchyViews(augment, TASKS, GROUPS, corrupt=Corrupt(mask_size=4)),
            decollate=False,
            train_handlers=[self.monitor],
        )
        self.trainer.logger.setLevel(logging.CRITICAL)

    def __call__(self) -> None:
        self.trainer.run()

    def break_projector(self) -> None:
        self.net.projectors["task"][-1].bias.data.fill_(torch.nan)

    def collapse(self) -> None:
        """Let all features be the same, and nothing be learnt."""
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self._zero_bottleneck)

    def _zero_bottleneck(self) -> None:
        for parameter in self.net.segresnet.parameters():
            parameter.data.zero_()


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


def values(events: EventAccumulator, name: str) -> torch.Tensor:
    return torch.tensor([event.value for event in events.Scalars(name)])


def perfect_logits(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return 10 * torch.eye(num_classes)[labels].repeat(2, 1)


# ---- what it writes ----------------------------------------------------------------------------------------------


def test_writes_every_term_and_indicator_at_every_look(events: EventAccumulator) -> None:
    names = [f"loss/{name}" for name in (*TERMS, "total")] + [f"batch/{name}" for name in BATCH]
    names += ["collapse/feature_std", "collapse/effective_rank", "schedule/learning_rate"]
    assert set(names) == set(events.Tags()["scalars"])
    for name in names:
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
        assert values(events, name).isfinite().all()


def test_indicators_are_in_their_ranges(events: EventAccumulator) -> None:
    for name in [*(f"batch/{name}" for name in BATCH), "collapse/feature_std"]:
        assert ((values(events, name) >= 0) & (values(events, name) <= 1)).all(), name
    rank = values(events, "collapse/effective_rank")
    assert ((rank >= 1) & (rank <= 6)).all()  # six views


def test_total_is_the_weighted_sum_of_the_terms(events: EventAccumulator) -> None:
    terms = sum(values(events, f"loss/{name}") for name in TERMS)
    torch.testing.assert_close(values(events, "loss/total"), terms)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_draws_both_views_and_what_is_seen_of_them_at_the_end_of_every_epoch(tmp_path: Path, spatial_dims: int) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        Run(writer, spatial_dims)()
    written = read(tmp_path)
    assert written.Tags()["images"] == ["views"]
    images = written.Images("views")
    assert [event.step for event in images] == [1, 2]
    assert (images[0].height, images[0].width) == (3 * (MIN_SIDE + GAP), 4 * (MIN_SIDE + GAP))


def test_looking_changes_nothing_in_the_run() -> None:
    states = []
    for interval in (1, 99):
        run = Run(interval=interval)
        run()
        states.append(run.net.state_dict())
    ours, theirs = states
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---- what it measures --------------------------------------------------------------------------------------------


def measured(embeddings: torch.Tensor, task: torch.Tensor, group: torch.Tensor, **logits: Any) -> dict[str, float]:
    task_logits = logits.get("task_logits", torch.zeros(2 * len(task), 3))
    group_logits = logits.get("group_logits", torch.zeros(2 * len(task), 2))
    found = level_metrics([embeddings] * 3, (task_logits, group_logits), (task, group))
    return {name: float(value) for name, value in found.items()}


def test_identical_views_are_always_retrieved() -> None:
    views = torch.randn(5, 8).repeat(2, 1)
    assert measured(views, torch.arange(5), torch.arange(5))["retrieval_image"] == 1


def test_task_and_group_are_retrieved_among_first_views_only() -> None:
    task, group = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1])
    embeddings = torch.randn(10, 4)
    found = measured(embeddings, task, group)
    assert found["retrieval_task"] == pytest.approx(float(retrieval_accuracy(embeddings[:5], task)))
    assert found["retrieval_group"] == pytest.approx(float(retrieval_accuracy(embeddings[:5], group)))
    alone = measured(torch.randn(5, 4).repeat(2, 1), torch.arange(5), torch.arange(5))
    assert alone["retrieval_task"] == alone["retrieval_group"] == 0  # the other view would have been the answer


def test_perfect_logits_have_an_accuracy_of_one() -> None:
    task, group = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])
    logits = {"task_logits": perfect_logits(task, 3), "group_logits": perfect_logits(1 - group, 2)}
    found = measured(torch.randn(6, 4), task, group, **logits)
    assert found["accuracy_task"] == 1
    assert found["accuracy_group"] == 0


def test_a_single_image_has_no_task_to_find() -> None:
    found = measured(torch.randn(2, 4), torch.tensor([1]), torch.tensor([0]))
    assert set(found) == {"retrieval_image", "accuracy_task", "accuracy_group"}
    assert found["retrieval_image"] == 1


# ---- when it stops -----------------------------------------------------------------------------------------------


def test_stops_when_the_loss_is_not_finite() -> None:
    run = Run()
    run.break_projector()
    with pytest.raises(RuntimeError, match=r"not finite in epoch 1, iteration 1: .*loss/task = nan.*--learning_rate"):
        run()


def test_stops_before_a_lost_epoch_is_saved() -> None:
    run = Run(interval=99)
    run.break_projector()
    with pytest.raises(RuntimeError, match="not finite in epoch 1, iteration 2: loss/total = nan"):
        run()


def test_stops_when_the_features_stay_collapsed() -> None:
    run = Run(patience=3)
    run.collapse()
    named = (
        r"collapsed in epoch 2, iteration 3: the pooled bottleneck's standard deviation is 0\.0000 .* at 3 looks in a "
        r"row\. Lower --learning_rate, lengthen --warmup_epochs, enlarge --batch_size"
    )
    with pytest.raises(RuntimeError, match=named):
        run()


def test_an_untrained_network_is_far_from_collapsed(events: EventAccumulator) -> None:
    assert (values(events, "collapse/feature_std") > 10 * HSSLMonitor.collapsed_std).all()


@pytest.mark.parametrize("kwargs", [{"interval": 0}, {"patience": 0}])
def test_rejects_counts_below_one(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`interval` and `patience` must be at least 1, got"):
        Run(**kwargs)
