from typing import Any

import pytest
import torch
from helpers import as_process, never_waiting
from monai.data import MetaTensor
from torch import Tensor

from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import HierarchyViews, Views, prepare_images

TASKS, GROUPS = ["spleen", "pancreas", "heart"], ["abdomen", "thorax"]
IDENTITY = BatchAugment(
    crop_scale=None, flip_prob=0, rotation=0, gamma=None, brightness=0, contrast=None, blur_prob=0
)  # fmt: skip
both_dims = pytest.mark.parametrize("shape", [(16, 12), (8, 12, 10)], ids=["2d", "3d"])


def make_batch(shape: tuple[int, ...] = (16, 12)) -> dict[str, Any]:
    items = [("heart", "thorax"), ("spleen", "abdomen"), ("spleen", "abdomen"), ("pancreas", "abdomen")]
    images = torch.rand(len(items), 1, *shape, generator=torch.Generator().manual_seed(0))
    return {"image": images, "task": [task for task, _ in items], "group": [group for _, group in items]}


def make_views(spatial_dims: int = 2, mask_fraction: float = 0.5, mask_size: int = 4, **kwargs: Any) -> HierarchyViews:
    return HierarchyViews(BatchAugment(spatial_dims), TASKS, GROUPS, mask_fraction, mask_size, **kwargs)


def test_views_come_one_after_the_other_and_differ() -> None:
    images = make_batch()["image"]
    views = Views(BatchAugment())({"image": images}, "cpu")
    assert views.images.shape == (8, 1, 16, 12)
    assert views.target is views.images
    assert not torch.allclose(views.images[:4], views.images[4:], atol=1e-2)
    assert type(Views(BatchAugment())({"image": MetaTensor(images)}, "cpu").images) is Tensor
    unchanged = Views(IDENTITY, num_views=3)({"image": images}, "cpu").images
    torch.testing.assert_close(unchanged, images.repeat(3, 1, 1, 1))


def test_labels_may_be_the_target() -> None:
    batch = {"image": torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8), "label": torch.tensor([1.0, 0, 1, 0])}
    images, labels = Views(BatchAugment(image_size=24), num_views=1, target_key="label")(batch, "cpu")
    assert (images.shape, images.dtype) == ((4, 1, 24, 24), torch.float32)
    assert torch.equal(labels, batch["label"])


def test_epochs_repeat_from_seed_rank_and_epoch() -> None:
    batch = make_batch()

    def second_batch(seed: int, rank: int, epoch: int) -> Tensor:
        with as_process(rank, 3):
            views = Views(BatchAugment(), seed=seed)
            views(batch, "cpu")
            views.set_epoch(epoch)
        views(batch, "cpu")
        return views(batch, "cpu").images

    reference = second_batch(1, 2, 3)
    assert torch.equal(reference, second_batch(1, 2, 3))
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0), (3, 2, 1)]:
        assert not torch.allclose(reference, second_batch(*other), atol=1e-2)


@pytest.mark.gpu
@both_dims
def test_nothing_waits_for_the_gpu(shape: tuple[int, ...], device: torch.device) -> None:
    batch = {"image": make_batch(shape)["image"].to(device)}
    views = Views(BatchAugment(len(shape)))
    views(batch, device)
    with never_waiting(device):
        assert views(batch, device).images.device.type == device.type


@pytest.mark.parametrize(("dtype", "expected"), [(torch.uint8, [0, 0.2, 1]), (torch.float32, [0, 51, 255])])
def test_only_bytes_are_scaled(dtype: torch.dtype, expected: list[float]) -> None:
    image, label = prepare_images({"image": torch.tensor([0, 51, 255], dtype=dtype), "label": torch.ones(2)}, "cpu")
    torch.testing.assert_close(image, torch.tensor(expected, dtype=torch.float32))
    assert label is not None
    assert label.tolist() == [1, 1]
    assert prepare_images({"image": image})[1] is None


@both_dims
def test_task_and_group_travel_with_the_views_and_the_mask_says_what_each_lost(shape: tuple[int, ...]) -> None:
    images, target = make_views(len(shape), num_views=3)(make_batch(shape), "cpu")
    assert images.shape == target.views.shape == target.masked.shape == (12, 1, *shape)
    assert (target.task.tolist(), target.group.tolist()) == ([2, 0, 0, 1], [1, 0, 0, 0])
    assert target.task.dtype == torch.int64
    assert (images[target.masked] == 0).all()
    assert torch.equal(images[~target.masked], target.views[~target.masked])
    assert (target.views[target.masked] > 0).any()
    assert len(target.masked.flatten(1).unique(dim=0)) == 12


def test_without_a_mask_they_are_those_of_views() -> None:
    expected = Views(BatchAugment(), seed=3)
    actual = make_views(mask_fraction=0, seed=3)
    for views in (expected, actual):
        views.set_epoch(2)
    images, target = actual(make_batch(), "cpu")
    assert torch.equal(images, expected(make_batch(), "cpu").images)
    assert target.masked is None
    assert images is target.views


def test_masks_repeat_with_their_epoch_and_leave_the_global_generator_alone() -> None:
    views, state = make_views(), torch.random.get_rng_state()
    first, other = views(make_batch(), "cpu"), views(make_batch(), "cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first.target.masked, other.target.masked)
    views.set_epoch(0)
    again = views(make_batch(), "cpu")
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.target.masked, again.target.masked)


@pytest.mark.parametrize("mask", [{"mask_size": 0}, {"mask_fraction": 1.5}])
def test_rejects_bad_masks(mask: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`mask_fraction` must be in \[0, 1\] and `mask_size` at least 1, got "):
        make_views(**mask)
