"""Data lists of segmentation: classes by name, folds and splits by whole subject."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dissect_monai.common import InputError, Item, shorten
from dissect_monai.data.datalists import (
    SPLITS,
    Datalist,
    SegmentationDatalist,
    data_folders,
    merge_datalists,
    read_folder,
)
from dissect_monai.data.domains import named_values
from dissect_monai.data.splits import _split

logger = logging.getLogger(__name__)
BTCV_ORGANS = (
    "spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "portal_and_splenic_veins", "pancreas", "right_adrenal_gland", "left_adrenal_gland",
)  # fmt: skip


def read_segmentation(
    dataset_dir: str | Path | Sequence[str | Path],
    structures: Sequence[str] | None = None,
    modality: str | Sequence[str] | None = None,
    fold: int | None = None,
    num_folds: int = 5,
    validation_fraction: float = 0.2,
    split_seed: int = 0,
    default_modality: str | Sequence[str] | None = None,
) -> SegmentationDatalist:
    """Read one or several folders with a Decathlon-style dataset.json of volumes and label maps.

    The classes are the structures that `labels` of dataset.json names, in the order of their values; several folders
    must name the same. Volumes without label map are left out, such as the test split of the Decathlon.

    A validation split is that of dataset.json. Without one, it is 0035 to 0040 where the subjects are those of BTCV
    (img0001, ...), as in the literature, or else a part of the training subjects. With `fold`, training and validation
    subjects are put together and parted anew into folds, of which that one is for validation. Splits are by whole
    subject; a volume without subject is one of its own.

    Args:
        dataset_dir: the folder or folders.
        structures: names of those to learn, whose order is that of the classes; None takes all.
        modality: of the volumes ("CT" scales by a window), or one a channel; None takes that of dataset.json.
        fold: place of the fold for validation, from 0; None takes no folds.
        num_folds: number of folds, at least 2.
        validation_fraction: share of the training subjects, in [0, 1), at least one, that becomes a validation split
            where there is none; 0 takes none, and so does a single subject.
        split_seed: draws other folds, and other subjects for a validation split.
        default_modality: of volumes whose modality neither `modality` nor dataset.json says.

    Raises:
        FileNotFoundError: if a folder or a listed file does not exist.
        ValueError: if an argument is out of range; dataset.json is malformed, or names no structures, or others than
            another folder; splits share a subject; or no volume has a label map.
    """
    if fold is not None and not 0 <= fold < num_folds:
        raise InputError(f"`fold` must be in [0, {num_folds}), got {fold}.")
    if num_folds < 2 or not 0 <= validation_fraction < 1:
        raise InputError(
            "`num_folds` must be at least 2 and `validation_fraction` in [0, 1), "
            f"got {num_folds} and {validation_fraction}."
        )
    folders = data_folders(dataset_dir)
    datalists = [read_folder(folder, spatial_dims=3) for folder in folders]
    found = [
        _complete(datalist, folder, modality, default_modality)
        for datalist, folder in zip(datalists, folders, strict=True)
    ]
    names = _common_names(found, folders, structures)
    datalist = _labelled(merge_datalists(datalists, folders))
    datalist = _split(datalist, fold, num_folds, validation_fraction, split_seed)
    first, *others = [item["modality"] for item in datalist.training or _items(datalist)]
    channels = {1 if isinstance(each, str) else len(each) for each in (first, *others)}
    if len(channels) != 1:
        raise InputError(f"all volumes must have the same number of channels, got {sorted(channels)} (`modality`).")
    _warn_of_unknown(datalist.training)
    common = first if all(each == first for each in others) else None
    splits = (datalist.training, datalist.validation, datalist.test)
    return SegmentationDatalist(*splits, names, common, channels.pop())


def segmentation_of_weights(settings: Mapping[str, Any]) -> SegmentationDatalist:
    """No volumes, but the structures and channels of weights: of a training whose caller lists the volumes itself.

    Args:
        settings: of the weights, as `read_settings` gives them.

    Raises:
        ValueError: if they name no structures.
    """
    if not settings.get("class_names"):
        raise InputError(
            "volumes that are listed without the names of their structures need weights that say them: put model.pt "
            "and model.json of a training into the bundle's `models`."
        )
    return SegmentationDatalist(
        [], [], [], settings["class_names"], settings.get("modality"), settings.get("in_channels", 1)
    )


def read_unlabelled(
    dataset_dir: str | Path | Sequence[str | Path],
    modality: str | Sequence[str] | None = None,
    default_modality: str | Sequence[str] | None = None,
) -> list[Item]:
    """The volumes to segment of one or several folders, of a dataset.json or without, or of one file.

    Listed files may be missing, for predictions name each volume that cannot be read and do the rest.

    Args:
        dataset_dir: the folder or folders, or a single volume.
        modality: of the volumes, or one a channel; None takes that of dataset.json.
        default_modality: of volumes whose modality neither says.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no volumes.
        ValueError: if a dataset.json is malformed.
    """
    folders = data_folders(dataset_dir)
    datalists = [read_folder(folder, spatial_dims=3, check=False) for folder in folders]
    items = _items(merge_datalists(datalists, folders, check=False))
    for item in items:
        item["modality"] = _modality(modality, item.get("modality"), default_modality)
    _warn_of_unknown(items)
    return items


def _complete(datalist: Datalist, folder: Path, modality: Any, default_modality: Any) -> list[str]:
    """Give every item its subject, task, modality and the values of its structures, and return all names."""
    base = folder if folder.is_dir() else folder.parent
    names: dict[str, None] = {}
    for item in _items(datalist):
        item.setdefault("subject", os.path.relpath(item["image"], base))
        item.setdefault("task", base.name)
        item["modality"] = _modality(modality, item.get("modality"), default_modality)
        given = item.get("labels")
        item["labels"] = named_values(given, folder) if isinstance(given, Mapping) else {}
        if not item["labels"]:
            raise InputError(
                f"{folder} must have a dataset.json that names the values of its label maps, such as "
                f'"labels": {{"1": "spleen"}}, got {item.get("labels")!r}: scripts/make_datalist.py writes one.'
            )
        names |= dict.fromkeys(sorted(item["labels"], key=lambda name: min(item["labels"][name])))
    return list(names)


def _modality(knob: Any, own: Any, default: Any) -> str | list[str]:
    if isinstance(knob, Mapping):
        raise InputError(f"`modality` must be a text, or a list with one for each channel, got {dict(knob)}.")
    given = next((each for each in (knob, own, default) if each is not None), None)
    values = list(given.values()) if isinstance(given, Mapping) else given
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    names = ["unknown" if value is None else str(value).strip() or "unknown" for value in values]
    return names[0] if len(names) == 1 else names


def _warn_of_unknown(items: Sequence[Item]) -> None:
    unknown = [item["image"] for item in items if "unknown" in item["modality"]]
    if unknown:
        logger.warning(
            "%d volumes have no modality (%s): they will be scaled as MR is. Write it into dataset.json, or give "
            "--modality, such as CT.", len(unknown), unknown[0],
        )  # fmt: skip


def _common_names(found: list[list[str]], folders: list[Path], structures: Sequence[str] | None) -> list[str]:
    for names, folder in zip(found, folders, strict=True):
        if {*names} != {*found[0]}:
            raise InputError(
                f"all folders must name the same structures, got {shorten(found[0])} in {folders[0]} and "
                f"{shorten(names)} in {folder}: what one set has not contoured would count as background."
            )
    if structures is None:
        return found[0]
    chosen = [structures] if isinstance(structures, str) else list(structures)
    unknown = [name for name in chosen if name not in found[0]]
    if unknown or not chosen or len({*chosen}) < len(chosen):
        raise InputError(
            f"`structures` must be different ones of {', '.join(found[0])}, got {', '.join(map(str, chosen))}."
        )
    return chosen


def _labelled(datalist: Datalist) -> Datalist:
    """Without the volumes that have no label map."""
    kept = {
        split: [item for item in getattr(datalist, split) if isinstance(item.get("label"), str)] for split in SPLITS
    }
    if not any(kept.values()):
        raise InputError(
            "dataset.json must list volumes with the path of a label map (`label`), got "
            f"{len(_items(datalist))} without: write them there, such as make_datalist.py does."
        )
    for split, items in kept.items():
        without = len(getattr(datalist, split)) - len(items)
        if without:
            logger.warning("%d of the volumes in `%s` have no label map and are left out.", without, split)
    return datalist._replace(**kept)


def _items(datalist: Datalist) -> list[Item]:
    return [item for split in SPLITS for item in getattr(datalist, split)]
