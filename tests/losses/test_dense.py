"""Tests of dissect_monai.losses.dense, and of the places of views that it needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.losses.dense import dense_contrast
from dissect_monai.transforms.augment import BatchAugment, Placement

GEOMETRY_ONLY = {"gamma": None, "brightness": 0.0, "contrast": None, "blur_prob": 0.0}
both_dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def same_place(views: int, spatial_dims: int) -> Placement:
    return Placement(torch.eye(spatial_dims).expand(views, -1, -1), torch.zeros(views, spatial_dims))


def cell_centers(cells: tuple[int, ...]) -> Tensor:
    axes = [(2 * torch.arange(length) + 1) / length - 1 for length in cells]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def naive(features: Tensor, placement: Placement, temperature: float) -> Tensor:
    """One cell at a time, its positive sought among all cells."""
    pairs, cells = len(features) // 2, tuple(features.shape[2:])
    places = cell_centers(cells)
    entropies = []
    for index in range(2 * pairs):
        other = (index + pairs) % (2 * pairs)
        here = places @ placement.matrix[index].T + placement.center[index]
        there = torch.linalg.solve(placement.matrix[other], (here - placement.center[other]).T).T
        anchors, candidates = (F.normalize(features[each].flatten(1).T, dim=1) for each in (index, other))
        for anchor, place in zip(anchors, there, strict=True):
            distance = ((places - place) * torch.tensor(cells) / 2).norm(dim=1)
            if distance.min() <= 0.5 * math.sqrt(len(cells)):
                logits = candidates @ anchor / temperature
                entropies.append(logits.logsumexp(0) - logits[distance.argmin()])
    return torch.stack(entropies).mean() if entropies else torch.zeros(())


# ---- the loss ----------------------------------------------------------------------------------------------------


@both_dims
@pytest.mark.parametrize("rotation", [0.0, 30.0])
def test_equals_the_naive_loss(spatial_dims: int, rotation: float) -> None:
    generator = torch.Generator().manual_seed(1)
    augment = BatchAugment(spatial_dims, crop_scale=(0.2, 0.9), flip_prob=0.5, rotation=rotation)
    placement = augment.placed(torch.rand(6, 1, *[8] * spatial_dims, generator=generator), generator).placement
    features = torch.randn(6, 5, *(4, 3, 2)[:spatial_dims], generator=generator)
    expected = naive(features, placement, 0.2)
    assert expected > 0
    torch.testing.assert_close(dense_contrast(features, placement, 0.2), expected)


@both_dims
def test_is_small_where_each_place_has_a_feature_of_its_own(spatial_dims: int) -> None:
    cells = (3,) * spatial_dims
    one_hot = torch.eye(math.prod(cells)).T.reshape(1, -1, *cells)
    placement = same_place(2, spatial_dims)
    assert dense_contrast(one_hot.expand(2, *one_hot.shape[1:]), placement, 0.05) < 1e-4
    moved = torch.cat([one_hot, one_hot.roll(1, 2)])
    assert dense_contrast(moved, placement, 0.05) > 5


def test_a_mirrored_view_finds_its_places_again() -> None:
    features = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    mirror = Placement(torch.stack([torch.eye(2), torch.diag(torch.tensor([-1.0, 1.0]))]), torch.zeros(2, 2))
    aligned = dense_contrast(torch.cat([features, features]), same_place(2, 2))
    mirrored = dense_contrast(torch.cat([features, features.flip(2)]), mirror)
    torch.testing.assert_close(mirrored, aligned)


def test_views_that_do_not_overlap_have_no_loss_and_no_gradient() -> None:
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    quarter = Placement(0.2 * torch.eye(2).expand(2, -1, -1), torch.tensor([[-0.7, 0.0], [0.7, 0.0]]))
    loss = dense_contrast(features, quarter)
    loss.backward()
    assert loss == 0
    assert features.grad is not None
    assert (features.grad == 0).all()


def test_both_views_get_a_gradient() -> None:
    features = torch.randn(4, 4, 3, 3, requires_grad=True)
    dense_contrast(features, same_place(4, 2)).backward()
    assert features.grad is not None
    assert (features.grad.flatten(1).abs().sum(1) > 0).all()


def test_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        dense_contrast(torch.rand(2, 4, 3, 3), same_place(2, 2), 0)
    with pytest.raises(ValueError, match="two views of each image, each with a place, got 3 maps and 3 places"):
        dense_contrast(torch.rand(3, 4, 3, 3), same_place(3, 2))
    with pytest.raises(ValueError, match="got 2 maps and 4 places"):
        dense_contrast(torch.rand(2, 4, 3, 3), same_place(4, 2))
