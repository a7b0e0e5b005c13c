"""Batches of augmented views: what a trainer's `prepare_batch` makes of the images of a loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.engines.utils import PrepareBatch
from torch import Tensor

from dissect_monai.common import InputError
from dissect_monai.transforms.augment import Augmented, BatchAugment, Corrupt, Placement


def prepare_images(
    batchdata: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Batch of a MONAI evaluator whose images are cached as uint8: move them first, scale them to [0, 1] there.

    Args:
        batchdata: with an "image" of any shape, uint8, or float, which is left as it is; and possibly a "label".
        device: where to.
        non_blocking: whether the copy may overlap.
        kwargs: for `Tensor.to`.

    Returns:
        the images as float32, and the label, or None.
    """
    image = torch.as_tensor(batchdata["image"]).to(device, non_blocking=non_blocking, **kwargs)
    label = batchdata.get("label")
    if label is not None:
        label = torch.as_tensor(label).to(device, non_blocking=non_blocking)
    return (image.float() / 255 if image.dtype == torch.uint8 else image), label


class ViewBatch(NamedTuple):
    """What `Views` returns: the first views of all images, then their second views, and so on."""

    images: Tensor  # (num_views * B, C, *spatial), the network's input
    target: Tensor  # the same before corruption: what a decoder reconstructs


class Views(PrepareBatch):
    """Make the views of a batch on the device: the `prepare_batch` of a trainer.

    Args:
        augment: makes one view of each image.
        seed: seed of all draws.
        rank: rank of this process, so that every process draws its own.
        num_views: views per image.
        key: key of the images in the batch.
        corrupt: applied to the network's input alone; None leaves input and target the same.

    Raises:
        ValueError: if `num_views` is below 1, or `seed`, `rank` or an epoch is negative.
    """

    def __init__(
        self,
        augment: BatchAugment,
        seed: int = 0,
        rank: int = 0,
        num_views: int = 2,
        key: str = "image",
        corrupt: Corrupt | None = None,
    ) -> None:
        if num_views < 1:
            raise InputError(f"`num_views` must be at least 1, got {num_views}.")
        self.augment, self.corrupt = augment, corrupt
        self.seed, self.rank = seed, rank
        self.num_views = num_views
        self.key = key
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Restart the draws: they depend on seed, rank and epoch alone, so that a resumed run repeats them."""
        if min(self.seed, self.rank, epoch) < 0:
            raise InputError(f"`seed`, `rank`, `epoch` must not be negative, got {self.seed}, {self.rank}, {epoch}.")
        self._epoch_seed = int(np.random.SeedSequence([self.seed, self.rank, epoch]).generate_state(1)[0])
        self._generator: torch.Generator | None = None

    def __call__(
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> ViewBatch:
        """Views of `batchdata[key]`, shape (B, C, *spatial); `kwargs` go to `Tensor.to`."""
        target = self._augmented(batchdata[self.key], device=device, non_blocking=non_blocking, **kwargs).images
        return ViewBatch(self.corrupt(target, self._generator) if self.corrupt else target, target)

    def _augmented(self, images: Tensor, **kwargs: Any) -> Augmented:
        # A MetaTensor would follow every operation with its own bookkeeping.
        images = images.as_subclass(Tensor).to(**kwargs)
        if self._generator is None or self._generator.device != images.device:
            self._generator = torch.Generator(images.device).manual_seed(self._epoch_seed)
        views = [self.augment.placed(images, self._generator) for _ in range(self.num_views)]
        matrix, center = (torch.cat(parts) for parts in zip(*(view.placement for view in views), strict=True))
        return Augmented(torch.cat([view.images for view in views]), Placement(matrix, center))


class AugmentedBatch(Views):
    """Augment the images of a batch on the device, and leave the labels: the `prepare_batch` of a classifier.

    Args:
        augment: makes the view of each image.
        seed: seed of all draws.
        rank: rank of this process, so that every process draws its own.
    """

    def __init__(self, augment: BatchAugment, seed: int = 0, rank: int = 0) -> None:
        super().__init__(augment, seed, rank, num_views=1)

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """View and label of `batchdata`; `kwargs` go to `Tensor.to`."""
        views = super().__call__(batchdata, device, non_blocking, **kwargs)
        return views.images, batchdata["label"].to(device=device, non_blocking=non_blocking)


class MaskedTarget(NamedTuple):
    """What a reconstruction is compared with."""

    views: Tensor  # (B, C, *spatial) in [0, 1], before corruption
    masked: Tensor  # (B, 1, *spatial), True where the network sees nothing


class MaskedImages(PrepareBatch):
    """Masks the images of an evaluator, the same voxels in every run: its `prepare_batch`.

    The masks are drawn on the CPU, so that they depend neither on the device nor on the size of the batches.

    Args:
        corrupt: masks the images.
        seed: draws other masks.

    Raises:
        ValueError: if `corrupt` masks nothing.
    """

    def __init__(self, corrupt: Corrupt, seed: int = 0) -> None:
        if not corrupt.mask_fraction:
            raise InputError("`mask_fraction` must be over 0, else there is nothing to reconstruct, got 0.")
        self.corrupt = corrupt
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, MaskedTarget]:
        """The masked images and what they were; "image" as for `prepare_images`, (B, C, *spatial)."""
        views, _ = prepare_images(batchdata, "cpu")
        masked = self.corrupt.mask(views, self.generator)
        images = self.corrupt(views, self.generator, masked)
        images, views, masked = (each.to(device, non_blocking=non_blocking) for each in (images, views, masked))
        return images.to(**kwargs), MaskedTarget(views, masked)


class HierarchyTarget(NamedTuple):
    """What `HSSLLoss` compares the network's output with, for V views of each of B images."""

    views: Tensor  # (V·B, C, *spatial) in [0, 1], before corruption: what the decoder reconstructs
    masked: Tensor | None  # (V·B, 1, *spatial), True where the network sees nothing; None without corruption
    task: Tensor  # (B,), int64, place in `tasks`
    group: Tensor  # (B,), int64, place in `groups`
    placement: Placement | None = None  # of the V·B views in their images, which the dense contrast needs


