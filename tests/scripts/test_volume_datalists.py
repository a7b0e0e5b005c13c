from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers import volume, write_series

from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.volume_lists import aggregate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
script = importlib.import_module("make_datalist")
pairs = importlib.import_module("datalists.volume_pairs")

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
SHAPE = (4, 5, 3)
KNOBS = ("--group", "abdomen", "--modality", "CT")


def run(*arguments: object) -> None:
    script.main([str(argument) for argument in arguments])


def refused(tmp_path: Path, match: str, *arguments: object) -> str:
    """The message of an error; and nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=match) as caught:
        run(*arguments)
    assert str(caught.value).startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def write_image(path: Path, affine: np.ndarray = AFFINE) -> Path:
    return save(path, np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), affine)


def write_label(path: Path, values: Sequence[int] = (1, 2), shape: Sequence[int] = SHAPE) -> Path:
    label = np.zeros(shape, np.uint8)
    label.flat[1 : 1 + 2 * len(values)] = np.repeat(values, 2)
    return save(path, label)


def btcv(
    folder: Path,
    numbers: Sequence[int] = (*range(1, 11), *range(21, 41)),
    parts: tuple[str, str] = ("img", "label"),
    names: tuple[str, str] = ("img{:04d}", "label{:04d}"),
) -> Path:
    for number in numbers:
        write_image(folder / parts[0] / f"{names[0].format(number)}.nii.gz")
        write_label(folder / parts[1] / f"{names[1].format(number)}.nii.gz", [4, 13] if number == 2 else [1, 13])
    return folder


def msd(folder: Path, count: int = 5, **changes: Any) -> Path:
    """A task of the Decathlon; `changes` replaces keys of its dataset.json."""
    names = [f"spleen_{index}.nii.gz" for index in range(count)]
    for name in names:
        write_image(folder / "imagesTr" / name)
        write_label(folder / "labelsTr" / name, [1])
        (folder / "imagesTr" / f"._{name}").write_bytes(b"of a Mac")
        (folder / "labelsTr" / f"._{name}").write_bytes(b"of a Mac")
    write_image(folder / "imagesTs" / "spleen_100.nii.gz")
    spec = {
        "name": "Spleen", "description": "Spleen Segmentation", "licence": "CC-BY-SA 4.0", "release": "1.0",
        "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}, "numTraining": count, "numTest": 1,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/spleen_100.nii.gz"],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps({**spec, **changes}))
    return folder


def folders(folder: Path, count: int = 5) -> Path:
    for index in range(count):
        write_image(folder / "images" / f"case_{index}.nii.gz")
        write_label(folder / "labels" / f"case_{index}.nii.gz")
    return folder


def volumes(folder: Path, *knobs: object) -> None:
    run("volumes", folder / "images", "--label_dir", folder / "labels", *KNOBS, *knobs)


def refused_volumes(folder: Path, match: str, *knobs: object) -> str:
    paths = (folder / "images", "--label_dir", folder / "labels")
    return refused(folder, match, "volumes", *paths, *KNOBS, *knobs)


def table_of(out: str) -> dict[str, list[str]]:
    """The cells of a printed table by what its lines start with."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


# --- BTCV


def test_btcv_with_the_original_names_gets_the_split_of_the_literature(tmp_path: Path) -> None:
    run("btcv", btcv(tmp_path))
    spec = content(tmp_path)
    assert [len(spec[split]) for split in ("training", "validation", "test")] == [24, 6, 0]
    assert [item["subject"] for item in spec["validation"]] == [f"{number:04d}" for number in range(35, 41)]
    assert spec["training"][0] == {
        "image": "img/img0001.nii.gz",
        "label": "label/label0001.nii.gz",
        "subject": "0001",
    }
    head = {key: spec[key] for key in ("name", "task", "group", "modality")}
    assert head == {"name": "btcv", "task": "btcv", "group": "abdomen", "modality": {"0": "CT"}}
    assert list(spec["labels"]) == [str(value) for value in range(14)]
    assert (spec["labels"]["1"], spec["labels"]["13"]) == ("spleen", "left_adrenal_gland")
    assert "drawn" not in spec["description"]


