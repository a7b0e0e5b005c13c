"""Batched, on-device augmentation for self-supervised learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple
from torch import Tensor, nn

from dissect_monai.common import InputError

_Range = tuple[float, float]
_OFF = (1.0, 1.0)  # the range of a factor that changes nothing
_MEMORY_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}


class Placement(NamedTuple):
    """Where views lie in their images: position in the image = matrix · position in the view + center.

    Positions run from −1 to 1 along every axis, from the outer side of the first voxel to that of the last.
    """

    matrix: Tensor  # (B, spatial_dims, spatial_dims)
    center: Tensor  # (B, spatial_dims)


class Augmented(NamedTuple):
    """What `BatchAugment.placed` returns."""

    images: Tensor  # float32 in [0, 1], shape (B, C, *image_size), channels last in memory
    placement: Placement


class BatchAugment(nn.Module):
    """Random crop, flip, rotation, blur and intensity of a batch, each image with its own draw.

    Crop, resize, flip and rotation are one `grid_sample`; nothing waits for the device. A switch at 0, None or (1, 1)
    costs nothing. The crop lies inside the image; what a rotation brings in from outside repeats the border.

    Args:
        spatial_dims: 2 or 3.
        image_size: sides of the views; None keeps the size of the images.
        crop_scale: range of the cropped part of the image's area (volume), in (0, 1].
        crop_ratio: range of the stretch: the cropped part of every further axis over that of the first axis.
        flip_prob: probability of a flip along the first axis, which is left-right in images that MONAI reads: 2-D ones
            are (x, y), volumes (x, y, z). Set it to 0 where the side matters.
        rotation: largest angle in degrees, in the plane of every two axes; voxels are taken as isotropic.
        gamma: range of the exponent.
        brightness: largest shift of the intensities, up or down.
        contrast: range of the factor on the distance from the mean of the view.
        blur_sigma: range of the standard deviation of the Gaussian blur, in pixels of the view.
        blur_prob: probability of a blur.

    Raises:
        ValueError: if an argument is outside its range, or images have the wrong shape or dtype.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        image_size: int | None = None,
        crop_scale: Sequence[float] | None = (0.5, 1.0),
        crop_ratio: Sequence[float] | None = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        rotation: float = 10.0,
        gamma: Sequence[float] | None = (0.7, 1.5),
        brightness: float = 0.1,
        contrast: Sequence[float] | None = (0.7, 1.3),
        blur_sigma: Sequence[float] = (0.1, 1.5),
        blur_prob: float = 0.5,
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.image_size = None if image_size is None else (image_size,) * spatial_dims
        self.crop_scale = _checked_range("crop_scale", crop_scale, highest=1)
        self.crop_ratio = _checked_range("crop_ratio", crop_ratio)
        self.flip_prob = _checked("flip_prob", flip_prob, highest=1)
        self.rotation = _checked("rotation", rotation, highest=180)
        self.gamma = _checked_range("gamma", gamma)
        self.brightness = _checked("brightness", brightness, highest=1)
        self.contrast = _checked_range("contrast", contrast)
        self.blur_sigma = _checked_range("blur_sigma", blur_sigma)
        self.blur_prob = _checked("blur_prob", blur_prob, highest=1)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment every image once: (B, C, *spatial) → (B, C, *image_size), float32 in [0, 1], channels last.

        Images are uint8 in [0, 255] or floating in [0, 1]; values outside are clipped. The generator of the draws is on
        their device; None takes the default one.
        """
        return self.placed(images, generator).images

    @torch.no_grad()
    def placed(self, images: Tensor, generator: torch.Generator | None = None) -> Augmented:
        """The same, and where each view lies in its image."""
        if images.ndim != self.spatial_dims + 2:
            axes = ", ".join("BCXYZ"[: self.spatial_dims + 2])
            raise InputError(f"`images` must have shape ({axes}), got {tuple(images.shape)}.")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise InputError(f"`images` must be uint8 in [0, 255] or floating in [0, 1], got {images.dtype}.")
        draw = _Draw(len(images), images.device, generator)
        images = images.float().mul_(1 / 255) if images.dtype == torch.uint8 else images.float().clamp(0, 1)
        images, placement = self._resample(images, draw)
        images = self._adjust(self._blur(images, draw), draw)
        return Augmented(images.contiguous(memory_format=_MEMORY_FORMAT[self.spatial_dims]), placement)

    def _resample(self, images: Tensor, draw: _Draw) -> Augmented:
        shape = tuple(images.shape[2:])
        size = self.image_size or shape
        if self.crop_scale == _OFF and not (self.flip_prob or self.rotation) and size == shape:
            same = torch.eye(self.spatial_dims, device=images.device).expand(len(images), -1, -1)
            return Augmented(images, Placement(same, same.new_zeros(len(images), self.spatial_dims)))
        side, center = draw.boxes(self.crop_scale, self.crop_ratio, self.spatial_dims)
        probabilities = [self.flip_prob] + [0.0] * (self.spatial_dims - 1)
        flip = torch.stack([torch.where(draw.happens(each), -1.0, 1.0) for each in probabilities], 1)
        matrix = torch.diag_embed(side * flip)
        if self.rotation:
            matrix = draw.rotations(self.rotation, shape) @ matrix
        # Coordinates as planes (the last axis first, as grid_sample wants them) are quicker to write than interleaved
        # ones, and only the last of these broadcast sums has the full size.
        grid = _expand(center.flip(1), self.spatial_dims)
        for axis, position in enumerate(_positions(size, images.device)):
            grid = grid + _expand(matrix[:, :, axis].flip(1), self.spatial_dims) * position
        views = F.grid_sample(images, grid.movedim(1, -1), padding_mode="border", align_corners=False)
        return Augmented(views, Placement(matrix, center))

    def _blur(self, images: Tensor, draw: _Draw) -> Tensor:
        if not self.blur_prob:
            return images
        sigma, drawn = draw.uniform(*self.blur_sigma), draw.happens(self.blur_prob)
        if images.device.type == "cpu":
            if drawn.any():
                images[drawn] = _gaussian_blur(images[drawn], sigma[drawn], self.blur_sigma[1])
            return images
        # To select the drawn images would wait for the device; so small a sigma leaves the others exactly as they are.
        return _gaussian_blur(images, torch.where(drawn, sigma, 0.01), self.blur_sigma[1])

    def _adjust(self, images: Tensor, draw: _Draw) -> Tensor:
        def per_image(low: float, high: float) -> Tensor:
            return _expand(draw.uniform(low, high), self.spatial_dims + 1)

        if self.gamma != _OFF:
            images.log2_().mul_(per_image(*self.gamma)).exp2_()  # twice as fast as pow
        if self.contrast != _OFF:
            factor = per_image(*self.contrast)
            offset = (1 - factor) * images.mean(tuple(range(1, images.ndim)), keepdim=True)
            images.mul_(factor).add_(offset)
        if self.brightness:
            images.add_(per_image(-self.brightness, self.brightness))
        return images.clamp_(0, 1)


@torch.no_grad()
def mask_blocks(
    images: Tensor, fraction: float, size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Images (B, C, *spatial) without random blocks, and what they lost: True in (B, 1, *spatial).

    They are the input of a reconstruction, whose target are the images before. Blocks have sides of `size` pixels, of
    which a part `fraction` is expected to be set to 0 in all channels.
    """
    blocks = [math.ceil(length / size) for length in images.shape[2:]]
    mask = torch.rand(len(images), 1, *blocks, device=images.device, generator=generator) < fraction
    for axis, length in enumerate(images.shape[2:], start=2):
        mask = mask.repeat_interleave(size, axis).narrow(axis, 0, length)
    return images.masked_fill(mask, 0), mask


