import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from datalists import image_sources
from helpers import SPLITS, content, make_list, sizes
from sources import chexpert, classes, nih, table, write_image, write_table

from dissect_monai import read_datalist

TABLE_OPTIONS = ("--image", "path", "--labels", "Edema", "Lung Lesion", "--subject", "patient")
Refused = Callable[..., str]


def subjects(folder: Path) -> list[set[str]]:
    return [{item["subject"] for item in content(folder)[split]} for split in SPLITS]


def by_name(folder: Path) -> dict[str, dict[str, Any]]:
    """All items, with their split, by file name."""
    return {Path(item["image"]).name: {**item, "split": split} for split in SPLITS for item in content(folder)[split]}


def test_nih_reads_findings_views_ages_and_subjects_and_keeps_the_official_test_list(tmp_path: Path) -> None:
    (nih(tmp_path) / "Data_Entry_2017.csv").rename(tmp_path / "Data_Entry_2017_v2020.csv")
    make_list("nih", tmp_path, "--validation_fraction", 0.2)
    items, spec = by_name(tmp_path), content(tmp_path)
    assert list(spec) == ["name", "description", "modality", "label_names", *SPLITS]
    assert spec["label_names"] == image_sources.NIH_FINDINGS
    first, second = items["00000001_000.png"], items["00000001_001.png"]
    positive = [name for name, value in zip(image_sources.NIH_FINDINGS, first["label"], strict=True) if value]
    assert positive == ["Cardiomegaly", "Hernia"]
    assert second["label"] == [0] * 14
    assert (first["subject"], first["view"], first["age"], first["sex"]) == ("1", "PA", 58, "F")
    assert first["image"] == "images_002/images/00000001_000.png"
    assert "age" not in second, "414 years is an error of the table"
    training, validation, test = subjects(tmp_path)
    assert test == {"16", "17", "18", "19", "20"}
    assert (len(training), len(validation)) == (12, 3)
    assert sizes(tmp_path) == [24, 6, 10]


@pytest.mark.parametrize(("uncertain", "value"), [("ignore", None), ("ones", 1), ("zeros", 0)])
def test_chexpert_takes_frontal_views_and_uncertain_labels(tmp_path: Path, uncertain: str, value: int | None) -> None:
    make_list("chexpert", chexpert(tmp_path), "--uncertain", uncertain)
    assert sizes(tmp_path) == [9, 1, 2]
    assert content(tmp_path)["training"][0]["label"][:5] == [0, 1, 0, value, 0]
    facts = {"subject": "patient00010", "view": "AP", "age": 68, "sex": "M"}
    image = "valid/patient00010/study1/view1_frontal.jpg"
    assert content(tmp_path)["test"][0] == {"image": image, "label": [0, 1] + [0] * 12, **facts}


def test_folders_become_one_hot_labels_split_by_the_subject_in_the_file_name(tmp_path: Path) -> None:
    make_list("folders", classes(tmp_path), "--subject_pattern", r"^(p\d+)_", "--seed", 1)
    spec = content(tmp_path)
    assert spec["label_names"] == ["covid", "normal"]
    for item in (item for split in SPLITS for item in spec[split]):
        assert item["label"] == ([1, 0] if item["image"].startswith("covid/") else [0, 1])
    assert [len(each) for each in subjects(tmp_path)] == [3, 1, 1]
    assert set.union(*subjects(tmp_path)) == {f"p{index}" for index in range(5)}


def test_folders_without_a_pattern_make_each_image_a_subject(tmp_path: Path) -> None:
    make_list("folders", classes(tmp_path))
    assert sizes(tmp_path) == [14, 2, 4]
    assert not any("subject" in item for item in by_name(tmp_path).values())


