"""What a source of make_datalist.py is, and how sources read folders and names."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from dissect_monai.data import layouts
from dissect_monai.data.dicom import read_tags
from dissect_monai.data.readers import image_format

SPLITS = ("training", "validation", "test")
Label = list[int | None]  # 1, 0 or None (unknown) per finding


class Record(NamedTuple):
    """One image of a source."""

    image: Path
    label: Label | None = None
    subject: str | None = None  # None: a subject of its own
    split: str | None = None  # None: to be drawn
    extra: Mapping[str, Any] = {}
    label_map: Path | None = None
    values: tuple[int, ...] = ()  # of the structures in its label map, once that is read

    def group(self, folder: Path) -> str:
        """What must not be divided among splits, by the same name wherever the folder of the data is."""
        return self.subject or Path(os.path.relpath(self.image, folder)).as_posix()


class Source(NamedTuple):
    """What a source has read; `make_datalist` does the rest."""

    folder: Path  # where dataset.json goes by default
    description: str
    records: Sequence[Record]
    shares: Mapping[str, float]  # split → share of the subjects whose split is to be drawn
    label_names: Sequence[str] = ()
    problems: Sequence[str] = ()  # what is incomplete, and so left out
    name: str = ""  # that of the folder if empty
    modality: str = "CR"
    group: str = ""  # of volumes: the region, which several tasks share; empty for X-rays
    labels: Mapping[int, str] = {}  # of volumes: names of the values of label maps
    about: Mapping[str, Any] = {}  # what else dataset.json says, such as a licence


def find_file(folder: Path, *names: str) -> Path:
    """The first of several files that exists."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} must hold {' or '.join(names)}. Give the folder of the whole data set.")


def subject_of(name: str, pattern: str) -> str | None:
    """The subject in a file name; None without a pattern."""
    return layouts.subject_of(name, pattern, "--subject_pattern") if pattern else None


def with_patients(records: Sequence[Record], option: str) -> list[Record]:
    """Records whose subject nobody has said, with the PatientID of their DICOM files; a warning counts the others."""
    with ThreadPool(16) as pool:
        patients = pool.map(patient_of, [record.image for record in records])
    unknown, known = patients.count(None), {*patients} - {None}
    said = f"{unknown} of {len(records)} images have no subject: each counts as one of its own" if unknown else ""
    if not unknown and len(known) == 1 < len(records):
        said = f"all {len(records)} images have the PatientID {patients[0]}: they count as one subject"
    if said:
        print(f"warning: {said}. Say which are of one patient by {option}.", file=sys.stderr)
    return [record._replace(subject=patient) for record, patient in zip(records, patients, strict=True)]


def patient_of(image: Path) -> str | None:
    """PatientID (0010,0020) of a DICOM file or of the first in a folder; None without one."""
    files = sorted(image.iterdir()) if image.is_dir() else [image]
    first = next((file for file in files if image_format(file) == "dicom"), None)
    return read_tags(first).get("PatientID") or None if first else None


def absolute(path: str) -> Path:
    """A path as the command line or a table gives it, made absolute without following links."""
    return Path(os.path.abspath(os.path.expanduser(path)))