class _Draw(NamedTuple):
    """Draws for the images of one batch."""

    batch: int
    device: torch.device
    generator: torch.Generator | None

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(self.batch, *shape, device=self.device).uniform_(low, high, generator=self.generator)

    def happens(self, prob: float) -> Tensor:
        return self.uniform(0, 1) < prob

    def boxes(self, scale: _Range, ratio: _Range, spatial_dims: int) -> tuple[Tensor, Tensor]:
        """Sides, as parts of the image's, and centres in [-1, 1] of boxes that lie inside; both (B, spatial_dims)."""
        mean = self.uniform(*scale, 1).log() / spatial_dims
        stretch = F.pad(self.uniform(math.log(ratio[0]), math.log(ratio[1]), spatial_dims - 1), (1, 0))
        stretch = stretch - stretch.mean(1, keepdim=True)
        # Less stretch where the longest side would exceed the image, so that the area is kept.
        stretch = stretch * (-mean / stretch.amax(1, keepdim=True).clamp_min(1e-6)).clamp_max(1)
        side = (mean + stretch).exp()
        return side, self.uniform(-1, 1, spatial_dims) * (1 - side)

    def rotations(self, degrees: float, shape: Sequence[int]) -> Tensor:
        """Rotations of the voxels as matrices (B, d, d) between coordinates in [-1, 1] along the axes of `shape`."""
        matrix = torch.eye(len(shape), device=self.device)
        for i, j in combinations(range(len(shape)), 2):
            angle = self.uniform(-math.radians(degrees), math.radians(degrees))
            plane = torch.eye(len(shape), device=self.device).repeat(self.batch, 1, 1)
            plane[:, i, i] = plane[:, j, j] = angle.cos()
            plane[:, i, j] = angle.sin() * (-shape[j] / shape[i])
            plane[:, j, i] = angle.sin() * (shape[i] / shape[j])
            matrix = matrix @ plane
        return matrix


