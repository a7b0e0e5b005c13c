"""Volumes of any modality in one range of intensities, where they are not air, and patches from there."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from math import inf
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandCropByPosNegLabeld, ScaleIntensityRange
from monai.utils import ImageMetaKey, convert_to_dst_type, ensure_tuple
from numpy.typing import NDArray

from dissect_monai.common import PICTURE, InputError

logger = logging.getLogger(__name__)
_AIR = 0.05  # part of the range from the darkest voxel to the upper percentile, noise included
_MAX_SAMPLE = 2**20  # voxels from which percentiles are estimated
_PERCENTILES = (0.5, 99.5)  # that become 0 and `b_max`
_MAX_INDICES = 4096  # of a volume: enough centres for more patches than are ever drawn of it


class NormalizeModalityd(MapTransform):
    """Scales every volume to [0, b_max] as its modality asks: CT by a fixed window, all others by percentiles.

    Values of CT are quantities (HU), which a window keeps comparable between volumes; those of MR and others have no
    unit, so each volume is scaled from the 0.5 to the 99.5 percentile of its voxels that are not air. Air, up to 5 % of
    the way from the darkest voxel to the 99.5 percentile of all, thereby becomes 0. Everything is clipped.

    A CT whose values are none in HU is refused, see `refuse_other_units`. Pictures of 8 bits are scaled from 0 to 255,
    deeper ones by percentiles over all their channels, whatever their modality.

    Args:
        keys: keys of the images, of shape (C, *spatial). A `modality` of the item that begins with CT, in either case,
            is CT; a missing one is not. A list scales every channel by its own.
        a_min: lower end of the CT window in HU.
        a_max: upper end of the CT window in HU.
        b_max: upper end of the result, 255 for a cache in uint8.
        modality: of items that say none.
        in_channels: of the network. If it is 3, an image of one modality that is grey is repeated.

    Raises:
        ValueError: if a volume has but one value after scaling, or another number of channels than modalities, or a CT
            is not in HU.
    """

    def __init__(
        self,
        keys: KeysCollection,
        a_min: float = -125.0,
        a_max: float = 275.0,
        b_max: float = 1.0,
        modality: str | Sequence[str] | None = None,
        in_channels: int | None = None,
    ) -> None:
        super().__init__(keys)
        self.window = (a_min, a_max)
        self.b_max, self.modality, self.in_channels = b_max, modality, in_channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the images of an item."""
        item = dict(data)
        for key in self.key_iterator(item):
            image, modalities = item[key], ensure_tuple(item.get("modality", self.modality))
            top = getattr(image, "meta", {}).get(PICTURE)
            if top is not None and len(modalities) == 1:
                low, high = (0.0, float(top)) if top else self._range(image)
                if not low < high:  # nearly all of it is of one value
                    low, high = float(image.min()), max(float(image.max()), float(image.min()) + 1e-6)
                item[key] = ScaleIntensityRange(low, high, 0.0, self.b_max, clip=True)(image)
                continue
            if len(modalities) != len(image):
                raise InputError(
                    f"a volume must have a channel for each of the modalities {', '.join(map(str, modalities))}, "
                    f"got {len(image)}: correct `modality` in dataset.json."
                )
            where = str(getattr(image, "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ, "a volume"))
            for channel, name in zip(image, modalities, strict=True):
                if is_ct(name):
                    refuse_other_units(channel, where)
            channels = [self._scaled(channel, name) for channel, name in zip(image, modalities, strict=True)]
            channels *= 3 if self.in_channels == 3 and len(modalities) == 1 else 1
            item[key] = convert_to_dst_type(torch.stack(channels), image, dtype=channels[0].dtype)[0]
        return item

    def _scaled(self, image: torch.Tensor, modality: object) -> torch.Tensor:
        low, high = self.window if is_ct(modality) else self._range(image)
        if not (low < high and low + (high - low) / 255 < image.max() and image.min() < high):  # of 255 greys, one
            raise InputError(
                f"a volume must have values between {low:g} and {high:g} ({modality or 'unknown modality'}), "
                f"got {float(image.min()):g} to {float(image.max()):g}: correct its modality or window, or remove it."
            )
        return ScaleIntensityRange(low, high, 0.0, self.b_max, clip=True)(image)

    def _range(self, image: torch.Tensor) -> tuple[float, float]:
        values = sample_voxels(image)
        darkest, bright = np.percentile(values, [0, _PERCENTILES[1]])
        content = values[values > darkest + _AIR * (bright - darkest)]
        low, high = np.percentile(content if len(content) else values, _PERCENTILES)
        return float(low), float(high)


class ForegroundIndicesd(MapTransform):
    """Remembers where a volume is not air, so that patches are drawn there: for `RandForegroundCropd`.

    MONAI's `FgBgToIndicesd` keeps eight bytes for every voxel, eight times a volume in uint8. Here at most 4096 voxels
    over 0, evenly spread over the volume (C, *spatial), are kept; a volume without one is a `ValueError`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add `image_fg_indices` for an `image`, flat places of voxels, int64 of shape (N,), and `image_bg_indices`.

        MONAI's crop takes them only together, and without places in either it would not draw by the other: so both
        hold the same. `image_range` is where voxels over 0 begin and end along the last axis, across slices; NaN if
        that is a single slice, or a picture.
        """
        item = dict(data)
        for key in self.key_iterator(item):
            mask = np.asarray(item[key]).max(0) > 0
            places = np.flatnonzero(mask)
            if not len(places):
                raise InputError("a volume must have voxels above 0 after scaling, got none: correct its modality.")
            chosen = np.linspace(0, len(places) - 1, min(_MAX_INDICES, len(places))).round().astype(int)
            item[f"{key}_fg_indices"] = item[f"{key}_bg_indices"] = places[chosen]
            across = np.flatnonzero(mask.any((0, 1)))
            placeless = item.get("slice_axis") == PICTURE or across[0] == across[-1]
            item[f"{key}_range"] = (np.nan, np.nan) if placeless else (int(across[0]), int(across[-1]) + 1)
        return item


class RandForegroundCropd(RandCropByPosNegLabeld):
    """Cuts patches around random voxels that are not air, as `ForegroundIndicesd` has found them, and says their place.

    A patch gets "place", a float32 in [0, 1]: where its centre lies in the foreground along the last axis; NaN if it is
    of a picture, or the foreground lies in one slice.

    Args:
        keys: keys of the image (C, X, Y, Z), then of what is cut in the same way.
        spatial_size: voxels of a patch along the axes of the array; a volume must not be smaller.
        num_samples: patches of a volume.
        allow_missing_keys: whether items may lack some of the keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        num_samples: int = 1,
        allow_missing_keys: bool = False,
    ) -> None:
        image = ensure_tuple(keys)[0]
        super().__init__(
            keys, image, spatial_size, neg=0, num_samples=num_samples, fg_indices_key=f"{image}_fg_indices",
            bg_indices_key=f"{image}_bg_indices", allow_missing_keys=allow_missing_keys,
        )  # fmt: skip
        self.size = spatial_size[-1]

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> list[dict[Hashable, Any]]:
        """The patches of a volume."""
        item = dict(data)
        first, end = item.pop(f"{self.label_key}_range")
        patches: list[dict[Hashable, Any]] = super().__call__(item, lazy)
        for patch, center in zip(patches, self.cropper.centers or (), strict=True):
            middle = center[-1] - self.size // 2 + self.size / 2  # from side to side, not between voxels
            patch["place"] = torch.tensor((middle - first) / (end - first), dtype=torch.float32).clamp(0, 1)
        return patches


def refuse_other_units(image: torch.Tensor | NDArray[Any], where: str) -> None:
    """Refuse a CT whose values are no HU: without intercept, or rescaled; what may be greys of 8 bits is logged.

    Without its intercept, of -1000 or -1024, hardly a voxel is as low as lung or fat, and more than half of those above
    400, as soft tissue then is, lie between 850 and 1300. No crop without air, window or bone looks so. The lowest and
    the highest value, and all up to -1000, may be padding or the ends of a window, and say nothing.
    """
    values = sample_voxels(image)
    low, high = float(values.min()), float(values.max())
    inner = values[(values > low) & (values < high)]

    def share(least: float, most: float, floor: float = -inf) -> float:
        found = inner[inner > floor]
        return float(np.mean((found > least) & (found < most))) if len(found) else 0.0

    tissue, solid, thin = share(850, 1300, -1000), share(400, inf, -1000), share(-1000, -100, -1000)
    fault, remedy = "", "write its HU anew from the original"
    if tissue > max(0.01, solid / 2) and thin < max(0.01, tissue / 10):
        fault, remedy = " with soft tissue at about 1000, as without the intercept", "subtract 1024 (or 1000)"
    elif share(-inf, -1150) > 0.05 and share(-500, inf) < 0.1:
        fault, remedy = " with air at about -2000, as with the intercept twice", "add 1024 (or 1000)"
    elif np.mean(values > 5000) > 0.05:
        fault = ", many of them above 5000"
    elif 0 < high - low < 20:
        fault = ", as after rescaling"
    elif low == 0 and 200 < high <= 255 and not (values % 1).any():
        logger.warning("%s is listed as CT and has values from %g to %g, as greys do: are they HU?", where, low, high)
    if fault:
        raise InputError(
            f"{where} is listed as CT, so its values must be HU, got {low:g} to {high:g}{fault}: {remedy}, or state "
            "another `modality` if it is no CT in HU, such as OT, which is scaled by its own percentiles."
        )


def is_ct(modality: object) -> bool:
    """Whether intensities are in HU, to go by the name of the modality: CT, CTA, ct, ...; not CBCT."""
    return str(modality).strip().upper().startswith("CT")


def sample_voxels(image: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    """At most about a million of the voxels, evenly spaced, as a flat array: enough for percentiles, and quick."""
    values = np.asarray(image).ravel()
    # An odd step does not meet the same columns of every row.
    return values[:: values.size // _MAX_SAMPLE | 1]
