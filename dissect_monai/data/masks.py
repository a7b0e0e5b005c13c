"""Label maps as their files have them: volumes, and masks of pictures with values or colours."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImage, MapTransform
from monai.utils import ImageMetaKey
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dissect_monai.common import PICTURE, InputError, Item, shorten
from dissect_monai.data.readers import ImageFileReader, explained, image_format, refuse_odd_file

WHITE = 255  # of masks in black and white
_MAX_UNNAMED = 32  # values of masks that are taken for classes without being named


class LoadLabeld(MapTransform):
    """Loads label maps, see `load_label`; items may lack them, and give the colours of their masks as `colours`."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the paths of an item by label maps (1, X, Y, Z)."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = load_label(item[key], {str(name): item.get(name) for name in ("labels", "ignored", "colours")})
        return item


def load_label(path: str, item: Item) -> MetaTensor:
    """A label map as its file has it, of shape (1, X, Y, Z) and in its own dtype; a mask of a picture is (1, X, Y, 1).

    Masks are PNG, TIFF or BMP of one page. Grey levels are values as they are, and so are the indices of a palette.
    With `colours` in the item, {name: [red, green, blue]}, a mask has these colours alone and black, which is
    background unless it is named, and its values become those that `labels` gives the names.

    Raises:
        ValueError: if it cannot be read, is a JPEG, has several pages, or colours that nothing names.
    """
    kind = image_format(path)
    if kind != "picture":
        reader = ImageFileReader(spatial_dims=3, channels=1 if kind == "nifti" else None)
        loaded: MetaTensor = LoadImage(reader, image_only=True, dtype=None, ensure_channel_first=True)(path)
        return loaded
    values = _read_mask(Path(path), _coded_colours(item) if item.get("colours") else None)
    wide = np.ascontiguousarray(values.T, np.float64 if values.dtype.kind == "f" else np.int32)
    array = wide.astype(np.uint8) if values.dtype.itemsize == 1 else wide
    return MetaTensor(
        torch.as_tensor(array)[None, ..., None], meta={ImageMetaKey.FILENAME_OR_OBJ: path, PICTURE: WHITE}
    )


def _coded_colours(item: Item) -> dict[int, int]:
    """The value of each colour, which is one number."""
    values = {"background": [0], **item["labels"]}  # what is in neither is ignored
    named = {
        _code(np.array(colour)).item(): values.get(name, item.get("ignored"))[0]
        for name, colour in item["colours"].items()
    }
    return {0: 0, **named}


def _code(rgb: NDArray[Any]) -> NDArray[np.int64]:
    coded: NDArray[np.int64] = rgb.astype(np.int64) @ np.array([2**16, 2**8, 1])
    return coded


def _read_mask(path: Path, colours: Mapping[int, int] | None) -> NDArray[Any]:
    """Values (rows, columns)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Correct the path or remove it from the data list.")
    refuse_odd_file(path)
    with explained(path), Image.open(path) as image:
        if "JPEG" in (image.format or "") or "jpeg" in str(image.info.get("compression")):
            raise InputError(f"{path} is JPEG, which changes the values of a mask near every edge: save it as PNG.")
        if getattr(image, "n_frames", 1) > 1:
            raise InputError(f"{path} must be a mask of one page, got {image.n_frames}: write one with all structures.")
        negative = getattr(image, "tag_v2", {}).get(262) == 0 and image.mode not in ("L", "1")
        if image.format == "TIFF":
            image.filename = ""  # see `_read_picture`
        upright = ImageOps.exif_transpose(image)
        has_values = upright.mode in ("1", "L", "F", "P") or upright.mode[0] == "I"
        if has_values and not (colours and upright.mode == "P"):
            values = np.asarray(upright)
            values = np.iinfo(values.dtype).max - values if negative and values.dtype.kind == "u" else values
            rgb = None if colours is None else np.stack([values * (WHITE if values.dtype.kind == "b" else 1)] * 3, -1)
        else:
            rgb = np.asarray(upright.convert("RGB"))
    if colours is not None:
        return _values_of_colours(path, rgb, colours)
    if rgb is None:
        return values
    other = rgb[(rgb != rgb[..., :1]).any(-1)]
    if len(other):
        raise InputError(
            f'{path} has colours, such as {other[0].tolist()}, that nothing names: write `colours`, such as {{"polyp": '
            f"{other[0].tolist()}}}, into dataset.json, or save the mask with a value for each structure."
        )
    return rgb[..., 0]


def _values_of_colours(path: Path, rgb: NDArray[Any], colours: Mapping[int, int]) -> NDArray[np.uint8]:
    found, places, counts = np.unique(_code(rgb), return_inverse=True, return_counts=True)
    unknown = [
        f"[{code >> 16}, {code >> 8 & 255}, {code & 255}] in {count} pixels"
        for code, count in sorted(zip(found.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
        if code not in colours
    ]
    if unknown:
        raise InputError(
            f"{path} must have the `colours` of its dataset.json alone, got {len(unknown)} others: "
            f"{shorten(unknown, 3)}. Name them there, or save the mask without smoothing its edges."
        )
    values = np.array([colours[code] for code in found.tolist()])
    return values[places].reshape(rgb.shape[:2]).astype(np.uint8 if values.max() < 256 else np.int32)


def mask_colours(given: Any, where: str) -> dict[str, list[int]]:
    """The `colours` of a dataset.json, which must be different triples of 0 to 255 by name."""
    colours = {}
    for name, colour in given.items() if isinstance(given, Mapping) else [("", given)]:
        is_triple = isinstance(colour, Sequence) and len(colour) == 3
        if not (is_triple and all(type(part) is int and 0 <= part <= WHITE for part in colour)):
            raise InputError(
                f'the `colours` of {where} must be red, green and blue by name, such as {{"polyp": [255, 0, 0]}}, '
                f"got {name or 'the value'} {colour!r}."
            )
        colours[str(name)] = list(colour)
    if len({*map(tuple, colours.values())}) < len(colours):
        raise InputError(f"the `colours` of {where} must differ, got one for two names: {colours}.")
    return colours


def values_in(path: str, item: Item) -> list[int]:
    """The values of a label map over 0; those of files that hold floats must be whole numbers."""
    array = load_label(path, item).numpy()
    values = np.unique(array)
    if (values != np.rint(values)).any():
        raise InputError(f"label map {path} must hold integers, got {shorten(values[values != np.rint(values)], 3)}.")
    return [int(value) for value in values if value > 0]


def unnamed_classes(found: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Names of the values in label maps, by path, that no dataset.json names: `foreground`, or `class_1` and so on.

    Masks with nothing but 1, or nothing but 255, are of one structure. Other values than 1, 2, ... must be named, as
    they are most often what smoothing makes of an edge.
    """
    values = sorted({value for each in found.values() for value in each})
    if not values:
        raise InputError(f"masks must show something, got {len(found)} that are empty: are they the right files?")
    if {*values} <= {1, WHITE} and all(len(each) < 2 for each in found.values()):
        return {"foreground": values}
    if values[-1] >= WHITE or len(values) > _MAX_UNNAMED:
        path = max(found, key=lambda name: len(found[name]))
        raise InputError(
            f"{fspath(path)} has the values {shorten(found[path])}, which nothing names: if they are structures, write "
            '`labels`, such as {"128": "disc", "255": "cup"}, into a dataset.json; if its edges were smoothed or '
            "resampled, write the mask anew with 0 and 255 alone."
        )
    return {f"class_{value}": [value] for value in values}