@pytest.mark.parametrize(
    ("below", "parts"),
    [
        ("Training", ("img", "label")),
        ("RawData/Training", ("img", "label")),
        (".", ("imagesTr", "labelsTr")),
        (".", ("images", "labels")),
    ],
)
def test_btcv_is_found_in_every_usual_place(tmp_path: Path, below: str, parts: tuple[str, str]) -> None:
    btcv(tmp_path / below, range(34, 42), parts)
    write_image(tmp_path / below / "imagesTs" / "img0061.nii.gz")
    run("btcv", tmp_path)
    assert [len(content(tmp_path)[split]) for split in ("training", "validation")] == [2, 6]


@pytest.mark.parametrize("names", [("ABD_{:03d}_0000", "ABD_{:03d}"), ("btcv_{}", "btcv_{}")])
def test_btcv_with_other_names_is_split_by_subject(tmp_path: Path, names: tuple[str, str]) -> None:
    run("btcv", btcv(tmp_path, range(31, 41), ("imagesTr", "labelsTr"), names))
    spec = content(tmp_path)
    assert [len(spec[split]) for split in ("training", "validation")] == [8, 2]
    assert "drawn with seed 0, 0.2 of the subjects for validation" in spec["description"]


def test_a_part_of_btcv_or_a_fraction_is_split_by_subject(tmp_path: Path) -> None:
    run("btcv", btcv(tmp_path / "part", range(31, 40)))
    assert len(content(tmp_path / "part")["validation"]) == 2
    run("btcv", btcv(tmp_path / "all"), "--validation_fraction", 0.5)
    assert len(content(tmp_path / "all")["validation"]) == 15


def test_btcv_refuses_other_folders_and_two_pairs(tmp_path: Path) -> None:
    btcv(tmp_path / "other", [1], ("averaged-training-images", "averaged-training-labels"))
    refused(tmp_path, "must hold one pair of the folders img and label, .+ got neither", "btcv", tmp_path / "other")
    btcv(btcv(tmp_path / "two", [1]), [1], ("imagesTr", "labelsTr"))
    refused(tmp_path, r"got \S+img and \S+imagesTr. Name the folder", "btcv", tmp_path / "two")


def test_btcv_refuses_names_without_a_number_or_with_the_same(tmp_path: Path) -> None:
    write_image(btcv(tmp_path / "a", [1]) / "img" / "image.nii.gz")
    refused(tmp_path, r"image\.nii\.gz must have a number in its name", "btcv", tmp_path / "a")
    write_image(btcv(tmp_path / "b", [1]) / "img" / "other1.nii.gz")
    refused(tmp_path, "must have different numbers, got .+img0001.nii.gz and .+other1", "btcv", tmp_path / "b")


# --- Decathlon


def test_msd_becomes_a_data_list_of_its_own_names_and_values(tmp_path: Path) -> None:
    run("msd", msd(tmp_path / "Task09_Spleen"), "--output", tmp_path)
    spec = content(tmp_path)
    head = {key: spec[key] for key in ("name", "task", "group", "modality", "labels", "licence")}
    assert head == {
        "name": "Spleen", "task": "Spleen", "group": "abdomen", "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"}, "licence": "CC-BY-SA 4.0",
    }  # fmt: skip
    assert [len(spec[split]) for split in ("training", "validation", "test")] == [4, 1, 0]
    item = next(item for item in spec["training"] + spec["validation"] if item["subject"] == "spleen_3")
    assert item["image"] == "Task09_Spleen/imagesTr/spleen_3.nii.gz"
    assert item["label"] == "Task09_Spleen/labelsTr/spleen_3.nii.gz"


def test_msd_may_get_a_test_split_which_leaves_room_for_validation(tmp_path: Path) -> None:
    run("msd", msd(tmp_path / "Task09_Spleen", 10), "--output", tmp_path, "--test_fraction", 0.3)
    assert [len(content(tmp_path)[split]) for split in ("training", "validation", "test")] == [5, 2, 3]


def test_msd_replaces_its_own_list_only_on_demand_and_can_be_run_again(tmp_path: Path) -> None:
    task = msd(tmp_path / "Task09_Spleen")
    refused(tmp_path, "dataset.json exists. Replace it with --overwrite true, or name another", "msd", task)
    written = []
    for _ in range(2):
        run("msd", task, "--overwrite", "true")
        written.append(content(task))
    assert written[0] == written[1]


