from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dissect_monai.data.datalists import read_datalist

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_datalist.py"
sys.path.insert(0, str(SCRIPT.parent))
script = importlib.import_module("make_datalist")
images = importlib.import_module("datalists.image_sources")

NIH_COLUMNS = ["Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position"]
SPLITS = ("training", "validation", "test")


def run(*arguments: object) -> None:
    script.main([str(argument) for argument in arguments])


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


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def by_name(folder: Path) -> dict[str, dict[str, Any]]:
    """All items, with their split, by file name."""
    return {Path(item["image"]).name: {**item, "split": split} for split in SPLITS for item in content(folder)[split]}


def nih(folder: Path, patients: int = 20, findings: str = "No Finding") -> Path:
    """Two images per patient in two folders; the last five patients are the official test set."""
    rows: list[list[object]] = []
    for patient in range(1, patients + 1):
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
    columns = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *images.CHEXPERT_FINDINGS]
    blank = [""] * 10
    rows: dict[str, list[list[object]]] = {"train.csv": [], "valid.csv": []}
    for patient in range(12):
        split = "train" if patient < 10 else "valid"
        for view in ("frontal", "lateral"):
            path = f"{split}/patient{patient:05d}/study1/view1_{view}.jpg"
            write_image(folder / path)
            labels = ["", "1.0", "0.0", "-1.0" if split == "train" else "0.0", *blank]
            facing = ["Frontal", "AP"] if view == "frontal" else ["Lateral", ""]
            rows[f"{split}.csv"].append([f"CheXpert-v1.0-small/{path}", "Male", 68, *facing, *labels])
    for name, lines in rows.items():
        write_table(folder / name, columns, lines)
    return folder


def classes(folder: Path, per_class: int = 10) -> Path:
    for name in ("covid", "normal"):
        for index in range(per_class):
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


TABLE_KNOBS = ("--image", "path", "--labels", "[Edema,Lung Lesion]", "--subject", "patient")


def test_nih_reads_findings_views_ages_and_subjects(tmp_path: Path) -> None:
    run("nih", nih(tmp_path))
    items, spec = by_name(tmp_path), content(tmp_path)
    assert list(spec) == ["name", "description", "modality", "label_names", *SPLITS]
    assert spec["label_names"] == images.NIH_FINDINGS
    first, second = items["00000001_000.png"], items["00000001_001.png"]
    assert [name for name, value in zip(images.NIH_FINDINGS, first["label"], strict=True) if value] == [
        "Cardiomegaly",
        "Hernia",
    ]
    assert second["label"] == [0] * 14
    assert (first["subject"], first["view"], first["age"], first["sex"]) == ("1", "PA", 58, "F")
    assert first["image"] == "images_002/images/00000001_000.png"
    assert "age" not in second, "414 years is an error of the table"


def test_nih_keeps_the_official_test_list_and_draws_validation_by_patient(tmp_path: Path) -> None:
    run("nih", nih(tmp_path), "--validation_fraction", 0.2)
    subjects = {split: {item["subject"] for item in content(tmp_path)[split]} for split in SPLITS}
    assert subjects["test"] == {"16", "17", "18", "19", "20"}
    assert len(subjects["validation"]) == 3
    assert len(subjects["training"]) == 12
    assert [len(content(tmp_path)[split]) for split in SPLITS] == [24, 6, 10]


def test_nih_takes_one_image_folder_and_the_2020_table(tmp_path: Path) -> None:
    nih(tmp_path)
    (tmp_path / "Data_Entry_2017.csv").rename(tmp_path / "Data_Entry_2017_v2020.csv")
    for image in list(tmp_path.glob("images_*/images/*.png")):
        (tmp_path / "images").mkdir(exist_ok=True)
        image.rename(tmp_path / "images" / image.name)
    run("nih", tmp_path)
    assert by_name(tmp_path)["00000001_000.png"]["image"] == "images/00000001_000.png"


