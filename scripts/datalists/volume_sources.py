"""The sources of volumes that make_datalist.py knows: BTCV, the Medical Segmentation Decathlon, and any folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from datalists.source import Options, Record, Source, Volumes, absolute, columns, find_file, is_true, subject_of
from datalists.volume_pairs import by_key, find_volumes, without_channels
from datalists.writer import DRAWN, leave_out
from dissect_monai import BTCV_ORGANS
from dissect_monai.data.splits import BTCV_VALIDATION

K = TypeVar("K")
BTCV_PARENTS = (".", "Training", "RawData/Training", "Abdomen/RawData/Training")
BTCV_PARTS = (("img", "label"), ("imagesTr", "labelsTr"), ("images", "labels"))
MSD_GROUPS = {
    "Task01": "head", "Task02": "heart", "Task03": "abdomen", "Task04": "head", "Task05": "pelvis", "Task06": "chest",
    "Task07": "abdomen", "Task08": "abdomen", "Task09": "abdomen", "Task10": "abdomen",
}  # fmt: skip


@dataclass
class VolumeSources(Options):
    """The sources of volumes; see `Sources` of make_datalist.py."""

    def btcv(self, folder: str, *, validation_fraction: float | None = None) -> Source:
        """BTCV's abdominal CT with 13 organs; an image and its label map have the same number.

        The validation split is that of the literature, 0035 to 0040, where the files have their original names
        (img0001, ...); else it is drawn by subject. Test images are left out, as they have no label maps. The folders
        averaged-training-images and -labels of the same download are hearts, and no part of this set.

        Args:
            folder: RawData, its folder Training, or a folder with img and label, imagesTr and labelsTr, or images and
                labels.
            validation_fraction: share of the subjects; draws them, whatever the names. 0.2 by default.
        """
        root = absolute(folder)
        images, labels = (by_number(find_volumes(part)) for part in btcv_folders(root))
        standard = all(re.match(r"img\d{4}\.", image.name) for image in images.values())
        standard = standard and validation_fraction is None and images.keys() >= set(BTCV_VALIDATION)
        records = []
        for number, image, label in paired(images, labels, self):
            given = ("validation" if number in BTCV_VALIDATION else "training") if standard else None
            records.append(Record(image, None, f"{number:04d}", given, label_map=label))
        description = "BTCV abdominal CT" + (", validation on 0035 to 0040" if standard else "")
        shares = {} if standard else {"validation": 0.2 if validation_fraction is None else validation_fraction}
        volumes = Volumes("abdomen", dict(enumerate(BTCV_ORGANS, start=1)))
        return Source(self, root, description, [], records, shares, "btcv", "CT", volumes)

    def msd(
        self,
        folder: str,
        *,
        group: str = "",
        subset: bool | str = False,
        validation_fraction: float = 0.2,
        test_fraction: float = 0.0,
    ) -> Source:
        """A task of the Medical Segmentation Decathlon, or a folder like it: names and values are its own.

        Splits are drawn from imagesTr and labelsTr. imagesTs has no label maps and is left out; `volumes` lists it for
        pretraining. dataset.json goes elsewhere with --output, or replaces that of the task with --overwrite true.

        Args:
            folder: TaskNN_Name, with dataset.json, imagesTr and labelsTr.
            group: its region. By default head for Task01 and 04, heart for 02, pelvis for 05, chest for 06, and
                abdomen for 03 and 07 to 10.
            subset: the folder holds a part of the task.
            validation_fraction: share of the subjects.
            test_fraction: share of the subjects.
        """
        root = absolute(folder)
        file, partial = find_file(root, "dataset.json"), is_true("subset", subset)
        spec = read_spec(file)
        modality = one_channel(spec, file)
        group = str(group or MSD_GROUPS.get(root.name[:6], ""))
        if not group:
            raise ValueError(f"{root.name} must have a group. Give its region, as in --group abdomen.")
        labels = find_volumes(root / "labelsTr")
        listed = [str(entry.get("label")) for entry in spec.get("training", []) if isinstance(entry, dict)]
        absent = sorted({Path(label).name for label in listed} - {path.name for path in labels.values()})
        if absent and not partial:
            raise ValueError(
                f"{root} must hold the {len(listed)} label maps that its dataset.json lists, lacks {len(absent)} "
                f"such as {absent[0]}. Complete the download, or say that a part is meant with --subset true."
            )
        images = without_channels(find_volumes(root / "imagesTr"), labels)
        records = [Record(image, None, name, label_map=label) for name, image, label in paired(images, labels, self)]
        name = str(spec.get("name") or root.name)
        description = str(spec.get("description") or f"{root.name} of the Medical Segmentation Decathlon")
        description = description.partition(DRAWN)[0]  # that of an earlier run
        about: dict[str, Any] = {key: spec[key] for key in ("reference", "licence") if key in spec}
        volumes = Volumes(group, names_of_values(spec.get("labels", {}), str(file)), about)
        shares = without_zeros(test=test_fraction, validation=validation_fraction)
        return Source(self, root, description, [], records, shares, name, modality, volumes)

    def volumes(
        self,
        folder: str,
        *,
        group: str = "",
        label_dir: str = "",
        labels: str | Sequence[str] | Mapping[Any, Any] = (),
        subject_pattern: str = "",
        validation_fraction: float | None = None,
        test_fraction: float = 0.0,
    ) -> Source:
        r"""A folder of volumes, nested or not, and of label maps with the same names; unlabelled without `label_dir`.

        A folder of DICOM slices is one volume, called like the folder. Suffixes may differ: the label map of case.mha,
        of the series case/ or of nnU-Net's case_0000.nii.gz may be case.nii.gz. dataset.json goes into the folder that
        holds images and label maps. Their values get names by --labels "[liver,left_kidney]", or, if they are not
        1, 2, ..., by --labels "{1: liver, 6: left_kidney}".

        Args:
            folder: holds the images.
            group: region, such as abdomen; needed, as is --modality.
            label_dir: holds the label maps.
            labels: names of the values 1, 2, ... in their order, or a mapping; label_1, ... by default.
            subject_pattern: regular expression whose one group is the subject in the path of an image below `folder`,
                as in '^(p\d+)_'; by default each is a subject of its own.
            validation_fraction: share of the subjects; by default 0.2, or 0 of unlabelled volumes.
            test_fraction: share of the subjects.
        """
        if not group or not self.modality:
            raise ValueError(
                "`volumes` must have a group and a modality. Give both, as in --group abdomen --modality CT."
            )
        root = absolute(folder)
        if not label_dir:
            if labels:
                raise ValueError(f"`labels` must come with `label_dir`, got {labels} without. Name the folder, too.")
            found: Mapping[str, Path] = {}
            names: Mapping[int, str] | None = {}
            images, place = find_volumes(root), root
        else:
            label_root = absolute(label_dir)
            if root == label_root:
                raise ValueError(f"`label_dir` must be another folder than that of the images, got {label_dir}.")
            found = find_volumes(label_root, without=root)
            images = without_channels(find_volumes(root, without=label_root), found)
            images = {name: image for name, image, _ in paired(images, found, self)}
            names = names_of_values(labels, "`labels`") if labels else None
            if names is None and self.check == "exists":
                raise ValueError("`labels` must be given with --check exists, which does not read the label maps.")
            place = Path(os.path.commonpath([root, label_root]))
            if place not in (root, root.parent) and not self.output:
                raise ValueError(
                    f"{root} and {label_root} must lie in one folder. Say where dataset.json goes with --output."
                )
        records = []
        for name, image in images.items():
            path = image.relative_to(root).as_posix()
            subject = subject_of(path, str(subject_pattern)) or name
            records.append(Record(image, None, subject, label_map=found.get(name)))
        share = (0.2 if label_dir else 0.0) if validation_fraction is None else validation_fraction
        shares = without_zeros(test=test_fraction, validation=share)
        description = "Volumes with label maps" if label_dir else "Unlabelled volumes"
        return Source(self, place, description, [], records, shares, volumes=Volumes(str(group), names))


def btcv_folders(root: Path) -> tuple[Path, Path]:
    """The folders of images and of label maps, which must be one pair."""
    pairs = [(root / parent / image, root / parent / label) for parent in BTCV_PARENTS for image, label in BTCV_PARTS]
    found = [pair for pair in pairs if all(part.is_dir() for part in pair)]
    if len(found) != 1:
        got = " and ".join(str(image) for image, _ in found) or "neither"
        raise FileNotFoundError(
            f"{root} must hold one pair of the folders img and label, imagesTr and labelsTr, or images and labels, "
            f"itself or in RawData/Training, got {got}. Name the folder that holds the pair."
        )
    return found[0]


def by_number(volumes: Mapping[str, Path]) -> dict[int, Path]:
    """Volumes by the last number in their name, less nnU-Net's _0000."""

    def number(name: str, path: Path) -> int:
        numbers = re.findall(r"\d+", Path(name).name)
        if len(numbers) > 1 and name.endswith("_0000"):
            numbers.pop()
        if not numbers:
            raise ValueError(f"{path} must have a number in its name, as img0001 has. Rename or remove it.")
        return int(numbers[-1])

    numbered = ((number(name, path), path) for name, path in volumes.items())
    return by_key(numbered, "volumes must have different numbers, got {} and {}. Rename or remove one.")