def _gaussian_blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Blur every image (B, C, *spatial) with its own sigma (B,), cut off at three times the `largest` one."""
    radius = math.ceil(3 * largest)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    # Weights that are next to nothing are set to 0: products with subnormal numbers are ten times slower.
    kernels = F.threshold(torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2), 1e-8, 0)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    # Every channel of every image is one group of a depthwise convolution.
    spatial_dims = images.ndim - 2
    channels = images.reshape(1, -1, *images.shape[2:])
    channels = F.pad(channels, [radius] * (2 * spatial_dims), mode="replicate")
    convolve = F.conv2d if spatial_dims == 2 else F.conv3d
    for axis in range(spatial_dims):
        shape = [len(kernels), 1, *[1] * spatial_dims]
        shape[2 + axis] = -1
        channels = convolve(channels, kernels.view(shape), groups=len(kernels))
    return channels.view_as(images)


def _positions(size: Sequence[int], device: torch.device) -> list[Tensor]:
    """Centres of the pixels along every axis, the image being [-1, 1]; each broadcasts over (B, C, *size)."""
    positions = [(2 * torch.arange(length, device=device) + 1) / length - 1 for length in size]
    return [position.view(-1, *[1] * (len(size) - 1 - axis)) for axis, position in enumerate(positions)]


def _expand(values: Tensor, trailing: int) -> Tensor:
    return values.view(*values.shape, *[1] * trailing)


def _checked(name: str, value: float, highest: float = math.inf) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= highest:
        raise InputError(f"`{name}` must be a number in [0, {highest}], got {value!r}.")
    return value


def _checked_range(name: str, values: Sequence[float] | None, highest: float = math.inf) -> _Range:
    given = _OFF if values is None else ensure_tuple(values)
    numbers = [value for value in given if isinstance(value, (int, float))]
    if len(given) != 2 or len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] <= highest:
        raise InputError(f"`{name}` must be two increasing numbers in (0, {highest}], got {values!r}.")
    return numbers[0], numbers[1]
