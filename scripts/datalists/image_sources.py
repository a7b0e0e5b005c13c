"""The sources of X-rays that make_datalist.py knows: NIH ChestX-ray14, CheXpert, class folders and tables."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from datalists.source import SPLITS, Label, Record, Source, absolute, find_file, subject_of, with_patients
from dissect_monai.data.datalists import walk, without_labels
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
UNCERTAIN = {"ignore": None, "ones": 1, "zeros": 0}  # what CheXpert's -1 becomes
SPLIT_NAMES = {"train": "training", "val": "validation", "valid": "validation", **{split: split for split in SPLITS}}


def nih(folder: Path, validation_fraction: float) -> Source:
    """NIH ChestX-ray14: the official test list; validation is drawn from the other patients.

    The folder holds Data_Entry_2017.csv (or _v2020), train_val_list.txt, test_list.txt, and the images anywhere below.
    """
    table = find_file(folder, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    lists = [find_file(folder, name) for name in ("train_val_list.txt", "test_list.txt")]
    train_val, test = (set(path.read_text(encoding="utf-8-sig").split()) for path in lists)
    path_of = {path.name: path for path in find_images(folder)}
    records = []
    for where, row in read_rows(table, "Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position"):
        name, findings = row["Image Index"], set(row["Finding Labels"].split("|")) - {"No Finding"}
        if not findings <= set(NIH_FINDINGS):
            raise ValueError(f"{where}: findings must be of {NIH_FINDINGS}, got {row['Finding Labels']!r}.")
        if (name in train_val) == (name in test):
            raise ValueError(f"{where}: {name} must be in one of {lists[0].name} and {lists[1].name}. Correct them.")
        sex = row.get("Patient Gender") or row.get("Patient Sex")
        extra = {"view": row["View Position"], "age": age_of(row["Patient Age"]), "sex": sex}
        label: Label = [int(finding in findings) for finding in NIH_FINDINGS]
        image = path_of.get(name, folder / "images" / name)
        records.append(Record(image, label, row["Patient ID"], "test" if name in test else None, extra))
    absent = sorted((train_val | test) - {record.image.name for record in records})
    problems = [f"{name}, which is in an official list, has no row in {table.name}" for name in absent]
    which = "A part of NIH ChestX-ray14" if absent else "NIH ChestX-ray14"
    description = f"{which} with its official test list; labels are text-mined and noisy"
    return Source(folder, description, records, {"validation": validation_fraction}, NIH_FINDINGS, problems)


def chexpert(folder: Path, uncertain: str, validation_fraction: float) -> Source:
    """CheXpert, full or small: valid.csv is the test split; validation is drawn from the patients of train.csv.

    The folder holds train.csv, valid.csv and the folders train and valid, or those of the full set as it is unpacked:
    "CheXpert-v1.0 batch 2 (train 1)" and so on. Lateral views are left out. A blank is 0, as in the literature: the
    report does not speak of the finding, which mostly means that there was none.
    """
    parts = [Path(), *sorted(path.relative_to(folder) for path in folder.glob("CheXpert-v1.0*"))]
    values = {**LABEL_VALUES, "": 0, **dict.fromkeys(("-1", "-1.0"), UNCERTAIN[uncertain])}
    records = []
    for file, split in {"train.csv": None, "valid.csv": "test"}.items():
        table, own = find_file(folder, *(str(part / file) for part in parts)), Path(file).stem
        # Of patients: train/patient00001, "... (train 1)/patient00001", "... (validate & csv)/valid/patient64541".
        places = [*(part / own for part in parts), *(part for part in parts[1:] if own in part.name)]
        found = {path.name: path for place in places for path in folder.joinpath(place).glob("patient*")}
        for where, row in read_rows(table, "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_FINDINGS):
            patient = re.search(r"patient\d+", row["Path"])
            if patient is None:
                raise ValueError(f"{where}: `Path` must name a folder patientNNNNN, got {row['Path']!r}.")
            if row["Frontal/Lateral"] == "Lateral":
                continue
            image = found.get(patient[0], folder / own / patient[0]) / row["Path"][patient.end() :].lstrip("/")
            label = read_label(row, CHEXPERT_FINDINGS, values, where)
            sex = {"Male": "M", "Female": "F"}.get(row["Sex"])
            extra = {"view": row["AP/PA"], "age": age_of(row["Age"]), "sex": sex}
            records.append(Record(image, label, patient[0], split, extra))
    description = f"CheXpert, its valid.csv for test; uncertain labels: {uncertain}, unmentioned: zeros"
    return Source(folder, description, records, {"validation": validation_fraction}, CHEXPERT_FINDINGS)


def folders(folder: Path, subject_pattern: str, validation_fraction: float, test_fraction: float) -> Source:
    """A folder per class, with images in it or below; each class is a finding, 1 in its folder and 0 elsewhere."""
    class_of = {path: path.relative_to(folder).parts[0] for path in find_images(folder)}
    classes = sorted(set(class_of.values()))
    wrong = [name for path, name in class_of.items() if path.parent == folder or name.lower() in SPLIT_NAMES]
    if wrong or len(classes) < 2:
        got = (wrong or classes)[0]
        raise ValueError(f"{folder} must hold two or more folders, one per class, got {got}. Move it, or use `table`.")
    records = []
    for path, given in class_of.items():
        label: Label = [int(name == given) for name in classes]
        records.append(Record(path, label, subject_of(path.name, subject_pattern)))
    records = records if subject_pattern else with_patients(records, "--subject_pattern")
    shares = {"test": test_fraction, "validation": validation_fraction}
    return Source(folder, "Labels from class folders", records, shares, classes)


def table(
    file: Path,
    image: str,
    labels: Sequence[str],
    subject: str,
    split: str,
    extra: Sequence[str],
    image_dir: Path | None,
    validation_fraction: float | None,
    test_fraction: float | None,
) -> Source:
    """A CSV table with a row per image; labels are 1, 0, or empty for unknown."""
    if split and (validation_fraction, test_fraction) != (None, None):
        raise ValueError("--split must not come with --validation_fraction or --test_fraction. Give one or the other.")
    if {"image", "label", "subject"} & set(extra):
        raise ValueError(f"--extra must not name image, label or subject, got {', '.join(extra)}. Rename the column.")
    needed = [name for name in (image, subject, split) if name]
    records = []
    for where, row in read_rows(file, *needed, *labels, *extra):
        if not all(row[name] for name in needed):
            raise ValueError(f"{where}: {' and '.join(needed)} must not be empty. Complete or remove the row.")
        if split and row[split].lower() not in SPLIT_NAMES:
            raise ValueError(f"{where}: {split} must be one of {', '.join(SPLIT_NAMES)}, got {row[split]!r}.")
        label = read_label(row, labels, LABEL_VALUES, where) if labels else None
        given = SPLIT_NAMES[row[split].lower()] if split else None
        copied = {name: row[name] for name in extra}
        path = absolute(str((image_dir or file.parent) / row[image]))
        records.append(Record(path, label, row[subject] if subject else None, given, copied))
    records = records if subject else with_patients(records, "--subject")
    shares = {
        "test": 0.2 if test_fraction is None else test_fraction,
        "validation": 0.1 if validation_fraction is None else validation_fraction,
    }
    return Source(file.parent, f"Labels from {file.name}", records, {} if split else shares, labels)


def read_rows(table: Path, *needed: str) -> list[tuple[str, dict[str, str]]]:
    """Rows of a CSV file in UTF-8 or Windows-1252, each with where it stands; spaces around cells are removed."""
    content = table.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    missing = [column for column in needed if column not in (reader.fieldnames or [])]
    if missing:
        for mark, name in {";": "semicolons", "\t": "tabs"}.items():
            if {*missing} <= {cell.strip(' "') for cell in text.partition("\n")[0].strip().split(mark)}:
                raise ValueError(f"{table} must have commas between its columns, got {name}. Save it with commas.")
        raise ValueError(f"{table} must have the columns {missing}, got {reader.fieldnames}. Name others or add them.")
    rows = []
    for row in reader:
        where = f"{table}, line {reader.line_num}"
        if any(row[column] is None for column in needed) or any(row.get("") or ()):
            raise ValueError(f"{where} must have as many cells as the header. Correct it.")
        rows.append((where, {column: cell.strip() for column, cell in row.items() if isinstance(cell, str)}))
    return rows


def read_label(row: Mapping[str, str], findings: Sequence[str], values: Mapping[str, int | None], where: str) -> Label:
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
    return without_labels(images, folder)


def age_of(text: str) -> int | None:
    """Age in years from "58" or "058Y"; None for what nobody reaches, which NIH's table has, too."""
    digits = text.removesuffix("Y")
    return int(digits) if digits.isdecimal() and int(digits) <= 120 else None