def test_a_table_gives_labels_unknowns_splits_and_extras(tmp_path: Path) -> None:
    make_list("table", table(tmp_path), *TABLE_OPTIONS, "--split", "part", "--extra", "view")
    spec = content(tmp_path)
    assert spec["label_names"] == ["Edema", "Lung Lesion"]
    assert sizes(tmp_path) == [10, 4, 6]
    assert [item["label"][0] for item in spec["training"][:6]] == [1, 0, None, 1, 0, None]
    assert spec["training"][0] == {"image": "images/0.png", "label": [1, 0], "subject": "P0", "view": "AP"}
    assert "view" not in spec["training"][1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), [16, 2, 2]), (("--validation_fraction", 0.3), [14, 4, 2]), (("--test_fraction", 0), [18, 2, 0])],
)
def test_a_table_is_split_by_subject(tmp_path: Path, options: Sequence[object], expected: list[int]) -> None:
    make_list("table", table(tmp_path), *TABLE_OPTIONS, *options)
    assert sizes(tmp_path) == expected
    assert [2 * len(each) for each in subjects(tmp_path)] == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_a_table_may_come_from_a_spreadsheet_with_its_own_image_folder(tmp_path: Path, encoding: str) -> None:
    rows = [[write_image(tmp_path / "x" / f"{index}.png").name, index % 2] for index in range(10)]
    file = write_table(tmp_path / "table.csv", ["Aufnahme", "Ödem"], rows, encoding)
    make_list("table", file, "--image", "Aufnahme", "--labels", "Ödem", "--image_dir", tmp_path / "x")
    assert content(tmp_path)["label_names"] == ["Ödem"]
    assert by_name(tmp_path)["3.png"]["label"] == [1]


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    make_list("table", table(tmp_path / "data"), *TABLE_OPTIONS, "--output", tmp_path / "elsewhere" / "dataset.json")
    datalist = read_datalist(tmp_path / "elsewhere")
    assert datalist.label_names == ["Edema", "Lung Lesion"]
    assert [len(getattr(datalist, split)) for split in SPLITS] == [16, 2, 2]
    assert all(os.path.isfile(item["image"]) for item in datalist.training)
    assert content(tmp_path / "elsewhere")["training"][0]["image"].startswith("../data/images/")
    assert sorted(os.listdir(tmp_path / "elsewhere")) == [".salt", "dataset.json"]


def test_the_seed_draws_the_splits_and_another_validation_fraction_leaves_the_test_split_alone(tmp_path: Path) -> None:
    tests = []
    for options in (["--seed", 0], ["--seed", 0, "--validation_fraction", 0.3], ["--seed", 1]):
        make_list("folders", classes(tmp_path), *options, "--overwrite")
        tests.append(content(tmp_path)["test"])
    assert tests[0] == tests[1] != tests[2]


def test_patients_keep_their_splits_when_others_are_added_and_the_folder_moves(tmp_path: Path) -> None:
    make_list("folders", classes(tmp_path / "a"))
    before = by_name(tmp_path / "a")
    for index in range(10, 20):
        write_image(tmp_path / "a" / "covid" / "site0" / f"p{index}_{index}.png")
    (tmp_path / "a").rename(tmp_path / "b")
    make_list("folders", tmp_path / "b", "--overwrite")
    after = by_name(tmp_path / "b")
    assert (len(before), len(after)) == (10, 20)
    assert {name: after[name] for name in before} == before


def test_an_empty_split_is_refused_with_a_seed_that_fills_it(tmp_path: Path, refused: Refused) -> None:
    command = ("folders", classes(tmp_path), "--subject_pattern", r"^(p\d+)_", "--validation_fraction", 0)
    said = refused("test must hold images, got none, of 5 subject", *command)
    make_list(*command, *said.rpartition("with ")[2].rstrip(".").split())
    assert all(sizes(tmp_path)[::2])


def dicoms(folder: Path, patients: Sequence[str]) -> Path:
    """An X-ray of each, and a table of them."""
    folder.mkdir()
    for index, patient in enumerate(patients):
        image = sitk.GetImageFromArray(np.random.default_rng(index).integers(0, 999, (1, 9, 8), dtype=np.int16))
        image.SetMetaData("0010|0020", patient)
        sitk.WriteImage(image, folder / f"{index}.dcm")
    rows = [[f"{index}.dcm", index % 2] for index in range(len(patients))]
    return write_table(folder / "table.csv", ["path", "Edema"], rows)


def test_dicom_says_whose_it_is_and_who_is_unknown_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patients = [f"P{index // 2} " for index in range(18)] + ["", ""]
    file = dicoms(tmp_path / "a", patients)
    make_list("table", file, "--image", "path", "--labels", "Edema", "--test_fraction", 0.1, "--seed", 1)
    items = by_name(tmp_path / "a")
    assert [items[f"{index}.dcm"].get("subject") for index in range(20)] == [
        *(name.strip() for name in patients[:18]), None, None,
    ]  # fmt: skip
    said = "2 of 20 images have no subject: each counts as one of its own. Say which are of one patient by --subject."
    assert f"warning: {said}\n" in capsys.readouterr().err
    file = dicoms(tmp_path / "b", ["ANON"] * 3)
    make_list("table", file, "--image", "path", "--validation_fraction", 0, "--test_fraction", 0)
    assert "all 3 images have the PatientID ANON: they count as one subject." in capsys.readouterr().err


