"""Data lists: read, check, merge, and the matrix of their labels."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from monai.utils import ensure_tuple
from numpy.typing import NDArray

from dissect_monai.common import NO_FINDING, InputError, Item, shorten
from dissect_monai.data import dicom
from dissect_monai.data.layouts import LABELS, Folders, label_folders, label_of, names_of, subject_of
from dissect_monai.data.readers import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    VolumeHeader,
    image_format,
    is_picture,
    is_volume,
    refuse_odd_file,
)

logger = logging.getLogger(__name__)
PATH_KEYS = ("image", "label")  # the label is a path in segmentation
SPLITS = ("training", "validation", "test")
_FOR_PICTURES = (
    "X-rays are for the bundles pretrain_vq_ssl (without volumes.json) and cxr_classify; for other pictures train with "
    "`spatial_dims` 2."
)


class Datalist(NamedTuple):
    """The items of a data set in three splits, and what they have in common.

    Items have an "image", an absolute path. They may have a "label", floats 1, 0 or NaN (unknown) or the path of a
    label map; "labels", the structures of the label map, {name: its values}; "colours", those of masks, {name: [red,
    green, blue]}; "subject", "task" and "group", texts; and "modality", a text, or a list with one for each channel.
    "origin" is their data folder and their subject there.
    """

    training: list[Item]
    validation: list[Item]
    test: list[Item]
    label_names: Sequence[str] = ()  # one for each value of a label
    task_names: Sequence[str] = ()  # sorted, of `aggregate`
    group_names: Sequence[str] = ()  # sorted, of `aggregate`
    headers: Mapping[str, VolumeHeader] = {}  # by image, of `aggregate`
    class_names: Sequence[str] = ()  # structures of the classes 1, 2, ..., of `read_segmentation`
    modality: str | list[str] | None = None  # of all training volumes of `read_segmentation`; None if they differ
    in_channels: int = 1
    mask_values: Mapping[str, int | list[int]] = {}  # of each class in masks of pictures, of `read_segmentation`

    def items(self) -> list[Item]:
        """Those of all splits."""
        return [*self.training, *self.validation, *self.test]

    def with_items(self, change: Callable[[list[Item]], list[Item]]) -> Datalist:
        """The same data list with other items, made of those of each split."""
        training, validation, test = map(change, self[:3])
        return self._replace(training=training, validation=validation, test=test)

    def labelled(self) -> Datalist:
        """The same data list without the items whose label has no known value."""
        return self.with_items(labelled)

    def with_findings(self, findings: str | Sequence[str] | None = None, allow_missing: bool = False) -> Datalist:
        """The labelled items, their labels reduced to some findings, or all, as `label_matrix` does it."""
        own = [*self.label_names]
        names = own if findings is None else [findings] if isinstance(findings, str) else [*findings]
        if not own:
            raise InputError(
                "`dataset_dir` must have labels, got none: write a `label` for each image into dataset.json."
            )
        if len(set(names)) < len(names):
            raise InputError(f"`findings` must be different, got {', '.join(names)}.")

        def relabelled(items: list[Item]) -> list[Item]:
            rows = label_matrix(items, own, names, allow_missing).tolist()
            return labelled([{**item, "label": row} for item, row in zip(items, rows, strict=True)])

        return self.with_items(relabelled)._replace(label_names=names)

    def complete(self, items: Sequence[Item]) -> list[Item]:
        """Add what items lack that give nothing but "image" and "label", as MONAI Label lists them.

        Their label maps must hold the classes themselves, 1, 2, ... in the order of `class_names`, or the larger values
        of `mask_values`, such as 255, and each image is a subject of its own. What an item gives stays.
        """
        labels = {name: [value] for value, name in enumerate(self.class_names, start=1)}
        for name, value in self.mask_values.items():
            if name in labels and isinstance(value, int) and value > len(labels):
                labels[name].append(value)
        common = {"task": "given", "modality": self.modality or "unknown", "labels": labels}
        return [{**common, "subject": Path(item["image"]).name, **item} for item in items]


def read_datalist(
    dataset_dir: str | Path | Sequence[str | Path], spatial_dims: int = 2, check: bool = True
) -> Datalist:
    """Read one or several data folders: with a Decathlon-style dataset.json, or with nothing but images.

    dataset.json holds the lists `training`, `validation` and `test` of {"image", "label", "subject", ...} or of image
    paths, relative to its folder; only `training` and "image" are required. A label is a list of 0, 1 or null
    (unknown), a mapping of names to such values, or the path of a label map. `label_names` names the values, else
    they are called finding_0, finding_1, ... `task`, `group`, `modality` and `labels` (the names of the values of label
    maps; else `label_names` names 1, 2, ...) of the whole set are copied to its items.

    Without dataset.json, every image in the folder and below, sorted, or the image given instead of a folder, becomes a
    training item. Its subject is the PatientID of DICOM; without one, it counts as a subject of its own. See `walk` and
    `without_labels` for what is left out. `subject_pattern` of dataset.json finds the subject in the name of a file
    that is listed without one, see `subject_of`.

    Several folders are merged: label names are united, labels that a set does not have are unknown (NaN), and subjects
    become "<folder name>/<subject>".

    Args:
        dataset_dir: the folder or folders.
        spatial_dims: 2 or 3; in folders without dataset.json, 3 takes a folder of DICOM slices as one item, or, if it
            holds several series, the first file of each, and leaves out PNG, JPEG, TIFF and BMP.
        check: False allows missing files and subjects in several splits, for predictions.

    Raises:
        FileNotFoundError: if a folder or (with `check`) a listed file does not exist, or a folder holds no images.
        ValueError: if dataset.json is malformed, or (with `check`) splits share a subject or an image, or 2-D images
            are volumes.
    """
    folders = data_folders(dataset_dir)
    parts = [read_folder(folder, spatial_dims, check) for folder in folders]
    return merge_datalists(parts, folders, check)


def _refuse_other_dims(datalist: Datalist, folder: Path, spatial_dims: int, check: bool = True) -> None:
    """Refuse volumes as 2-D images, and the reverse; for predictions (no `check`) only if both of the first are."""
    first = [Path(item["image"]) for item in datalist.items()[:2]]
    found = [*map(is_volume if spatial_dims == 2 else is_picture, first)]
    are_odd = any(found) if check else bool(found) and all(found)
    if spatial_dims == 2 and (are_odd or _are_slices(folder, first)):
        raise InputError(
            f"`dataset_dir` must hold 2-D images, got volumes in {folder}: pretrain on them by pretrain_vq_ssl with "
            "configs/volumes.json after train.json, or by hssl_multidomain; segment them by seg_finetune_btcv."
        )
    if spatial_dims == 3 and are_odd:
        raise InputError(f"`dataset_dir` must hold volumes, got 2-D images in {folder}: {_FOR_PICTURES}")


def _are_slices(folder: Path, images: Sequence[Path]) -> bool:
    """Whether files that nobody has listed are slices of one scan."""
    if (folder / "dataset.json").exists() or [*map(image_format, images)] != ["dicom"] * 2:
        return False
    first, second = map(dicom.read_tags, images)
    same = first.get("SeriesInstanceUID") == second.get("SeriesInstanceUID")
    return same and "ImagePositionPatient" in first  # a film has none


def data_folders(dataset_dir: str | Path | Sequence[str | Path]) -> list[Path]:
    """Absolute paths of the folders, for which their dataset.json may stand; a `ValueError` if there is one twice."""
    paths = [Path(os.path.abspath(os.path.expanduser(folder))) for folder in _listed(dataset_dir)]
    folders = [path.parent if path.name == "dataset.json" else path for path in paths]
    if not folders or len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise InputError(f"`dataset_dir` must name one folder or several different ones, got {dataset_dir!r}.")
    return folders


def _listed(given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    """Also of a list that a command line passes as one text, without inner quotes: [A, B]."""
    text = str(given).strip()
    if not isinstance(given, (str, Path)) or Path(text).exists() or not (text.startswith("[") and text.endswith("]")):
        return ensure_tuple(given)
    return [name.strip(" '\"") for name in text[1:-1].split(",")]


def labelled(items: Sequence[Item]) -> list[Item]:
    """The items whose label has a known value."""
    return [item for item in items if not np.isnan(_values(item)).all()]


def label_matrix(
    items: Sequence[Item],
    label_names: Sequence[str],
    findings: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> NDArray[Any]:
    """Labels of shape (N, C), 1, 0 or NaN (unknown); an item without label is unknown throughout.

    The columns are `findings`, or `label_names` if None. "No finding" is derived if it is no label itself: 1 where
    every label is 0, 0 where one is 1, and else NaN. Findings without labels are refused, or unknown with
    `allow_missing` if there are others; "No finding" is unknown too then, as they may be there.
    """
    rows = [_values(item) or [np.nan] * len(label_names) for item in items]
    labels = np.array(rows, dtype=float).reshape(len(items), len(label_names))
    if findings is None:
        return labels
    columns = dict(zip(label_names, labels.T, strict=True))
    missing = [name for name in findings if name not in (*label_names, NO_FINDING)]
    if not missing and NO_FINDING not in columns:
        all_zero = np.where(np.isnan(labels).any(1), np.nan, 1.0)
        derived = np.where((labels == 1).any(1), 0.0, all_zero)
        own = next((name for name in label_names if name.lower() == NO_FINDING.lower()), None)  # CheXpert: "No Finding"
        columns[NO_FINDING] = derived if own is None else columns[own]
    if (missing and not allow_missing) or columns.keys().isdisjoint(findings):
        near = get_close_matches(missing[0], label_names, n=1)
        raise InputError(
            f"the labels must include the `findings` {', '.join(missing)}, got {', '.join(label_names)}"
            + (f"; did you mean {near[0]}?" if near else ".")
        )
    unknown = np.full(len(items), np.nan)
    return np.stack([columns.get(name, unknown) for name in findings], axis=1)


def read_folder(folder: Path, spatial_dims: int, check: bool = True, pictures: bool = False) -> Datalist:
    """Data list of one folder, see `read_datalist`, without checking what its splits share.

    With 3 dimensions and `pictures`, these are found beside volumes, and images of a folder without dataset.json have
    the label maps of `label_folders`. So they have, also without `pictures`, where dataset.json holds no lists.
    """
    datalist = _read_folder(folder, spatial_dims, check, pictures)
    if not pictures:
        _refuse_other_dims(datalist, folder, spatial_dims, check)
    own = str(folder if folder.is_dir() else folder.parent)
    alone = (own, None)  # one for all, as there may be millions
    for item in datalist.items():
        item["origin"] = (own, item["subject"]) if "subject" in item else alone
    return datalist


def _read_folder(folder: Path, spatial_dims: int, check: bool, pictures: bool = False) -> Datalist:
    if not folder.exists():
        several = " Several folders are a list, \"['A','B']\"." if "," in folder.name else ""
        raise FileNotFoundError(
            f"`dataset_dir` must be an existing folder or image, got {folder}. Correct the path.{several}"
        )
    if os.path.lexists(folder / "dataset.json"):  # also a link to nothing
        return _read_json(folder / "dataset.json", check, pictures or spatial_dims == 2)
    if pictures and folder.is_dir() and (folders := label_folders(folder)):
        return _paired(folders, check, pictures)
    if folder.is_dir():
        images = _find_images(folder, spatial_dims, pictures)
    elif image_format(folder) is not None:
        images = [str(folder)]
    else:
        raise InputError(f"`dataset_dir` must be a folder or an image, got the file {folder}. Name the folder.")
    items = _with_patients(images)
    if not items:
        with_pictures = spatial_dims == 2 or pictures
        suffixes = " ".join((PICTURE_SUFFIXES if with_pictures else ()) + VOLUME_SUFFIXES)
        hint = "" if with_pictures or not _find_images(folder, 2) else f" It holds 2-D images: {_FOR_PICTURES}"
        raise FileNotFoundError(f"{folder} must hold a dataset.json or images ({suffixes}), got neither.{hint}")
    return Datalist(items, [], [])


def _paired(folders: Folders, check: bool, pictures: bool) -> Datalist:
    """The images of folders with their label maps; those of one folder below are of one subject, called like it."""
    splits: dict[str, list[Item]] = {}
    for split, (images, labels) in folders.items():
        splits[split] = items = _with_patients(_find_images(images, 3, pictures))
        for item in items:
            below = Path(item["image"]).relative_to(images).parts
            if len(below) > 1:
                item.setdefault("subject", below[0])
        if check and labels is not None:
            _add_labels(items, images, labels)
    if not any(splits.values()):
        raise FileNotFoundError(f"{images} must hold images, got none.")
    training, validation, test = (splits.get(split, []) for split in SPLITS)
    return Datalist(training, validation, test)


def _add_labels(items: Sequence[Item], images: Path, label_folder: Path) -> None:
    """Give each item its label map, see `label_of`."""
    by_name: dict[str, list[str]] = {}
    own = {item["image"] for item in items}
    for path in (str(path) for _, paths in walk(label_folder) for path in paths if image_format(path)):
        name = os.path.relpath(path, label_folder)
        for each in {name, *names_of(name)} if path not in own else ():
            by_name.setdefault(each, []).append(path)
    of_label: dict[str, str] = {}
    for item in items:
        found = label_of(item["image"], images, by_name)
        if len(found) > 1 or of_label.keys() & {*found}:
            other = f", which is also that of {of_label[found[0]]}" if found[0] in of_label else ""
            raise InputError(
                f"{item['image']} must have one label map of its own, got {shorten(found)}{other}: rename them, or "
                "list both in a dataset.json."
            )
        item |= {"label": found[0]} if found else {}
        of_label |= dict.fromkeys(found, str(item["image"]))
    without = [item["image"] for item in items if "label" not in item]
    unused = sorted({path for paths in by_name.values() for path in paths} - {*of_label})
    if items and not of_label:
        raise InputError(
            f"{label_folder} must hold label maps with the names of the images, but for the suffix, got {without[0]} "
            f"and {shorten(unused, 1) or 'no label map'}: rename them, or list both in a dataset.json."
        )
    subjects = len({item.get("subject", item["image"]) for item in items})
    what = f"{len(items)} images of {subjects} subjects"
    logger.info("Found %s in %s, %d with a label map in %s.", what, images, len(of_label), label_folder)
    for files, what in ((without, "Images without a label map"), (unused, "Label maps without an image")):
        if files:
            logger.warning("%s: %d (%s).", what, len(files), shorten(files, 3))


def _find_images(folder: Path, spatial_dims: int, pictures: bool = False) -> list[str]:
    found: list[Path] = []
    for parent, paths in walk(folder):
        formats = {path: image_format(path) for path in paths}
        if spatial_dims == 2:
            found += [path for path in paths if formats[path]]
        else:
            found += [path for path in paths if formats[path] in ("itk", "nifti", "picture")[: 2 + pictures]]
            if "dicom" in formats.values():
                found += dicom.find_volumes(parent, pictures)
    for image in map(str, found):
        if not image.isascii() and image != image.encode(errors="replace").decode():
            raise InputError(f"{folder} must hold files with names in UTF-8, got {image!a}. Rename it.")
    return [str(path) for path in without_labels(sorted(found), folder)]


def _with_patients(images: Sequence[str]) -> list[Item]:
    """Items of images, DICOM with its PatientID as the subject, and without what is no image, which is logged."""
    items: list[Item] = []
    left_out = []
    for image in images:
        if image.lower().endswith((*PICTURE_SUFFIXES, *ITK_SUFFIXES, *NIFTI_SUFFIXES)):
            items.append({"image": image})
            continue
        path = Path(image)
        series = dicom.find_series(path) if path.is_dir() else []
        is_file = not path.is_dir() and image_format(path) == "dicom"
        tags = series[0].tags[0] if series else dicom.read_tags(path) if is_file else {}
        if is_file and not dicom.is_image(tags):
            left_out.append(path.name)
        else:
            items.append({"image": image, **({"subject": tags["PatientID"]} if tags.get("PatientID") else {})})
    if left_out:
        dicom.warn_once(f"{Path(images[0]).parent}: left out, as they are no images: {shorten(left_out)}.")
    patients = [item["subject"] for item in items if "subject" in item]
    if len(patients) > 1 == len({*patients}):
        dicom.warn_once(
            f"{Path(images[0]).parent}: {len(patients)} images have one PatientID, and so are of one subject. If they "
            "are not, list them in a dataset.json with a `subject` for each."
        )
    return items


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder in a folder and its files, hidden ones left out; links are followed, but no folder comes twice.

    What is no file, such as a pipe, or a link to a file that comes itself, is left out and logged.
    """
    real = os.path.realpath(folder)
    seen = {real, *map(str, Path(real).parents)}
    visited = {real}

    def is_new(path: str) -> bool:
        known = len(seen)
        seen.add(os.path.realpath(path))
        return len(seen) > known

    def links_last(path: str) -> tuple[bool, str]:
        return os.path.islink(path), path

    found = []
    for parent, *listed in os.walk(folder, followlinks=True):
        paths = [[os.path.join(parent, name) for name in names if not name.startswith(".")] for names in listed]
        below = list(filter(is_new, sorted(paths[0], key=links_last)))
        visited |= set(map(os.path.realpath, below))
        listed[0][:] = map(os.path.basename, below)
        found.append((parent, sorted(paths[1])))
    for parent, files in found:
        odd = {path for path in files if not os.path.isfile(path) and os.path.exists(path)}
        links = [path for path in files if path not in odd and os.path.islink(path)]
        twins = {path for path in links if os.path.dirname(os.path.realpath(path)) in visited and os.path.exists(path)}
        for left_out, what in ((odd, "no files"), (twins, "links to files of the same folder")):
            if left_out:
                logger.warning("Left out, as they are %s: %s.", what, shorten(sorted(left_out), 3))
        yield Path(parent), [Path(path) for path in files if path not in odd | twins]


