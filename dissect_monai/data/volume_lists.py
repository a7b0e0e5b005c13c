"""Data lists of volumes: several data sets as one, segmentation, and volumes without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import Dataset
from monai.utils import ensure_tuple

from dissect_monai.common import PICTURE, InputError, Item, acquired_plane, shorten
from dissect_monai.data import dicom
from dissect_monai.data.datalists import Datalist, data_folders, merge_datalists, read_folder, refuse_leaks
from dissect_monai.data.datasets import read_all
from dissect_monai.data.masks import mask_values, name_values, part_ignored, settle_labels
from dissect_monai.data.readers import ImageFileReader, VolumeHeader, image_format, read_grid, read_header
from dissect_monai.data.splits import hold_out, refuse_other_channels, split_training, with_test_split

logger = logging.getLogger(__name__)
PerFolder = str | Sequence[str] | Mapping[str, str] | None  # a value for all folders, or one by the name of a folder
_GREY = 8  # of 255, by which the channels of a grey picture that is stored in RGB may differ
_OF_WEIGHTS = ("class_names", "modality", "in_channels", "mask_values")  # what their settings say of a segmentation


def aggregate(
    dataset_dirs: str | Path | Sequence[str | Path],
    task: PerFolder = None,
    group: PerFolder = None,
    modality: PerFolder = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    on_corrupt: str = "raise",
    test_seed: int | None = None,
    spatial_dims: int = 3,
    in_channels: int | None = None,
    slice_axis: str = "auto",
    position: bool = False,
) -> Datalist:
    """Merge data folders of volumes, each with a task and a group, and read the headers of all their files.

    The folders are those of `read_datalist`. `task`, `group` and `modality` ("CT", or {"0": "CT"}) of dataset.json
    count unless given here. Folders may share a task. Unknown modalities are logged, and are not CT. `labels` of
    dataset.json names the structures of its label maps, as the Decathlon has it, {"0": "background", "1": "spleen"}, or
    as nnU-Net has it, {"background": 0, "spleen": 1, "kidneys": [2, 3]}; 0 is background and left out. nnU-Net's
    "ignore" is no structure: its value, of voxels that are not annotated, becomes `ignored` of the items.

    Args:
        dataset_dirs: the folder or folders.
        task: one for all folders, or a mapping from names of folders.
        group: the same of the group, such as the region.
        modality: the same of the modality.
        validation_fraction: share in [0, 1) of the subjects of a task, at least one, that becomes its validation split
            if its folders have none, see `hold_out`. An item without subject is one of its own.
        seed: draws other subjects for it.
        on_corrupt: "raise" refuses volumes whose header cannot be read or is not 3-D; "skip" logs and leaves them out.
        test_seed: for an evaluation: draws the subjects of `with_test_split`; None leaves the splits as they are.
        spatial_dims: 2 takes pictures, too, see `read_segmentation`.
        in_channels: see `read_segmentation`.
        slice_axis: of slices in 2-D: with "auto", a task whose volumes were acquired in several planes is logged.
        position: whether places across slices are compared, so that such a task is refused.

    Raises:
        FileNotFoundError: if a folder or a listed file does not exist, or a folder holds no volumes.
        ValueError: if a folder has no task or group, or names values of label maps that are no integers; a task has two
            groups or fewer than two training subjects; splits share a subject; or volumes cannot be used.
    """
    pictures = spatial_dims == 2
    folders, datalists = _read(dataset_dirs, {"task": task, "group": group, "modality": modality}, pictures=pictures)
    for folder, datalist in zip(folders, datalists, strict=True):
        _refuse_without_domain(datalist, folder)
        refuse_other_channels(datalist.items(), in_channels or 1, spatial_dims=spatial_dims)
    merged = merge_datalists(hold_out(datalists, validation_fraction, seed), folders)
    _warn_of_unknown(merged.items())
    every_image = [{"image": image} for image in sorted({item["image"] for item in merged.items()})]
    files = Dataset(every_image, lambda item: read_header(item["image"], pictures))
    found, readable = read_all(files, on_corrupt, num_workers=8)  # headers, of which MONAI makes plain tuples
    headers = {item["image"]: VolumeHeader(*header) for item, header in zip(readable, found, strict=True)}
    merged = merged.with_items(lambda items: [item for item in items if item["image"] in headers])
    _refuse_odd_tasks(merged)
    task_names, group_names = (sorted({item[key] for item in merged.items()}) for key in ("task", "group"))
    in_channels = in_channels or _channels(merged.training if pictures else [])
    for name in task_names if pictures else ():
        items = [item for item in merged.items() if item["task"] == name]
        if slice_axis == "auto":
            _warn_of_planes(items, f"task {name!r}", position)
        if test_seed is not None:
            name_values(items, on_corrupt)
    datalist = merged._replace(headers=headers, task_names=task_names, group_names=group_names, in_channels=in_channels)
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
    spatial_dims: int = 3,
    in_channels: int | None = None,
    on_corrupt: str = "raise",
    weights: Mapping[str, Any] | None = None,
    slice_axis: str = "auto",
) -> Datalist:
    """Read one or several folders with a Decathlon-style dataset.json of volumes and label maps.

    The classes are the structures that `labels` of dataset.json names, in the order of their values; several folders
    must name the same. Volumes without label map are left out, such as the test split of the Decathlon.

    In 2-D they may be pictures with masks (see `load_label`), too, and without dataset.json those of the folders
    `images` and `labels`. `colours` of dataset.json names structures by their colour, see `settle_labels`. Values that
    nothing names are classes as `name_values` calls them.

    Args:
        dataset_dir: the folder or folders.
        structures: names of those to learn, in the order of the classes; None takes all.
        modality: of the volumes ("CT" scales by a window), or one for each channel; None takes that of dataset.json.
        fold: puts training and validation subjects together and takes this of their folds, from 0, for validation.
        num_folds: number of folds, at least 2.
        validation_fraction: share in [0, 1) of the training subjects, at least one, that becomes the validation split
            of a set that has none; 0 takes none, and so does a single subject.
        split_seed: draws other folds or validation subjects.
        default_modality: of volumes whose modality neither `modality` nor dataset.json says.
        given: items for training and for validation that a caller lists itself, such as MONAI Label, in place of
            folders, see `Datalist.complete`; needed if `dataset_dir` is None.
        settings: of the weights to go on from, whose structures and channels those items have.
        spatial_dims: 2 takes pictures, too.
        in_channels: of the network in 2-D, where images have one modality: 1 makes luminance of colour, 3 repeats grey.
            None takes 3 if any picture for training has colours.
        on_corrupt: "raise" refuses masks that cannot be read, where their values are looked at; "skip" logs them.
        weights: settings of weights to be scored, which name the values that nothing else names.
        slice_axis: see `aggregate`.

    Raises:
        FileNotFoundError: if a folder or a listed file does not exist.
        ValueError: if `fold` is out of range; dataset.json is malformed, or names no structures, or others than another
            folder; splits share a subject; or no volume has a label map.
    """
    if given is not None or dataset_dir is None:
        settings = settings or {}
        if not settings.get("class_names"):
            raise InputError(
                "volumes that are listed without the names of their structures need weights that say them: put "
                "model.pt and model.json of a training into the bundle's `models`."
            )
        datalist = Datalist([], [], [], **{key: settings[key] for key in _OF_WEIGHTS if key in settings})
        training, validation = map(datalist.complete, given or ([], []))
        return datalist._replace(training=training, validation=validation)
    if fold is not None and not 0 <= fold < num_folds:
        raise InputError(f"`fold` must be in [0, {num_folds}), got {fold}.")
    folders, datalists = _read(dataset_dir, {"modality": modality}, default_modality, pictures=spatial_dims == 2)
    for datalist, folder in zip(datalists, folders, strict=True):
        for item in datalist.items():
            item.setdefault("task", folder.name)
    merged = _with_label_maps(merge_datalists(datalists, folders))
    if spatial_dims == 2:
        name_values(merged.items(), on_corrupt, weights)
        if slice_axis == "auto":
            _warn_of_planes(merged.items(), "the data")
    datalist = split_training(merged, fold, num_folds, validation_fraction, split_seed)
    refuse_leaks(datalist)  # links may give one image to two subjects
    trained_on = datalist.training or datalist.items()
    common = trained_on[0]["modality"]
    own = _channels(trained_on) if spatial_dims == 2 and isinstance(common, str) else len(ensure_tuple(common))
    in_channels = in_channels or own
    refuse_other_channels(trained_on, in_channels, common, spatial_dims)
    _warn_of_unknown(datalist.training)
    class_names = _class_names(merged.items(), structures)
    return datalist._replace(
        label_names=(),
        class_names=class_names,
        mask_values=mask_values(trained_on, class_names, on_corrupt),
        modality=common if all(item["modality"] == common for item in trained_on) else None,
        in_channels=in_channels,
    )


def read_volumes(
    dataset_dir: str | Path | Sequence[str | Path],
    modality: PerFolder = None,
    default_modality: str | Sequence[str] | None = None,
    in_channels: int = 1,
    spatial_dims: int = 3,
) -> list[Item]:
    """The volumes to embed or to segment; files may be missing, as predictions report what cannot be read.

    Args:
        dataset_dir: the folder or folders, or a single volume.
        modality: see `aggregate`; with several channels, one for each channel. None takes that of dataset.json.
        default_modality: of volumes whose modality neither says.
        in_channels: channels that the network takes.
        spatial_dims: 2 takes pictures, too, see `read_segmentation`.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no volumes.
        ValueError: if a dataset.json is malformed, or a volume has other channels.
    """
    pictures = spatial_dims == 2
    folders, datalists = _read(dataset_dir, {"modality": modality}, default_modality, check=False, pictures=pictures)
    items = merge_datalists(datalists, folders, check=False).items()
    refuse_other_channels(items, in_channels, default_modality, spatial_dims)
    _warn_of_unknown(items)
    return items


def _read(
    dataset_dirs: str | Path | Sequence[str | Path],
    given: Mapping[str, PerFolder],
    default_modality: str | Sequence[str] | None = None,
    check: bool = True,
    pictures: bool = False,
) -> tuple[list[Path], list[Datalist]]:
    """The folders and their data lists; each item has a subject, a modality, and what else is given for it."""
    folders = data_folders(dataset_dirs)
    names = [folder.name for folder in folders]
    for key, value in given.items():
        unknown = [str(name) for name in value if name not in names] if isinstance(value, Mapping) else []
        if unknown:
            raise InputError(f"`{key}` must name folders among {', '.join(names)}, got {', '.join(unknown)}.")
    datalists = [read_folder(folder, 3, check, pictures) for folder in folders]
    for folder, datalist in zip(folders, datalists, strict=True):
        own = {key: value.get(folder.name) if isinstance(value, Mapping) else value for key, value in given.items()}
        for item in datalist.items():
            modality = _modality(own["modality"], item.get("modality"), default_modality)
            if modality == "unknown" and pictures:
                modality = _of_picture(Path(item["image"]))
            item |= {key: value for key, value in own.items() if value is not None} | {"modality": modality}
            item.setdefault("subject", os.path.relpath(item["image"], folder if folder.is_dir() else folder.parent))
            if check and isinstance(item.get("labels"), Mapping):
                item["labels"] = _named_values(item["labels"], folder)
            if check and pictures:
                settle_labels(item, str(folder))
            if check and isinstance(item.get("labels"), Mapping):
                part_ignored(item)
    if default_modality is not None:
        _warn_of_other_modality([item for each in datalists for item in each.items()], default_modality)
    return folders, datalists


def _of_picture(path: Path) -> str:
    """The modality of a picture, whose greys say what they are, as far as DICOM says it; "unknown" of a volume."""
    kind = image_format(path)
    with suppress(ValueError):  # what cannot be read is refused later
        if kind == "dicom" and path.is_file() and (series := dicom.series_of(path)).is_picture:
            return series.tags[0].get("Modality") or PICTURE
    return PICTURE if kind == "picture" else "unknown"


def _modality(*choices: Any) -> str | list[str]:
    """The first that is given: a text, or a list with one for each channel; "unknown" where nothing says it."""
    chosen = next((each for each in choices if each is not None), None)
    values = chosen.values() if isinstance(chosen, Mapping) else ensure_tuple(chosen)
    names = [str(value or "").strip() or "unknown" for value in values]
    return names[0] if len(names) == 1 else names


def _warn_of_other_modality(items: Sequence[Item], of_weights: str | Sequence[str]) -> None:
    def has_ct(modality: str | Sequence[str]) -> bool:
        return any(str(name).strip().upper().startswith("CT") for name in ensure_tuple(modality))

    known = [item for item in items if "unknown" not in item["modality"]] if "unknown" not in of_weights else []
    other = [item for item in known if has_ct(item["modality"]) != has_ct(of_weights)]
    if other:
        logger.warning(
            "The weights are of %s, but %d volumes are listed as %s (%s), so that results mean little: correct "
            "`modality`, or take other weights.", of_weights, len(other), other[0]["modality"], other[0]["image"],
        )  # fmt: skip


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


def _channels(items: Sequence[Item]) -> int:
    """3 if any picture has colours, else 1; a file that cannot be read is left to what reads the images.

    A picture in RGB has none if its channels are nowhere more than 8 of 255 apart, which is what JPEG makes of grey.
    """
    for item in items:
        with suppress(InputError):
            if image_format(item["image"]) in ("picture", "dicom"):
                grid = read_grid(item["image"], pictures=True)
                if grid.channels == 3 and grid.shape[2] == 1:
                    rgb, _ = ImageFileReader(spatial_dims=3, channels=3).get_data(Path(item["image"]))
                    if np.ptp(rgb, -1).max() > _GREY:
                        return 3
    return 1


def _warn_of_planes(items: Sequence[Item], what: str, refuse: bool = False) -> None:
    planes: dict[str, list[str]] = {}
    for image in (item["image"] for item in items):
        with suppress(ValueError, OSError):  # pictures, and what is left to what reads the images
            planes.setdefault(acquired_plane(*read_header(image)), []).append(image)
    found = ", ".join(f"{len(images)} {plane} (such as {images[0]})" for plane, images in sorted(planes.items()))
    remedy = "choose one for all by `slice_axis`, or make a data folder of each"
    if len(planes) > 1 and refuse:
        raise InputError(
            f"the slices of {what} must be of one plane for a contrast of places, got {found}: {remedy}, or set "
            "`position_weight` to 0."
        )
    if len(planes) > 1:
        logger.warning("The volumes of %s were acquired in several planes, %s: %s.", what, found, remedy)


def _refuse_without_domain(datalist: Datalist, folder: Path) -> None:
    for item in datalist.items():
        for key in ("task", "group"):
            if not isinstance(item.get(key), str) or not item[key].strip():
                raise InputError(
                    f"{folder} must have a `{key}`, got {item.get(key)!r} for {item['image']}: write it into its "
                    f"dataset.json, or give `{key}`, such as {{'{folder.name}': 'abdomen'}}."
                )


def _refuse_odd_tasks(datalist: Datalist) -> None:
    """Refuse tasks of two groups, or with a single training subject."""
    firsts: dict[str, Item] = {}
    for item in datalist.items():
        first = firsts.setdefault(item["task"], item)
        if item["group"] != first["group"]:
            raise InputError(
                f"task {item['task']!r} must have one group, got {first['group']!r} for {first['image']} and "
                f"{item['group']!r} for {item['image']}: give them one group, or two tasks."
            )
    for name, first in firsts.items():
        subjects = {item["subject"] for item in datalist.training if item["task"] == name}
        if len(subjects) < 2:
            raise InputError(
                f"task {name!r} must have at least two training subjects, as the contrast needs, got {len(subjects)} "
                f"(see {first['image']}): add volumes, give it the task of another folder, or leave its folder out."
            )


def _class_names(items: Sequence[Item], structures: Sequence[str] | None) -> list[str]:
    """The chosen structures, or all in the order of their values; all volumes must name the same."""
    first = items[0]
    for item in items:
        labels = item.get("labels")
        if not isinstance(labels, Mapping) or not labels:
            raise InputError(
                f"{item['image']} must have a dataset.json that names the values of its label maps, such as "
                f'"labels": {{"1": "spleen"}}, got {labels!r}: write them there.'
            )
        if {*labels} != {*first["labels"]}:
            raise InputError(
                f"all volumes must name the same structures, got {shorten([*first['labels']])} for {first['image']} "
                f"and {shorten([*labels])} for {item['image']}: what one set has not contoured would count as "
                "background."
            )
    names = sorted(first["labels"], key=lambda name: min(first["labels"][name]))
    chosen = names if structures is None else [*ensure_tuple(structures)]
    if not chosen or not {*chosen} <= {*names} or len({*chosen}) < len(chosen):
        got = ", ".join(map(str, chosen))
        raise InputError(f"`structures` must be different ones of {', '.join(names)}, got {got}.")
    return chosen


def refuse_overlap(datalist: Datalist) -> None:
    """Refuse classes that share a value, such as nnU-Net's regions, as a voxel has one class."""
    for item in datalist.items():
        labels = {name: item["labels"].get(name, ()) for name in datalist.class_names}
        every = [value for values in labels.values() for value in values]
        shared = [name for name, values in labels.items() if any(every.count(value) > 1 for value in values)]
        if shared:
            raise InputError(
                f"structures must not share values, got the regions {', '.join(shared)} (see {item['image']}): choose "
                "`structures` that do not overlap, or name each value once in dataset.json."
            )


def _with_label_maps(datalist: Datalist) -> Datalist:
    kept = datalist.with_items(lambda items: [item for item in items if isinstance(item.get("label"), str)])
    without = len(datalist.items()) - len(kept.items())
    if not kept.items():
        raise InputError(
            f"dataset.json must list volumes with the path of a label map (`label`), got {without} without: write it "
            "there for each volume, or put pictures and masks of the same names into folders `images` and `labels`."
        )
    if without:
        logger.warning("%d volumes have no label map and are left out.", without)
    return kept
