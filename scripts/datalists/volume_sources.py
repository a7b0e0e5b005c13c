"""The sources of volumes that make_datalist.py knows: BTCV, the Medical Segmentation Decathlon, and any folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datalists.source import Record, Source, find_file, subject_of, with_patients
from datalists.volume_pairs import find_volumes, pair_volumes
from dissect_monai import BTCV_ORGANS

BTCV_VALIDATION = range(35, 41)  # of the literature; the other 24 of the 30 are 1 to 10 and 21 to 34
BTCV_PARENTS = (".", "Training", "RawData/Training")
BTCV_PARTS = (("img", "label"), ("imagesTr", "labelsTr"), ("images", "labels"))
MSD_GROUPS = {
    "Task01": "head", "Task02": "heart", "Task03": "abdomen", "Task04": "head", "Task05": "pelvis", "Task06": "chest",
    "Task07": "abdomen", "Task08": "abdomen", "Task09": "abdomen", "Task10": "abdomen",
}  # fmt: skip


def btcv(folder: Path, validation_fraction: float | None) -> Source:
    """BTCV's abdominal CT with 13 organs: a folder with img and label, imagesTr and labelsTr, or images and labels.

    They may also lie in its Training or RawData/Training. The validation split is that of the literature, 0035 to 0040,
    where the files have their original names (img0001, ...) and no fraction is given; else it is drawn by subject. Test
    images are left out, as they have no label maps. The folders averaged-training-images and -labels of the same
    download are hearts, and no part of this set.
    """
    parents = [folder / parent for parent in BTCV_PARENTS]
    pairs = [(parent / image, parent / label) for parent in parents for image, label in BTCV_PARTS]
    found = [pair for pair in pairs if all(part.is_dir() for part in pair)]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} must hold one pair of the folders img and label, imagesTr and labelsTr, or images and labels, "
            f"itself or in RawData/Training, got {len(found)}. Name the folder that holds the pair."
        )
    records, problems = pair_volumes(*found[0])
    chosen = {f"{number:04d}" for number in BTCV_VALIDATION}
    original = {record.subject for record in records if record.image.name.startswith("img")}
    standard = validation_fraction is None and chosen < original
    if standard:
        records = [
            record._replace(split="validation" if record.subject in chosen else "training") for record in records
        ]
    return Source(
        folder,
        "BTCV abdominal CT" + (", validation on 0035 to 0040" if standard else ""),
        records,
        {} if standard else {"validation": 0.2 if validation_fraction is None else validation_fraction},
        problems=problems,
        name="btcv",
        modality="CT",
        group="abdomen",
        labels=dict(enumerate(BTCV_ORGANS, start=1)),
    )


def msd(folder: Path, group: str, validation_fraction: float, test_fraction: float) -> Source:
    """A task of the Medical Segmentation Decathlon, or a folder like it: names and values are its own.

    The folder holds dataset.json, imagesTr and labelsTr. imagesTs has no label maps and is left out; `volumes` lists it
    for pretraining. dataset.json goes elsewhere with --output, or replaces that of the task with --overwrite.
    """
    group = group or MSD_GROUPS.get(folder.name.partition("_")[0], "")
    if not group:
        raise ValueError(f"{folder.name} must have a group. Give its region, as in --group abdomen.")
    file = find_file(folder, "dataset.json")
    try:
        spec = json.loads(file.read_text(encoding="utf-8-sig"))
        channels = [*(spec.get("modality") or spec["channel_names"]).values()]  # nnU-Net calls them channel_names
        listed = {Path(entry["label"]).name for entry in spec.get("training", [])}
        labels = value_names(spec["labels"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} must be that of a Decathlon task, got: {error!r}. Download it again, or use `volumes`."
        ) from error
    if len(channels) != 1:
        raise ValueError(
            f"{file} must have one channel, got {len(channels)} ({', '.join(map(str, channels))}). Write each channel "
            "to a file of its own, and give the folder of one of them to `volumes`."
        )
    records, problems = pair_volumes(folder / "imagesTr", folder / "labelsTr")
    there = {path.name for path in (folder / "labelsTr").iterdir()}
    return Source(
        folder,
        f"{folder.name} of the Medical Segmentation Decathlon",
        records,
        {"test": test_fraction, "validation": validation_fraction},
        problems=[*problems, *(f"labelsTr/{name} is in dataset.json alone" for name in sorted(listed - there))],
        name=str(spec.get("name", folder.name)),
        modality={"MRI": "MR"}.get(channels[0], channels[0]),
        group=group,
        labels=labels,
        about={key: spec[key] for key in ("reference", "licence") if key in spec},
    )


def volumes(
    folder: Path,
    group: str,
    modality: str,
    label_dir: Path | None,
    labels: Sequence[str],
    subject_pattern: str,
    validation_fraction: float | None,
    test_fraction: float,
) -> Source:
    """A folder of volumes, nested or not, and of label maps with the same names; unlabelled without --label_dir.

    A folder of DICOM slices is one volume, called like the folder. Suffixes may differ: the label map of case.mha, of
    the series case/ or of nnU-Net's case_0000.nii.gz may be case.nii.gz. With label maps dataset.json goes beside the
    folder, not into it.
    """
    if bool(label_dir) != bool(labels):
        raise ValueError("--label_dir and --labels must come together. Give both or none.")
    if label_dir:
        records, problems = pair_volumes(folder, label_dir)
    else:
        records, problems = [Record(path, subject=name) for name, path in find_volumes(folder).items()], []
    if subject_pattern:
        names = [record.image.relative_to(folder).as_posix() for record in records]
        subjects = [subject_of(name, subject_pattern) for name in names]
    else:
        subjects = [record.subject for record in with_patients(records, "--subject_pattern")]
    records = [record._replace(subject=each or record.subject) for record, each in zip(records, subjects, strict=True)]
    share = (0.2 if label_dir else 0.0) if validation_fraction is None else validation_fraction
    named = dict(part.split("=", 1) for part in labels) if "=" in "".join(labels) else labels
    return Source(
        folder.parent if label_dir else folder,
        "Volumes with label maps" if label_dir else "Unlabelled volumes",
        records,
        {"test": test_fraction, "validation": share},
        problems=problems,
        modality=modality,
        group=group,
        labels=value_names(named) if named else {},
    )


def value_names(given: Mapping[str, Any] | Sequence[str]) -> dict[int, str]:
    """Names of the values of label maps, less background: of a list, of {value: name} or of {name: value}."""
    pairs: list[tuple[Any, Any]] = list(given.items() if isinstance(given, Mapping) else enumerate(given, start=1))
    regions = [str(key) for key, each in pairs if isinstance(each, list)]
    if regions:
        raise ValueError(f"labels must have one value each, got the regions {', '.join(regions)}: name their parts")
    names = dict((int(key), str(each)) if str(key).isdecimal() else (int(each), str(key)) for key, each in pairs)
    values = sorted(names.keys() - {0})
    if not values or len(set(names.values())) < len(given):
        raise ValueError(f"labels must give whole numbers different names, as in 1=liver 2=spleen, got {given}")
    return {value: names[value] for value in values}
