"""Label maps: values of files to classes and back, largest components, and which structures are wanted."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ImageMetaKey, convert_to_dst_type, ensure_tuple
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from dissect_monai.common import InputError, shorten
from dissect_monai.transforms.spatial import refuse_other_grid

LabelMap = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
IGNORED = 255  # in place of a class: a voxel that nobody has annotated
_ROUNDING = 1e-3  # by which a value may miss a whole number: what scale factors of a header leave


class ValuesToClassesd(MapTransform):
    """Turns the values of label files into classes: 1, 2, ... for the structures by name, 0 for everything else.

    Voxels with one of the values that the item has as `ignored` become `IGNORED`, 255.

    Args:
        keys: keys of the label maps, of shape (1, *spatial), integers of any dtype; items may lack them. The item must
            have the values of each structure as `labels`, {name: values}.
        class_names: structures of the classes 1, 2, ...; what an item names beside them is background. None only makes
            integers of the values and asks for no names.
        image_key: key of the image on whose grid the label maps must be, see `refuse_other_grid`; None does not look.

    Raises:
        ValueError: if an item does not name its values, names one under 1, or one of two classes twice, or its label
            map has fractions, a value that it does not name, or is on another grid.
    """

    def __init__(self, keys: KeysCollection, class_names: Sequence[str] | None, image_key: str | None = None) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.class_names = class_names and _numbered(class_names)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the label maps of an item by classes in uint8."""
        item = dict(data)
        for key in self.key_iterator(item):
            where = f"label map {getattr(item[key], 'meta', {}).get(ImageMetaKey.FILENAME_OR_OBJ, key)}"
            if self.image_key is not None:
                refuse_other_grid(item[key], item[self.image_key], where)
            array = np.asarray(item[key])
            label_map = integer_map(where, array[0] if len(array) == 1 else array)
            if self.class_names is None:
                item[key] = convert_to_dst_type(label_map[None], item[key], dtype=label_map.dtype)[0]
                continue
            labels = item.get("labels")
            if not isinstance(labels, Mapping):
                raise InputError(f"{where} must come with the names of its values (`labels`), got {labels!r}.")
            ignored = item.get("ignored", ())
            classes, unknown = values_to_classes(label_map, labels, self.class_names, where, ignored)
            if unknown:
                named = sorted({0, *ignored, *(value for values in labels.values() for value in values)})
                raise InputError(
                    f"{where} must hold values that `labels` of its dataset.json names ({shorten(named)}), got "
                    f"{shorten(unknown)}: name them there, or correct the label map."
                )
            item[key] = convert_to_dst_type(classes[None], item[key], dtype=classes.dtype)[0]
        return item


def values_to_classes(
    label_map: LabelMap,
    labels: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
    where: str,
    ignored: Sequence[int] = (),
) -> tuple[NDArray[np.uint8], list[int]]:
    """Classes 1, 2, ... of the named structures in place of a file's values, and the values that have no name.

    `labels` has the values of each structure; those that are no class may share them. Values that are `ignored` become
    `IGNORED`, all others but the classes background, 0. A value under 1, or in two classes, is refused; the message
    calls the label map `where`.
    """
    _numbered(class_names, IGNORED - bool(ignored))
    class_of = {0: 0}
    for name, values in (*labels.items(), ("ignore", ignored)):
        if min(values, default=1) < 1:
            raise InputError(f"{where} must have structures with values over 0, got {min(values)} for {name}.")
        class_of |= dict.fromkeys(values, IGNORED if values is ignored else 0)
    for index, name in enumerate(class_names, start=1):
        for value in labels.get(name, ()):
            if class_of[value] not in (0, index):
                raise InputError(f"{where} must give each value one class, got {value} in {name} and another one.")
            class_of[value] = index
    unknown = sorted({*np.unique(label_map).tolist()} - class_of.keys())
    if unknown:
        label_map = np.where(np.isin(label_map, unknown), 0, label_map)
    table = np.zeros(max(class_of) + 1, np.uint8)
    table[list(class_of)] = list(class_of.values())
    return table[label_map], unknown


