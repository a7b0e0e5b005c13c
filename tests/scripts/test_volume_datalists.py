import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from datalists import volume_pairs
from datalists.source import Record
from helpers import SPLITS, content, make_list, sizes, volume, write_series
from sources import SHAPE, btcv, msd, save_volume, volume_folders, write_label_map, write_volume

from dissect_monai import aggregate, read_datalist

OPTIONS = ("--group", "abdomen", "--modality", "CT")
LABELS = ("--labels", "liver", "spleen")
Refused = Callable[..., str]


def subjects(folder: Path) -> set[str]:
    return {item["subject"] for split in SPLITS for item in content(folder)[split]}


def volumes(folder: Path, *options: object) -> tuple[object, ...]:
    """The command for two folders."""
    return "volumes", folder / "images", "--label_dir", folder / "labels", *OPTIONS, *(options or LABELS)


# --- BTCV


def test_btcv_with_the_original_names_gets_the_split_of_the_literature(tmp_path: Path) -> None:
    make_list("btcv", btcv(tmp_path))
    spec = content(tmp_path)
    assert sizes(tmp_path) == [24, 6, 0]
    assert [item["subject"] for item in spec["validation"]] == [f"{number:04d}" for number in range(35, 41)]
    assert spec["training"][0] == {"image": "img/img0001.nii.gz", "label": "label/label0001.nii.gz", "subject": "0001"}
    head = {key: spec[key] for key in ("name", "task", "group", "modality")}
    assert head == {"name": "btcv", "task": "btcv", "group": "abdomen", "modality": {"0": "CT"}}
    assert list(spec["labels"]) == [str(value) for value in range(14)]
    assert (spec["labels"]["1"], spec["labels"]["13"]) == ("spleen", "left_adrenal_gland")
    assert "drawn" not in spec["description"]


@pytest.mark.parametrize(
    ("parent", "parts"),
    [("Training", ("img", "label")), ("RawData/Training", ("imagesTr", "labelsTr")), (".", ("images", "labels"))],
)
def test_btcv_is_found_in_every_usual_place(tmp_path: Path, parent: str, parts: tuple[str, str]) -> None:
    btcv(tmp_path / parent, range(34, 42), parts)
    write_volume(tmp_path / parent / "imagesTs" / "img0061.nii.gz")
    make_list("btcv", tmp_path, "--name", "mine")
    assert sizes(tmp_path) == [2, 6, 0]
    assert content(tmp_path)["task"] == "mine"


@pytest.mark.parametrize(
    ("numbers", "names", "expected"),
    [
        (range(31, 41), ("ABD_{:03d}_0000", "ABD_{:03d}"), 2),
        (range(31, 41), ("btcv_{}", "btcv_{}"), 2),
        (range(30, 40), ("img{:04d}", "label{:04d}"), 3),
    ],
)
def test_other_names_or_a_part_of_btcv_are_split(
    tmp_path: Path, numbers: range, names: tuple[str, str], expected: int
) -> None:
    make_list("btcv", btcv(tmp_path, numbers, names=names))
    assert sizes(tmp_path) == [10 - expected, expected, 0]
    assert "drawn with seed 0, 0.2 of the subjects for validation" in content(tmp_path)["description"]


def test_btcv_refuses_other_folders_and_two_pairs(tmp_path: Path, refused: Refused) -> None:
    btcv(tmp_path / "other", [1], ("averaged-training-images", "averaged-training-labels"))
    refused("must hold one pair of the folders img and label, .+ got 0", "btcv", tmp_path / "other")
    btcv(btcv(tmp_path / "two", [1]), [1], ("imagesTr", "labelsTr"))
    refused("got 2. Name the folder that holds the pair", "btcv", tmp_path / "two")


# --- Decathlon


