import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dissect_monai.transforms.augment import BatchAugment, _gaussian_blur, mask_blocks

OFF: dict[str, Any] = dict.fromkeys(("crop_scale", "gamma", "contrast"))
OFF |= dict.fromkeys(("flip_prob", "rotation", "brightness", "blur_prob"), 0)
both_dims = pytest.mark.parametrize("shape", [(24, 18), (16, 12, 10)], ids=["2d", "3d"])


def only(spatial_dims: int = 2, **switches: Any) -> BatchAugment:
    return BatchAugment(spatial_dims, **{**OFF, **switches})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(shape: tuple[int, ...], batch: int = 4, channels: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, channels, *shape), dtype=torch.uint8, generator=generator())


def coordinates(shape: tuple[int, ...], batch: int = 16) -> Tensor:
    """Images whose channel k holds the position along axis k, 0 to 1 from edge to edge."""
    axes = [(torch.arange(length) + 0.5) / length for length in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(batch, *[-1] * (len(shape) + 1))


def jacobians(views: Tensor) -> Tensor:
    """Derivative of every channel of coordinate images along every axis at the centre, as matrices (B, C, axes)."""
    center = [length // 2 for length in views.shape[2:]]
    columns = []
    for axis in range(len(center)):
        ahead = [position + (axis == other) for other, position in enumerate(center)]
        columns.append(views[(slice(None), slice(None), *ahead)] - views[(slice(None), slice(None), *center)])
    return torch.stack(columns, 2)


@both_dims
@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_the_given_size_and_range(shape: tuple[int, ...], channels: int) -> None:
    views = BatchAugment(len(shape), image_size=9)(random_images(shape, channels=channels), generator())
    assert views.shape == (4, channels, *[9] * len(shape))
    assert views.dtype == torch.float32
    assert 0 <= views.min() < views.max() <= 1
    assert views.is_contiguous(memory_format=torch.channels_last if len(shape) == 2 else torch.channels_last_3d)


@both_dims
def test_everything_off_gives_the_images_at_their_size_or_another(shape: tuple[int, ...]) -> None:
    images = random_images(shape)
    torch.testing.assert_close(only(len(shape))(images), images / 255)
    resized = F.interpolate(images / 255, size=[15] * len(shape), mode="bilinear" if len(shape) == 2 else "trilinear")
    torch.testing.assert_close(only(len(shape), image_size=15)(images), resized, atol=1e-5, rtol=0)


@both_dims
def test_crop_lies_in_the_image_and_has_the_drawn_area(shape: tuple[int, ...]) -> None:
    images = coordinates(shape)
    views = only(len(shape), crop_scale=(0.3, 0.6), crop_ratio=(0.5, 2))(images, generator())
    matrix = jacobians(views)
    side = matrix.diagonal(dim1=1, dim2=2) * torch.tensor(shape)
    area = side.prod(1)
    torch.testing.assert_close(matrix * torch.tensor(shape), torch.diag_embed(side), atol=1e-4, rtol=0)
    assert 0.3 - 1e-4 < area.min() < area.max() < 0.6 + 1e-4
    ratio = side[:, 1:] / side[:, :1]
    assert 0.5 - 1e-4 < ratio.min() < ratio.max() < 2 + 1e-4
    center = views.flatten(2).mean(2)
    assert ((center - side / 2) > -0.02).all()
    assert ((center + side / 2) < 1.02).all()


def test_longest_side_of_a_stretched_crop_stops_at_the_image() -> None:
    views = only(crop_scale=(0.8, 0.8), crop_ratio=(4, 4))(coordinates((20, 20)))
    side = jacobians(views).diagonal(dim1=1, dim2=2) * 20
    torch.testing.assert_close(side, torch.tensor([0.8, 1.0]).expand(16, 2), atol=1e-4, rtol=0)


@both_dims
def test_rotation_turns_voxels_about_the_centre(shape: tuple[int, ...]) -> None:
    views = only(len(shape), rotation=20)(coordinates(shape), generator())
    sizes = torch.tensor(shape, dtype=torch.float32)
    matrix = jacobians(views) * sizes[:, None]  # from parts of a side to voxels
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(len(shape)).expand_as(matrix), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(16), atol=1e-3, rtol=0)
    planes = len(shape) * (len(shape) - 1) // 2
    largest = math.cos(math.radians(20)) ** planes
    assert matrix.diagonal(dim1=1, dim2=2).min() > largest - 0.1
    assert matrix[:, 0, 1].abs().max() < 0.4
    assert matrix[:, 0, 1].std() > 0.05
    even = torch.full((8, 1, *shape), 0.7)  # what comes in from outside repeats the border
    torch.testing.assert_close(only(len(shape), rotation=45)(even), even)


@both_dims
@pytest.mark.parametrize("rotation", [0.0, 25.0])
def test_a_placement_says_where_each_voxel_of_a_view_comes_from(shape: tuple[int, ...], rotation: float) -> None:
    images = coordinates(shape, batch=5)
    augment = only(len(shape), image_size=5, crop_scale=(0.5, 1), flip_prob=0.5, rotation=rotation)
    views, placement = augment.placed(images, generator())
    cells = 2 * coordinates(tuple(views.shape[2:]), batch=5).flatten(2).mT - 1
    expected = cells @ placement.matrix.mT + placement.center[:, None]
    found = 2 * views.flatten(2).mT - 1
    inside = (expected.abs() < 1 - 1 / min(shape)).all(-1)  # border voxels are left out
    assert inside.float().mean() > 0.4
    torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-4)
    whole = only(len(shape)).placed(images).placement
    assert torch.equal(whole.matrix, torch.eye(len(shape)).expand(5, -1, -1))
    assert not whole.center.any()


