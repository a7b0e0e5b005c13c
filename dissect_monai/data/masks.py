"""Label maps as their files have them: volumes, and masks of pictures with values or colours."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import Dataset, MetaTensor
from monai.transforms import LoadImage, MapTransform
from monai.utils import ImageMetaKey
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dissect_monai.common import InputError, Item, shorten
from dissect_monai.data.datasets import read_all
from dissect_monai.data.readers import ImageFileReader, explained, image_format, refuse_odd_file

logger = logging.getLogger(__name__)
WHITE = 255  # of masks in black and white
_UNNAMED = {"foreground": WHITE}  # beside class_1, class_2, ...
_MAX_UNNAMED = 32  # different values of masks that are taken for classes without being named
_OF_LABELS = ("labels", "ignored", "colours", "either")  # what an item says of its label map


class LoadLabeld(MapTransform):
    """Loads the label maps (1, X, Y, Z) of items, which may lack them, see `load_label`."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the paths of an item."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = load_label(item[key], {name: item.get(name) for name in _OF_LABELS})
        return item


def load_label(path: str, item: Item) -> MetaTensor:
    """A label map as its file has it, of shape (1, X, Y, Z) and in its own dtype; a mask of a picture is (1, X, Y, 1).

    Masks are PNG, TIFF or BMP of one page. Grey levels are values as they are, and so are the indices of a palette.
    With `colours` in the item, {name: [red, green, blue]}, a mask has these colours alone and black, which is
    background unless it is named, and its values become those that `labels` gives the names.

    Raises:
        ValueError: if it cannot be read, is a JPEG, has several pages, colours that nothing names, its shape in the
            alpha channel, or both 1 and 255 where `labels` names one of them.
    """
    if not _is_picture(path):
        loaded: MetaTensor = _loader(1 if image_format(path) == "nifti" else None)(path)
        return loaded
    values = _read_mask(Path(path), item)
    if item.get("either") and np.isin((1, WHITE), values).all():
        raise InputError(
            f"{path} must hold 1 or 255 for its structure, got both, and `labels` names one: list the other as "
            "`ignore` in the `labels` of dataset.json, or repaint it."
        )
    kind = np.uint8 if values.dtype.itemsize == 1 else np.float32 if values.dtype.kind == "f" else np.int32
    return MetaTensor(torch.tensor(values.T.astype(kind))[None, ..., None], meta={ImageMetaKey.FILENAME_OR_OBJ: path})


@cache
def _loader(channels: int | None) -> LoadImage:
    reader = ImageFileReader(spatial_dims=3, channels=channels)  # with channels, NIfTI may have two axes
    return LoadImage(reader, image_only=True, dtype=None, ensure_channel_first=True)


def _read_mask(path: Path, item: Item) -> NDArray[Any]:
    """Values (rows, columns)."""
    refuse_odd_file(path)
    with explained(path), Image.open(path) as image:
        if "JPEG" in (image.format or "") or "jpeg" in str(image.info.get("compression")):
            raise InputError(f"{path} is JPEG, which changes the values of a mask near every edge: save it as PNG.")
        if (pages := getattr(image, "n_frames", 1)) > 1:
            raise InputError(f"{path} must be a mask of one page, got {pages}: write one with all structures.")
        if image.format == "TIFF":
            image.filename = ""  # see `_read_picture`
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("1", "L", "F", "P") or upright.mode[0] == "I":
            if not item.get("colours"):
                return np.asarray(upright)
            upright = upright if upright.mode == "P" else upright.convert("L")
        rgb = np.asarray(upright.convert("RGB"))
        alpha = np.asarray(upright.getchannel("A")) if upright.mode in ("LA", "PA", "RGBA") else np.zeros(1)
        if np.ptp(alpha) and not np.ptp(rgb, (0, 1)).any():
            raise InputError(
                f"{path} must be a mask in grey or colours, got its shape in the alpha channel: save it as grey."
            )
    if item.get("colours"):
        return _values_of_colours(path, rgb, item)
    other = rgb[(rgb != rgb[..., :1]).any(-1)][:1].tolist()
    if other:
        raise InputError(
            f'{path} has colours, such as {other[0]}, that nothing names: write `colours`, such as {{"polyp": '
            f"{other[0]}}}, into dataset.json, or save the mask with a value for each structure."
        )
    return rgb[..., 0]