def test_msd_becomes_a_data_list_of_its_own_names_and_values(tmp_path: Path) -> None:
    make_list(*msd(tmp_path / "Task09_Spleen"), "--output", tmp_path)
    spec = content(tmp_path)
    head = {key: spec[key] for key in ("name", "task", "group", "modality", "labels", "licence")}
    assert head == {
        "name": "Spleen", "task": "Spleen", "group": "abdomen", "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"}, "licence": "CC-BY-SA 4.0",
    }  # fmt: skip
    assert sizes(tmp_path) == [4, 1, 0]
    item = next(item for item in spec["training"] + spec["validation"] if item["subject"] == "spleen_3")
    assert item["image"] == "Task09_Spleen/imagesTr/spleen_3.nii.gz"
    assert item["label"] == "Task09_Spleen/labelsTr/spleen_3.nii.gz"


def test_msd_needs_a_group_for_other_tasks_and_may_get_a_test_split(tmp_path: Path, refused: Refused) -> None:
    command = (*msd(tmp_path / "Task100_Trunk", 10, modality={"0": "MRI"}), "--output", tmp_path)
    refused("Task100_Trunk must have a group. Give its region, as in --group abdomen", *command)
    make_list(*command, "--group", "trunk", "--test_fraction", 0.3)
    assert sizes(tmp_path) == [5, 3, 2]
    assert (content(tmp_path)["group"], content(tmp_path)["modality"]) == ("trunk", {"0": "MR"})


def test_msd_replaces_its_own_list_only_on_demand_and_can_be_run_again(tmp_path: Path, refused: Refused) -> None:
    command = msd(tmp_path / "Task09_Spleen")
    refused("dataset.json exists. Replace it with --overwrite, or name another", *command)
    written = []
    for _ in range(2):
        make_list(*command, "--overwrite")
        written.append(content(tmp_path / "Task09_Spleen"))
    assert written[0] == written[1]


def test_msd_refuses_a_part_of_a_task_unless_it_is_meant(tmp_path: Path, refused: Refused) -> None:
    command = (*msd(tmp_path / "Task09_Spleen"), "--output", tmp_path)
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "Task09_Spleen" / part / "spleen_2.nii.gz").unlink()
    refused("1 of 5 images cannot be used:\n  labelsTr/spleen_2.nii.gz is in dataset.json alone\n", *command)
    make_list(*command, "--skip_corrupt")
    assert sizes(tmp_path) == [3, 1, 0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": {"1": "a", "2": "a"}}, "must give whole numbers different names"),
        ({"labels": {}}, "must give whole numbers different names"),
        ({"labels": {"both": [1, 2]}}, "must be that of a Decathlon task"),
        ({"modality": {"0": "T2", "1": "ADC"}}, r"must have one channel, got 2 \(T2, ADC\). Write each channel to a"),
    ],
)
def test_msd_refuses_lists_of_another_form(
    tmp_path: Path, changes: dict[str, Any], match: str, refused: Refused
) -> None:
    refused(match, *msd(tmp_path / "Task09_Spleen", **changes), "--output", tmp_path)


# --- any folders


@pytest.mark.parametrize(
    "given", [("liver", "left kidney"), ("1=liver", "2=left kidney"), ("left kidney=2", "liver=1")]
)
def test_two_folders_are_matched_by_name_and_values_named_as_given(tmp_path: Path, given: Sequence[str]) -> None:
    make_list(*volumes(volume_folders(tmp_path), "--labels", *given))
    spec = content(tmp_path)
    assert spec["labels"] == {"0": "background", "1": "liver", "2": "left kidney"}
    assert (spec["task"], spec["group"], spec["modality"]) == (tmp_path.name, "abdomen", {"0": "CT"})
    assert sizes(tmp_path) == [4, 1, 0]
    for item in spec["training"]:
        assert item["label"].replace("labels", "images") == item["image"]
    assert subjects(tmp_path) == {f"case_{index}" for index in range(5)}


def test_channel_suffixes_of_nnunet_are_understood(tmp_path: Path, refused: Refused) -> None:
    for path in (volume_folders(tmp_path) / "images").iterdir():
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    make_list(*volumes(tmp_path))
    item = content(tmp_path)["training"][0]
    assert item["image"] == f"images/{item['subject']}_0000.nii.gz"
    assert item["label"] == f"labels/{item['subject']}.nii.gz"
    write_volume(tmp_path / "images" / "case_1_0001.nii.gz")
    match = "must have different names, got .+case_1_0000.+ and .+case_1_0001.+ channels"
    refused(match, *volumes(tmp_path), "--overwrite")