def test_chexpert_takes_frontal_views_and_makes_valid_the_test_split(tmp_path: Path) -> None:
    run("chexpert", chexpert(tmp_path))
    spec = content(tmp_path)
    assert [len(spec[split]) for split in SPLITS] == [9, 1, 2]
    assert spec["test"][0] == {
        "image": "valid/patient00010/study1/view1_frontal.jpg",
        "label": [0, 1] + [0] * 12,
        "subject": "patient00010",
        "view": "AP",
        "age": 68,
        "sex": "M",
    }


def test_chexpert_keeps_lateral_views_beside_the_frontal_ones_of_a_patient(tmp_path: Path) -> None:
    run("chexpert", chexpert(tmp_path), "--lateral", "true")
    items = [item for split in SPLITS for item in content(tmp_path)[split]]
    assert [item["view"] for item in items].count("lateral") == len(items) / 2 == 12


@pytest.mark.parametrize(
    ("knobs", "label"),
    [
        ((), [0, 1, 0, None, 0]),
        (("--uncertain", "ones"), [0, 1, 0, 1, 0]),
        (("--uncertain", "zeros"), [0, 1, 0, 0, 0]),
        (("--uncertain", "ignore", "--unmentioned", "ignore"), [None, 1, 0, None, None]),
    ],
)
def test_chexpert_policies_settle_uncertain_and_unmentioned_labels(
    tmp_path: Path, knobs: Sequence[str], label: list[int | None]
) -> None:
    run("chexpert", chexpert(tmp_path), *knobs)
    assert content(tmp_path)["training"][0]["label"][:5] == label


def test_folders_become_one_hot_labels_split_by_the_subject_in_the_file_name(tmp_path: Path) -> None:
    run("folders", classes(tmp_path), "--subject_pattern", r"^(p\d+)_")
    spec = content(tmp_path)
    assert spec["label_names"] == ["covid", "normal"]
    for item in (item for split in SPLITS for item in spec[split]):
        assert item["label"] == ([1, 0] if item["image"].startswith("covid/") else [0, 1])
    subjects = {split: {item["subject"] for item in spec[split]} for split in SPLITS}
    assert sorted(map(len, subjects.values())) == [1, 1, 3]
    assert set.union(*subjects.values()) == {f"p{index}" for index in range(5)}


def test_folders_without_a_pattern_make_each_image_a_subject(tmp_path: Path) -> None:
    run("folders", classes(tmp_path))
    spec = content(tmp_path)
    assert [len(spec[split]) for split in SPLITS] == [14, 2, 4]
    assert not any("subject" in item for split in SPLITS for item in spec[split])


def test_a_table_gives_labels_unknowns_splits_and_extras(tmp_path: Path) -> None:
    run("table", table(tmp_path), *TABLE_KNOBS, "--split", "part", "--extra", "[view]")
    spec = content(tmp_path)
    assert spec["label_names"] == ["Edema", "Lung Lesion"]
    assert [len(spec[split]) for split in SPLITS] == [10, 4, 6]
    assert [item["label"][0] for item in spec["training"][:6]] == [1, 0, None, 1, 0, None]
    assert spec["training"][0] == {"image": "images/0.png", "label": [1, 0], "subject": "P0", "view": "AP"}
    assert "view" not in spec["training"][1]


def test_a_table_without_split_column_is_split_by_subject(tmp_path: Path) -> None:
    run("table", table(tmp_path), *TABLE_KNOBS)
    subjects = [{item["subject"] for item in content(tmp_path)[split]} for split in SPLITS]
    assert [len(each) for each in subjects] == [7, 1, 2]
    assert [len(content(tmp_path)[split]) for split in SPLITS] == [14, 2, 4]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_a_table_may_come_from_a_spreadsheet_with_its_own_image_folder(tmp_path: Path, encoding: str) -> None:
    rows = [[write_image(tmp_path / "x" / f"{index}.png").name, index % 2] for index in range(10)]
    file = write_table(tmp_path / "table.csv", ["Aufnahme", "Ödem"], rows, encoding)
    run("table", file, "--image", "Aufnahme", "--labels", "Ödem", "--image_dir", tmp_path / "x")
    assert content(tmp_path)["label_names"] == ["Ödem"]
    assert by_name(tmp_path)["3.png"]["label"] == [1]


