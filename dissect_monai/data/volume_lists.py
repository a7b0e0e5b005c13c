"""Data lists of volumes: several data sets as one, segmentation, and volumes without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import Dataset

from dissect_monai.common import InputError, Item, shorten
from dissect_monai.data.datalists import SPLITS, Datalist, absolute, data_folders, merge_datalists, read_folder
from dissect_monai.data.datasets import read_all
from dissect_monai.data.readers import VolumeHeader, read_header
from dissect_monai.data.splits import (
    hold_out,
    refuse_other_channels,
    split_training,
    warn_of_shared_subjects,
    with_test_split,
)

logger = logging.getLogger(__name__)
# A value for all folders, one for each folder, or one by the name or path of a folder.
PerFolder = str | Sequence[str | None] | Mapping[str, str] | None


def aggregate(
    dataset_dirs: str | Path | Sequence[str | Path],
    task: PerFolder = None,
    group: PerFolder = None,
    modality: PerFolder = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    on_corrupt: str = "raise",
    num_workers: int = 8,
    test_seed: int | None = None,
) -> Datalist:
    """Merge data folders of 3-D volumes, each with a task and a group, and read the headers of all their files.

    The folders are those of `read_datalist`. `task`, `group` and `modality` ("CT", or {"0": "CT"}) of dataset.json
    count unless given here. Folders may share a task. Unknown modalities are logged, and are not CT. `labels` of
    dataset.json names the structures of its label maps, as the Decathlon has it, {"0": "background", "1": "spleen"}, or
    as nnU-Net has it, {"background": 0, "spleen": 1, "kidneys": [2, 3]}; 0 is background and left out.

    Args:
        dataset_dirs: the folder or folders.
        task: one for all folders, a list with one for each (null leaves that of dataset.json), or a mapping from names
            or paths of folders.
        group: the same of the group, such as the region.
        modality: the same of the modality.
        validation_fraction: share in [0, 1) of the subjects of a task, at least one, that becomes its validation split
            if its folders have none; none where fewer than two would be left to train on. Subjects of one name in
            folders of one task count as the same, and an item without subject is one of its own.
        seed: draws other subjects for it.
        on_corrupt: "raise" refuses volumes whose header cannot be read or is not 3-D; "skip" logs and leaves them out.
        num_workers: threads that read headers.
        test_seed: for an evaluation: draws the subjects of `with_test_split`; None leaves the splits as they are.

    Raises:
        FileNotFoundError: if a folder or a listed file does not exist, or a folder holds no volumes.
        ValueError: if an argument is out of range; a folder has no task or group, mixes channels, or names values of
            label maps that are no integers; a task has two groups or fewer than two training subjects; splits share a
            subject; or volumes cannot be used.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"`validation_fraction` must be in [0, 1), got {validation_fraction}.")
    folders = data_folders(dataset_dirs)
    datalists = [read_folder(folder, spatial_dims=3) for folder in folders]
    tasks, groups = _per_folder("task", task, folders), _per_folder("group", group, folders)
    modalities = _per_folder("modality", modality, folders)
    for datalist, folder, *domain in zip(datalists, folders, tasks, groups, modalities, strict=True):
        _complete(datalist, folder, *domain)
        _refuse_without_domain(datalist, folder)
        refuse_other_channels(datalist.items(), 1)
    datalists = hold_out(datalists, validation_fraction, seed)
    warn_of_shared_subjects(datalists)
    images = [sorted({item["image"] for item in datalist.items()}) for datalist in datalists]
    merged = merge_datalists(datalists, folders)
    _warn_of_unknown(merged.items())
    every_image = [{"image": image} for image in sorted(set().union(*images))]
    files = Dataset(every_image, lambda item: read_header(item["image"]))
    found, items = read_all(files, on_corrupt, num_workers)  # headers, of which MONAI makes plain tuples
    headers = {item["image"]: VolumeHeader(*header) for item, header in zip(items, found, strict=True)}
    for folder, of_folder in zip(folders, images, strict=True):
        _refuse_mixed_channels(folder, {image: headers[image] for image in of_folder if image in headers})
    readable = merged.with_items(lambda items: [item for item in items if item["image"] in headers])
    datalist = _with_ids(readable._replace(headers=headers))
    return datalist if test_seed is None else with_test_split(datalist, seed=test_seed)


