"""Made-up downloads of data sets, and folders and tables of a hospital, as make_datalist.py reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from datalists import image_sources
from PIL import Image

NIH_COLUMNS = ["Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position"]
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
SHAPE = (4, 5, 3)


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (9, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def nih(folder: Path, findings: str = "No Finding") -> Path:
    """Two images of each of twenty patients in two folders; the last five patients are the official test set."""
    rows: list[list[object]] = []
    for patient in range(1, 21):
        for follow_up in range(2):
            name = f"{patient:08d}_{follow_up:03d}.png"
            write_image(folder / f"images_00{1 + patient % 2}" / "images" / name)
            rows.append([name, findings, patient, "058", "F", "PA"])
    rows[0][1], rows[1][3] = "Cardiomegaly|Hernia", "414"
    write_table(folder / "Data_Entry_2017.csv", [*NIH_COLUMNS, ""], rows)
    names = [str(row[0]) for row in rows]
    (folder / "train_val_list.txt").write_text("\n".join(names[:-10]))
    (folder / "test_list.txt").write_text("\n".join(names[-10:]) + "\n")
    return folder


def chexpert(folder: Path) -> Path:
    columns = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *image_sources.CHEXPERT_FINDINGS]
    for file, patients in {"train": range(10), "valid": range(10, 12)}.items():
        rows = []
        for patient in patients:
            for view, facing in (("frontal", ["Frontal", "AP"]), ("lateral", ["Lateral", ""])):
                path = f"{file}/patient{patient:05d}/study1/view1_{view}.jpg"
                write_image(folder / path)
                labels = ["", "1.0", "0.0", "-1.0" if file == "train" else "0.0", *[""] * 10]
                rows.append([f"CheXpert-v1.0-small/{path}", "Male", 68, *facing, *labels])
        write_table(folder / f"{file}.csv", columns, rows)
    return folder


def classes(folder: Path) -> Path:
    for name in ("covid", "normal"):
        for index in range(10):
            write_image(folder / name / f"site{index % 2}" / f"p{index // 2}_{index}.png")
    return folder


def table(folder: Path, **changes: Sequence[object]) -> Path:
    """Twenty images of ten patients; `changes` replaces whole columns."""
    cells: dict[str, Sequence[object]] = {
        "path": [str(Path("images", f"{index}.png")) for index in range(20)],
        "patient": [f"P{index // 2}" for index in range(20)],
        "Edema": [1, 0, "", "1.0", "0.0", "nan"] + [0, 1] * 7,
        "Lung Lesion": [0, 1] * 10,
        "part": ["train"] * 10 + ["Valid"] * 4 + ["test"] * 6,
        "view": ["AP", ""] * 10,
    }
    for index in range(20):
        write_image(folder / "images" / f"{index}.png")
    cells |= changes
    return write_table(folder / "table.csv", list(cells), list(zip(*cells.values(), strict=True)))


def save_volume(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def write_volume(path: Path, affine: np.ndarray = AFFINE) -> Path:
    return save_volume(path, np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), affine)


def write_label_map(path: Path, values: Sequence[int] = (1, 2), shape: Sequence[int] = SHAPE) -> Path:
    label = np.zeros(shape, np.uint8)
    label.flat[1 : 1 + 2 * len(values)] = np.repeat(values, 2)
    return save_volume(path, label)


def btcv(
    folder: Path,
    numbers: Sequence[int] = (*range(1, 11), *range(21, 41)),
    parts: tuple[str, str] = ("img", "label"),
    names: tuple[str, str] = ("img{:04d}", "label{:04d}"),
) -> Path:
    for number in numbers:
        write_volume(folder / parts[0] / f"{names[0].format(number)}.nii.gz")
        write_label_map(folder / parts[1] / f"{names[1].format(number)}.nii.gz", [4, 13] if number == 2 else [1, 13])
    return folder


def msd(folder: Path, count: int = 5, **changes: Any) -> tuple[object, ...]:
    """The command for a task of the Decathlon; `changes` replaces keys of its dataset.json."""
    names = [f"spleen_{index}.nii.gz" for index in range(count)]
    for name in names:
        write_volume(folder / "imagesTr" / name)
        write_label_map(folder / "labelsTr" / name, [1])
        (folder / "imagesTr" / f"._{name}").write_bytes(b"of a Mac")
        (folder / "labelsTr" / f"._{name}").write_bytes(b"of a Mac")
    write_volume(folder / "imagesTs" / "spleen_100.nii.gz")
    spec = {
        "name": "Spleen", "description": "Spleen Segmentation", "licence": "CC-BY-SA 4.0", "release": "1.0",
        "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}, "numTraining": count, "numTest": 1,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/spleen_100.nii.gz"],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps({**spec, **changes}))
    return "msd", folder


def volume_folders(folder: Path, count: int = 5) -> Path:
    for index in range(count):
        write_volume(folder / "images" / f"case_{index}.nii.gz")
        write_label_map(folder / "labels" / f"case_{index}.nii.gz")
    return folder
