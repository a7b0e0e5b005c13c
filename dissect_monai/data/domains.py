"""Several data sets of volumes as one: each item knows its task, group and modality."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from dissect_monai.common import InputError, Item
from dissect_monai.data.datalists import SPLITS, Datalist, DomainDatalist, data_folders, merge_datalists, read_folder
from dissect_monai.data.headers import VolumeHeader, read_header
from dissect_monai.data.splits import hold_out, warn_of_shared_subjects

logger = logging.getLogger(__name__)
# A value for all folders, one a folder, or one by the name or path of a folder.
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
) -> DomainDatalist:
    """Merge data folders of 3-D volumes, each with a task and a group, and read the headers of all their files.

    The folders are those of `read_datalist`: with a Decathlon-style dataset.json, whose `task`, `group` and `modality`
    ("CT", or {"0": "CT"}) count unless given here, or with nothing but volumes. Folders may share a task. Splits are by
    whole subject; an item without subject is one of its own. An unknown modality is logged, and is not CT. `labels` of
    dataset.json names the structures of its label maps, as the Decathlon has it, {"0": "background", "1": "spleen"}, or
    as nnU-Net has it, {"background": 0, "spleen": 1, "kidneys": [2, 3]}; 0 is background and left out.

    Args:
        dataset_dirs: the folder or folders.
        task: of every folder: one for all, a list parallel to the folders (null leaves what dataset.json says), or a
            mapping from names or paths of folders.
        group: the same of the group, such as the region.
        modality: the same of the modality.
        validation_fraction: share in [0, 1) of the subjects of a task whose folders have no validation split that
            becomes one, at least one subject; none where fewer than two would be left to train on. Folders of one task
            in which a subject has the same name are taken to show the same subject.
        seed: draws other subjects for it.
        on_corrupt: "raise" refuses volumes whose header shows that they cannot be used; "skip" logs them and leaves
            them out.
        num_workers: threads that read headers.

    Raises:
        FileNotFoundError: if a folder or a listed file does not exist, or a folder holds no volumes.
        ValueError: if an argument is out of range; a folder has no task or group, mixes channels, or names values of
            label maps that are no integers; a task has two groups or fewer than two training subjects; splits share a
            subject; or volumes cannot be used, which are those that cannot be read or are not 3-D.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"`validation_fraction` must be in [0, 1), got {validation_fraction}.")
    if on_corrupt not in ("raise", "skip"):
        raise InputError(f'`on_corrupt` must be "raise" or "skip", got {on_corrupt!r}.')
    folders = data_folders(dataset_dirs)
    values = {"task": task, "group": group, "modality": modality}
    given = {key: _per_folder(key, value, folders) for key, value in values.items()}
    datalists = []
    for index, folder in enumerate(folders):
        datalist = read_folder(folder, spatial_dims=3)
        _complete(datalist, folder, {key: given[key][index] for key in ("task", "group")})
        _set_modality(datalist, folder, given["modality"][index])
        datalists.append(datalist)
    datalists = hold_out(datalists, validation_fraction, seed)
    warn_of_shared_subjects(datalists)
    images = [{item["image"] for item in _items(datalist)} for datalist in datalists]
    merged = merge_datalists(datalists, folders)
    headers = _read_headers(sorted(set().union(*images)), on_corrupt, num_workers)
    for folder, of_folder in zip(folders, images, strict=True):
        _refuse_mixed_channels(folder, {image: headers[image] for image in sorted(of_folder & headers.keys())})
    readable = {split: [item for item in getattr(merged, split) if item["image"] in headers] for split in SPLITS}
    return _with_ids(merged._replace(**readable), headers)


def read_volumes(dataset_dirs: str | Path | Sequence[str | Path], modality: PerFolder = None) -> Datalist:
    """Read folders of 3-D volumes whose embeddings or predictions are wanted: each gets a modality, and no more.

    Listed files may be missing, for predictions name each volume that cannot be read and do the rest.

    Args:
        dataset_dirs: the folder or folders, or a single volume; see `aggregate`.
        modality: of every folder, see `aggregate`.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no volumes.
        ValueError: if a dataset.json is malformed, or has several channels.
    """
    folders = data_folders(dataset_dirs)
    datalists = [read_folder(folder, spatial_dims=3, check=False) for folder in folders]
    for datalist, folder, given in zip(datalists, folders, _per_folder("modality", modality, folders), strict=True):
        _set_modality(datalist, folder, given)
    return merge_datalists(datalists, folders, check=False)