def _values_of_colours(path: Path, rgb: NDArray[np.uint8], item: Item) -> NDArray[np.int64]:
    values: dict[str, list[int]] = {"background": [0], **item["labels"]}
    ignored: list[int] = item.get("ignored") or [0]  # what is in neither
    named = {tuple(colour): values.get(name, ignored)[0] for name, colour in item["colours"].items()}
    known = {(0, 0, 0): 0, **named}
    code = rgb.astype(np.int64) @ (2**16, 2**8, 1)
    _, first, places, counts = np.unique(code, return_index=True, return_inverse=True, return_counts=True)
    found = [tuple(colour) for colour in rgb.reshape(-1, 3)[first].tolist()]
    unknown = sorted((pair for pair in zip(counts, found, strict=True) if pair[1] not in known), reverse=True)
    if unknown:
        raise InputError(
            f"{path} must have the `colours` of its dataset.json alone, got {len(unknown)} others: "
            f"{shorten([f'{[*colour]} in {count} pixels' for count, colour in unknown], 3)}. Name them there, or save "
            "the mask without smoothing its edges."
        )
    return np.array([known[colour] for colour in found])[places].reshape(code.shape)


def settle_labels(item: Item, where: str) -> None:
    """Bring the `labels` {name: values} of an item in line with its `colours`, or with masks in black and white.

    With colours, values are 1, 2, ... if there are no labels. Masks of one structure, called 1 or 255, may have either,
    but not both.
    """
    labels: Any = item.get("labels") or {}
    if item.get("colours"):
        given = item["colours"] if isinstance(item["colours"], Mapping) else {}
        names = [name for name in given if name != "background"]
        triples = [tuple(each) for each in given.values() if isinstance(each, list) and len(each) == 3]
        colours = {each for each in triples if all(type(part) is int and 0 <= part <= WHITE for part in each)}
        if not names or len(colours) < len(given) or (labels and {*labels} != {*names}):
            raise InputError(
                f"the `colours` of {where} must be one for each structure of its `labels`, such as "
                f'{{"polyp": [255, 0, 0]}}, got {item["colours"]!r}: correct its dataset.json.'
            )
        item["labels"] = labels or {name: [value] for value, name in enumerate(names, start=1)}
    elif isinstance(labels, Mapping) and len(labels) == 1 and _is_picture(item.get("label")):
        ((name, values),) = labels.items()
        if {*values} <= {1, WHITE}:
            item |= {"labels": {name: [1, WHITE]}, "either": len({*values}) == 1}


def _is_picture(label: Any) -> bool:
    return isinstance(label, str) and image_format(label) == "picture"


def name_values(items: Sequence[Item], on_corrupt: str = "raise", weights: Mapping[str, Any] | None = None) -> None:
    """Name the values of label maps that no dataset.json names, in place.

    Masks with nothing but 1, or nothing but 255, are of one structure, `foreground`; values 1, 2, ... are `class_1`,
    `class_2`, ... Others must be named, as they are most often what smoothing makes of an edge. Masks that cannot be
    read are refused, or, with `on_corrupt` "skip", logged and looked at no further.

    Where `weights` are to be scored, it is their settings that name values and colours, and others are refused.
    """
    unnamed = [item for item in items if isinstance(item.get("label"), str) and not item.get("labels")]
    if not unnamed:
        return
    if weights:
        _name_by_weights(unnamed, on_corrupt, weights)
        return
    found = _values_in(unnamed, on_corrupt)
    values = sorted({value for each in found.values() for value in each})
    if not values:
        raise InputError(f"masks must show something, got {len(found)} that are empty, such as {unnamed[0]['label']}.")
    labels = {f"class_{value}": [value] for value in values}
    if {*values} <= {1, WHITE} and all(len(each) < 2 for each in found.values()):
        labels = {"foreground": [1, WHITE]}
    elif values[-1] >= WHITE or len(values) > _MAX_UNNAMED:
        path = max(found, key=lambda name: len(found[name]))
        raise InputError(
            f"{path} has the values {shorten(found[path])}, which nothing names: if they are structures, write "
            '`labels`, such as {"disc": 128, "cup": 255}, into a dataset.json; if its edges were smoothed, write the '
            "mask anew with 0 and 255 alone."
        )
    empty = sum(not each for each in found.values())
    logger.info("Classes of %d label maps, %d of them empty, by their values: %s.", len(found), empty, labels)
    for item in unnamed:
        item["labels"] = labels