def without_labels(paths: list[Path], folder: Path) -> list[Path]:
    """The paths in a folder that are not called like label maps, unless all are; the others are logged."""
    labels = [path for path in paths if any(map(LABELS.fullmatch, path.relative_to(folder).parts))]
    if not labels or len(labels) == len(paths):
        return paths
    logger.warning(
        "Left out, as they are called like label maps: %d files (%s). To use them as images, rename them, or list them "
        "in a dataset.json.", len(labels), labels[0],
    )  # fmt: skip
    return sorted({*paths} - {*labels})


def _read_json(path: Path, check: bool, pictures: bool = False) -> Datalist:
    refuse_odd_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        spec = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(spec, ensure_ascii=False).encode()  # which fails on half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON in UTF-8, got: {error}. Correct it there.") from error
    if isinstance(spec, dict) and spec.keys().isdisjoint(SPLITS) and (folders := label_folders(path.parent)):
        found = _paired(folders, check, pictures)
        if "subject_pattern" in spec:  # which counts more than folders
            found = found.with_items(lambda items: [{**item, "subject": None} for item in items])
        spec |= dict(zip(SPLITS, found, strict=False))
    if not isinstance(spec, dict) or "training" not in spec:
        got = f"the keys {list(spec)}" if isinstance(spec, dict) else f"a {type(spec).__name__}"
        raise InputError(
            f"{path} must be a JSON object with a list `training`, got {got}; without lists, it must lie beside "
            "folders called images and labels."
        )
    for key in spec.keys() - {*SPLITS, "label_names"}:
        if isinstance(spec[key], list) and any(isinstance(item, dict) and "image" in item for item in spec[key]):
            raise InputError(f"{path}: lists of images must be called {', '.join(SPLITS)}, got `{key}`. Rename it.")
    shared = {key: spec[key] for key in ("task", "group", "modality", "colours") if key in spec}
    shared |= {"colours": spec["colors"]} if "colors" in spec else {}
    channels = spec.get("channel_names")
    if channels and "modality" not in shared:  # as nnU-Net calls it
        names = [*channels.values()] if isinstance(channels, dict) else [*ensure_tuple(channels)]
        if len(names) != 1:
            raise InputError(
                f"{path}: `channel_names` must be one, got {shorten(names)}, each of which is a file of its own in "
                "nnU-Net: make a data folder of one channel, or one file of all and a `modality` for each."
            )
        shared["modality"] = names[0]
    if isinstance(spec.get("labels"), dict):  # else they are no names
        shared["labels"] = spec["labels"]
    splits = [_read_items(spec.get(split, []), f"{path}: `{split}`", path.parent, shared) for split in SPLITS]
    items = [item for split in splits for item in split]
    for item in items if "subject_pattern" in spec else ():
        if "subject" not in item:
            item["subject"] = subject_of(
                Path(item["image"]).name, spec["subject_pattern"], f"`subject_pattern` of {path}"
            )
    if check:
        _refuse_missing([item[key] for item in items for key in PATH_KEYS if isinstance(item.get(key), str)], path)
    both = sorted(
        {item["image"] for item in items} & {label for item in items if isinstance(label := item.get("label"), str)}
    )
    if both:
        raise InputError(f"{path} must not list a label map as an image, got {shorten(both, 3)}. Remove these items.")
    with_findings = [item for item in items if not isinstance(item.get("label", ""), str)]
    names = spec.get("label_names") or []
    if not isinstance(names, list) or len({*map(str, names)}) < len(names):
        raise InputError(f"{path}: `label_names` must be a list of different names, got {names}.")
    if not names and with_findings:
        labels = [item["label"] for item in with_findings]
        named = dict.fromkeys(name for label in labels if isinstance(label, dict) for name in label)
        names = [*named] or [f"finding_{index}" for index in range(len(ensure_tuple(labels[0])))]
    for item in with_findings:
        item["label"] = _read_label(item["label"], names, f"{path}: the label of {item['image']}")
    of_values = {name: value for value, name in enumerate(names, start=str(names[:1]).lower() != "['background']")}
    for item in items if of_values else ():
        if isinstance(item.get("label"), str) and "colours" not in item:
            item.setdefault("labels", of_values)
    training, validation, test = splits
    return Datalist(training, validation, test, names if with_findings else [])