def test_unlabelled_folders_are_all_training(tmp_path: Path) -> None:
    for path in ("one/a.png", "one/deep/b.png", "two/c.jpg", "one/.hidden/d.png"):
        write_image(tmp_path / path)
    (tmp_path / "one" / "notes.txt").write_text("no image")
    run("unlabelled", tmp_path / "one", tmp_path / "two", "--output", tmp_path)
    spec = content(tmp_path)
    assert spec["training"] == [{"image": "one/a.png"}, {"image": "one/deep/b.png"}, {"image": "two/c.jpg"}]
    assert spec["validation"] == spec["test"] == []
    assert len(read_datalist(tmp_path).training) == 3


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run("table", table(tmp_path / "data"), *TABLE_KNOBS, "--output", tmp_path / "elsewhere" / "dataset.json")
    datalist = read_datalist(tmp_path / "elsewhere")
    assert datalist.label_names == ["Edema", "Lung Lesion"]
    assert [len(getattr(datalist, split)) for split in SPLITS] == [14, 2, 4]
    assert all(os.path.isfile(item["image"]) for item in datalist.training)
    assert content(tmp_path / "elsewhere")["training"][0]["image"].startswith("../data/images/")
    assert os.listdir(tmp_path / "elsewhere") == ["dataset.json"]


def test_the_seed_draws_other_splits_and_the_same_seed_the_same(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        run("folders", classes(tmp_path), "--seed", seed, "--overwrite", "true")
        drawn.append([item["image"] for item in content(tmp_path)["test"]])
    assert drawn[0] == drawn[1] != drawn[2]


def test_another_validation_fraction_leaves_the_test_split_alone(tmp_path: Path) -> None:
    tests = []
    for fraction in (0, 0.3):
        run("folders", classes(tmp_path), "--validation_fraction", fraction, "--overwrite", "true")
        tests.append(content(tmp_path)["test"])
    assert tests[0] == tests[1]


def test_threads_do_not_change_the_result(tmp_path: Path) -> None:
    written = []
    for workers in (1, 5):
        run("folders", classes(tmp_path), "--workers", workers, "--overwrite", "true")
        written.append(content(tmp_path))
    assert written[0] == written[1]


def test_counts_are_printed_per_split_and_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("table", table(tmp_path), *TABLE_KNOBS, "--split", "part")
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert cells["images"] == ["10", "4", "6"]
    assert cells["subjects"] == ["5", "2", "3"]
    assert cells["Edema"] == ["4 / 4 / 2", "2 / 2 / 0", "3 / 3 / 0"]
    assert cells["Lung Lesion"] == ["5 / 5 / 0", "2 / 2 / 0", "3 / 3 / 0"]


def test_findings_that_a_split_cannot_evaluate_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edema = [1, 0] * 5 + ["", 0, 0, 0] + [1] * 6
    run("table", table(tmp_path, Edema=edema), *TABLE_KNOBS, "--split", "part")
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "warning: test has no negatives of Edema.",
        "warning: validation has no positives of Edema.",
    ]


def test_corrupt_images_are_named_and_left_out_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("folders", classes(tmp_path), "--output", tmp_path)
    before = {item["image"]: split for split in SPLITS for item in content(tmp_path)[split]}
    break_image(tmp_path / "covid" / "site0" / "p1_2.png")
    run("folders", tmp_path, "--skip_corrupt", "true", "--overwrite", "true")
    assert "warning: skipped " in capsys.readouterr().err
    after = {item["image"]: split for split in SPLITS for item in content(tmp_path)[split]}
    assert len(after) == 19
    assert "covid/site0/p1_2.png" not in after
    assert {image: split for image, split in before.items() if image in after} == after, (
        "the others stay where they were"
    )


