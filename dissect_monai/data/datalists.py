"""Data lists: read, check, merge, and draw a fraction by subject."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dissect_monai.common import NO_FINDING, InputError, Item, shorten
from dissect_monai.data.headers import VolumeHeader
from dissect_monai.data.readers import DICOM_SUFFIXES, ITK_SUFFIXES, NIFTI_SUFFIXES, PICTURE_SUFFIXES, image_format

PATH_KEYS = ("image", "label")  # the label is a path in segmentation
SPLITS = ("training", "validation", "test")
VOLUME_SUFFIXES = DICOM_SUFFIXES + ITK_SUFFIXES + NIFTI_SUFFIXES
logger = logging.getLogger(__name__)


class Datalist(NamedTuple):
    """What `read_datalist` found; read it by name."""

    training: list[Item]  # "image": absolute path; "label": floats 1, 0, NaN (unknown) or a path; "subject": str
    validation: list[Item]
    test: list[Item]
    label_names: list[str]  # one per value of a label; empty when there are no such labels


def read_datalist(
    dataset_dir: str | Path | Sequence[str | Path], spatial_dims: int = 2, check: bool = True
) -> Datalist:
    """Read one or several data folders: with a Decathlon-style dataset.json, or with nothing but images.

    dataset.json holds the lists `training`, `validation` and `test` of {"image", "label", "subject", ...}, or of
    image paths, relative to its folder; all but `training` and "image" may be missing. A label is a list of 0, 1 or
    null (unknown), one such value, a mapping of names to values, or the path of a label map; `label_names` names the
    values, else they are called finding_0, finding_1, ... `task`, `group` and `modality` of the whole set are copied to
    its items, and so are `labels`, the names of the values of its label maps.

    Without dataset.json, every image in the folder and below, sorted, or the image named instead of a folder, becomes a
    training item without subject, which counts as a subject of its own; hidden files are skipped.

    Several folders are merged: label names are united, what another set does not label is unknown (NaN), and
    subjects become "<folder name>/<subject>", since the numbering of different data sets may coincide.

    Args:
        dataset_dir: the folder or folders.
        spatial_dims: 2 or 3; in folders without dataset.json, 3 takes a folder of DICOM slices as one item and
            leaves out PNG, JPEG, TIFF and BMP.
        check: False lets listed files be missing and splits share subjects, for predictions, which name each image
            that cannot be read and do the rest.

    Returns:
        The three splits and the names of the label values.

    Raises:
        FileNotFoundError: if a folder or (with `check`) a listed file does not exist, or a folder holds no images.
        ValueError: if dataset.json is malformed, or (with `check`) splits share a subject or an image.
    """
    if spatial_dims not in (2, 3):
        raise InputError(f"`spatial_dims` must be 2 or 3, got {spatial_dims!r}.")
    folders = data_folders(dataset_dir)
    return merge_datalists([read_folder(folder, spatial_dims, check) for folder in folders], folders, check)


def data_folders(dataset_dir: str | Path | Sequence[str | Path]) -> list[Path]:
    """Absolute paths of the one or several folders that were given.

    Raises:
        ValueError: if none is given, or one twice.
    """
    given = _listed(dataset_dir) if isinstance(dataset_dir, (str, Path)) else dataset_dir
    folders = [Path(os.path.abspath(os.path.expanduser(folder))) for folder in given]
    if not folders or len(set(folders)) < len(folders):
        raise InputError(f"`dataset_dir` must name one folder or several different ones, got {dataset_dir!r}.")
    return folders


def _listed(given: str | Path) -> list[str | Path]:
    """The folders of a list that lacks the quotes within, which a command line hands on as one text: [A, B]."""
    text = str(given).strip()
    if not (text.startswith("[") and text.endswith("]")) or Path(text).exists():
        return [given]
    return [name.strip(" '\"") for name in text[1:-1].split(",")]


def labelled(items: list[Item]) -> list[Item]:
    """The items with a known value in their label: those that findings can be learnt from."""
    return [item for item in items if not np.isnan(_values(item)).all()]


def label_matrix(items: list[Item], label_names: Sequence[str]) -> np.ndarray:
    """Labels as a float array of shape (N, C), 1, 0 or NaN (unknown); an item without label is unknown throughout.

    Raises:
        ValueError: if a label has another length than `label_names`.
    """
    matrix = np.full((len(items), len(label_names)), np.nan)
    for row, item in zip(matrix, items, strict=True):
        values = _values(item)
        if values and len(values) != len(label_names):
            raise InputError(f"The label of {item['image']} must have {len(label_names)} values, got {len(values)}.")
        row[: len(values)] = values
    return matrix


def finding_matrix(items: list[Item], label_names: Sequence[str], findings: Sequence[str]) -> np.ndarray:
    """Columns of the label matrix by name, (N, len(findings)); "No finding" is derived if it is no label itself.

    It is 1 where every label is 0, 0 where one is 1, and else NaN (unknown).

    Raises:
        ValueError: if a finding is unknown.
    """
    columns = dict(zip(label_names, label_matrix(items, label_names).T, strict=True))
    own = next((name for name in label_names if name.lower() == NO_FINDING.lower()), None)
    if own is None:
        labels = label_matrix(items, label_names)
        any_unknown = np.where(np.isnan(labels).any(1), np.nan, 1.0)
        columns[NO_FINDING] = np.where((labels == 1).any(1), 0.0, any_unknown)
    else:
        columns.setdefault(NO_FINDING, columns[own])  # CheXpert writes "No Finding"
    unknown = [name for name in findings if name not in columns]
    if unknown:
        raise InputError(f"`findings` must be among {', '.join(columns)}, got {', '.join(unknown)}.")
    return np.stack([columns[name] for name in findings], axis=1)


def with_findings(
    datalist: Datalist, findings: str | Sequence[str] | None = None, allow_missing: bool = False
) -> Datalist:
    """The labelled items of a data list, their labels holding some findings in a given order.

    Args:
        datalist: as `read_datalist` gives it.
        findings: names of its labels, or "No finding"; None keeps all.
        allow_missing: whether findings that the data list lacks are unknown instead of refused.

    Raises:
        ValueError: if the data list lacks a finding, or all of them.
    """
    names = list(datalist.label_names) if findings is None else [findings] if isinstance(findings, str) else [*findings]
    if not datalist.label_names:
        raise InputError(
            "labels are needed, and there are none: give a --dataset_dir whose dataset.json has a `label`."
        )
    if len(set(names)) < len(names):
        raise InputError(f"`findings` must be different, got {', '.join(names)}.")
    known = [name for name in names if name in datalist.label_names]
    # "No finding" of a model that knows more findings than these labels is unknown.
    if NO_FINDING in names and NO_FINDING not in known and {*names} - {NO_FINDING} <= {*known}:
        known.append(NO_FINDING)
    if not known or (len(known) < len(names) and not allow_missing):
        lacking = ", ".join(name for name in names if name not in known)
        raise InputError(f"the labels must know {lacking}, got {', '.join(datalist.label_names)}.")

    def relabelled(items: list[Item]) -> list[Item]:
        items = labelled(items)
        values = dict(zip(known, finding_matrix(items, datalist.label_names, known).T, strict=True))
        unknown = np.full(len(items), np.nan)
        columns = np.stack([values.get(name, unknown) for name in names], axis=1)
        return labelled([{**item, "label": row} for item, row in zip(items, columns.tolist(), strict=True)])

    splits = {split: relabelled(getattr(datalist, split)) for split in SPLITS}
    return datalist._replace(**splits, label_names=names)


def read_folder(folder: Path, spatial_dims: int, check: bool = True) -> Datalist:
    """Data list of one folder, as `read_datalist` describes it, without a look at what its splits share."""
    if not folder.exists():
        raise FileNotFoundError(f"`dataset_dir` must be an existing folder, got {folder}. Correct the path.")
    if folder.name == "dataset.json":
        return _read_json(folder, check)
    if not folder.is_dir():
        if image_format(folder) is None:
            raise InputError(f"`dataset_dir` must be a folder or an image, got the file {folder}. Name the folder.")
        return Datalist([{"image": str(folder)}], [], [], [])
    if (folder / "dataset.json").exists():
        return _read_json(folder / "dataset.json", check)
    images = sorted(_find_images(folder, spatial_dims))
    if not images:
        suffixes = " ".join((PICTURE_SUFFIXES if spatial_dims == 2 else ()) + VOLUME_SUFFIXES)
        raise FileNotFoundError(f"{folder} must hold a dataset.json or images ({suffixes}), got neither.")
    return Datalist([{"image": image} for image in images], [], [], [])


def _find_images(folder: Path, spatial_dims: int) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(parent, name) for name in names if not name.startswith(".")]
        formats = {path: image_format(path) for path in paths}
        if spatial_dims == 2:
            yield from (path for path in paths if formats[path])
        else:
            yield from (path for path in paths if formats[path] in ("itk", "nifti"))
            if "dicom" in formats.values():
                yield parent


def _read_json(path: Path, check: bool) -> Datalist:
    try:
        spec = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path} must be JSON in UTF-8, got: {error}. Correct it there.") from error
    if not isinstance(spec, dict) or "training" not in spec:
        got = f"the keys {list(spec)}" if isinstance(spec, dict) else f"a {type(spec).__name__}"
        raise InputError(f"{path} must be a JSON object with a list `training`, got {got}.")
    for key in spec.keys() - set(SPLITS) - {"label_names"}:
        if isinstance(spec[key], list) and any(isinstance(item, dict) and "image" in item for item in spec[key]):
            raise InputError(f"{path}: lists of images must be called {', '.join(SPLITS)}, got `{key}`. Rename it.")
    shared = {key: spec[key] for key in ("task", "group", "modality") if key in spec}
    if isinstance(spec.get("labels"), dict):  # else they are no names
        shared["labels"] = spec["labels"]
    splits = {split: _read_items(spec.get(split, []), split, path, shared) for split in SPLITS}
    items = [item for split in SPLITS for item in splits[split]]
    if check:
        _refuse_missing([item[key] for item in items for key in PATH_KEYS if isinstance(item.get(key), str)], path)
    names = _label_names(items, spec.get("label_names"), path)
    for split in SPLITS:
        for index, item in enumerate(splits[split]):
            if not isinstance(item.get("label", ""), str):
                item["label"] = _read_label(item["label"], names, f"{path}: `{split}`[{index}] ({item['image']})")
    return Datalist(**splits, label_names=names)


def _read_items(given: Any, split: str, path: Path, shared: Item) -> list[Item]:
    if not isinstance(given, list):
        raise InputError(f"{path}: `{split}` must be a list of items, got a {type(given).__name__}.")
    items = []
    for index, entry in enumerate(given):
        entry = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise InputError(f'{path}: `{split}`[{index}] must have the path of an "image", got {entry}.')
        item = {**shared, **entry}
        for key in ("label", "subject"):
            if item.get(key) is None:
                item.pop(key, None)
        for key in PATH_KEYS:
            if isinstance(item.get(key), str):
                item[key] = os.path.abspath(os.path.join(path.parent, item[key]))
        if "subject" in item:
            item["subject"] = str(item["subject"])
        items.append(item)
    return items


def _refuse_missing(paths: list[str], datalist: Path) -> None:
    @cache
    def listing(folder: str) -> set[str]:
        try:
            return set(os.listdir(folder))
        except OSError:
            return set()

    # One listing per folder is much faster than asking for each of 100,000 files, above all on a network drive.
    unlisted = [path for path in paths if os.path.basename(path) not in listing(os.path.dirname(path))]
    missing = [path for path in unlisted if not os.path.exists(path)]
    if missing:
        raise FileNotFoundError(
            f"{datalist} must list existing files, got {len(missing)} missing: {shorten(missing, 3)}. "
            "Correct the paths, which are relative to its folder, or remove the items."
        )


def _label_names(items: list[Item], given: Any, path: Path) -> list[str]:
    given = [] if given is None else given
    if not isinstance(given, list) or len({name for name in given if isinstance(name, str)}) < len(given):
        raise InputError(f"{path}: `label_names` must be a list of different names, got {given}.")
    labels = [item["label"] for item in items if "label" in item and not isinstance(item["label"], str)]
    if given or not labels:
        return list(given) if labels else []
    named = dict.fromkeys(name for label in labels if isinstance(label, dict) for name in label)
    length = len(labels[0]) if isinstance(labels[0], list) else 1
    return list(named) or [_name(None, index) for index in range(length)]


def _read_label(label: Any, names: list[str], where: str) -> list[float]:
    if isinstance(label, dict):
        if not set(label) <= set(names):
            raise InputError(f"{where}: the label must use the names {names}, got {list(label)}.")
        label = [label.get(name) for name in names]
    label = label if isinstance(label, list) else [label]
    if len(label) != len(names):
        raise InputError(f"{where}: the label must have {len(names)} values ({shorten(names, 3)}), got {len(label)}.")
    # NaN, which Python's JSON reads, is the one value that differs from itself.
    values = [float("nan") if value is None or value != value else value for value in label]
    if not all(isinstance(value, (int, float)) and (value in (0, 1) or value != value) for value in values):
        raise InputError(f"{where}: label values must be 1, 0 or null (unknown), got {label}.")
    return [float(value) for value in values]


def merge_datalists(datalists: list[Datalist], folders: list[Path], check: bool = True) -> Datalist:
    """One data list of those of several folders, as `read_datalist` describes it; that of one is left as it is.

    Raises:
        ValueError: if (with `check`) splits share a subject or an image.
    """
    datalist = datalists[0] if len(datalists) == 1 else _merge(datalists, folders)
    if check:
        _refuse_leaks(datalist)
    return datalist


def _merge(datalists: list[Datalist], folders: list[Path]) -> Datalist:
    label_names = list(dict.fromkeys(name for datalist in datalists for name in datalist.label_names))
    short = [folder.name for folder in folders]
    prefixes = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    merged: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for datalist, prefix in zip(datalists, prefixes, strict=True):
        for split in SPLITS:
            for item in getattr(datalist, split):
                if "subject" in item:
                    item["subject"] = f"{prefix}/{item['subject']}"
                if isinstance(item.get("label"), list):
                    values = dict(zip(datalist.label_names, item["label"], strict=True))
                    item["label"] = [values.get(name, float("nan")) for name in label_names]
                merged[split].append(item)
    return Datalist(**merged, label_names=label_names)


def _refuse_leaks(datalist: Datalist) -> None:
    for key in ("subject", "image"):
        where = {
            split: {item[key]: item["image"] for item in getattr(datalist, split) if key in item} for split in SPLITS
        }
        for first, second in itertools.combinations(SPLITS, 2):
            shared = sorted(where[first].keys() & where[second].keys())
            if shared:
                example = " and ".join(sorted({where[split][shared[0]] for split in (first, second)}))
                raise InputError(
                    f"`{first}` and `{second}` must share no {key}, got {len(shared)} in both: {shorten(shared, 5)} "
                    f"(see {example}). Move each to one split of dataset.json, else the evaluation is on training data."
                )
    for split in SPLITS:
        images = [item["image"] for item in getattr(datalist, split)]
        if len(set(images)) < len(images):
            repeated = [image for image, count in Counter(images).items() if count > 1]
            logger.warning("`%s` lists %d images more than once: %s.", split, len(repeated), shorten(repeated, 3))


def _values(item: Item) -> list[float]:
    label = item.get("label")
    return label if isinstance(label, list) else []


def _positives(items: list[Item]) -> set[int]:
    return {index for item in items for index, value in enumerate(_values(item)) if value == 1}


def _name(label_names: Sequence[str] | None, index: int) -> str:
    return label_names[index] if label_names else f"finding_{index}"


class DomainDatalist(NamedTuple):
    """What `aggregate` found; read it by name."""

    # "image", "task", "group", "modality", "subject": str; "task_id", "group_id": int; "label" as in `Datalist`;
    # "labels": the structures of label maps, {name: its values}. The last two may be missing.
    training: list[Item]
    validation: list[Item]
    test: list[Item]
    label_names: list[str]  # as in `Datalist`
    task_names: list[str]  # sorted; "task_id" is the place in it
    group_names: list[str]  # sorted; "group_id" is the place in it
    headers: dict[str, VolumeHeader]  # by image


class SegmentationDatalist(NamedTuple):
    """What `read_segmentation` found; read it by name."""

    # "image", "label": paths; "subject", "task": str; "modality": str, or a list of them, one a channel;
    # "labels": {name: its values in the label map}.
    training: list[Item]
    validation: list[Item]
    test: list[Item]
    class_names: list[str]  # structures of the classes 1, 2, ...
    modality: str | list[str] | None  # of all training volumes; None if they differ
    in_channels: int

    def complete(self, items: Sequence[Item]) -> list[Item]:
        """Items that a caller lists by "image" and "label" alone, with all that those read here have.

        The label maps must hold the classes themselves, 1, 2, ... in the order of `class_names`, and each image is a
        subject of its own. What an item says of itself stays.
        """
        labels = {name: [value] for value, name in enumerate(self.class_names, start=1)}
        common = {"task": "given", "modality": self.modality or "unknown", "labels": labels}
        return [{**common, "subject": Path(item["image"]).name, **item} for item in items]