def _per_folder(key: str, value: PerFolder, folders: list[Path]) -> list[str | None]:
    """What was given for every folder; None where nothing was."""
    if value is None or isinstance(value, str):
        return [value] * len(folders)
    if isinstance(value, Mapping):
        names = {str(name): text for name, text in value.items()}
        paths = {os.path.abspath(os.path.expanduser(name)): text for name, text in names.items()}
        unknown = [name for name, path in zip(names, paths, strict=True) if not _is_among(name, path, folders)]
        if unknown:
            raise InputError(
                f"`{key}` must name folders among {', '.join(folder.name for folder in folders)}, "
                f"got {', '.join(unknown)}."
            )
        return [names.get(folder.name, paths.get(str(folder))) for folder in folders]
    if len(value) != len(folders):
        raise InputError(f"`{key}` must have one value for each of the {len(folders)} folders, got {len(value)}.")
    return list(value)


def _is_among(name: str, path: str, folders: list[Path]) -> bool:
    return any(name == folder.name or path == str(folder) for folder in folders)


def _items(datalist: Datalist) -> list[Item]:
    return [item for split in SPLITS for item in getattr(datalist, split)]


def _complete(datalist: Datalist, folder: Path, given: Mapping[str, str | None]) -> None:
    """Give every item its task, group and subject."""
    base = folder if folder.is_dir() else folder.parent
    for item in _items(datalist):
        item.update({key: value for key, value in given.items() if value is not None})
        for key in ("task", "group"):
            if not isinstance(item.get(key), str) or not item[key].strip():
                raise InputError(
                    f"{folder} must have a `{key}`, got {item.get(key)!r} for {item['image']}: write it into its "
                    f"dataset.json, or give `{key}`, such as {{'{folder.name}': 'abdomen'}}."
                )
        if isinstance(item.get("labels"), Mapping):
            item["labels"] = named_values(item["labels"], folder)
        item.setdefault("subject", os.path.relpath(item["image"], base))


def _set_modality(datalist: Datalist, folder: Path, given: str | None) -> None:
    """Give every item one modality, "unknown" where nothing says it."""
    for item in _items(datalist):
        item["modality"] = _modality(item.get("modality") if given is None else given, folder)
    unknown = [item["image"] for item in _items(datalist) if item["modality"] == "unknown"]
    if unknown:
        logger.warning(
            "%s has no modality for %d volumes (%s): they will be scaled as MR is. Write it into its dataset.json, or "
            "give `modality`.", folder, len(unknown), unknown[0],
        )  # fmt: skip


def _modality(given: Any, folder: Path) -> str:
    names = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, list) else [given]
    if len(names) != 1:
        raise InputError(
            f"{folder} must have one channel, got the modalities {names}: make a data folder of each channel."
        )
    return "unknown" if names[0] is None else str(names[0]).strip() or "unknown"


def named_values(labels: Mapping[str, Any], folder: Path) -> dict[str, list[int]]:
    """Values of each named structure, of {value: name} or {name: value or values}; 0 is background and left out.

    Raises:
        ValueError: if a value is no integer; `folder` is what the message names.
    """
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


def _read_headers(images: list[str], on_corrupt: str, num_workers: int) -> dict[str, VolumeHeader]:
    def read(image: str) -> VolumeHeader | ValueError:
        try:
            return read_header(image)
        except ValueError as error:
            return error

    with ThreadPool(max(1, num_workers)) as pool:
        results = dict(zip(images, pool.map(read, images), strict=True))
    headers = {image: result for image, result in results.items() if isinstance(result, VolumeHeader)}
    errors = [str(result) for result in results.values() if isinstance(result, ValueError)]
    if errors and (on_corrupt == "raise" or not headers):
        raise InputError(
            f"`dataset_dirs` must hold volumes that can be used, got {len(errors)} of {len(images)} that cannot:\n  "
            + "\n  ".join(errors[:5] + ["..."] * (len(errors) > 5))
        )
    for error in errors:
        logger.warning("Skipped: %s", error)
    return headers


def _refuse_mixed_channels(folder: Path, headers: Mapping[str, VolumeHeader]) -> None:
    examples = {header.channels: image for image, header in headers.items()}
    if len(examples) > 1:
        raise InputError(
            f"{folder} must hold volumes of one number of channels, got "
            + " and ".join(f"{channels} in {image}" for channels, image in sorted(examples.items()))
            + ": make a data folder of each kind."
        )


def _with_ids(datalist: Datalist, headers: dict[str, VolumeHeader]) -> DomainDatalist:
    items = _items(datalist)
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
    return DomainDatalist(*datalist, task_names, group_names, headers)