def _read_items(given: Any, where: str, folder: Path, shared: Item) -> list[Item]:
    if not isinstance(given, list):
        raise InputError(f"{where} must be a list of items, got a {type(given).__name__}.")
    items = []
    for index, entry in enumerate(given):
        entry = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise InputError(f'{where}[{index}] must have the path of an "image", got {entry}.')
        item = {**shared, **entry}
        for key in ("label", "subject"):
            if item.get(key) is None:
                item.pop(key, None)
        for key in PATH_KEYS:
            if isinstance(item.get(key), str):
                item[key] = os.path.abspath(os.path.join(folder, item[key]))
        if "subject" in item:
            item["subject"] = str(item["subject"])
        items.append(item)
    return items


def _refuse_missing(paths: list[str], datalist: Path) -> None:
    # One listing per folder is much faster than 100,000 look-ups of files, above all on a network drive.
    folders = {os.path.dirname(path) for path in paths}
    found = {os.path.join(folder, name) for folder in filter(os.path.isdir, folders) for name in os.listdir(folder)}
    missing = [path for path in paths if path not in found and not os.path.exists(path)]
    if missing:
        raise FileNotFoundError(
            f"{datalist} must list existing files, got {len(missing)} missing: {shorten(missing, 3)}. "
            "Correct the paths, which are relative to its folder, or remove the items."
        )


