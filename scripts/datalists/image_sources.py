"""The sources of X-rays that make_datalist.py knows: NIH ChestX-ray14, CheXpert, class folders, tables, any images."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datalists.source import (
    Label,
    Options,
    Record,
    Source,
    absolute,
    columns,
    find_file,
    is_true,
    one_of,
    subject_of,
    walk,
)
from dissect_monai.common import shorten
from dissect_monai.data.datalists import SPLITS
from dissect_monai.data.readers import image_format

# fmt: off
NIH_FINDINGS = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
]
CHEXPERT_FINDINGS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
]
# fmt: on
LABEL_VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": None, "nan": None}
SPLIT_NAMES = {"train": "training", "val": "validation", "valid": "validation", **{split: split for split in SPLITS}}


@dataclass
class ImageSources(Options):
    """The sources of X-rays; see `Sources` of make_datalist.py."""

    def nih(self, folder: str, *, subset: bool | str = False, validation_fraction: float = 0.1) -> Source:
        """NIH ChestX-ray14: the official test list; validation is drawn from the other patients.

        Args:
            folder: holds Data_Entry_2017.csv (or _v2020), train_val_list.txt, test_list.txt, and the images anywhere
                below, as in images_001/images or images.
            subset: the table holds a part of the official images.
            validation_fraction: share of the patients of train_val_list.txt.
        """
        root = absolute(folder)
        table = find_file(root, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
        lists = [find_file(root, name) for name in ("train_val_list.txt", "test_list.txt")]
        train_val, test = (set(path.read_text(encoding="utf-8-sig").split()) for path in lists)
        path_of = {path.name: path for path in find_images(root)}
        partial = is_true("subset", subset)
        records = []
        for where, row in read_rows(
            table, "Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position"
        ):
            name, findings = row["Image Index"], set(row["Finding Labels"].split("|")) - {"No Finding"}
            if not findings <= set(NIH_FINDINGS):
                raise ValueError(f"{where}: findings must be of {NIH_FINDINGS}, got {row['Finding Labels']!r}.")
            if (name in train_val) == (name in test):
                raise ValueError(
                    f"{where}: {name} must be in one of {lists[0].name} and {lists[1].name}. Correct them."
                )
            sex = row.get("Patient Gender") or row.get("Patient Sex")
            extra = {"view": row["View Position"], "age": age_of(row["Patient Age"]), "sex": sex}
            label: Label = [int(finding in findings) for finding in NIH_FINDINGS]
            image = path_of.get(name, root / "images" / name)
            records.append(Record(image, label, row["Patient ID"], "test" if name in test else None, extra))
        absent = sorted((train_val | test) - {record.image.name for record in records})
        if absent and not partial:
            raise ValueError(
                f"{table} must have a row for each image of the official lists, got none for {len(absent)}: "
                f"{shorten(absent, 3)}. Complete the download, or give --subset true if only a part is meant."
            )
        which = "A part of NIH ChestX-ray14" if absent else "NIH ChestX-ray14"
        description = f"{which} with its official test list; labels are text-mined and noisy"
        return Source(self, root, description, NIH_FINDINGS, records, {"validation": validation_fraction})

    def chexpert(
        self,
        folder: str,
        *,
        uncertain: str = "ignore",
        unmentioned: str = "zeros",
        lateral: bool | str = False,
        validation_fraction: float = 0.1,
    ) -> Source:
        """CheXpert, full or small: valid.csv is the test split; validation is drawn from the patients of train.csv.

        Args:
            folder: holds train.csv, valid.csv and the folders train and valid.
            uncertain: what a label of -1 becomes: "ignore" (unknown), "ones" or "zeros".
            unmentioned: what a blank becomes: "zeros", as in the literature, or "ignore". A blank says that the report
                does not speak of the finding, which mostly means that there was none.
            lateral: keep lateral views, too.
            validation_fraction: share of the patients of train.csv.
        """
        root = absolute(folder)
        meaning = {"ignore": None, "ones": 1, "zeros": 0}
        values = {**LABEL_VALUES, "": meaning[one_of("unmentioned", unmentioned, "zeros", "ignore")]}
        values["-1"] = values["-1.0"] = meaning[one_of("uncertain", uncertain, *meaning)]
        with_lateral = is_true("lateral", lateral)
        records = []
        for file, split in {"train.csv": None, "valid.csv": "test"}.items():
            table = find_file(root, file)
            for where, row in read_rows(table, "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_FINDINGS):
                patient = re.search(r"patient\d+", row["Path"])
                if patient is None:
                    raise ValueError(f"{where}: `Path` must name a folder patientNNNNN, got {row['Path']!r}.")
                is_lateral = row["Frontal/Lateral"] == "Lateral"
                if is_lateral and not with_lateral:
                    continue
                image = root / re.sub(r"^CheXpert-v1\.0[^/]*/", "", row["Path"])
                label = read_label(row, CHEXPERT_FINDINGS, values, where)
                view, sex = "lateral" if is_lateral else row["AP/PA"], {"Male": "M", "Female": "F"}.get(row["Sex"])
                extra = {"view": view, "age": age_of(row["Age"]), "sex": sex}
                records.append(Record(image, label, patient[0], split, extra))
        description = f"CheXpert, its valid.csv for test; uncertain labels: {uncertain}, unmentioned: {unmentioned}"
        return Source(self, root, description, CHEXPERT_FINDINGS, records, {"validation": validation_fraction})

    def folders(
        self, folder: str, *, subject_pattern: str = "", validation_fraction: float = 0.1, test_fraction: float = 0.2
    ) -> Source:
        r"""A folder per class, with images in it or below; each class is a finding, 1 in its folder and 0 elsewhere.

        Args:
            folder: holds the class folders.
            subject_pattern: regular expression whose one group is the subject in a file name, as in '^(p\d+)_'; by
                default each image is a subject of its own.
            validation_fraction: share of the subjects.
            test_fraction: share of the subjects.
        """
        root = absolute(folder)
        class_of = {path: path.relative_to(root).parts[0] for path in find_images(root)}
        classes = sorted(set(class_of.values()))
        wrong = [name for path, name in class_of.items() if path.parent == root or name.lower() in SPLIT_NAMES]
        if wrong or len(classes) < 2:
            got = shorten(sorted(set(wrong or classes)), 3)
            raise ValueError(
                f"{root} must hold two or more folders, one per class, got {got}. Move it, or use `table`."
            )
        records = []
        for path, given in class_of.items():
            label: Label = [int(name == given) for name in classes]
            records.append(Record(path, label, subject_of(path.name, str(subject_pattern))))
        shares = {"test": test_fraction, "validation": validation_fraction}
        return Source(self, root, "Labels from class folders", classes, records, shares)

    def table(
        self,
        file: str,
        *,
        image: str,
        labels: str | Sequence[str] = (),
        subject: str = "",
        split: str = "",
        extra: str | Sequence[str] = (),
        image_dir: str = "",
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
    ) -> Source:
        """A CSV table with a row per image; labels are 1, 0, or empty for unknown.

        Args:
            file: the table.
            image: column with paths relative to `image_dir`.
            labels: columns with labels, as in "[Edema,Effusion]"; none for unlabelled images.
            subject: column with the patient; by default each image is a subject of its own.
            split: column with train, valid or test; by default splits are drawn by subject.
            extra: columns to copy, as in "[view,age]".
            image_dir: folder of the images; that of the table by default.
            validation_fraction: share of the subjects, 0.1 by default; only without `split`.
            test_fraction: share of the subjects, 0.2 by default; only without `split`.
        """
        path, label_names, extras = absolute(file), columns(labels), columns(extra)
        root = absolute(image_dir) if image_dir else path.parent
        if {"image", "label", "subject"} & set(extras):
            raise ValueError(f"`extra` must not name image, label or subject, got {extras}. Rename the column.")
        image, subject, split = str(image), str(subject), str(split)
        asked = {"test": test_fraction, "validation": validation_fraction}
        given_shares = {part: share for part, share in asked.items() if share is not None}
        if split and given_shares:
            names = " and ".join(f"`{part}_fraction`" for part in given_shares)
            raise ValueError(f"{names} must be left out with --split {split}, whose splits are kept. Remove either.")
        shares = {} if split else {"test": 0.2, "validation": 0.1, **given_shares}
        needed = [name for name in (image, subject, split) if name]
        records = []
        for where, row in read_rows(path, *needed, *label_names, *extras):
            if not all(row[name] for name in needed):
                raise ValueError(f"{where}: {' and '.join(needed)} must not be empty. Complete or remove the row.")
            if split and row[split].lower() not in SPLIT_NAMES:
                raise ValueError(f"{where}: {split} must be one of {', '.join(SPLIT_NAMES)}, got {row[split]!r}.")
            label = read_label(row, label_names, LABEL_VALUES, where) if label_names else None
            given = SPLIT_NAMES[row[split].lower()] if split else None
            copied = {name: row[name] for name in extras}
            records.append(Record(root / row[image], label, row[subject] if subject else None, given, copied))
        return Source(self, path.parent, f"Labels from {path.name}", label_names, records, shares)

    def unlabelled(self, *folders: str) -> Source:
        """Folders of images without labels, nested or not; all for training, each image a subject of its own.

        Args:
            folders: one, or several with `--output`.
        """
        if not folders or (len(folders) > 1 and not self.output):
            raise ValueError(f"`unlabelled` must get one folder, or several and --output, got {len(folders)}.")
        roots = [absolute(folder) for folder in folders]
        records = [Record(path, split="training") for root in roots for path in find_images(root)]
        return Source(self, roots[0], "Unlabelled images", [], records)


def read_rows(table: Path, *needed: str) -> list[tuple[str, dict[str, str]]]:
    """Rows of a CSV file in UTF-8 or Windows-1252, each with where it stands; spaces around cells are removed."""
    if not table.is_file():
        raise FileNotFoundError(f"{table} must be a CSV file, got none. Correct the path.")
    content = table.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    missing = [column for column in needed if column not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(f"{table} must have the columns {missing}, got {reader.fieldnames}. Name others or add them.")
    rows = []
    for row in reader:
        where = f"{table}, line {reader.line_num}"
        if any(row[column] is None for column in needed) or any(row.get("") or ()):
            raise ValueError(f"{where} must have as many cells as the header. Correct it.")
        rows.append((where, {column: cell.strip() for column, cell in row.items() if isinstance(cell, str)}))
    if not rows:
        raise ValueError(f"{table} must have a row per image, got only a header.")
    return rows


def read_label(row: Mapping[str, str], findings: list[str], values: Mapping[str, int | None], where: str) -> Label:
    """The label in a table's row."""
    for finding in findings:
        if row[finding].lower() not in values:
            allowed = ", ".join(filter(None, values))
            raise ValueError(f"{where}: {finding} must be one of {allowed} or empty, got {row[finding]!r}. Correct it.")
    return [values[row[finding].lower()] for finding in findings]


def find_images(folder: Path) -> list[Path]:
    """All images in a folder and below, sorted."""
    images = sorted(path for _, files in walk(folder) for path in files if image_format(path))
    if not images:
        raise FileNotFoundError(f"{folder} must be a folder with images, got none. Correct the path.")
    return images


def age_of(text: str) -> int | None:
    """Age in years from "58" or "058Y"; None for what nobody reaches, which NIH's table has, too."""
    digits = text.removesuffix("Y")
    return int(digits) if digits.isdecimal() and int(digits) <= 120 else None
