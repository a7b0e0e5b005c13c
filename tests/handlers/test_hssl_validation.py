from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import evaluated, small_segresnet
from ignite.engine import Events
from monai.data import DataLoader, Dataset

from dissect_monai.handlers.validation import HSSLValidation
from dissect_monai.losses.pretraining import unexplained_variance
from dissect_monai.metrics.probes import extract_features
from dissect_monai.metrics.representation import DomainFeatures, collapse_metrics
from dissect_monai.networks.hssl import HSSLNet, HSSLOutput
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import HierarchyTarget, HierarchyViews

TASKS, GROUPS = ["a", "b b", "c"], ["x", "y"]
GROUP_OF = {"a": "x", "b b": "y", "c": "y"}
METRICS = {
    *(f"{name}_{level}" for name in ("retrieval", "accuracy") for level in ("task", "group")),
    *("retrieval_image", "reconstruction_error", *(f"reconstruction_error_{task}" for task in ("a", "b_b", "c"))),
    *("shortcut_task", "shortcut_task_intensity", "shortcut_within_group"),
    *("collapse_effective_rank", "collapse_centroid_similarity"),
}


def make_items(tasks: list[str], per_task: int = 3, spatial_dims: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Images of one range of intensities a task, alternating between the tasks."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number in range(per_task):
        for task in tasks:
            noise = torch.rand(1, *[8] * spatial_dims, generator=generator)
            image = 0.3 * TASKS.index(task) + 0.25 * noise
            items.append({"image": image, "task": task, "group": GROUP_OF[task], "subject": f"{task}{number}"})
    return items


class Validation:
    """An evaluator of an untrained network over images of the tasks."""

    def __init__(
        self, tasks: list[str] = TASKS, spatial_dims: int = 2, per_task: int = 3, mask_fraction: float = 0.3
    ) -> None:
        segresnet = small_segresnet(spatial_dims, out_channels=1)
        self.net = HSSLNet(segresnet, len(TASKS), len(GROUPS), hidden_dim=16, out_dim=8)
        # Nothing that mixes up the order of the brightness.
        augment = BatchAugment(spatial_dims=spatial_dims, brightness=0, contrast=None, gamma=None)
        self.views = HierarchyViews(augment, TASKS, GROUPS, seed=5, mask_fraction=mask_fraction, mask_size=2)
        self.validation = DataLoader(Dataset(make_items(tasks, per_task, spatial_dims)), batch_size=4)
        self.handler = HSSLValidation(Dataset(make_items(tasks, 4, spatial_dims, seed=1)))
        self.seen: list[tuple[HierarchyTarget, HSSLOutput]] = []

    def __call__(self, **changed: Any) -> dict[str, float]:
        """Run; let the network answer otherwise: each value is a function of the target."""

        def change(engine: Any) -> None:
            state = engine.state.output
            new = {name: function(state["label"]) for name, function in changed.items()}
            state["pred"] = state["pred"]._replace(**new)
            self.seen.append((state["label"], state["pred"]))

        changer = SimpleNamespace(attach=lambda engine: engine.add_event_handler(Events.ITERATION_COMPLETED, change))
        run = evaluated(self.net, self.validation, changer, self.handler, prepare_batch=self.views)
        self.said = run.state.result.text
        return run.state.metrics


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_leaves_every_metric_in_its_range_and_the_network_as_it_is(spatial_dims: int) -> None:
    validation = Validation(spatial_dims=spatial_dims)
    before = {name: value.clone() for name, value in validation.net.state_dict().items()}
    metrics = validation()
    assert set(metrics) == METRICS
    assert np.isfinite(list(metrics.values())).all()
    assert all(0 <= value <= 1 for name, value in metrics.items() if not name.startswith("reconstruction_error"))
    assert all(torch.equal(before[name], value) for name, value in validation.net.state_dict().items())


@pytest.mark.parametrize(("tasks", "share"), [(TASKS, "0.333"), (["a", "a", "c"], "0.667"), (["a"], "1.000")])
def test_the_result_says_what_guessing_reaches(tasks: list[str], share: str) -> None:
    validation = Validation(tasks)
    accuracy = validation()["accuracy_task"]
    compared = f"(their mean alone: 1), accuracy of the task {accuracy:.3f} (always the most frequent: {share})"
    assert compared in validation.said


def test_with_a_single_task_there_is_no_shortcut() -> None:
    left_out = {"shortcut_task", "shortcut_task_intensity", "shortcut_within_group", "collapse_centroid_similarity"}
    left_out |= {"reconstruction_error_b_b", "reconstruction_error_c"}
    assert set(Validation(["a"])()) == METRICS - left_out


def test_few_images_make_no_metric_nan() -> None:
    metrics = Validation(per_task=1)()
    assert set(metrics) == METRICS
    single = Validation(["a"], per_task=1)()
    assert {"retrieval_image", "accuracy_task", "reconstruction_error_a"} <= set(single)
    assert "retrieval_task" not in single
    assert np.isfinite([*metrics.values(), *single.values()]).all()


def test_perfect_answers_are_perfect() -> None:
    metrics = Validation()(
        reconstruction=lambda target: target.views,
        task_logits=lambda target: torch.eye(3)[target.task].repeat(2, 1),
        group_logits=lambda target: -torch.eye(2)[target.group].repeat(2, 1),
        embeddings=lambda target: tuple(
            torch.eye(4)[labels].repeat(2, 1) + 0.01 for labels in (target.task, target.task, target.group)
        ),
    )
    assert all(value == 0 for name, value in metrics.items() if name.startswith("reconstruction_error"))
    assert metrics["accuracy_task"] == 1
    assert metrics["accuracy_group"] == 0
    assert metrics["retrieval_task"] == metrics["retrieval_group"] == 1


def test_views_are_retrieved_among_all_batches() -> None:
    metrics = Validation()(embeddings=lambda target: (torch.eye(4)[: len(target.task)].repeat(2, 1),) * 3)
    # Equal embeddings in three batches: the other view of an image is nearest only by chance.
    assert metrics["retrieval_image"] < 1
    metrics = Validation()(
        embeddings=lambda target: (target.views[:4].flatten(1)[: len(target.task)].repeat(2, 1),) * 3
    )
    assert metrics["retrieval_image"] == 1


@pytest.mark.parametrize("mask_fraction", [0.5, 0])
def test_reconstruction_is_judged_by_task_on_masked_voxels_or_on_all_if_there_are_none(mask_fraction: float) -> None:
    validation = Validation(mask_fraction=mask_fraction)
    metrics = validation()
    errors: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for target, output in validation.seen:
        for index, task in enumerate(target.task.repeat(2).tolist()):
            view = slice(index, index + 1)
            masked = target.masked[view] if mask_fraction else None
            errors[task].append(float(unexplained_variance(output.reconstruction[view], target.views[view], masked)))
    means = [float(np.mean(errors[task])) for task in range(3)]
    assert metrics["reconstruction_error_b_b"] == pytest.approx(means[1], rel=1e-5)
    assert metrics["reconstruction_error"] == pytest.approx(np.mean(means), rel=1e-5)


def test_features_are_those_of_the_images_as_they_are_and_their_brightness_betrays_the_task() -> None:
    validation = Validation()
    metrics = validation()
    features = extract_features(
        validation.net.segresnet, validation.validation, "cpu", lambda encoder, images: [encoder.encode(images)[0]]
    )
    items = validation.validation.dataset.data
    task, group = ([item[key] for item in items] for key in ("task", "group"))
    expected = collapse_metrics(DomainFeatures(features.last, features.last, task, group))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["shortcut_task"] > 0.9
    assert metrics["shortcut_task_intensity"] == metrics["shortcut_within_group"] == 1


def test_every_validation_has_the_same_views_and_starts_anew() -> None:
    validation = Validation()
    first = dict(validation())
    validation.views.set_epoch(9)
    assert validation() == first
