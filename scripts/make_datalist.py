r"""Write the dataset.json of a data folder: every image checked, split by subject, and counted.

    python scripts/make_datalist.py nih DIR
    python scripts/make_datalist.py chexpert DIR --uncertain ignore
    python scripts/make_datalist.py folders DIR --subject_pattern '^(p\d+)_'
    python scripts/make_datalist.py table FILE.csv --image path --labels "[Edema,Effusion]" --subject patient
    python scripts/make_datalist.py unlabelled DIR [DIR ...]

and of volumes (NIfTI, MHA, NRRD, folders of DICOM slices), images and label maps compared:

    python scripts/make_datalist.py btcv DIR
    python scripts/make_datalist.py msd Task09_Spleen --output DIR
    python scripts/make_datalist.py volumes DIR --label_dir DIR --labels "[liver,spleen]" --group abdomen --modality CT
    python scripts/make_datalist.py volumes DIR --group abdomen --modality CT

What cannot be made right is refused with one message and exit status 1, and nothing is written. `nih --help` lists the
knobs of one source.
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from inspect import cleandoc, getmembers, isfunction, signature
from pathlib import Path

import fire
from datalist_source import Label, Record, Source, absolute, columns, find_file, one_of, shorten, subject_of
from datalist_writer import make_datalist
from volume_sources import VolumeSources

from dissect_monai.bundle import is_true
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
class Sources(VolumeSources):
    """Write the dataset.json of a data folder: every image checked, split by subject, and counted.

    Give one of the sources nih, chexpert, folders, table and unlabelled, or, of volumes, btcv, msd and volumes;
    `nih --help` says what it takes.

    Args:
        output: where it goes, if not into the data folder: a folder, or a path that ends in dataset.json.
        overwrite: replace an existing dataset.json.
        check: "open" reads every image, or of volumes every header and label map; "exists" only looks for the files.
        workers: threads that check images; more than cores, since they wait for the disk.
        skip_corrupt: leave out images that cannot be read and volumes that do not agree with their label map, and name
            them, instead of refusing the data.
        seed: draws other splits.
        name: name of the data set, and the task of volumes; by default that of its folder, btcv, or what the Decathlon
            calls it.
        modality: its DICOM code, such as CR (X-ray, the default of images), CT or MR.
    """

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
        partial = is_true(subset, "subset")
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
                f"{shorten(absent)}. Complete the download, or give --subset true if only a part is meant."
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
        with_lateral = is_true(lateral, "lateral")
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
            got = shorten(sorted(set(wrong or classes)))
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
    """All images in a folder and below, sorted; hidden ones are left out and links followed, as in training."""
    images = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        images += [path for path in paths if image_format(path)]
    if not images:
        raise FileNotFoundError(f"{folder} must be a folder with images, got none. Correct the path.")
    return sorted(images)


def age_of(text: str) -> int | None:
    """Age in years from "58" or "058Y"; None for what nobody reaches, which NIH's table has, too."""
    digits = text.removesuffix("Y")
    return int(digits) if digits.isdecimal() and int(digits) <= 120 else None


def words_of(arguments: Sequence[str]) -> list[str]:
    """The arguments that are neither knobs nor, as Fire reads them, the values of knobs."""
    is_knob = [re.match(r"--|-[a-zA-Z]", argument) is not None for argument in arguments]
    takes_next = [knob and "=" not in argument for knob, argument in zip(is_knob, arguments, strict=True)]
    return [
        argument
        for argument, knob, is_value in zip(arguments, is_knob, [False, *takes_next], strict=False)
        if not (knob or is_value)
    ]


def usage() -> str:
    """What to type, and the knobs that all sources share."""
    knobs = cleandoc(str(Sources.__doc__)).partition("Args:\n")[2]
    return f"{__doc__.strip()}\n\nAll sources take:\n\n{knobs}"


def refuse_misspelt(arguments: Sequence[str]) -> None:
    """Refuse a source or knob that does not exist, and words too many: Fire would take them for something else.

    Raises:
        ValueError: naming the nearest source or knob, or the word.
    """
    source, *given = words_of(arguments)
    sources = [name for name, member in getmembers(Sources, isfunction) if not name.startswith("_")]
    if source not in sources:
        (near,) = get_close_matches(source, sources, n=1, cutoff=0)
        raise ValueError(f"there is no source {source}; did you mean {near}?")
    parameters = signature(getattr(Sources, source)).parameters
    known = {"help", *(field.name for field in fields(Sources)), *parameters} - {"self", "folders"}
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("-").replace("-", "_")
        if argument.startswith("--") and name and name not in known:
            (near,) = get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"there is no --{name}; did you mean --{near}?")
    if len(given) > 1 and not any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
        raise ValueError(f"`{source}` must get one path, got {', '.join(given)}. Name the knobs, as in --seed 1.")


def main(command: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        command: the arguments; those of the process by default.
    """
    arguments = sys.argv[1:] if command is None else command
    if not words_of(arguments):
        if not {"-h", "--help"} & set(arguments):
            raise SystemExit(usage())
        print(usage())
        return
    try:
        refuse_misspelt(arguments)
        source = fire.Fire(Sources, command, serialize=lambda got: None if isinstance(got, Source) else got)
        if isinstance(source, Source):
            make_datalist(source)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
