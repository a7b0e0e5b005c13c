"""A fixed set of patches of volumes, and which structures lie in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from torch import Tensor

from dissect_monai.common import Item
from dissect_monai.data.datasets import flattened, read_all

LABEL_MAP = "label_map"  # key of the path of a label map, which `transform` makes the map
# Part of the voxels of a patch, or of those of the structure itself, from which on a structure counts as shown.
_PART_OF_PATCH = 1e-3
_PART_OF_STRUCTURE = 0.5


def patch_dataset(
    data: list[Item],
    transform: Callable[..., Any],
    on_corrupt: str = "raise",
    num_workers: int = 0,
    seed: int = 0,
) -> Dataset:
    """A fixed set of patches: every volume is read once, now, and nothing but its patches is kept.

    What is drawn of a volume follows from `seed` and its place in `data`. `transform` finds the path of a label map
    under "label_map" instead of "label", and the patches get `structures`, {name: 1, 0 or NaN (unknown)} for the names
    in `labels` of the item. A patch shows a structure (1) if it fills 0.1 % of the patch or half of it lies there, and
    does not (0) if none of it does; anything between is unknown. So is a structure that the whole volume lacks, as it
    may be there without having been annotated, or that a patch with values that are `ignored` by the item lacks.

    Args:
        data: items of a data list, as `aggregate` gives them.
        transform: MONAI transforms whose random ones come last and cut "image" and "label_map" into patches, such as
            `RandCropByPosNegLabeld` with `num_samples`.
        on_corrupt: as in `cached_dataset`.
        num_workers: threads that read; at least one.
        seed: draws other patches.

    Returns:
        A data set of {"image", "task", "group"}, the last two being names; its `.data` has the item of the volume for
        each patch, with `structures` if there is a label map.

    Raises:
        ValueError: as `cached_dataset`.
    """
    volumes = _Volumes(data, transform, seed)
    contents, items = read_all(volumes, on_corrupt, num_workers) if data else ([], [])
    patches = [(item, patch) for item, of_volume in zip(items, contents, strict=True) for patch in of_volume]
    data = [{**item, **{key: patch[key] for key in patch if key != "image"}} for item, patch in patches]
    return _PatchDataset(data, [patch["image"] for _, patch in patches])


class _PatchDataset(Dataset):
    def __init__(self, data: list[Item], images: list[Tensor]) -> None:
        super().__init__(data)
        self.images = images

    def _transform(self, index: int) -> dict[str, Any]:
        names = {key: self.data[index][key] for key in ("task", "group") if key in self.data[index]}
        return {"image": self.images[index], **names}


class _Volumes(Dataset):
    """The patches of every volume."""

    def __init__(self, data: list[Item], transform: Callable[..., Any], seed: int) -> None:
        super().__init__(data)
        self.steps, self.num_deterministic = flattened(transform)
        self.seed = seed

    def _transform(self, index: int) -> list[dict[str, Any]]:
        item = dict(self.data[index])
        if isinstance(item.get("label"), str):
            item[LABEL_MAP] = item.pop("label")
        volume = self.steps(item, end=self.num_deterministic)
        # A copy, as threads share the transforms; what it draws follows from the seed and the index.
        seeds = np.random.SeedSequence([self.seed, index]).generate_state(1)
        steps = deepcopy(self.steps).set_random_state(int(seeds[0]))
        drawn = steps(volume, start=self.num_deterministic)
        drawn = drawn if isinstance(drawn, list) else [drawn]
        has_names = LABEL_MAP in item and isinstance(item.get("labels"), Mapping)
        sizes = _voxels(volume[LABEL_MAP], item["labels"]) if has_names else {}
        patches = []
        for source in drawn:
            # A copy, so that a patch does not keep its volume in memory.
            image = torch.as_tensor(source["image"]).as_subclass(Tensor).clone(memory_format=torch.contiguous_format)
            shown = {"structures": _shown(source[LABEL_MAP], sizes, item)} if has_names else {}
            patches.append({"image": image, **shown})
        return patches


def _shown(label_map: Tensor, sizes: Mapping[str, int], item: Item) -> dict[str, float]:
    shown = {}
    in_part = _voxels(label_map, {"": item.get("ignored", [])})[""] > 0  # annotated in a part only
    for name, count in _voxels(label_map, item["labels"]).items():
        size = sizes[name]
        enough = count >= min(_PART_OF_PATCH * label_map[0].numel(), _PART_OF_STRUCTURE * size)
        unknown = not size or (count > 0 and not enough) or (in_part and not count)
        shown[name] = float("nan") if unknown else float(count > 0)
    return shown


def _voxels(label_map: Tensor, labels: Mapping[str, list[int]]) -> dict[str, int]:
    """Voxels of each named structure."""
    counts = torch.bincount(label_map.as_subclass(Tensor).flatten().clamp_min(0).long()).tolist()
    return {name: sum(counts[value] for value in values if value < len(counts)) for name, values in labels.items()}