@both_dims
def test_flips_are_along_the_first_axis_alone_of_about_the_given_part(shape: tuple[int, ...]) -> None:
    images = random_images(shape)
    torch.testing.assert_close(only(len(shape), flip_prob=1)(images), images.flip(2) / 255, atol=1e-5, rtol=0)
    some = only(flip_prob=0.25)(coordinates((4, 4), batch=1000), generator())
    assert 0.2 < (jacobians(some)[:, 0, 0] < 0).float().mean() < 0.3


@both_dims
def test_blur_equals_scipy(shape: tuple[int, ...]) -> None:
    images = random_images(shape) / 255
    blurred = only(len(shape), blur_prob=1, blur_sigma=(1.4, 1.4))(images)
    axes = tuple(range(2, images.ndim))
    reference = torch.from_numpy(gaussian_filter(images.numpy(), 1.4, mode="nearest", radius=5, axes=axes))
    torch.testing.assert_close(blurred, reference, atol=1e-5, rtol=0)


def test_every_blur_has_a_sigma_of_its_own() -> None:
    impulses = F.pad(torch.ones(32, 1, 1, 1), [10] * 4)
    blurred = only(blur_prob=1, blur_sigma=(0.6, 1.5))(impulses, generator())
    sigma = (blurred.sum((1, 2)) @ torch.arange(-10.0, 11) ** 2).sqrt()
    assert 0.55 < sigma.min() < sigma.max() < 1.5
    assert sigma.std() > 0.1


def test_blur_leaves_the_images_that_are_not_drawn_exactly() -> None:
    images = random_images((16, 16), batch=400)
    kept = (only(blur_prob=0.7, blur_sigma=(1, 1))(images, generator()) == only()(images)).flatten(1).all(1)
    assert 0.2 < kept.float().mean() < 0.4
    assert torch.equal(only(blur_prob=1e-6)(images, generator()), only()(images))
    # On a GPU these go through the convolution with a sigma that must change nothing.
    assert torch.equal(_gaussian_blur(images.float(), torch.full((400,), 0.01), largest=1.5), images.float())


@both_dims
@pytest.mark.parametrize("factor", [0.5, 1.4])
def test_intensity_equals_its_formula(shape: tuple[int, ...], factor: float) -> None:
    images = random_images(shape) / 255
    torch.testing.assert_close(only(len(shape), gamma=(factor, factor))(images), images**factor)
    mean = images.flatten(1).mean(1).view(-1, *[1] * (images.ndim - 1))
    stretched = (mean + factor * (images - mean)).clamp(0, 1)
    torch.testing.assert_close(only(len(shape), contrast=(factor, factor))(images), stretched)


