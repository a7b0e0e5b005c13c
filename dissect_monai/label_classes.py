"""Label maps with the values of files as label maps of classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ImageMetaKey, convert_to_dst_type

from dissect_monai.data import few
from dissect_monai.original_grid import refuse_apart
from dissect_monai.segmentation_metrics import integer_map


class LabelClassesd(MapTransform):
    """Turns the values of label files into classes: 1, 2, ... for the structures by name, 0 for everything else.

    Args:
        keys: keys of the label maps, of shape (1, *spatial), integers of any dtype.
        class_names: structures of the classes 1, 2, ...; what an item names beside them is background.
        labels_key: key of the item's {name: values}.
        image_key: key of the image that the label maps must not lie beside, see `refuse_apart`; None does not look.
        allow_missing_keys: whether an item without a key of `keys` is left alone.

    Raises:
        ValueError: if an item does not name its values, names one under 1, or one of two classes twice, or its label
            map has fractions, a value that it does not name, or lies beside its image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        class_names: Sequence[str],
        labels_key: str = "labels",
        image_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(class_names) > 255:
            raise ValueError(f"`class_names` must be at most 255, which uint8 can number, got {len(class_names)}.")
        self.class_names = list(class_names)
        self.labels_key, self.image_key = labels_key, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the label maps of an item by classes in uint8."""
        item = dict(data)
        for key in self.key_iterator(item):
            where = f"label map {getattr(item[key], 'meta', {}).get(ImageMetaKey.FILENAME_OR_OBJ, key)}"
            if self.image_key is not None:
                refuse_apart(item[key], item[self.image_key], where)
            table = self._table(item.get(self.labels_key), where)
            array = np.asarray(item[key])
            label_map = integer_map(where, array[0] if len(array) == 1 else array)
            unknown = sorted({*np.unique(label_map).tolist()} - table.keys())
            if unknown:
                raise ValueError(
                    f"{where} must hold values that `labels` of its dataset.json names ({few(sorted(table))}), got "
                    f"{few(unknown)}: name them there, or correct the label map."
                )
            classes = np.zeros(max(table) + 1, np.uint8)
            classes[list(table)] = list(table.values())
            item[key] = convert_to_dst_type(classes[label_map][None], item[key], dtype=classes.dtype)[0]
        return item

    def _table(self, labels: Any, where: str) -> dict[int, int]:
        """Class of every value of a file."""
        if not isinstance(labels, Mapping):
            raise ValueError(f"{where} must come with the names of its values (`{self.labels_key}`), got {labels!r}.")
        table = {0: 0}
        for name, values in labels.items():
            index = self.class_names.index(name) + 1 if name in self.class_names else 0
            for value in values:
                if value < 1:
                    raise ValueError(f"{where} must have structures with values over 0, got {value} for {name}.")
                # A region that is not learnt may share values with one that is.
                if index and table.get(value, 0) not in (0, index):
                    raise ValueError(f"{where} must give each value one class, got {value} in {name} and another one.")
                table[value] = index or table.get(value, 0)
        return table