def _read_label(label: Any, names: list[str], where: str) -> list[float]:
    if isinstance(label, dict) and set(label) <= set(names):
        label = [label.get(name) for name in names]
    values = ensure_tuple(label)
    if len(values) != len(names):
        raise InputError(f"{where} must have {len(names)} values ({shorten(names, 3)}), got {len(values)}.")
    # NaN, which Python's JSON reads, is in no tuple.
    if any(value not in (0, 1, None) and value == value for value in values):
        raise InputError(f"{where} must have values 1, 0 or null (unknown), got {label}.")
    return [float("nan") if value is None else float(value) for value in values]


def merge_datalists(datalists: Sequence[Datalist], folders: Sequence[Path], check: bool = True) -> Datalist:
    """One data list of those of several folders, see `read_datalist`; that of one folder stays as it is."""
    label_names = list(dict.fromkeys(name for datalist in datalists for name in datalist.label_names))
    short = [folder.name for folder in folders]
    prefixes = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    for datalist, prefix in zip(datalists, prefixes, strict=True) if len(datalists) > 1 else ():
        for item in datalist.items():
            if "subject" in item:
                item["subject"] = f"{prefix}/{item['subject']}"
            if isinstance(item.get("label"), list):
                values = dict(zip(datalist.label_names, item["label"], strict=True))
                item["label"] = [values.get(name, float("nan")) for name in label_names]
    training, validation, test = ([item for each in datalists for item in getattr(each, split)] for split in SPLITS)
    merged = Datalist(training, validation, test, label_names)
    if check:
        refuse_leaks(merged)
    return merged


