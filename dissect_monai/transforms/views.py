"""Batches of augmented views: what a trainer's `prepare_batch` makes of the images of a loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.engines.utils import PrepareBatch
from torch import Tensor

from dissect_monai.common import InputError, rank
from dissect_monai.transforms.augment import Augmented, BatchAugment, Placement, mask_blocks

Device = str | torch.device | None


def prepare_images(
    batchdata: Mapping[str, Any], device: Device = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """`prepare_batch` of images that are cached as uint8: move them first, scale them to [0, 1] there.

    An "image" of floats is left as it is; `kwargs` go to `Tensor.to`. The "label" comes with it, or None.
    """
    image = torch.as_tensor(batchdata["image"]).to(device, non_blocking=non_blocking, **kwargs)
    label = batchdata.get("label")
    if label is not None:
        label = torch.as_tensor(label).to(device, non_blocking=non_blocking)
    return (image.float() / 255 if image.dtype == torch.uint8 else image), label


class ViewBatch(NamedTuple):
    """What `Views` returns: the first views of all images, then their second views, and so on."""

    images: Tensor  # (num_views * B, C, *spatial), the network's input
    target: Any  # the same, which a decoder reconstructs; or labels; or a `HierarchyTarget`


class Views(PrepareBatch):
    """Makes the views of a batch on the device: the `prepare_batch` of a trainer.

    Args:
        augment: makes one view of each image.
        seed: seed of all draws; every process draws its own.
        num_views: views per image.
        target_key: key of the target in the batch, such as "label"; None takes the views themselves.
    """

    def __init__(self, augment: BatchAugment, seed: int = 0, num_views: int = 2, target_key: str | None = None) -> None:
        self.augment = augment
        self.seed = seed
        self.num_views = num_views
        self.target_key = target_key
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Restart the draws: they depend on seed, process and epoch alone, so that a resumed run repeats them."""
        self._epoch_seed = int(np.random.SeedSequence([self.seed, rank(), epoch]).generate_state(1)[0])
        self._generator: torch.Generator | None = None

    def __call__(
        self, batchdata: Mapping[str, Any], device: Device = None, non_blocking: bool = False, **kwargs: Any
    ) -> ViewBatch:
        """Views of the "image" of `batchdata`, shape (B, C, *spatial); `kwargs` go to `Tensor.to`."""
        views = self._augmented(batchdata["image"], device=device, non_blocking=non_blocking, **kwargs).images
        if self.target_key is None:
            return ViewBatch(views, views)
        return ViewBatch(views, batchdata[self.target_key].to(device=device, non_blocking=non_blocking))

    def _augmented(self, images: Tensor, **kwargs: Any) -> Augmented:
        # A MetaTensor would follow every operation with its own bookkeeping.
        images = images.as_subclass(Tensor).to(**kwargs)
        if self._generator is None or self._generator.device != images.device:
            self._generator = torch.Generator(images.device).manual_seed(self._epoch_seed)
        views = [self.augment.placed(images, self._generator) for _ in range(self.num_views)]
        matrix, center = (torch.cat(parts) for parts in zip(*(view.placement for view in views), strict=True))
        return Augmented(torch.cat([view.images for view in views]), Placement(matrix, center))


class HierarchyTarget(NamedTuple):
    """What `HSSLLoss` compares the network's output with, for V views of each of B images."""

    views: Tensor  # (V·B, C, *spatial) in [0, 1], before corruption: what the decoder reconstructs
    masked: Tensor | None  # (V·B, 1, *spatial), True where the network sees nothing; None without corruption
    task: Tensor  # (B,), int64, place in `tasks`
    group: Tensor  # (B,), int64, place in `groups`
    place: Tensor | None = None  # (B,), in [0, 1] across the slices of the volume, NaN without a place
    placement: Placement | None = None  # of the V·B views in their images, which the dense contrast needs


class HierarchyViews(Views):
    """`Views` of images from several data sets, with a `HierarchyTarget`, as `HSSLLoss` needs it.

    Args:
        augment: makes one view of each image.
        tasks: all names that `task` of an image may have; their order numbers them.
        groups: all names that `group` of an image may have.
        mask_fraction: part of the network's input that is masked, see `mask_blocks`; 0 leaves it as it is.
        mask_size: side of a masked block in pixels.
        kwargs: `seed` and `num_views` of `Views`.
    """

    def __init__(
        self,
        augment: BatchAugment,
        tasks: Sequence[str],
        groups: Sequence[str],
        mask_fraction: float = 0.0,
        mask_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(augment, **kwargs)
        if not 0 <= mask_fraction <= 1 or mask_size < 1:
            raise InputError(
                f"`mask_fraction` must be in [0, 1] and `mask_size` at least 1, got {mask_fraction} and {mask_size}."
            )
        self.mask_fraction, self.mask_size = mask_fraction, mask_size
        self.numbers = {
            key: {name: number for number, name in enumerate(names)}
            for key, names in (("task", tasks), ("group", groups))
        }

    def __call__(
        self, batchdata: Mapping[str, Any], device: Device = None, non_blocking: bool = False, **kwargs: Any
    ) -> ViewBatch:
        """Views of the "image" of `batchdata`, (B, C, *spatial), its `task` and `group` as numbers, and its `place`."""
        views, placement = self._augmented(batchdata["image"], device=device, non_blocking=non_blocking, **kwargs)
        images = views
        masked: Tensor | None = None
        if self.mask_fraction:
            images, masked = mask_blocks(views, self.mask_fraction, self.mask_size, self._generator)
        task, group = (
            torch.tensor([numbers[name] for name in batchdata[key]]).to(device, non_blocking=non_blocking)
            for key, numbers in self.numbers.items()
        )
        place = batchdata.get("place")
        if place is not None:
            place = place.to(device, non_blocking=non_blocking)
        return ViewBatch(images, HierarchyTarget(views, masked, task, group, place, placement))