def read_segmentation(
    dataset_dir: str | Path | Sequence[str | Path] | None,
    structures: Sequence[str] | None = None,
    modality: str | Sequence[str] | None = None,
    fold: int | None = None,
    num_folds: int = 5,
    validation_fraction: float = 0.2,
    split_seed: int = 0,
    default_modality: str | Sequence[str] | None = None,
    given: tuple[list[Item], list[Item]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Datalist:
    """Read one or several folders with a Decathlon-style dataset.json of volumes and label maps.

    The classes are the structures that `labels` of dataset.json names, in the order of their values; several folders
    must name the same. Volumes without label map are left out, such as the test split of the Decathlon.

    A set without validation split gets one by whole subject: 0035 to 0040 where the subjects are those of BTCV
    (img0001, ...), as in the literature, or else a part of the training subjects. `fold` puts training and validation
    subjects together and splits them anew. A volume without subject is one of its own.

    Args:
        dataset_dir: the folder or folders.
        structures: names of those to learn, in the order of the classes; None takes all.
        modality: of the volumes ("CT" scales by a window), or one for each channel; None takes that of dataset.json.
        fold: fold for validation, from 0; None takes no folds.
        num_folds: number of folds, at least 2.
        validation_fraction: share of the training subjects, in [0, 1), at least one; 0 takes none, and so does a single
            subject.
        split_seed: draws other folds or validation subjects.
        default_modality: of volumes whose modality neither `modality` nor dataset.json says.
        given: items for training and for validation that a caller lists itself, such as MONAI Label, in place of
            folders, see `Datalist.complete`; needed if `dataset_dir` is None.
        settings: of the weights to go on from, whose structures and channels those items have.

    Raises:
        FileNotFoundError: if a folder or a listed file does not exist.
        ValueError: if an argument is out of range; dataset.json is malformed, or names no structures, or others than
            another folder; splits share a subject; or no volume has a label map.
    """
    if given is not None or dataset_dir is None:
        datalist = segmentation_of_weights(settings or {})
        training, validation = map(datalist.complete, given or ([], []))
        return datalist._replace(training=training, validation=validation)
    if fold is not None and not 0 <= fold < num_folds:
        raise InputError(f"`fold` must be in [0, {num_folds}), got {fold}.")
    if num_folds < 2 or not 0 <= validation_fraction < 1:
        raise InputError(
            "`num_folds` must be at least 2 and `validation_fraction` in [0, 1), "
            f"got {num_folds} and {validation_fraction}."
        )
    folders = data_folders(dataset_dir)
    datalists = [read_folder(folder, spatial_dims=3) for folder in folders]
    for datalist, folder in zip(datalists, folders, strict=True):
        _complete(datalist, folder, modality=modality, default_modality=default_modality)
        for item in datalist.items():
            item.setdefault("task", (folder if folder.is_dir() else folder.parent).name)
    class_names = _class_names(datalists, folders, structures)
    datalist = _with_label_maps(merge_datalists(datalists, folders))
    datalist = split_training(datalist, fold, num_folds, validation_fraction, split_seed)
    trained_on = datalist.training or datalist.items()
    common = trained_on[0]["modality"]
    in_channels = 1 if isinstance(common, str) else len(common)
    refuse_other_channels(trained_on, in_channels)
    _warn_of_unknown(datalist.training)
    if any(item["modality"] != common for item in trained_on):
        common = None
    return datalist._replace(label_names=(), class_names=class_names, modality=common, in_channels=in_channels)


def segmentation_of_weights(settings: Mapping[str, Any]) -> Datalist:
    """The structures and channels in the settings of weights, for a caller that lists the volumes itself."""
    if not settings.get("class_names"):
        raise InputError(
            "volumes that are listed without the names of their structures need weights that say them: put model.pt "
            "and model.json of a training into the bundle's `models`."
        )
    return Datalist(
        [], [], [],
        class_names=settings["class_names"],
        modality=settings.get("modality"),
        in_channels=settings.get("in_channels", 1),
    )  # fmt: skip


def read_volumes(
    dataset_dir: str | Path | Sequence[str | Path],
    modality: PerFolder = None,
    default_modality: str | Sequence[str] | None = None,
    in_channels: int = 1,
) -> list[Item]:
    """The volumes to embed or to segment; files may be missing, as predictions report what cannot be read.

    Args:
        dataset_dir: the folder or folders, or a single volume.
        modality: of every folder, see `aggregate`; with several channels, one for each channel. None takes that of
            dataset.json.
        default_modality: of volumes whose modality neither says.
        in_channels: channels that the network takes.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no volumes.
        ValueError: if a dataset.json is malformed, or a volume has other channels.
    """
    folders = data_folders(dataset_dir)
    datalists = [read_folder(folder, spatial_dims=3, check=False) for folder in folders]
    given = _per_folder("modality", modality, folders) if in_channels == 1 else [modality] * len(folders)
    for datalist, of_folder in zip(datalists, given, strict=True):
        for item in datalist.items():
            item["modality"] = _modality(of_folder, item.get("modality"), default_modality)
    items = merge_datalists(datalists, folders, check=False).items()
    refuse_other_channels(items, in_channels)
    _warn_of_unknown(items)
    return items


def _per_folder(key: str, value: PerFolder, folders: Sequence[Path]) -> list[str | None]:
    """What was given for every folder; None where nothing was."""
    if value is None or isinstance(value, str):
        return [value] * len(folders)
    if isinstance(value, Mapping):
        places = {name: [each for each in folders if name == each.name or absolute(name) == each] for name in value}
        unknown = [str(name) for name, found in places.items() if not found]
        if unknown:
            raise InputError(
                f"`{key}` must name folders among {', '.join(folder.name for folder in folders)}, "
                f"got {', '.join(unknown)}."
            )
        return [next((value[name] for name in places if folder in places[name]), None) for folder in folders]
    if len(value) != len(folders):
        raise InputError(f"`{key}` must have one value for each of the {len(folders)} folders, got {len(value)}.")
    return list(value)


def _complete(
    datalist: Datalist,
    folder: Path,
    task: str | None = None,
    group: str | None = None,
    modality: str | Sequence[str] | None = None,
    default_modality: str | Sequence[str] | None = None,
) -> None:
    """Give every item its subject and modality, and task, group and values of its structures if they are known."""
    base = folder if folder.is_dir() else folder.parent
    for item in datalist.items():
        item.setdefault("subject", os.path.relpath(item["image"], base))
        item.update({key: value for key, value in (("task", task), ("group", group)) if value is not None})
        item["modality"] = _modality(modality, item.get("modality"), default_modality)
        if isinstance(item.get("labels"), Mapping):
            item["labels"] = _named_values(item["labels"], folder)


def _modality(given: Any, own: Any, default: Any) -> str | list[str]:
    """A text, or a list with one for each channel; "unknown" where nothing says it."""
    chosen = next((each for each in (given, own, default) if each is not None), None)
    values = list(chosen.values()) if isinstance(chosen, Mapping) else chosen
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    names = ["unknown" if value is None else str(value).strip() or "unknown" for value in values]
    return names[0] if len(names) == 1 else names


def _warn_of_unknown(items: Sequence[Item]) -> None:
    unknown = [item["image"] for item in items if "unknown" in item["modality"]]
    if unknown:
        logger.warning(
            "%d volumes have no modality (%s): they will be scaled like MR. Write it into dataset.json, or set "
            "`modality`, such as CT.", len(unknown), unknown[0],
        )  # fmt: skip


def _named_values(labels: Mapping[str, Any], folder: Path) -> dict[str, list[int]]:
    """Values of each named structure, of {value: name} or {name: value or values}; 0 is background and left out."""
    structures: dict[str, list[int]] = {}
    for key, text in labels.items():
        name, given = (text, key) if key.strip().isdecimal() and isinstance(text, str) else (key, text)
        try:
            values = [int(value) for value in (given if isinstance(given, list) else [given])]
        except (TypeError, ValueError):
            raise InputError(
                f'the `labels` of {folder} must give integers names, such as {{"1": "spleen"}} or {{"spleen": 1}}, '
                f"got {{{key!r}: {text!r}}}: correct its dataset.json, or remove them."
            ) from None
        structures.setdefault(name, []).extend(value for value in values if value != 0)
    return {name: values for name, values in structures.items() if values}


def _refuse_without_domain(datalist: Datalist, folder: Path) -> None:
    for item in datalist.items():
        for key in ("task", "group"):
            if not isinstance(item.get(key), str) or not item[key].strip():
                raise InputError(
                    f"{folder} must have a `{key}`, got {item.get(key)!r} for {item['image']}: write it into its "
                    f"dataset.json, or give `{key}`, such as {{'{folder.name}': 'abdomen'}}."
                )


def _refuse_mixed_channels(folder: Path, headers: Mapping[str, VolumeHeader]) -> None:
    examples = {header.channels: image for image, header in headers.items()}
    if len(examples) > 1:
        raise InputError(
            f"{folder} must hold volumes of one number of channels, got "
            + " and ".join(f"{channels} in {image}" for channels, image in sorted(examples.items()))
            + ": make a data folder of each kind."
        )


def _with_ids(datalist: Datalist) -> Datalist:
    items = datalist.items()
    groups: dict[str, Item] = {}
    for item in items:
        first = groups.setdefault(item["task"], item)
        if item["group"] != first["group"]:
            raise InputError(
                f"task {item['task']!r} must have one group, got {first['group']!r} for {first['image']} and "
                f"{item['group']!r} for {item['image']}: give them one group, or two tasks."
            )
    task_names = sorted(groups)
    group_names = sorted({item["group"] for item in items})
    for item in items:
        item["task_id"], item["group_id"] = task_names.index(item["task"]), group_names.index(item["group"])
    for name in task_names:
        subjects = {item["subject"]: item["image"] for item in datalist.training if item["task"] == name}
        if len(subjects) < 2:
            only = next(iter(subjects.values()), groups[name]["image"])
            raise InputError(
                f"task {name!r} must have at least two training subjects, as the contrast needs, got {len(subjects)} "
                f"(see {only}): add volumes, give it the task of another folder, or leave its folder out."
            )
    return datalist._replace(task_names=task_names, group_names=group_names)


def _class_names(datalists: Sequence[Datalist], folders: Sequence[Path], structures: Sequence[str] | None) -> list[str]:
    """The chosen structures, or all in the order of their values; all folders must name the same."""
    found = [_structures(datalist, folder) for datalist, folder in zip(datalists, folders, strict=True)]
    for names, folder in zip(found, folders, strict=True):
        if {*names} != {*found[0]}:
            raise InputError(
                f"all folders must name the same structures, got {shorten(found[0])} in {folders[0]} and "
                f"{shorten(names)} in {folder}: what one set has not contoured would count as background."
            )
    if structures is None:
        return found[0]
    chosen = [structures] if isinstance(structures, str) else list(structures)
    if not chosen or not {*chosen} <= {*found[0]} or len({*chosen}) < len(chosen):
        raise InputError(
            f"`structures` must be different ones of {', '.join(found[0])}, got {', '.join(map(str, chosen))}."
        )
    return chosen


def _structures(datalist: Datalist, folder: Path) -> list[str]:
    names: dict[str, None] = {}
    for item in datalist.items():
        labels = item.get("labels")
        if not isinstance(labels, Mapping) or not labels:
            raise InputError(
                f"{folder} must have a dataset.json that names the values of its label maps, such as "
                f'"labels": {{"1": "spleen"}}, got {labels!r}: write them there.'
            )
        names |= dict.fromkeys(sorted(labels, key=lambda name: min(labels[name])))
    return list(names)


def _with_label_maps(datalist: Datalist) -> Datalist:
    kept = datalist.with_items(lambda items: [item for item in items if isinstance(item.get("label"), str)])
    if not kept.items():
        raise InputError(
            "dataset.json must list volumes with the path of a label map (`label`), got "
            f"{len(datalist.items())} without: write it there for each volume."
        )
    for split in SPLITS:
        without = len(getattr(datalist, split)) - len(getattr(kept, split))
        if without:
            logger.warning("%d of the volumes in `%s` have no label map and are left out.", without, split)
    return kept