@pytest.mark.parametrize(("task", "group"), [("Task02_Heart", "heart"), ("Task06_Lung", "chest")])
def test_msd_groups_are_those_of_the_table(tmp_path: Path, task: str, group: str) -> None:
    run("msd", msd(tmp_path / task, modality={"0": "MRI"}), "--output", tmp_path)
    assert (content(tmp_path)["group"], content(tmp_path)["modality"]) == (group, {"0": "MR"})


def test_msd_asks_for_the_group_of_another_folder(tmp_path: Path) -> None:
    task = msd(tmp_path / "spleens")
    refused(tmp_path, "spleens must have a group. Give its region", "msd", task, "--output", tmp_path)
    run("msd", task, "--output", tmp_path, "--group", "trunk")
    assert content(tmp_path)["group"] == "trunk"


def test_msd_refuses_several_channels_with_the_remedy(tmp_path: Path) -> None:
    task = msd(tmp_path / "Task05_Prostate", modality={"0": "T2", "1": "ADC"})
    match = r"must have one channel, got 2 \(T2, ADC\). Write each channel to a file of its own"
    refused(tmp_path, match, "msd", task, "--output", tmp_path)


def test_msd_refuses_a_part_of_a_task_unless_it_is_meant(tmp_path: Path) -> None:
    task = msd(tmp_path / "Task09_Spleen")
    for part in ("imagesTr", "labelsTr"):
        (task / part / "spleen_2.nii.gz").unlink()
    match = "must hold the 5 label maps .+ lacks 1 such as spleen_2.nii.gz. Complete the download, .+ --subset true"
    refused(tmp_path, match, "msd", task, "--output", tmp_path)
    run("msd", task, "--output", tmp_path, "--subset", "true")
    assert len(content(tmp_path)["training"]) == 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": {"1": "a", "2": "a"}}, "must give whole numbers different names"),
        ({"labels": {"both": [1, 2]}}, "must give whole numbers different names"),
        ({"labels": {}}, "must give whole numbers different names"),
        ({"modality": "CT"}, "must be that of a Decathlon task"),
        ({"modality": {}}, "must have one channel, got 0"),
    ],
)
def test_msd_refuses_lists_of_another_form(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refused(tmp_path, match, "msd", msd(tmp_path / "Task09_Spleen", **changes), "--output", tmp_path)


# --- any folders


def test_two_folders_are_matched_by_name_and_values_named_as_given(tmp_path: Path) -> None:
    volumes(folders(tmp_path), "--labels", "[liver,left kidney]")
    spec = content(tmp_path)
    assert spec["labels"] == {"0": "background", "1": "liver", "2": "left kidney"}
    assert (spec["task"], spec["group"], spec["modality"]) == (tmp_path.name, "abdomen", {"0": "CT"})
    assert [len(spec[split]) for split in ("training", "validation", "test")] == [4, 1, 0]
    assert {item["label"].replace("labels", "images") for item in spec["training"]} == {
        item["image"] for item in spec["training"]
    }
    assert {item["subject"] for item in spec["training"] + spec["validation"]} == {f"case_{n}" for n in range(5)}


def test_values_without_given_names_are_called_by_their_number(tmp_path: Path) -> None:
    write_label(folders(tmp_path) / "labels" / "case_1.nii.gz", [7])
    volumes(tmp_path)
    expected = {"0": "background", "1": "label_1", "2": "label_2", "7": "label_7"}
    assert content(tmp_path)["labels"] == expected


@pytest.mark.parametrize("given", ["{1: liver, 2: spleen}", "{liver: 1, spleen: 2, background: 0}"])
def test_names_may_be_given_by_value_or_values_by_name(tmp_path: Path, given: str) -> None:
    volumes(folders(tmp_path), "--labels", given)
    assert content(tmp_path)["labels"] == {"0": "background", "1": "liver", "2": "spleen"}


def test_channel_suffixes_of_nnunet_are_understood(tmp_path: Path) -> None:
    for path in (folders(tmp_path) / "images").iterdir():
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    volumes(tmp_path)
    item = content(tmp_path)["training"][0]
    assert item["image"] == f"images/{item['subject']}_0000.nii.gz"
    assert item["label"] == f"labels/{item['subject']}.nii.gz"
    write_image(tmp_path / "images" / "case_1_0001.nii.gz")
    (tmp_path / "dataset.json").unlink()
    refused_volumes(tmp_path, "a label map must have one image, got .+case_1_0000.+ and .+case_1_0001.+ channels")


def test_numbers_at_the_end_of_a_name_are_no_channels(tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / "images" / f"case_{index:04d}.nii.gz")
        write_label(tmp_path / "labels" / f"case_{index:04d}.nii.gz")
    volumes(tmp_path)
    assert len(content(tmp_path)["training"]) == 2


def test_formats_may_differ_and_a_folder_of_slices_is_one_image(tmp_path: Path) -> None:
    scan = volume()
    label = sitk.Cast(scan > 500, sitk.sitkUInt8)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    write_series(tmp_path / "images" / "a", scan)
    sitk.WriteImage(scan, str(tmp_path / "images" / "b.mha"))
    sitk.WriteImage(scan, str(tmp_path / "images" / "c.nrrd"))
    for name in ("a.nii.gz", "b.nii.gz", "c.mha"):
        sitk.WriteImage(label, str(tmp_path / "labels" / name))
    volumes(tmp_path, "--validation_fraction", 0)
    items = content(tmp_path)["training"]
    assert [item["image"] for item in items] == ["images/a", "images/b.mha", "images/c.nrrd"]
    assert [item["label"] for item in items] == ["labels/a.nii.gz", "labels/b.nii.gz", "labels/c.mha"]
    assert len(aggregate(tmp_path).training) == 3


def test_unlabelled_volumes_are_all_training(tmp_path: Path) -> None:
    write_image(tmp_path / "p1" / "a.nii.gz")
    write_image(tmp_path / "p1" / "._a.nii.gz")
    write_image(tmp_path / ".hidden" / "b.nii.gz")
    write_series(tmp_path / "p2", volume())
    write_series(tmp_path / "p3", volume())
    run("volumes", tmp_path, *KNOBS)
    spec = content(tmp_path)
    assert spec["training"] == [
        {"image": "p1/a.nii.gz", "subject": "p1/a"},
        {"image": "p2", "subject": "p2"},
        {"image": "p3", "subject": "p3"},
    ]
    assert spec["validation"] == spec["test"] == []
    assert "labels" not in spec
    assert "label_names" not in spec


def test_a_pattern_names_the_subject_of_nested_volumes(tmp_path: Path) -> None:
    for index in range(12):
        write_image(tmp_path / f"p{index // 3}" / f"scan_{index}.nii.gz")
    run("volumes", tmp_path, *KNOBS, "--subject_pattern", r"^(p\d+)/", "--validation_fraction", 0.25)
    spec = content(tmp_path)
    assert [len(spec[split]) for split in ("training", "validation")] == [9, 3]
    assert len({item["subject"] for item in spec["training"]}) == 3


def test_label_maps_may_lie_below_the_images(tmp_path: Path) -> None:
    folders(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.rename(tmp_path / path.name)
    run("volumes", tmp_path, "--label_dir", tmp_path / "labels", *KNOBS)
    assert len(content(tmp_path)["training"]) == 4


def test_folders_far_apart_need_an_output(tmp_path: Path) -> None:
    folders(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "labels").rename(tmp_path / "labels")
    arguments = ("volumes", tmp_path / "a" / "b" / "images", "--label_dir", tmp_path / "labels", *KNOBS)
    refused(tmp_path, "must lie in one folder. Say where dataset.json goes with --output", *arguments)
    run(*arguments, "--output", tmp_path)
    assert all(Path(item["label"]).is_file() for item in read_datalist(tmp_path).training)


def test_volumes_refuse_what_they_cannot_do_without(tmp_path: Path) -> None:
    images = folders(tmp_path) / "images"
    refused(tmp_path, "must have a group and a modality", "volumes", images)
    refused(tmp_path, "must have a group and a modality", "volumes", images, "--group", "abdomen")
    refused(tmp_path, "`labels` must come with `label_dir`", "volumes", images, *KNOBS, "--labels", "[liver]")
    refused(tmp_path, "must be another folder than", "volumes", images, *KNOBS, "--label_dir", images)
    refused(tmp_path, "must be a folder with volumes", "volumes", tmp_path / "nowhere", *KNOBS)
    refused_volumes(tmp_path, "`labels` must be given with --check exists", "--check", "exists")
    refused_volumes(tmp_path, "`labels` must give whole numbers different names", "--labels", "[liver,liver]")
    refused_volumes(tmp_path, "fractions must be 0 or more", "--validation_fraction", 1)


def test_two_volumes_of_one_name_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(volume(), str(folders(tmp_path) / "images" / "case_1.mha"))
    refused_volumes(tmp_path, r"different names, got \S+case_1.mha and \S+case_1.nii.gz")


# --- what does not agree


def other_shape(folder: Path) -> None:
    write_label(folder / "labels" / "case_1.nii.gz", shape=(4, 5, 2))


def other_affine(folder: Path) -> None:
    write_image(folder / "images" / "case_1.nii.gz", np.diag([-1.0, -1.0, 2.5, 1.0]))


def other_orientation(folder: Path) -> None:
    write_image(folder / "images" / "case_1.nii.gz", np.diag([1.0, -1.0, 2.0, 1.0]))


def unknown_value(folder: Path) -> None:
    write_label(folder / "labels" / "case_1.nii.gz", [1, 3, 5])


def fractions(folder: Path) -> None:
    save(folder / "labels" / "case_1.nii.gz", np.linspace(0, 1, 60, dtype=np.float32).reshape(SHAPE))


def negative_value(folder: Path) -> None:
    save(folder / "labels" / "case_1.nii.gz", np.full(SHAPE, -1, np.int16))


def missing_label(folder: Path) -> None:
    (folder / "labels" / "case_1.nii.gz").unlink()


def missing_image(folder: Path) -> None:
    (folder / "images" / "case_1.nii.gz").unlink()


def several_channels(folder: Path) -> None:
    save(folder / "images" / "case_1.nii.gz", np.zeros((*SHAPE, 2), np.int16))


def colour(folder: Path) -> None:
    save(folder / "labels" / "case_1.nii.gz", np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def corrupt_image(folder: Path) -> None:
    (folder / "images" / "case_1.nii.gz").write_bytes(b"nothing")


def truncated_label(folder: Path) -> None:
    missing_label(folder)
    path = write_label(folder / "labels" / "case_1.nii")
    path.write_bytes(path.read_bytes()[:-30])


BOTH = r"\S+images/case_1.nii.gz and \S+labels/case_1.nii.gz: "
PROBLEMS = [
    (other_shape, BOTH + r"shape \(4, 5, 3\) and \(4, 5, 2\)$"),
    (other_affine, BOTH + r"spacing \(1, 1, 2.5\) and \(1, 1, 2\), corners up to 1 mm apart$"),
    (other_orientation, BOTH + "orientation RPS and LPS, corners up to 6 mm apart$"),
    (unknown_value, BOTH + "values without a name, 3, 5$"),
    (negative_value, BOTH + "values without a name, -1$"),
    (fractions, BOTH + r"values that are no whole numbers, 0\.0\d+, .+, \.\.\.$"),
    (missing_label, r"\S+images/case_1.nii.gz has no label map$"),
    (missing_image, r"\S+labels/case_1.nii.gz has no image$"),
    (
        several_channels,
        r"\S+case_1.nii.gz must be one 3-D volume, got shape \(4, 5, 3, 2\): write every frame or channel",
    ),
    (colour, r"\S+labels/case_1.nii.gz must have one value a voxel, got 3. Write each channel to a file"),
    (corrupt_image, r"\S+images/case_1.nii.gz must be an intact image"),
    (truncated_label, r"\S+labels/case_1.nii must be an intact image"),
]


@pytest.mark.parametrize(("damage", "match"), PROBLEMS, ids=lambda each: getattr(each, "__name__", ""))
def test_what_does_not_agree_is_named_and_left_out_on_demand(
    tmp_path: Path, damage: Callable[[Path], None], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folders(tmp_path))
    knobs = ("--labels", "[liver,spleen]")
    refused_volumes(tmp_path, rf"(?m)^error: 1 of 5 volumes cannot be used:\n  {match}", *knobs)
    message = refused_volumes(tmp_path, "cannot be used", *knobs)
    assert message.endswith("Correct them, or leave them out with --skip_corrupt true.")
    volumes(tmp_path, *knobs, "--skip_corrupt", "true")
    assert "warning: skipped " in capsys.readouterr().err
    spec = content(tmp_path)
    assert {item["subject"] for item in spec["training"] + spec["validation"]} == {
        f"case_{index}" for index in (0, 2, 3, 4)
    }


def test_only_the_first_of_many_problems_are_named_and_the_others_counted(tmp_path: Path) -> None:
    for path in sorted((folders(tmp_path, 13) / "labels").iterdir()):
        write_label(path, shape=(4, 5, 2))
    lines = refused_volumes(tmp_path, "13 of 13 volumes cannot be used").splitlines()
    assert len(lines) == 13
    assert lines[1].startswith(f"  {tmp_path}/images/case_0.nii.gz and {tmp_path}/labels/case_0.nii.gz: shape ")
    assert lines[-2] == "  and 3 more"


def test_left_out_pairs_do_not_move_the_others(tmp_path: Path) -> None:
    volumes(folders(tmp_path, 10))
    before = {item["subject"] for item in content(tmp_path)["validation"]}
    other_shape(tmp_path)
    volumes(tmp_path, "--skip_corrupt", "true", "--overwrite", "true")
    assert {item["subject"] for item in content(tmp_path)["validation"]} == before - {"case_1"}


def test_no_label_map_is_read_where_headers_differ(tmp_path: Path) -> None:
    truncated_label(folders(tmp_path))
    write_label(tmp_path / "labels" / "case_2.nii.gz", shape=(4, 5, 2))
    assert "case_1" not in refused_volumes(tmp_path, "1 of 5 volumes cannot be used")


def test_whole_numbers_stored_as_floats_are_label_values(tmp_path: Path) -> None:
    save(folders(tmp_path) / "labels" / "case_1.nii.gz", np.full(SHAPE, 2, np.float32))
    volumes(tmp_path, "--labels", "[liver,spleen]")


def test_an_image_in_the_place_of_a_label_map_is_found_without_names(tmp_path: Path) -> None:
    save(folders(tmp_path) / "labels" / "case_1.nii.gz", np.full(SHAPE, 1024, np.int16))
    refused_volumes(tmp_path, "values without a name, 1024")


@pytest.mark.parametrize(("shift", "agrees"), [(0.0, True), (0.05, True), (0.5, False)])
def test_grids_agree_within_a_tenth_of_a_voxel(shift: float, agrees: bool) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += shift
    found = pairs.difference(pairs.Grid(SHAPE, AFFINE), pairs.Grid(SHAPE, moved))
    assert found == (None if agrees else "origin (0, 0, 0) and (0.5, 0, 0), corners up to 0.5 mm apart")


def test_grids_that_are_only_turned_differ_by_their_corners() -> None:
    turned = AFFINE.copy()
    turned[:2, :2] = [[-0.8, 0.6], [-0.6, -0.8]]
    assert pairs.difference(pairs.Grid(SHAPE, AFFINE), pairs.Grid(SHAPE, turned)) == "corners up to 3.16 mm apart"


def test_a_small_error_of_spacing_counts_by_what_it_moves_the_far_corner() -> None:
    long = (4, 5, 300)
    stretched = AFFINE @ np.diag([1, 1, 1.001, 1])
    assert pairs.difference(pairs.Grid(SHAPE, AFFINE), pairs.Grid(SHAPE, stretched)) is None
    assert pairs.difference(pairs.Grid(long, AFFINE), pairs.Grid(long, stretched)).endswith("0.598 mm apart")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.nrrd", "series"])
def test_a_grid_is_the_same_in_every_format_and_that_of_the_reader(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "series":
        write_series(path, volume())
    else:
        sitk.WriteImage(volume(), str(path))
    grid = pairs.one_channel_grid(path)
    reader = pairs.ImageFileReader(spatial_dims=3)
    array, meta = reader.get_data(reader.read(path))
    assert grid.shape == array.shape == (6, 5, 4)
    np.testing.assert_allclose(grid.affine, meta["affine"], atol=1e-4)


def test_a_fourth_axis_is_refused_as_the_reader_does(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.JoinSeries([volume()]), str(tmp_path / "a.mha"))
    assert "a.mha must be one 3-D volume, got shape (6, 5, 4, 1)" in pairs.check_grids(tmp_path / "a.mha", None).error


def test_the_values_of_a_label_map_are_those_that_numpy_finds(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, SHAPE, dtype=np.uint8)
    path = save(tmp_path / "a.nii.gz", values)
    expected = tuple(value for value in np.unique(values).tolist() if value)
    assert pairs.check_values(path, path, range(256)) == pairs.Found(expected)


# --- what all have in common


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    for name in ("btcv", "msd", "own", "raw"):
        (tmp_path / name).mkdir()
    run("btcv", btcv(tmp_path / "btcv"))
    run("msd", msd(tmp_path / "Task02_Heart"), "--output", tmp_path / "msd")
    volumes(folders(tmp_path / "own"))
    run("volumes", folders(tmp_path / "raw", 3) / "images", "--group", "head", "--modality", "MR", "--name", "raw")
    dirs = [tmp_path / "btcv", tmp_path / "msd", tmp_path / "own", tmp_path / "raw" / "images"]
    datalist = aggregate(dirs)
    assert datalist.task_names == ["Spleen", "btcv", "own", "raw"]
    assert datalist.group_names == ["abdomen", "head", "heart"]
    assert (len(datalist.training), len(datalist.validation), len(datalist.test)) == (24 + 4 + 4 + 3, 6 + 1 + 1, 0)
    assert datalist.training[0]["labels"]["portal_and_splenic_veins"] == [10]
    for folder in dirs:
        read = read_datalist(folder, spatial_dims=3)
        assert all(Path(item["image"]).exists() for item in read.training)
        assert all(Path(item["label"]).is_file() for item in read.training if "label" in item)


def test_subjects_are_counted_per_split_and_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("btcv", btcv(tmp_path))
    captured = capsys.readouterr()
    cells = table_of(captured.out)
    assert cells["images"] == cells["subjects"] == ["24", "6"]
    assert cells["spleen"] == ["23", "6"]
    assert cells["gallbladder"] == ["1", "0"]
    assert cells["left_adrenal_gland"] == ["24", "6"]
    assert captured.out.splitlines()[-2:] == [
        "(structures: subjects whose label map shows them)",
        f"wrote {tmp_path}/dataset.json",
    ]
    assert "warning: validation has no right_kidney, left_kidney, gallbladder, " in captured.err


def test_files_alone_are_looked_for_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (btcv(tmp_path, range(1, 5)) / "label" / "label0001.nii.gz").write_bytes(b"nothing")
    run("btcv", tmp_path, "--check", "exists")
    assert "spleen" not in capsys.readouterr().out
    assert content(tmp_path)["labels"]["1"] == "spleen"


def test_the_seed_draws_other_splits_and_the_same_seed_the_same(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        volumes(folders(tmp_path, 10), "--seed", seed, "--overwrite", "true")
        drawn.append([item["image"] for item in content(tmp_path)["validation"]])
    assert drawn[0] == drawn[1] != drawn[2]


def test_name_modality_and_task_can_be_given(tmp_path: Path) -> None:
    run("btcv", btcv(tmp_path, range(1, 4)), "--name", "mine", "--modality", "MR")
    spec = content(tmp_path)
    assert (spec["name"], spec["task"], spec["modality"]) == ("mine", "mine", {"0": "MR"})


def test_misspelt_sources_and_knobs_and_words_too_many_are_refused(tmp_path: Path) -> None:
    btcv(tmp_path, [1])
    refused(tmp_path, "there is no source volume; did you mean volumes?", "volume", tmp_path)
    refused(tmp_path, "there is no --gruop; did you mean --group", "volumes", tmp_path, "--gruop", "abdomen")
    refused(tmp_path, "`btcv` must get one path, got .+, extra", "btcv", tmp_path, "extra")


@pytest.mark.parametrize("source", ["btcv", "msd", "volumes"])
def test_help_shows_the_knobs_of_a_source(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(source, "--help")
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert "validation_fraction" in captured.out + captured.err