def _numbered(class_names: Sequence[str], most: int = IGNORED) -> list[str]:
    if len(class_names) > most:
        raise InputError(f"`class_names` must be at most {most}, which uint8 can number, got {len(class_names)}.")
    return list(class_names)


def integer_map(name: str, label_map: ArrayLike) -> LabelMap:
    """A 3-D label map, called `name` in messages, as an array of integers, which files often hold as floats."""
    array = np.asarray(label_map)
    if array.ndim != 3:
        raise InputError(f"`{name}` must have shape (X, Y, Z), got {array.shape}.")
    if array.dtype.kind in "iu":
        return array
    if array.dtype.kind not in "bf":
        raise InputError(f"`{name}` must hold integers, got values of {array.dtype}: write it anew as integers.")
    with np.errstate(invalid="ignore"):  # NaN is refused below
        integers = np.rint(array).astype(np.int32)
        apart = array[~(abs(array - integers) <= _ROUNDING)]
    if apart.size:
        found = shorten([f"{value:g}" for value in np.unique(apart)], 3)
        raise InputError(
            f"`{name}` must hold integers, got fractions ({found}): it was saved with a scale factor (scl_slope of a "
            "NIfTI) or resampled by interpolation. Write it anew from integers, resampled by nearest neighbours."
        )
    return integers


def box_around(found: Sequence[Sequence[Box | None]], values: Sequence[int]) -> Box:
    """The smallest box around all voxels that have one of some values; an empty one if there are none.

    `found` is what `scipy.ndimage.find_objects` gives of each label map; the value 0 has no box.
    """
    boxes = [each[value - 1] for each in found for value in values if 0 < value <= len(each)]
    axes = list(zip(*(box for box in boxes if box is not None), strict=True)) or [(slice(0, 0),)] * 3
    x, y, z = (slice(min(each.start for each in axis), max(each.stop for each in axis)) for axis in axes)
    return x, y, z


def largest_components(label_map: ArrayLike, values: Iterable[int]) -> LabelMap:
    """A label map (X, Y, Z) with only the largest connected part of the structures with some values.

    The other parts become background. Faces connect, edges do not. Of parts of equal size, the first is kept.
    """
    cleaned = integer_map("label_map", label_map).copy()
    found = ndimage.find_objects(cleaned)
    for value in values:
        part = cleaned[box_around([found], [value])]
        components, count = ndimage.label(part == value)
        if count > 1:
            sizes = np.bincount(components.ravel())[1:]
            part[(components > 0) & (components != sizes.argmax() + 1)] = 0
    return cleaned


class LargestComponentsd(MapTransform):
    """Keeps the largest connected part of some structures of a label map (1, X, Y, Z) of classes.

    It suits structures that are one piece. Of two kidneys under one value, it removes one. `class_names` are the
    structures of the classes 1, 2, ...; for those to clean see `chosen_structures`.
    """

    def __init__(self, keys: KeysCollection, class_names: Sequence[str], structures: str | Sequence[str]) -> None:
        super().__init__(keys)
        self.values = [list(class_names).index(name) + 1 for name in chosen_structures(structures, class_names)]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the label maps of an item."""
        item = dict(data)
        for key in self.key_iterator(item) if self.values else ():
            cleaned = largest_components(np.asarray(item[key].cpu())[0], self.values)
            item[key] = convert_to_dst_type(cleaned[None], item[key], dtype=cleaned.dtype)[0]
        return item


def chosen_structures(names: str | Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Structures as a knob names them: "none", "all", or some of them; a `ValueError` if one is unknown."""
    if names in ("none", "all"):
        return list(class_names) if names == "all" else []
    chosen = list(ensure_tuple(names))
    unknown = [str(name) for name in chosen if name not in class_names]
    if unknown:
        near = get_close_matches(unknown[0], [*class_names, "none", "all"], n=1)
        raise InputError(
            f"`largest_only` must be none, all, or among {', '.join(class_names)}, got {', '.join(unknown)}"
            + (f"; did you mean {near[0]}?" if near else ".")
        )
    return chosen