def refuse_leaks(datalist: Datalist) -> None:
    """Refuse splits that share a subject or an image, also by a link."""
    real = _real_paths([item["image"] for item in datalist.items()])
    for key, splits in product(("subject", "image"), combinations(SPLITS, 2)):
        first, second = (
            {real.get(item[key], item[key]): item["image"] for item in getattr(datalist, split) if key in item}
            for split in splits
        )
        shared = sorted(first.keys() & second.keys())
        if shared:
            images = dict.fromkeys([first[shared[0]], second[shared[0]]])
            raise InputError(
                f"`{splits[0]}` and `{splits[1]}` must share no {key}, got {len(shared)} in both: {shorten(shared, 5)} "
                f"(see {' and '.join(images)}). Move each to one split of dataset.json, else the evaluation is on "
                "training data."
            )


def _real_paths(paths: Sequence[str]) -> dict[str, str]:
    """Paths without links, by path, with one listing per folder instead of several look-ups per file."""
    folders = {folder: os.path.realpath(folder) for folder in map(os.path.dirname, paths)}
    found = (entry for folder in filter(os.path.isdir, folders) for entry in os.scandir(folder))
    links = {entry.path: os.path.realpath(entry.path) for entry in found if entry.is_symlink()}
    return {
        path: links.get(path, os.path.join(folders[os.path.dirname(path)], os.path.basename(path))) for path in paths
    }


def _values(item: Item) -> list[float]:
    label = item.get("label")
    return label if isinstance(label, list) else []
