import logging
from typing import Any

import pytest
import torch
from helpers import Writer, small_resnet, small_segresnet
from ignite.engine import Engine
from torch import Tensor

from dissect_monai.handlers import monitors
from dissect_monai.handlers.monitors import HSSLMonitor, SSLMonitor, level_metrics
from dissect_monai.handlers.training import TargetMomentumHandler
from dissect_monai.losses.contrastive import retrieval_accuracy
from dissect_monai.losses.pretraining import HSSLLoss, VQSSLLoss
from dissect_monai.networks.hssl import HSSLNet
from dissect_monai.networks.vqssl import VQSSLNet
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import HierarchyViews
from dissect_monai.visualize.training import TILE_SIDE

TASKS, GROUPS = ["a", "b", "c"], ["x", "y"]
LEVELS = [f"{name}_{level}" for name in ("retrieval", "accuracy") for level in ("task", "group")] + ["retrieval_image"]
SCALARS = {
    "ssl": {
        *(f"loss/{name}" for name in ("continuous", "discrete", "commitment", "reconstruction", "total")),
        *(f"collapse/{name}" for name in ("feature_std", "target_std", "effective_rank")),
        *(f"codes/{name}_stage{stage}" for name in ("perplexity", "usage") for stage in (2, 4)),
        *("schedule/learning_rate", "schedule/target_momentum"),
    },
    "hssl": {
        *(f"loss/{name}" for name in ("image", "task", "group", "classification", "reconstruction", "total")),
        *(f"batch/{name}" for name in LEVELS),
        *("collapse/feature_std", "collapse/effective_rank", "schedule/learning_rate"),
    },
}


class Run:
    """A run of two epochs of two iterations over batches of three images; it does not learn."""

    def __init__(self, net: Any, loss: Any, monitor: Any, writer: Writer | None, interval: int) -> None:
        self.net, self.loss = net, loss
        self.monitor = monitor(net, loss, torch.optim.SGD(net.parameters(), lr=0.5), writer, interval)
        self.engine = Engine(self.step)
        self.engine.logger.setLevel(logging.CRITICAL)

    def step(self, engine: Engine, batch: int) -> dict[str, Any]:
        image, target = self.batch()
        pred = self.net(image)
        return {"image": image, "label": target, "pred": pred, "loss": self.loss(pred, target)}

    def __call__(self) -> None:
        self.monitor.attach(self.engine)
        self.engine.run(range(2), max_epochs=2)


class SSLRun(Run):
    def __init__(self, writer: Writer | None = None, decode: bool = True, interval: int = 1) -> None:
        small = {"num_embeddings": 8, "embedding_dim": 8, "hidden_dim": 16, "out_dim": 8}
        net = VQSSLNet(small_resnet(widen_factor=0.25), stages=(2, 4), decode=decode, predict=True, **small)
        loss = VQSSLLoss(reconstruction_weight=decode, objective="byol")
        super().__init__(net, loss, SSLMonitor, writer, interval)
        TargetMomentumHandler(net, 0.9, num_iterations=4).attach(self.engine)

    def batch(self) -> tuple[Tensor, Tensor]:
        views = torch.rand(6, 1, 32, 32)
        return views, views

    def spoil(self) -> None:
        self.net.predictors["continuous"][-1].bias.data.fill_(torch.nan)

    def collapse(self) -> None:
        """Let every target be the same."""
        for last in (self.net.projectors["continuous"][-1], self.net.target.heads["continuous"][-1]):
            last.weight.data.zero_()


class HSSLRun(Run):
    def __init__(self, writer: Writer | None = None, interval: int = 1) -> None:
        net = HSSLNet(small_segresnet(out_channels=1), len(TASKS), len(GROUPS), hidden_dim=16, out_dim=8)
        super().__init__(net, HSSLLoss(), HSSLMonitor, writer, interval)
        self.views = HierarchyViews(BatchAugment(spatial_dims=2), TASKS, GROUPS, mask_fraction=0.3, mask_size=4)

    def batch(self) -> Any:
        return self.views({"image": torch.rand(3, 1, 8, 8), "task": [*"abc"], "group": [*"xyy"]}, "cpu")

    def spoil(self) -> None:
        self.net.projectors["task"][-1].bias.data.fill_(torch.nan)

    def collapse(self) -> None:
        """Let all features be the same."""
        for parameter in self.net.segresnet.parameters():
            parameter.data.zero_()


RUNS: dict[str, Any] = {"ssl": SSLRun, "hssl": HSSLRun}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@pytest.fixture(scope="module")
def written() -> dict[str, Writer]:
    writers = {}
    for name, run in RUNS.items():
        writers[name] = Writer()
        run(writers[name])()
    return writers