class HierarchyBatch(NamedTuple):
    """What `HierarchyViews` returns: the first views of all images, then their second views, and so on."""

    images: Tensor  # (V·B, C, *spatial), the network's input
    target: HierarchyTarget


class HierarchyViews(Views):
    """`Views` of images from several data sets: the `prepare_batch` of a trainer with `HSSLLoss`.

    Args:
        augment: makes one view of each image.
        tasks: all names that `task` of an image may have; their order numbers them.
        groups: all names that `group` of an image may have.
        seed: see `Views`, as for the arguments below.
        rank: rank of this process.
        num_views: views per image.
        key: key of the images in the batch.
        corrupt: applied to the network's input alone.

    Raises:
        ValueError: as `Views`, or if names repeat or are none, or an image has no `task` or `group` of that name.
    """

    def __init__(
        self,
        augment: BatchAugment,
        tasks: Sequence[str],
        groups: Sequence[str],
        seed: int = 0,
        rank: int = 0,
        num_views: int = 2,
        key: str = "image",
        corrupt: Corrupt | None = None,
    ) -> None:
        super().__init__(augment, seed, rank, num_views, key, corrupt)
        self.numbers = {"task": _numbered("tasks", tasks), "group": _numbered("groups", groups)}

    def __call__(  # type: ignore[override]
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> HierarchyBatch:
        """Views of `batchdata[key]`, shape (B, C, *spatial), and the B names in `task` and `group` as numbers."""
        augmented = self._augmented(batchdata[self.key], device=device, non_blocking=non_blocking, **kwargs)
        views = augmented.images
        images, masked = views, None
        if self.corrupt:
            masked = self.corrupt.mask(views, self._generator)
            images = self.corrupt(views, self._generator, masked)
        labels = {
            key: torch.tensor(self._numbers(batchdata, key)).to(device, non_blocking=non_blocking)
            for key in self.numbers
        }
        return HierarchyBatch(images, HierarchyTarget(views, masked, **labels, placement=augmented.placement))

    def _numbers(self, batchdata: Mapping[str, Any], key: str) -> list[int]:
        numbers = self.numbers[key]
        if key not in batchdata:
            raise InputError(f"every image must have a `{key}`, got {list(batchdata)}: name it in its dataset.json.")
        unknown = [name for name in batchdata[key] if name not in numbers]
        if unknown:
            raise InputError(f"`{key}` of an image must be one of {', '.join(numbers)}, got {unknown[0]!r}.")
        return [numbers[name] for name in batchdata[key]]


def _numbered(argument: str, names: Sequence[str]) -> dict[str, int]:
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise InputError(f"`{argument}` must be different names, at least one, got {names!r}.")
    return {name: number for number, name in enumerate(names)}