def test_counts_are_printed_per_split_and_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_list("table", table(tmp_path), *TABLE_OPTIONS, "--split", "part")
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert cells["images"] == ["10", "4", "6"]
    assert cells["subjects"] == ["5", "2", "3"]
    assert cells["Edema"] == ["4 / 4 / 2", "2 / 2 / 0", "3 / 3 / 0"]
    assert cells["Lung Lesion"] == ["5 / 5 / 0", "2 / 2 / 0", "3 / 3 / 0"]


def test_images_that_are_listed_twice_are_left_out_on_demand(tmp_path: Path, refused: Refused) -> None:
    file = table(tmp_path, path=["images/0.png", "./images/0.png", *(f"images/{index}.png" for index in range(2, 20))])
    refused(r"1 of 19 images cannot be used:\n  \S+/images/0.png is listed 2 times\n", "table", file, *TABLE_OPTIONS)
    make_list("table", file, *TABLE_OPTIONS, "--skip_corrupt", "--seed", 1)
    assert by_name(tmp_path).keys() == {f"{index}.png" for index in range(2, 20)}


def test_what_is_left_out_moves_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    make_list("table", table(tmp_path), *TABLE_OPTIONS)
    before = by_name(tmp_path)
    broken = tmp_path / "images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "images" / "4.png").unlink()
    command = ("table", tmp_path / "table.csv", *TABLE_OPTIONS, "--overwrite")
    said = refused("2 of 20 images cannot be used", *command)
    assert "images/3.png must be an intact image" in said
    assert "images/4.png does not exist" in said
    make_list(*command, "--skip_corrupt")
    assert "warning: left out, 2 of 20 images" in capsys.readouterr().err
    assert by_name(tmp_path) == {name: item for name, item in before.items() if name not in ("3.png", "4.png")}


def test_refuses_a_patient_in_two_official_lists(tmp_path: Path, refused: Refused) -> None:
    nih(tmp_path)
    lists = [tmp_path / "train_val_list.txt", tmp_path / "test_list.txt"]
    names = [path.read_text().split() for path in lists]
    lists[0].write_text("\n".join(names[0] + names[1][:1]))
    refused(r"line 32: 00000016_000.png must be in one of train_val_list.txt and test", "nih", tmp_path)
    lists[1].write_text("\n".join(names[1][1:]))
    refused("must share no subject, got 1 in both: 16 .+ Move each to one split", "nih", tmp_path)


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({"patient": ["P0"] * 11 + ["P1"] * 9}, ["--split", "part"], "must share no subject, got 1 in both: P0"),
        ({"patient": ["P0", ""] * 10}, [], "line 3: path and patient must not be empty"),
        ({"part": ["train", "holdout"] * 10}, ["--split", "part"], "line 3: part must be one of train, .+ 'holdout"),
        ({"part": ["test"] * 20}, ["--split", "part"], "training must hold images, got none"),
        ({"patient": ["P0"] * 20}, [], r"training and test must hold images, got none, of 1 subject\(s\)\. Add"),
        ({"Edema": [0, 1, 2] + [0] * 17}, [], "line 4: Edema must be one of .+ or empty, got '2'"),
        ({}, ["--subject", "who"], r"must have the columns \['who'\], got \['path'"),
        ({}, ["--split", "part", "--test_fraction", "0"], "--split must not come with .+ Give one or the other"),
        ({}, ["--extra", "label"], "--extra must not name image, label or subject"),
    ],
)  # fmt: skip
def test_refuses_a_table_that_makes_no_data_list(
    tmp_path: Path, changes: dict[str, Sequence[object]], options: list[str], match: str, refused: Refused
) -> None:
    refused(match, "table", table(tmp_path, **changes), *TABLE_OPTIONS, *options)


def test_refuses_rows_of_another_length(tmp_path: Path, refused: Refused) -> None:
    file = table(tmp_path)
    lines = file.read_text().splitlines()
    for changed in (lines[2].rsplit(",", 4)[0], f"{lines[2]},more"):
        file.write_text("\n".join([*lines[:2], changed, *lines[3:]]))
        refused("line 3 must have as many cells as the header", "table", file, *TABLE_OPTIONS)