def break_image(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def refused(tmp_path: Path, match: str, *arguments: object) -> None:
    """The one line of an error; and nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=match) as caught:
        run(*arguments)
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("source", "suffix"), [("folders", "png"), ("unlabelled", "jpg"), ("unlabelled", "nii")])
def test_refuses_corrupt_images(tmp_path: Path, source: str, suffix: str) -> None:
    classes(tmp_path)
    bad = tmp_path / "covid" / f"bad.{suffix}"
    if suffix == "nii":
        bad.write_bytes(b"no image")
    else:
        break_image(write_image(bad))
    refused(tmp_path, rf"1 of 21 images cannot be read: \S+bad.{suffix} \(.+--skip_corrupt true", source, tmp_path)
    run(source, tmp_path, "--check", "exists")


def test_a_png_damaged_in_the_middle_is_found(tmp_path: Path) -> None:
    bad = write_image(tmp_path / "a.png")
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    refused(tmp_path, "1 of 1 images cannot be read", "unlabelled", tmp_path)


def test_refuses_missing_images_with_the_first_few_named(tmp_path: Path) -> None:
    file = table(tmp_path)
    for index in range(4, 8):
        (tmp_path / "images" / f"{index}.png").unlink()
    match = r"4 of 20 images do not exist: \S+4.png, \S+5.png, \S+6.png, \.\.\.\. Complete"
    refused(tmp_path, match, "table", file, *TABLE_KNOBS)


def test_refuses_to_overwrite_and_says_how(tmp_path: Path) -> None:
    run("folders", classes(tmp_path))
    refused(tmp_path, "dataset.json exists. Replace it with --overwrite true", "folders", tmp_path)
    run("folders", tmp_path, "--overwrite", "true")


def test_refuses_a_patient_in_two_official_lists(tmp_path: Path) -> None:
    nih(tmp_path)
    lists = [tmp_path / "train_val_list.txt", tmp_path / "test_list.txt"]
    names = [path.read_text().split() for path in lists]
    lists[0].write_text("\n".join(names[0] + names[1][:1]))
    refused(tmp_path, r"line 32: 00000016_000.png must be in one of train_val_list.txt and test", "nih", tmp_path)
    lists[1].write_text("\n".join(names[1][1:]))
    refused(tmp_path, r"1 subjects are in more than one split: 16 \(test, .+Move each", "nih", tmp_path)


def test_refuses_a_subject_in_two_splits_of_a_table(tmp_path: Path) -> None:
    file = table(tmp_path, patient=["P0"] * 11 + ["P1"] * 9)
    match = r"2 subjects are in more than one split: P0 \(training, validation\), P1 \(test, validation\)"
    refused(tmp_path, match, "table", file, *TABLE_KNOBS, "--split", "part")


def test_refuses_an_image_that_is_listed_twice(tmp_path: Path) -> None:
    file = table(tmp_path, path=["images/0.png", "./images/0.png"] + [f"images/{index}.png" for index in range(2, 20)])
    refused(tmp_path, r"1 images are listed more than once: \S+0.png. Remove", "table", file, *TABLE_KNOBS)


def test_refuses_missing_columns(tmp_path: Path) -> None:
    refused(
        tmp_path, r"must have the columns \['who'\], got \['path'", "table", table(tmp_path), "--image", "path",
        "--subject", "who",
    )  # fmt: skip


@pytest.mark.parametrize(("label", "got"), [("2", "'2'"), ("yes", "'yes'"), ("-1", "'-1'")])
def test_refuses_label_values_with_their_line(tmp_path: Path, label: str, got: str) -> None:
    file = table(tmp_path, Edema=[0, 1, label] + [0] * 17)
    refused(tmp_path, f"line 4: Edema must be one of .+ or empty, got {got}", "table", file, *TABLE_KNOBS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"patient": ["P0", ""] * 10}, "line 3: path and patient and part must not be empty"),
        ({"part": ["train", "holdout"] * 10}, "line 3: part must be one of train, val, .+, got 'holdout'"),
        ({"part": ["test"] * 20}, "training must hold images, got none"),
    ],
)
def test_refuses_incomplete_rows_and_strange_splits(
    tmp_path: Path, changes: dict[str, Sequence[object]], match: str
) -> None:
    refused(tmp_path, match, "table", table(tmp_path, **changes), *TABLE_KNOBS, "--split", "part")


def test_refuses_rows_of_another_length(tmp_path: Path) -> None:
    file = table(tmp_path)
    lines = file.read_text().splitlines()
    for changed in (lines[2].rsplit(",", 4)[0], f"{lines[2]},more"):
        file.write_text("\n".join([*lines[:2], changed, *lines[3:]]))
        refused(tmp_path, "line 3 must have as many cells as the header", "table", file, *TABLE_KNOBS)
    file.write_text(lines[0])
    refused(tmp_path, "must have a row per image, got only a header", "table", file, *TABLE_KNOBS)


def test_refuses_a_part_of_nih_unless_it_is_meant(tmp_path: Path) -> None:
    table = nih(tmp_path) / "Data_Entry_2017.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:37]))
    match = r"got none for 4: 00000019_000.png, 00000019_001.png, 00000020_000.png, .+ --subset true"
    refused(tmp_path, match, "nih", tmp_path)
    refused(tmp_path, "`subset` must be true or false, got 'maybe'", "nih", tmp_path, "--subset", "maybe")
    run("nih", tmp_path, "--subset", "true")
    assert len(content(tmp_path)["test"]) == 6
    assert content(tmp_path)["description"].startswith("A part of NIH ChestX-ray14")


@pytest.mark.parametrize("knob", ["--validation_fraction", "--test_fraction"])
def test_refuses_a_fraction_beside_a_split_column(tmp_path: Path, knob: str) -> None:
    match = f"`{knob[2:]}` must be left out with --split part"
    refused(tmp_path, match, "table", table(tmp_path), *TABLE_KNOBS, "--split", "part", knob, 0.3)


def test_a_table_keeps_the_default_of_the_fraction_that_is_not_given(tmp_path: Path) -> None:
    run("table", table(tmp_path), *TABLE_KNOBS, "--validation_fraction", 0.3)
    assert [len(content(tmp_path)[split]) for split in SPLITS] == [10, 6, 4]


def test_empty_splits_of_labelled_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = table(tmp_path, part=["train"] * 14 + ["test"] * 6)
    run("table", file, *TABLE_KNOBS, "--split", "part")
    err = capsys.readouterr().err
    assert "warning: validation has no images, but cxr_classify needs validation and test.\n" in err
    assert "warning: test has no images" not in err
    run("unlabelled", tmp_path / "images")
    assert "has no images" not in capsys.readouterr().err


def test_refuses_unknown_sources_and_words_too_many(tmp_path: Path) -> None:
    classes(tmp_path)
    refused(tmp_path, "there is no source nihh; did you mean nih?", "nihh", tmp_path)
    refused(tmp_path, "there is no source fodlers; did you mean folders?", "--name", "nih", "fodlers", tmp_path)
    refused(tmp_path, "`folders` must get one path, got .+, extra", "folders", tmp_path, "extra")
    refused(tmp_path, "`folders` must get one path, got .+, description", "folders", tmp_path, "description")
    run("folders", tmp_path, "--name", "table")
    assert content(tmp_path)["name"] == "table"


def test_help_shows_the_usage_and_so_does_no_source(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    shown = capsys.readouterr().out
    assert shown.startswith("Write the dataset.json")
    assert "scripts/make_datalist.py nih DIR\n" in shown
    assert "skip_corrupt: leave out images" in shown
    with pytest.raises(SystemExit, match=r"make_datalist\.py nih DIR"):
        run()


def test_refuses_findings_that_nih_does_not_have(tmp_path: Path) -> None:
    match = r"line 3: findings must be of \['Atelectasis', .+, got 'Mass\|Pnuemonia'"
    refused(tmp_path, match, "nih", nih(tmp_path, findings="Mass|Pnuemonia"))


def test_refuses_a_folder_that_is_another_data_set(tmp_path: Path) -> None:
    classes(tmp_path)
    refused(tmp_path, "must hold Data_Entry_2017_v2020.csv or Data_Entry_2017.csv", "nih", tmp_path)
    refused(tmp_path, "must hold train.csv", "chexpert", tmp_path)
    refused(tmp_path, "must be a CSV file", "table", tmp_path, "--image", "path")
    refused(tmp_path, "must be a folder with images", "unlabelled", tmp_path / "nowhere")


def test_refuses_folders_that_are_no_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_image(tmp_path / "splits" / name / f"{name}.png")
    refused(tmp_path, "one per class, got test, train", "folders", tmp_path / "splits")
    write_image(classes(tmp_path / "loose") / "loose.png")
    refused(tmp_path, "one per class, got loose.png", "folders", tmp_path / "loose")
    write_image(tmp_path / "single" / "covid" / "a.png")
    refused(tmp_path, "one per class, got covid", "folders", tmp_path / "single")


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        (("--subject_pattern", r"^(q\d+)_"), "`subject_pattern` must match every file name"),
        (("--subject_pattern", r"^p\d+_"), "`subject_pattern` must match every file name, with one group"),
        (("--subject_pattern", "(p"), "`subject_pattern` must be a regular expression"),
        (("--test_fraction", 0.95), "fractions must be 0 or more and sum to less than 1"),
        (("--validation_fraction", -0.1), "fractions must be 0 or more"),
        (("--workers", 0), "`workers` must be a whole number of at least 1, got 0"),
        (("--seed", "one"), "`seed` must be a whole number of at least 0, got 'one'"),
        (("--check", "closely"), "`check` must be one of open, exists, got 'closely'"),
        (("--skip_corrupt", "maybe"), "`skip_corrupt` must be true or false, got 'maybe'"),
        (("--overwrite", "maybe"), "`overwrite` must be true or false, got 'maybe'"),
        (("--output", "nowhere/dataset.json"), "`output` must be an existing folder, with or without /dataset.json"),
    ],
)
def test_refuses_bad_knobs(tmp_path: Path, knobs: Sequence[object], match: str) -> None:
    refused(tmp_path, match, "folders", classes(tmp_path), *knobs)


def test_refuses_bad_policies_and_sources_without_a_place_for_the_output(tmp_path: Path) -> None:
    chexpert(tmp_path)
    refused(tmp_path, "`uncertain` must be one of ignore, ones, zeros", "chexpert", tmp_path, "--uncertain", "two")
    refused(tmp_path, "`unmentioned` must be one of zeros, ignore", "chexpert", tmp_path, "--unmentioned", "ones")
    refused(tmp_path, "or several and --output, got 2", "unlabelled", tmp_path / "train", tmp_path / "valid")
    match = "`extra` must not name image, label or subject"
    refused(tmp_path, match, "table", tmp_path / "train.csv", "--image", "Path", "--extra", "[label]")


def test_refuses_too_few_subjects_for_the_splits(tmp_path: Path) -> None:
    file = table(tmp_path, patient=["P0"] * 20)
    refused(tmp_path, "training and validation must hold images, got none", "table", file, *TABLE_KNOBS)


def test_a_misspelt_knob_writes_nothing(tmp_path: Path) -> None:
    classes(tmp_path)
    refused(
        tmp_path, "there is no --test_fractoin; did you mean --test_fraction", "folders", tmp_path, "--test_fractoin=1"
    )
    refused(tmp_path, "there is no --wokers; did you mean --workers", "folders", tmp_path, "--wokers", 2)
    assert not (tmp_path / "dataset.json").exists()


def test_the_command_line_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "unlabelled", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} must be a folder with images")
    assert "Traceback" not in done.stderr