def test_brightness_shifts_every_image_by_its_own_amount() -> None:
    images = 0.4 + 0.2 * random_images((6, 6), batch=200) / 255
    shift = (only(brightness=0.3)(images, generator()) - images).flatten(1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))
    assert -0.3 <= shift.min() < -0.28
    assert 0.28 < shift.max() <= 0.3


def test_input_is_left_as_it_was_and_clipped() -> None:
    images = (torch.rand(4, 1, 8, 8) * 3 - 1).requires_grad_()
    before = images.detach().clone()
    views = BatchAugment(crop_scale=None, flip_prob=0, rotation=0)(images)
    assert views.isfinite().all()
    assert not views.requires_grad
    assert torch.equal(images, before)
    assert torch.equal(only()(images), images.clamp(0, 1))


@both_dims
def test_views_follow_from_the_generator_for_bytes_and_floats_alike(shape: tuple[int, ...]) -> None:
    images = random_images(shape)
    augment = BatchAugment(len(shape))
    first = augment(images, generator(1))
    assert torch.equal(first, augment(images, generator(1)))
    assert not torch.allclose(first, augment(images, generator(2)), atol=1e-2)
    torch.testing.assert_close(first, augment(images / 255, generator(1)))


@pytest.mark.parametrize(
    ("switch", "value"),
    [("crop_scale", (0.5, 1)), ("rotation", 10), ("gamma", (0.5, 2)), ("contrast", (0.5, 1.5)), ("blur_prob", 1)],
)
def test_every_image_has_a_draw_of_its_own(switch: str, value: Any) -> None:
    images = random_images((16, 16), batch=1).expand(3, -1, -1, -1)
    views = only(**{switch: value})(images, generator())
    assert not torch.allclose(views[0], views[1], atol=1e-3)
    assert not torch.allclose(views[0], views[2], atol=1e-3)


@both_dims
def test_whole_blocks_are_masked_in_all_channels(shape: tuple[int, ...]) -> None:
    images = torch.ones(50, 2, *shape)
    corrupted, masked = mask_blocks(images, 0.4, 5, generator())
    assert masked.shape == (50, 1, *shape)
    assert torch.equal(corrupted == 0, masked.expand_as(images))
    assert 0.3 < masked.float().mean() < 0.5
    assert len(masked.flatten(1).unique(dim=0)) == 50
    block = masked[(slice(None), 0, *[slice(0, 5)] * len(shape))].flatten(1)
    assert torch.equal(block.all(1), block.any(1))
    assert (images == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_scale": (0.5, 1.1)}, r"`crop_scale` must be two increasing numbers in \(0, 1\], got \(0.5, 1.1\)"),
        ({"crop_ratio": (2, 1)}, r"`crop_ratio` must be two increasing numbers in \(0, inf\], got \(2, 1\)"),
        *(({"crop_ratio": each}, r"`crop_ratio` must be two increasing numbers in \(0, inf\]") for each in ("12", 0.5)),
        ({"flip_prob": 2}, r"`flip_prob` must be a number in \[0, 1\], got 2"),
        ({"rotation": "lots"}, r"`rotation` must be a number in \[0, 180\], got 'lots'"),
        ({"gamma": (0, 1)}, r"`gamma` must be two increasing numbers"),
        ({"brightness": 2}, r"`brightness` must be a number in \[0, 1\]"),
    ],
)
def test_rejects_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchAugment(**arguments)


@pytest.mark.parametrize(
    ("spatial_dims", "images", "message"),
    [
        (2, torch.zeros(1, 8, 8), r"shape \(B, C, X, Y\), got \(1, 8, 8\)"),
        (3, torch.zeros(1, 1, 8, 8), r"shape \(B, C, X, Y, Z\), got \(1, 1, 8, 8\)"),
        (2, torch.zeros(1, 1, 8, 8, dtype=torch.int16), r"uint8 in .* or floating in .*, got torch.int16"),
    ],
)
def test_rejects_bad_images(spatial_dims: int, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"`images` must .*{message}"):
        BatchAugment(spatial_dims)(images)