def test_numbers_at_the_end_of_a_name_are_no_channels(tmp_path: Path) -> None:
    for index in range(3):
        write_volume(tmp_path / "images" / f"case_{index:04d}.nii.gz")
        write_label_map(tmp_path / "labels" / f"case_{index:04d}.nii.gz")
    make_list(*volumes(tmp_path), "--seed", 1)
    assert sizes(tmp_path) == [2, 1, 0]


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
    make_list(*volumes(tmp_path), "--validation_fraction", 0)
    items = content(tmp_path)["training"]
    assert [item["image"] for item in items] == ["images/a", "images/b.mha", "images/c.nrrd"]
    assert [item["label"] for item in items] == ["labels/a.nii.gz", "labels/b.nii.gz", "labels/c.mha"]
    assert len(aggregate(tmp_path).training) == 3


def test_unlabelled_volumes_are_all_training(tmp_path: Path) -> None:
    write_volume(tmp_path / "p1" / "a.nii.gz")
    write_volume(tmp_path / "p1" / "._a.nii.gz")
    write_volume(tmp_path / ".hidden" / "b.nii.gz")
    write_series(tmp_path / "p2", volume())
    make_list("volumes", tmp_path, *OPTIONS)
    spec = content(tmp_path)
    assert spec["training"] == [{"image": "p1/a.nii.gz", "subject": "p1/a"}, {"image": "p2", "subject": "p2"}]
    assert sizes(tmp_path) == [2, 0, 0]
    assert not {"labels", "label_names"} & spec.keys()


def test_a_pattern_names_the_subject_of_nested_volumes(tmp_path: Path) -> None:
    for index in range(12):
        write_volume(tmp_path / f"p{index // 3}" / f"scan_{index}.nii.gz")
    make_list(
        "volumes", tmp_path, *OPTIONS, "--subject_pattern", r"^(p\d+)/", "--validation_fraction", 0.25, "--seed", 1
    )
    assert sizes(tmp_path) == [6, 6, 0]
    assert len({item["subject"] for item in content(tmp_path)["training"]}) == 2


def test_volumes_refuse_what_they_cannot_do_without(tmp_path: Path, refused: Refused) -> None:
    images = volume_folders(tmp_path) / "images"
    refused("--label_dir and --labels must come together", "volumes", images, *OPTIONS, "--labels", "liver")
    refused("must be a folder with volumes", "volumes", tmp_path / "nowhere", *OPTIONS)
    refused("labels must give whole numbers different names", *volumes(tmp_path, "--labels", "liver", "liver"))
    sitk.WriteImage(volume(), str(images / "case_1.mha"))
    refused(r"different names, got \S+case_1.mha and \S+case_1.nii.gz", *volumes(tmp_path))


# --- what does not agree


PROBLEMS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "other affine": (
        lambda image, label: write_volume(image, np.diag([1.0, -1.0, 2.5, 1.0])),
        r".+spacing \[1.0, 1.0, 2.5\], orientation RPS,.+spacing \[1.0, 1.0, 2.0\], orientation LPS",
    ),
    "unknown values": (
        lambda image, label: write_label_map(label, [1, 3, 5]),
        r"\S+labels/case_1.nii.gz has values without a name: 3, 5$",
    ),
    "fractions": (
        lambda image, label: save_volume(label, np.linspace(0, 1, 60, dtype=np.float32).reshape(SHAPE)),
        r"`label map \S+labels/case_1.nii.gz` must hold integers, got fractions \(0\.0\d+, ",
    ),
    "no label map": (lambda image, label: label.unlink(), r"\S+images/case_1.nii.gz has no label map$"),
    "no image": (lambda image, label: image.unlink(), r"\S+labels/case_1.nii.gz has no image$"),
    "colour": (
        lambda image, label: save_volume(label, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        r"\S+labels/case_1.nii.gz must have one value a voxel, got 3. Write each channel to a file",
    ),
    "corrupt image": (
        lambda image, label: image.write_bytes(b"nothing"),
        r"\S+images/case_1.nii.gz must be an intact image",
    ),
    "truncated label map": (
        lambda image, label: label.write_bytes(label.read_bytes()[:-30]),
        r"\S+labels/case_1.nii.gz must be an intact image",
    ),
}


