"""Tests of dissect_monai.transforms.views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset

from dissect_monai.transforms.augment import BatchAugment, Corrupt
from dissect_monai.transforms.views import HierarchyViews, Views

TASKS, GROUPS = ["spleen", "pancreas", "heart"], ["abdomen", "thorax"]
both_dims = pytest.mark.parametrize("shape", [(16, 12), (8, 12, 10)], ids=["2d", "3d"])


def make_batch(shape: tuple[int, ...] = (16, 12)) -> dict[str, Any]:
    items = [("heart", "thorax"), ("spleen", "abdomen"), ("spleen", "abdomen"), ("pancreas", "abdomen")]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(items), 1, *shape, generator=generator)
    dataset = Dataset(
        [{"image": image, "task": task, "group": group} for image, (task, group) in zip(images, items, strict=True)]
    )
    return next(iter(DataLoader(dataset, batch_size=len(items))))


def make_views(spatial_dims: int = 2, mask_fraction: float | None = 0.5, **kwargs: Any) -> HierarchyViews:
    corrupt = None if mask_fraction is None else Corrupt(mask_fraction, mask_size=4)
    return HierarchyViews(BatchAugment(spatial_dims), TASKS, GROUPS, corrupt=corrupt, **kwargs)


@both_dims
@pytest.mark.parametrize("num_views", [2, 3])
def test_task_and_group_travel_with_the_views(shape: tuple[int, ...], num_views: int) -> None:
    images, target = make_views(len(shape), num_views=num_views)(make_batch(shape), "cpu")
    assert images.shape == target.views.shape == (num_views * 4, 1, *shape)
    assert target.masked is not None
    assert target.masked.shape == (num_views * 4, 1, *shape)
    assert target.task.tolist() == [2, 0, 0, 1]
    assert target.group.tolist() == [1, 0, 0, 0]
    assert target.task.dtype == torch.int64


@both_dims
def test_mask_says_what_each_view_lost(shape: tuple[int, ...]) -> None:
    images, target = make_views(len(shape))(make_batch(shape), "cpu")
    assert target.masked is not None
    assert (images[target.masked] == 0).all()
    assert torch.equal(images[~target.masked], target.views[~target.masked])
    assert (target.views[target.masked] > 0).any()
    assert len(target.masked.flatten(1).unique(dim=0)) == 8


def test_without_corruption_nothing_is_masked() -> None:
    images, target = make_views(mask_fraction=None)(make_batch(), "cpu")
    assert target.masked is None
    assert images is target.views


def test_views_are_those_of_two_views() -> None:
    expected = Views(BatchAugment(), seed=3, rank=1)
    actual = make_views(mask_fraction=None, seed=3, rank=1)
    for views in (expected, actual):
        views.set_epoch(2)
    assert torch.equal(actual(make_batch(), "cpu").images, expected(make_batch(), "cpu").images)


def test_epochs_repeat_from_their_number() -> None:
    views = make_views()
    first = views(make_batch(), "cpu")
    other = views(make_batch(), "cpu")
    assert not torch.equal(first.images, other.images)
    views.set_epoch(0)
    again = views(make_batch(), "cpu")
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.target.masked, again.target.masked)


@pytest.mark.parametrize("names", [[], ["heart", "heart"], "heart"])
def test_rejects_names_that_cannot_be_numbered(names: Any) -> None:
    with pytest.raises(ValueError, match="`tasks` must be different names, at least one, got"):
        HierarchyViews(BatchAugment(), names, GROUPS)
    with pytest.raises(ValueError, match="`groups` must be different names, at least one, got"):
        HierarchyViews(BatchAugment(), TASKS, names)


def test_rejects_an_image_of_an_unknown_task_or_without_group() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="`task` of an image must be one of spleen, pancreas, heart, got 'liver'"):
        make_views()({**batch, "task": ["liver"] * 4}, "cpu")
    del batch["group"]
    with pytest.raises(ValueError, match=r"every image must have a `group`, got \['image', 'task'\]: name it in"):
        make_views()(batch, "cpu")