def _name_by_weights(unnamed: Sequence[Item], on_corrupt: str, weights: Mapping[str, Any]) -> None:
    for item in unnamed:
        item |= _of_weights(weights, item["label"])
        settle_labels(item, "the weights")
        part_ignored(item)
    named = (*unnamed[0]["labels"].values(), unnamed[0].get("ignored", ()))
    known = {value for values in named for value in values}
    for path, values in _values_in(unnamed, on_corrupt).items():
        if not {*values} <= known:
            raise InputError(
                f"{path} has the values {shorten(values)}, of which the weights know {shorten(sorted(known))} "
                'alone: say what they are by `labels`, such as {"disc": 128}, in a dataset.json.'
            )


def _of_weights(settings: Mapping[str, Any], label: str) -> Item:
    """What the settings of weights say of masks without names: `colours`, or `labels`."""
    values = {**(settings.get("mask_values") or {})}
    if any(isinstance(each, list) for each in values.values()):
        return {"colours": values}
    names = settings.get("class_names", ())
    values = {name: values.get(name, _UNNAMED.get(name, name.removeprefix("class_"))) for name in names}
    if not all(str(value).isdecimal() for value in values.values()):
        raise InputError(
            f"{label} must come with names of its values, as the weights do not know those of {shorten([*names])}: "
            f'write `labels`, such as {{"{names[0]}": 1}}, into a dataset.json.'
        )
    either = len(names) == 1 and {*values.values()} <= {1, WHITE}
    return {"labels": {name: [1, WHITE] if either else [int(value)] for name, value in values.items()}}


def part_ignored(item: Item) -> None:
    """Move the values of nnU-Net's "ignore", of what nobody has annotated, from `labels` to `ignored`."""
    names = [name for name in item["labels"] if name.lower() == "ignore"]
    if names:
        item["ignored"] = [value for name in names for value in item["labels"].pop(name)]


def mask_values(
    items: Sequence[Item], class_names: Sequence[str], on_corrupt: str = "raise"
) -> dict[str, int | list[int]]:
    """What each class is in masks of pictures, a colour or a value, as in the first that shows something."""
    masks = [item for item in items if _is_picture(item["label"])]
    if not masks:
        return {}
    labels: Mapping[str, list[int]] = masks[0]["labels"]
    values = {name: labels[name][0] for name in class_names}
    if len(labels) == 1 and WHITE in labels[class_names[0]]:
        values[class_names[0]] = WHITE
        for mask in masks:
            try:
                found = _values_in([mask])[mask["label"]]
            except InputError:
                if on_corrupt != "skip":  # else what reads the masks leaves it out, and says so
                    raise
                continue
            if found:
                values[class_names[0]] = found[-1]
                break
    return {**values, **masks[0].get("colours", {})}


def _values_in(items: Sequence[Item], on_corrupt: str = "raise") -> dict[str, list[int]]:
    """Those over 0 in the label map of each item, by its path."""

    def read(item: Item) -> list[int] | str:
        try:
            values = np.unique(load_label(item["label"], item).numpy())
        except InputError as error:
            return str(error)
        if (values != np.rint(values)).any():
            return f"label map {item['label']} must hold integers, got {shorten(values, 5)}."
        return [int(value) for value in values if value > 0]

    found = read_all(Dataset(items, read), num_workers=8)[0]
    bad = [each for each in found if isinstance(each, str)]
    if bad and (on_corrupt != "skip" or len(bad) == len(found)):
        others = f" (and {len(bad) - 1} others)" if len(bad) > 1 else ""
        raise InputError(
            f"masks must be files that can be read, got {len(bad)} of {len(found)} that cannot: {bad[0]}{others} "
            "Repair them, remove them from the data list, or leave them out by setting `on_corrupt` to skip."
        )
    for line in bad:
        logger.warning("Skipped: %s", line)
    return {item["label"]: each for item, each in zip(items, found, strict=True) if not isinstance(each, str)}
