"""Volumes of any modality and resolution in one range of intensities and one spacing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, ScaleIntensityRange
from monai.utils import convert_to_dst_type

from dissect_monai.common import InputError

# Part of the range from the darkest voxel to the `upper` percentile up to which a voxel is air, noise included.
_AIR = 0.05
_MAX_SAMPLE = 2**20  # voxels from which percentiles are estimated


class NormalizeModalityd(MapTransform):
    """Scales every volume to [0, b_max] as its modality asks: CT by a fixed window, all others by percentiles.

    Values of CT are quantities (HU), which a window keeps comparable between volumes; those of MR and others have no
    unit, so each volume is scaled from the `lower` to the `upper` percentile of its voxels that are not air. Air, up to
    5 % of the way from the darkest voxel to the `upper` percentile of all, thereby becomes 0. Everything is clipped.

    Args:
        keys: keys of the images; tensors of any shape.
        a_min: lower end of the CT window in HU.
        a_max: upper end of the CT window in HU.
        lower: percentile in [0, 100) that becomes 0.
        upper: percentile that becomes `b_max`, over `lower` and at most 100.
        b_max: upper end of the result, 255 for a cache in uint8.
        modality_key: key of the item's modality: what begins with CT, in either case, is CT. A missing one is not. A
            list scales every channel by its own.
        modality: of items that say none.
        allow_missing_keys: whether an item without a key of `keys` is left alone.

    Raises:
        ValueError: if an argument is outside its range, a volume has but one value after scaling, or another number
            of channels (of those with shape (C, X, Y, Z)) than modalities.
    """

    def __init__(
        self,
        keys: KeysCollection,
        a_min: float = -125.0,
        a_max: float = 275.0,
        lower: float = 0.5,
        upper: float = 99.5,
        b_max: float = 1.0,
        modality_key: str = "modality",
        modality: str | Sequence[str] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not a_min < a_max:
            raise InputError(f"`a_min` must be below `a_max`, got {a_min} and {a_max}.")
        if not 0 <= lower < upper <= 100:
            raise InputError(f"`lower` and `upper` must be increasing percentages, got {lower} and {upper}.")
        if b_max <= 0:
            raise InputError(f"`b_max` must be over 0, got {b_max}.")
        self.window = (a_min, a_max)
        self.percentiles = (lower, upper)
        self.b_max = b_max
        self.modality_key, self.modality = modality_key, modality

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the images of an item."""
        item = dict(data)
        for key in self.key_iterator(item):
            image, modality = item[key], item.get(self.modality_key, self.modality)
            names = modality if isinstance(modality, (list, tuple)) else [modality]
            if image.ndim == 4 and len(names) != len(image):
                raise InputError(
                    f"a volume must have a channel for each of the modalities {', '.join(map(str, names))}, "
                    f"got {len(image)}: correct `{self.modality_key}` in dataset.json."
                )
            if isinstance(modality, (list, tuple)):
                channels = [self._scaled(channel, name) for channel, name in zip(image, modality, strict=True)]
                item[key] = convert_to_dst_type(torch.stack(channels), image, dtype=channels[0].dtype)[0]
            else:
                item[key] = self._scaled(image, modality)
        return item

    def _scaled(self, image: torch.Tensor, modality: object) -> torch.Tensor:
        low, high = self.window if is_ct(modality) else self._range(image)
        if not (low < high and low < image.max()):
            raise InputError(
                f"a volume must have values between {low:g} and {high:g} ({modality or 'unknown modality'}), "
                f"got {float(image.min()):g} to {float(image.max()):g}: correct its modality, or remove it."
            )
        return ScaleIntensityRange(low, high, 0.0, self.b_max, clip=True)(image)

    def _range(self, image: torch.Tensor) -> tuple[float, float]:
        values = sample_voxels(image)
        darkest, bright = np.percentile(values, [0, self.percentiles[1]])
        content = values[values > darkest + _AIR * (bright - darkest)]
        low, high = np.percentile(content if len(content) else values, self.percentiles)
        return float(low), float(high)


class ForegroundIndicesd(MapTransform):
    """Remembers where a volume is not air, so that patches are drawn there: for MONAI's `RandCropByPosNegLabeld`.

    MONAI's `FgBgToIndicesd` keeps eight bytes for every voxel, eight times a volume in uint8. Here a part of them,
    evenly spread over the volume, is kept: enough centres for more patches than are ever drawn of it.

    Args:
        keys: keys of the images, of shape (C, *spatial), in which air is 0, as `NormalizeModalityd` leaves it.
        max_indices: how many voxels are kept at most, at least 1.
        allow_missing_keys: whether an item without a key of `keys` is left alone.

    Raises:
        ValueError: if `max_indices` is below 1, or a volume has no voxel above 0.
    """

    def __init__(
        self,
        keys: KeysCollection,
        max_indices: int = 4096,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if max_indices < 1:
            raise InputError(f"`max_indices` must be at least 1, got {max_indices}.")
        self.max_indices = max_indices

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add `image_fg_indices` for an `image`, flat places of voxels, int64 of shape (N,), and `image_bg_indices`.

        MONAI's crop takes them only together, and without places in either it would not draw by the other: so both
        hold the same. Give it `neg` = 0.
        """
        item = dict(data)
        for key in self.key_iterator(item):
            places = np.flatnonzero(np.asarray(item[key]).max(0) > 0)
            if not len(places):
                raise InputError("a volume must have voxels above 0 after scaling, got none: correct its modality.")
            chosen = np.linspace(0, len(places) - 1, min(self.max_indices, len(places))).round().astype(int)
            item[f"{key}_fg_indices"] = item[f"{key}_bg_indices"] = places[chosen]
        return item


def is_ct(modality: object) -> bool:
    """Whether intensities are in HU, to go by the name of the modality: CT, CTA, ct, ...; not CBCT."""
    return str(modality).strip().upper().startswith("CT")


def sample_voxels(image: torch.Tensor | np.ndarray) -> np.ndarray:
    """At most about a million of the voxels, evenly spaced, as a flat array: enough for percentiles, and quick."""
    values = np.asarray(image).ravel()
    # An odd step does not meet the same columns of every row.
    return values[:: values.size // _MAX_SAMPLE | 1]
