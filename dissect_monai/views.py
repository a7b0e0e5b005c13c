"""Views of a batch from several data sets, with the task and the group of every image beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dissect_monai.augment import BatchAugment, Corrupt, Placement, TwoViews


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


class HierarchyViews(TwoViews):
    """`TwoViews` of images from several data sets: the `prepare_batch` of a trainer with `HSSLLoss`.

    Args:
        augment: makes one view of each image.
        tasks: all names that `task` of an image may have; their order numbers them.
        groups: all names that `group` of an image may have.
        seed: see `TwoViews`, as for the arguments below.
        rank: rank of this process.
        num_views: views per image.
        key: key of the images in the batch.
        corrupt: applied to the network's input alone.

    Raises:
        ValueError: as `TwoViews`, or if names repeat or are none, or an image has no `task` or `group` of that name.
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
            raise ValueError(f"every image must have a `{key}`, got {list(batchdata)}: name it in its dataset.json.")
        unknown = [name for name in batchdata[key] if name not in numbers]
        if unknown:
            raise ValueError(f"`{key}` of an image must be one of {', '.join(numbers)}, got {unknown[0]!r}.")
        return [numbers[name] for name in batchdata[key]]


def _numbered(argument: str, names: Sequence[str]) -> dict[str, int]:
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"`{argument}` must be different names, at least one, got {names!r}.")
    return {name: number for number, name in enumerate(names)}