def paired(images: Mapping[K, Path], labels: Mapping[K, Path], options: Options) -> list[tuple[K, Path, Path]]:
    """Key, image and label map of all that have both; the others are refused, or named and left out."""
    lonely = [f"{path} has no label map" for key, path in images.items() if key not in labels]
    lonely += [f"{path} has no image" for key, path in labels.items() if key not in images]
    leave_out(lonely, len({*images, *labels}), is_true("skip_corrupt", options.skip_corrupt))
    return [(key, image, labels[key]) for key, image in images.items() if key in labels]


def read_spec(file: Path) -> dict[str, Any]:
    """What the dataset.json of a Decathlon task says."""
    try:
        spec = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON in UTF-8, got: {error}. Download it again.") from error
    kinds = {"modality": dict, "channel_names": dict, "training": list}
    if not isinstance(spec, dict) or not all(isinstance(spec.get(key, kind()), kind) for key, kind in kinds.items()):
        raise ValueError(f"{file} must be that of a Decathlon task. Download it again, or use `volumes`.")
    return spec


def one_channel(spec: Mapping[str, Any], file: Path) -> str:
    """The one modality of a Decathlon task, as its DICOM code; `channel_names` is what nnU-Net calls them."""
    channels = [str(name) for name in (spec.get("modality") or spec.get("channel_names") or {}).values()]
    if len(channels) != 1:
        raise ValueError(
            f"{file} must have one channel, got {len(channels)} ({', '.join(channels)}). Write each channel to a file "
            "of its own, and give the folder of one of them to `volumes`."
        )
    return {"MRI": "MR"}.get(channels[0], channels[0])


def names_of_values(given: Any, where: str) -> dict[int, str]:
    """Names of the values of label maps, less background: of a list, of {value: name} or of {name: value}."""
    if isinstance(given, Mapping):
        pairs = [(value, name) if str(value).isdecimal() else (name, value) for value, name in given.items()]
    else:
        pairs = list(enumerate(columns(given), start=1))
    named = {int(value): str(name) for value, name in pairs if str(value).isdecimal() and int(value) > 0}
    background = sum(str(value) == "0" for value, _ in pairs)
    if not named or len(set(named.values())) != len(pairs) - background:
        raise ValueError(
            f'{where} must give whole numbers different names, as in {{"1": "liver", "2": "spleen"}}, got {given}. '
            "Correct it."
        )
    return dict(sorted(named.items()))


def without_zeros(**shares: float) -> dict[str, float]:
    """Only the splits that are to be drawn."""
    return {split: share for split, share in shares.items() if share}