@pytest.mark.parametrize("name", RUNS)
def test_writes_every_term_and_indicator_at_every_look(written: dict[str, Writer], name: str) -> None:
    writer = written[name]
    assert set(writer.scalars) == SCALARS[name]
    highest = {"collapse/effective_rank": 6, "codes/perplexity_stage2": 8, "codes/perplexity_stage4": 8}  # views, codes
    for scalar, steps in writer.scalars.items():
        assert list(steps) == [1, 2, 3, 4]
        values = writer.values(scalar)
        assert values.isfinite().all()
        if scalar.startswith(("batch/", "collapse/", "codes/")):
            assert ((values >= float(scalar in highest)) & (values <= highest.get(scalar, 1))).all(), scalar
    weights = RUNS[name]().monitor.loss.weights
    terms = sum(weights[term] * writer.values(f"loss/{term}") for term in weights if f"loss/{term}" in writer.scalars)
    torch.testing.assert_close(writer.values("loss/total"), terms)


def test_an_untrained_network_is_far_from_collapsed_and_its_momentum_rises(written: dict[str, Writer]) -> None:
    assert (written["ssl"].values("collapse/target_std") > 10 * SSLMonitor.collapsed_std).all()
    assert (written["hssl"].values("collapse/feature_std") > 10 * HSSLMonitor.collapsed_std).all()
    assert (written["ssl"].values("schedule/learning_rate") == 0.5).all()
    momentum = written["ssl"].values("schedule/target_momentum")
    assert momentum[-1] == 1
    assert (momentum.diff() > 0).all()


@pytest.mark.parametrize("decode", [True, False])
def test_draws_views_reconstructions_and_codes_at_the_end_of_every_epoch(decode: bool) -> None:
    SSLRun(writer := Writer(), decode)()
    names = {"views": 2, "codes_of_stages_2_4": 3} | ({"reconstruction": 2} if decode else {})
    assert {name: [*shapes] for name, shapes in writer.images.items()} == {name: [1, 2] for name in names}
    for name, count in names.items():
        for _, height, width in writer.images[name].values():
            assert (height > 3 * TILE_SIDE, width) == (True, count * TILE_SIDE)  # with the captions
    assert ("loss/reconstruction" in writer.scalars) == decode


@every_run
def test_looking_at_an_interval_changes_nothing_in_the_run(run: Any) -> None:
    states = []
    for interval in (1, 3):
        looked = run(writer := Writer(), interval=interval)
        looked()
        states.append({**looked.net.state_dict(), "loss": looked.engine.state.output["loss"]})
    assert list(writer.scalars["loss/total"]) == [3]
    ours, theirs = states
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@every_run
@pytest.mark.parametrize(("interval", "iteration", "term"), [(1, 1, "/(continuous|task) = nan, "), (99, 2, "")])
def test_stops_before_a_lost_epoch_is_saved(run: Any, interval: int, iteration: int, term: str) -> None:
    lost = run(interval=interval)
    lost.spoil()
    message = rf"not finite in epoch 1, iteration {iteration}: .*{term}.*loss/total = nan\. Lower `learning_rate`"
    with pytest.raises(ValueError, match=message):
        lost()


@pytest.mark.parametrize(("run", "spread"), [(SSLRun, "collapse/target_std"), (HSSLRun, "collapse/feature_std")])
def test_stops_when_the_features_stay_collapsed(run: Any, spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "PATIENCE", 3)
    lost = run()
    lost.collapse()
    message = rf"epoch 2, iteration 3: {spread} is 0\.0000 .* at 3 looks in a row\. .*[Ll]ower `learning_rate`"
    with pytest.raises(ValueError, match=message):
        lost()


def test_forgives_a_short_collapse() -> None:
    run = SSLRun()
    run.monitor.collapsed = monitors.PATIENCE - 1  # bad looks before a good one
    run()
    assert run.monitor.collapsed == 0


def measured(embeddings: Tensor, task: Tensor, group: Tensor) -> dict[str, float]:
    logits = torch.eye(5)[task].repeat(2, 1), torch.eye(5)[(group + 1) % 5].repeat(2, 1)  # all right, all wrong
    return {name: float(value) for name, value in level_metrics([embeddings] * 3, logits, (task, group)).items()}


def test_task_and_group_are_retrieved_among_first_views_only() -> None:
    task, group = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1])
    embeddings = torch.randn(10, 4)
    found = measured(embeddings, task, group)
    assert found["retrieval_task"] == pytest.approx(float(retrieval_accuracy(embeddings[:5], task)))
    assert found["retrieval_group"] == pytest.approx(float(retrieval_accuracy(embeddings[:5], group)))
    assert (found["accuracy_task"], found["accuracy_group"]) == (1, 0)
    alone = measured(torch.randn(5, 4).repeat(2, 1), torch.arange(5), torch.arange(5))
    assert alone["retrieval_image"] == 1
    assert alone["retrieval_task"] == alone["retrieval_group"] == 0  # the other view would have been the answer


def test_a_single_image_has_no_task_to_find() -> None:
    found = measured(torch.randn(2, 4), torch.tensor([1]), torch.tensor([0]))
    assert set(found) == {"retrieval_image", "accuracy_task", "accuracy_group"}
    assert found["retrieval_image"] == 1