@pytest.mark.parametrize("tables", ["", "CheXpert-v1.0 batch 1 (validate & csv)"])
def test_chexpert_is_found_as_the_full_set_is_unpacked(tmp_path: Path, tables: str) -> None:
    chexpert(tmp_path)
    batches = ["batch 2 (train 1)"] * 6 + ["batch 3 (train 2)"] * 4 + ["batch 1 (validate & csv)/valid"] * 2
    for patient, batch in enumerate(batches):
        (tmp_path / f"CheXpert-v1.0 {batch}").mkdir(parents=True, exist_ok=True)
        name = f"patient{patient:05d}"
        (tmp_path / ("valid" if patient > 9 else "train") / name).rename(tmp_path / f"CheXpert-v1.0 {batch}" / name)
    for path in tmp_path.glob("*.csv"):
        path.write_text(path.read_text().replace("CheXpert-v1.0-small/", "CheXpert-v1.0/"))
        path.rename(tmp_path / tables / path.name)
    make_list("chexpert", tmp_path)
    assert sizes(tmp_path) == [9, 1, 2]
    assert subjects(tmp_path)[2] == {"patient00010", "patient00011"}


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_table_without_commas_is_named_so(tmp_path: Path, mark: str, name: str, refused: Refused) -> None:
    path = table(tmp_path)
    path.write_text(path.read_text().replace(",", mark))
    refused(f"must have commas between its columns, got {name}. Save it", "table", path, *TABLE_OPTIONS)


def test_refuses_a_part_of_nih_unless_it_is_meant(tmp_path: Path, refused: Refused) -> None:
    table = nih(tmp_path) / "Data_Entry_2017.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:37]))
    refused("4 of 40 images cannot be used:\n  00000019_000.png, which is in an official list, has no", "nih", tmp_path)
    make_list("nih", tmp_path, "--skip_corrupt")
    assert len(content(tmp_path)["test"]) == 6
    assert content(tmp_path)["description"].startswith("A part of NIH ChestX-ray14")


def test_refuses_a_folder_that_is_another_data_set(tmp_path: Path, refused: Refused) -> None:
    match = r"line 3: findings must be of \['Atelectasis', .+, got 'Mass\|Pnuemonia'"
    refused(match, "nih", nih(tmp_path / "other", findings="Mass|Pnuemonia"))
    classes(tmp_path)
    refused("must hold Data_Entry_2017_v2020.csv or Data_Entry_2017.csv", "nih", tmp_path)
    refused("must hold train.csv", "chexpert", tmp_path)
    refused("must be a folder with images", "folders", tmp_path / "nowhere")


def test_refuses_folders_that_are_no_classes(tmp_path: Path, refused: Refused) -> None:
    for name in ("train", "test"):
        write_image(tmp_path / "splits" / name / f"{name}.png")
    refused("one per class, got test", "folders", tmp_path / "splits")
    write_image(classes(tmp_path / "loose") / "loose.png")
    refused("one per class, got loose.png", "folders", tmp_path / "loose")
    write_image(tmp_path / "single" / "covid" / "a.png")
    refused("one per class, got covid", "folders", tmp_path / "single")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--subject_pattern", r"^(q\d+)_"), "--subject_pattern must match every file name"),
        (("--subject_pattern", r"^p\d+_"), "--subject_pattern must match every file name, with one group"),
        (("--subject_pattern", "(p"), "--subject_pattern must be a regular expression"),
        (("--test_fraction", 0.95), "fractions must be 0 or more and sum to less than 1"),
        (("--validation_fraction", -0.1), "fractions must be 0 or more"),
        (("--output", "no/where/dataset.json"), "--output must be a folder, or a new one in a folder that exists"),
    ],
)
def test_refuses_bad_options(tmp_path: Path, options: Sequence[object], match: str, refused: Refused) -> None:
    refused(match, "folders", classes(tmp_path), *options)


@pytest.mark.parametrize("source", ["", "nih", "chexpert", "folders", "table", "btcv", "msd", "volumes"])
def test_help_says_what_a_source_takes(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_list(*source.split(), "--help")
    assert caught.value.code == 0
    assert ("--validation_fraction" if source else "make_datalist.py nih DIR\n") in capsys.readouterr().out