@pytest.mark.parametrize(("damage", "match"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_does_not_agree_is_named_and_left_out_on_demand(
    tmp_path: Path, damage: Callable[[Path, Path], object], match: str, refused: Refused
) -> None:
    damage(*(volume_folders(tmp_path) / part / "case_1.nii.gz" for part in ("images", "labels")))
    message = refused(rf"(?m)^error: 1 of 5 images cannot be used:\n  {match}", *volumes(tmp_path))
    assert message.endswith("Correct them, or leave them out with --skip_corrupt.")
    make_list(*volumes(tmp_path), "--skip_corrupt")
    assert subjects(tmp_path) == {f"case_{index}" for index in (0, 2, 3, 4)}


def test_only_the_first_of_many_problems_are_named_and_the_others_counted(tmp_path: Path, refused: Refused) -> None:
    for path in sorted((volume_folders(tmp_path, 13) / "labels").iterdir()):
        write_label_map(path, shape=(4, 5, 2))
    lines = refused("13 of 13 images cannot be used", *volumes(tmp_path)).splitlines()
    assert len(lines) == 13
    named = r"  \S+/images/case_0.nii.gz \(shape \(4, 5, 3\), .+\) and \S+/labels/case_0.nii.gz \(shape \(4, 5, 2\), .+"
    assert re.match(named, lines[1])
    assert lines[-2] == "  and 3 more"


def test_the_values_of_a_label_map_are_those_that_numpy_finds(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.float32)  # whole numbers may be stored as floats
    path = save_volume(tmp_path / "a.nii.gz", values)
    found = volume_pairs.check_values(Record(path, label_map=path), range(256)).values
    assert found == tuple(value for value in np.unique(values).tolist() if value)


# --- what all have in common


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    for name in ("btcv", "msd", "own", "raw"):
        (tmp_path / name).mkdir()
    make_list("btcv", btcv(tmp_path / "btcv"))
    make_list(*msd(tmp_path / "Task02_Heart"), "--output", tmp_path / "msd")
    make_list(*volumes(volume_folders(tmp_path / "own")))
    raw = volume_folders(tmp_path / "raw", 3) / "images"
    make_list("volumes", raw, "--group", "head", "--modality", "MR", "--name", "raw")
    dirs = [tmp_path / "btcv", tmp_path / "msd", tmp_path / "own", tmp_path / "raw" / "images"]
    datalist = aggregate(dirs)
    assert datalist.task_names == ["Spleen", "btcv", "own", "raw"]
    assert datalist.group_names == ["abdomen", "head", "heart"]
    assert (len(datalist.training), len(datalist.validation), len(datalist.test)) == (24 + 4 + 4 + 3, 6 + 1 + 1, 0)
    assert datalist.training[0]["labels"]["portal_and_splenic_veins"] == [10]
    for folder in dirs:
        items = read_datalist(folder, spatial_dims=3).training
        assert all(Path(item["image"]).exists() for item in items)
        assert all(Path(item["label"]).is_file() for item in items if "label" in item)


def test_subjects_are_counted_per_split_and_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_list("btcv", btcv(tmp_path))
    *lines, unit, wrote = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["images"] == cells["subjects"] == ["24", "6", "0"]
    assert cells["spleen"] == ["23", "6", "0"]
    assert cells["gallbladder"] == ["1", "0", "0"]
    assert cells["left_adrenal_gland"] == ["24", "6", "0"]
    assert (unit, wrote) == ("(structures: subjects whose label map shows them)", f"wrote {tmp_path}/dataset.json")


def test_what_is_not_annotated_is_listed_but_counts_as_no_structure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "Task09_Spleen"
    make_list(*msd(folder, labels={"background": 0, "spleen": 1, "ignore": 2}), "--overwrite")
    assert "ignore" not in capsys.readouterr().out
    assert content(folder)["labels"] == {"0": "background", "1": "spleen", "2": "ignore"}
