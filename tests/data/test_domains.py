from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers import volume, write_series

from dissect_monai.data.domains import aggregate, read_volumes
from dissect_monai.data.splits import datalist_digest, with_test_split


def write_volume(path: Path, shape: Sequence[int] = (4, 5, 6), spacing: float = 2.0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 100, shape, dtype=np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([spacing, 1, 1, 1])), path)
    return path.name


def write_set(folder: Path, training: int = 3, validation: int = 0, **spec: Any) -> Path:
    """A folder whose subjects are called 0, 1, ..."""
    names = [write_volume(folder / f"{index}.nii.gz") for index in range(training + validation)]
    items = [{"image": name, "subject": index} for index, name in enumerate(names)]
    lists = {"training": items[:training], "validation": items[training:]}
    (folder / "dataset.json").write_text(json.dumps({**lists, **spec}))
    return folder


def two_sets(tmp_path: Path) -> list[Path]:
    a = write_set(tmp_path / "a", 3, 2, task="liver", group="abdomen", modality={"0": "CT"})
    b = write_set(tmp_path / "b", 2, task="brain", group="head", modality="MR")
    return [a, b]


def subjects(items: list[dict[str, Any]]) -> set[str]:
    return {item["subject"] for item in items}


# --- what comes out


def test_items_know_their_domain(tmp_path: Path) -> None:
    datalist = aggregate(two_sets(tmp_path))
    assert [len(datalist.training), len(datalist.validation), len(datalist.test)] == [5, 2, 0]
    assert (datalist.task_names, datalist.group_names) == (["brain", "liver"], ["abdomen", "head"])
    assert datalist.training[0] == {
        "image": str(tmp_path / "a" / "0.nii.gz"), "subject": "a/0", "task": "liver", "group": "abdomen",
        "modality": "CT", "task_id": 1, "group_id": 0,
    }  # fmt: skip
    last = datalist.training[-1]
    assert (last["subject"], last["task"], last["modality"]) == ("b/1", "brain", "MR")
    assert (last["task_id"], last["group_id"]) == (0, 1)
    assert {item["task"] for item in datalist.validation} == {"liver"}


def test_ids_do_not_depend_on_the_order_of_the_folders(tmp_path: Path) -> None:
    folders = two_sets(tmp_path)
    ids = [
        {item["image"]: (item["task_id"], item["group_id"]) for item in aggregate(order).training}
        for order in (folders, folders[::-1])
    ]
    assert ids[0] == ids[1]


def test_headers_are_kept_by_image(tmp_path: Path) -> None:
    datalist = aggregate(two_sets(tmp_path))
    assert datalist.headers.keys() == {item["image"] for item in datalist.training + datalist.validation}
    assert set(datalist.headers.values()) == {((4, 5, 6), (2, 1, 1), 1)}


def test_folders_may_share_a_task(tmp_path: Path) -> None:
    folders = [write_set(tmp_path / name, 1, task="liver", group="abdomen", modality="CT") for name in "ab"]
    datalist = aggregate(folders)
    assert datalist.task_names == ["liver"]
    assert subjects(datalist.training) == {"a/0", "b/0"}


def test_one_folder_keeps_its_subjects(tmp_path: Path) -> None:
    assert subjects(aggregate(str(two_sets(tmp_path)[1])).training) == {"0", "1"}


@pytest.mark.parametrize(
    ("task", "group"),
    [
        (["x", "y"], "body"),
        ({"a": "x", "b": "y"}, ["body", "body"]),
        (["x", "y"], {"a": "body", "b": "body"}),
    ],
)
def test_a_folder_of_volumes_needs_no_list_when_its_domain_is_given(tmp_path: Path, task: Any, group: Any) -> None:
    for name in "ab":
        for index in range(2):
            write_volume(tmp_path / name / "sub" / f"{index}.nii.gz")
    datalist = aggregate([tmp_path / "a", tmp_path / "b"], task, group, modality="CT")
    assert [item["task"] for item in datalist.training] == ["x", "x", "y", "y"]
    assert datalist.group_names == ["body"]
    assert subjects(datalist.training) == {f"{name}/sub/{index}.nii.gz" for name in "ab" for index in range(2)}
    assert {item["modality"] for item in datalist.training} == {"CT"}


def test_what_is_given_goes_before_what_the_folder_says(tmp_path: Path) -> None:
    folders = two_sets(tmp_path)
    datalist = aggregate(folders, task=[None, "skull"], group={str(folders[0]): "trunk"}, modality={"b": "PET"})
    assert datalist.task_names == ["liver", "skull"]
    assert datalist.group_names == ["head", "trunk"]
    assert {item["task"]: item["modality"] for item in datalist.training} == {"liver": "CT", "skull": "PET"}


def test_an_unknown_modality_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datalist = aggregate(write_set(tmp_path / "a", task="liver", group="abdomen"))
    assert {item["modality"] for item in datalist.training} == {"unknown"}
    assert "a has no modality for 3 volumes" in caplog.text


def test_mha_nrrd_and_dicom_series_are_volumes_too(tmp_path: Path) -> None:
    for name in ("1.mha", "2.nrrd"):
        sitk.WriteImage(volume(), str(tmp_path / name))
    write_series(tmp_path / "3", volume())
    datalist = aggregate(tmp_path, task="liver", group="abdomen", modality="CT")
    assert [Path(item["image"]).name for item in datalist.training] == ["1.mha", "2.nrrd", "3"]
    assert {header.shape for header in datalist.headers.values()} == {(5, 6, 4)}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"0": "background", "1": "spleen", "2": "both", "3": "both"}, {"spleen": [1], "both": [2, 3]}),
        ({"background": 0, "spleen": 1, "both": [2, 3]}, {"spleen": [1], "both": [2, 3]}),
        ({"spleen": "1"}, {"spleen": [1]}),
        ({}, {}),
        (["background", "spleen"], None),
        ("spleen", None),
    ],
)
def test_items_know_what_the_structures_are_called(tmp_path: Path, labels: Any, expected: Any) -> None:
    one, other = two_sets(tmp_path)
    spec = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**spec, "labels": labels}))
    found = [item.get("labels") for item in aggregate([one, other]).training]
    assert found == [None] * 3 + [expected] * 2


# --- validation split


def test_no_validation_split_is_made_unless_asked_for(tmp_path: Path) -> None:
    folders = two_sets(tmp_path)
    assert len(aggregate(folders[1]).validation) == 0
    folder = write_set(tmp_path / "c", 10, task="heart", group="thorax", modality="MR")
    drawn = aggregate([folders[0], folder], validation_fraction=0.3)
    assert [item["subject"] for item in drawn.validation if item["task"] == "liver"] == ["a/3", "a/4"]  # its own
    assert sum(item["task"] == "heart" for item in drawn.validation) == 3
    assert not subjects(drawn.training) & subjects(drawn.validation)
    assert len(drawn.training + drawn.validation) == 15
    again, other = (aggregate([folders[0], folder], validation_fraction=0.3, seed=seed) for seed in (0, 1))
    assert again == drawn
    assert subjects(other.validation) != subjects(drawn.validation)


def test_a_drawn_split_keeps_subjects_whole(tmp_path: Path) -> None:
    names = [write_volume(tmp_path / f"{index}.nii.gz") for index in range(8)]
    training = [{"image": name, "subject": index // 2} for index, name in enumerate(names)]
    spec = {"training": training, "task": "heart", "group": "thorax", "modality": "MR"}
    (tmp_path / "dataset.json").write_text(json.dumps(spec))
    datalist = aggregate(tmp_path, validation_fraction=0.5)
    assert (len(datalist.training), len(datalist.validation)) == (4, 4)
    assert not subjects(datalist.training) & subjects(datalist.validation)


# --- refusals


@pytest.mark.parametrize("labels", [{"one": "spleen"}, {"spleen": None}, {"spleen": [1, "two"]}, {"1": None, "2": {}}])
def test_names_of_structures_without_a_value_are_refused(tmp_path: Path, labels: Any) -> None:
    folder = write_set(tmp_path / "a", task="liver", group="abdomen", modality="CT", labels=labels)
    with pytest.raises(
        ValueError, match=rf"the `labels` of {folder} must give integers names, .*: correct its dataset"
    ):
        aggregate(folder)


@pytest.mark.parametrize("key", ["task", "group"])
@pytest.mark.parametrize("value", [None, " ", 3])
def test_a_folder_without_task_or_group_is_refused_with_a_remedy(tmp_path: Path, key: str, value: Any) -> None:
    spec = {"task": "liver", "group": "abdomen", "modality": "CT", key: value}
    folder = write_set(tmp_path / "a", **spec)
    with pytest.raises(ValueError, match=rf"{folder} must have a `{key}`, .* {folder}/0\.nii\.gz: write it into its"):
        aggregate(folder)


def test_a_task_of_one_training_subject_is_refused(tmp_path: Path) -> None:
    folders = two_sets(tmp_path)
    lone = write_set(tmp_path / "c", 1, 2, task="heart", group="thorax", modality="MR")
    with pytest.raises(ValueError, match=r"task 'heart' must have at least two training .* got 1 \(see .*c/0"):
        aggregate([*folders, lone])


def test_two_subjects_of_a_folder_stay_in_training(tmp_path: Path) -> None:
    large = write_set(tmp_path / "a", 4, task="liver", group="abdomen", modality="CT")
    small = write_set(tmp_path / "b", 2, task="brain", group="head", modality="MR")
    found = aggregate([large, small], validation_fraction=0.5)
    assert [item["task"] for item in found.training] == ["liver"] * 2 + ["brain"] * 2
    assert [item["task"] for item in found.validation] == ["liver"] * 2


def test_without_test_split_validation_is_scored_and_training_chooses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = aggregate(two_sets(tmp_path))
    found.test.append({**found.training[-1], "subject": "b/tested"})
    split = with_test_split(found, fraction=0.4)
    subjects = [[item["subject"] for item in getattr(split, name)] for name in ("training", "validation", "test")]
    assert sorted(subjects[2]) == ["a/3", "a/4", "b/tested"]
    assert sorted(subjects[0] + subjects[1]) == ["a/0", "a/1", "a/2", "b/0", "b/1"]
    assert len(subjects[1]) == 1
    assert subjects[1][0].startswith("a/")
    assert "Task liver has no test split" in caplog.text
    assert "brain" not in caplog.text


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_rejects_a_bad_fraction_of_a_test_split(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\)"):
        with_test_split(aggregate(two_sets(tmp_path)), fraction)


def test_folders_of_one_task_hold_out_the_same_subjects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a = write_set(tmp_path / "a", 12, task="brain", group="head", modality="MR")
    b = write_set(tmp_path / "b", 11, task="brain", group="head", modality="MR")
    found = aggregate([a, b], validation_fraction=0.3)
    names = [{item["subject"].split("/")[1] for item in split} for split in (found.training, found.validation)]
    assert len(names[1]) == 4
    assert not names[0] & names[1]
    assert "of one name in different splits" not in caplog.text


def test_subjects_of_one_name_in_different_splits_of_a_task_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = write_set(tmp_path / "a", 3, task="brain", group="head", modality="MR")
    b = write_set(tmp_path / "b", 2, 1, task="brain", group="head", modality="MR")
    aggregate([a, b])
    assert "task brain have 1 subjects of one name in different splits, such as 2" in caplog.text


def test_a_digest_follows_the_volumes_and_not_their_place(tmp_path: Path) -> None:
    folders = two_sets(tmp_path)
    digest = datalist_digest(aggregate(folders).training)
    assert digest == datalist_digest(aggregate(folders).training[::-1])
    assert digest != datalist_digest(aggregate(folders).training[1:])
    assert digest != datalist_digest(aggregate(folders, modality={"b": "CT"}).training)
    moved = (tmp_path / "moved").mkdir() or [folder.rename(tmp_path / "moved" / folder.name) for folder in folders]
    assert digest == datalist_digest(aggregate(moved).training)


def test_volumes_to_embed_need_no_task_but_have_a_modality(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = write_set(tmp_path / "a", 2)
    (plain / "dataset.json").unlink()
    assert {item["modality"] for item in read_volumes([plain], modality="CT").training} == {"CT"}
    assert "a task" not in caplog.text
    assert {item["modality"] for item in read_volumes(plain).training} == {"unknown"}
    assert "has no modality for 2 volumes" in caplog.text


def test_volumes_to_embed_may_be_missing(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", 2, modality={"0": "CT"})
    missing = Path(read_volumes(folder).training[1]["image"])
    missing.unlink()
    assert [item["modality"] for item in read_volumes(folder).training] == ["CT", "CT"]


def test_a_task_of_two_groups_is_refused(tmp_path: Path) -> None:
    folders = [write_set(tmp_path / name, 2, task="liver", group=name, modality="CT") for name in "ab"]
    with pytest.raises(ValueError, match=r"task 'liver' must have one group, got 'a' for .*a/0.* and 'b' for .*b/0"):
        aggregate(folders)


def test_splits_that_share_a_subject_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", 2, task="liver", group="abdomen", modality="CT")
    spec = json.loads((folder / "dataset.json").read_text())
    write_volume(folder / "other.nii.gz")
    spec["validation"] = [{"image": "other.nii.gz", "subject": 1}]
    (folder / "dataset.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="must share no subject"):
        aggregate(folder)


def with_bad_files(folder: Path) -> Path:
    write_set(folder, 5, task="liver", group="abdomen", modality="CT")
    write_volume(folder / "1.nii.gz", (4, 5, 6, 3))
    (folder / "3.nii.gz").write_bytes(b"nothing")
    return folder


def test_frames_and_unreadable_files_are_named(tmp_path: Path) -> None:
    message = (
        r"got 2 of 5 that cannot:\n .*1\.nii\.gz must be one 3-D .* \(4, 5, 6, 3\).*\n .*3\.nii\.gz must be an intact"
    )
    with pytest.raises(ValueError, match=message):
        aggregate(with_bad_files(tmp_path / "a"))


def test_frames_and_unreadable_files_may_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datalist = aggregate(with_bad_files(tmp_path / "a"), on_corrupt="skip")
    assert subjects(datalist.training) == {"0", "2", "4"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    for name in ("0", "2", "4"):
        (tmp_path / "a" / f"{name}.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="got 5 of 5 that cannot"):
        aggregate(tmp_path / "a", on_corrupt="skip")


def test_mixed_channels_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(volume(), str(tmp_path / "1.mha"))
    sitk.WriteImage(sitk.Compose([volume()] * 3), str(tmp_path / "2.mha"))
    with pytest.raises(ValueError, match=rf"{tmp_path} must hold .* got 1 in .*1\.mha and 3 in .*2\.mha"):
        aggregate(tmp_path, "liver", "abdomen", "CT")
    folder = write_set(tmp_path / "a", task="brain", group="head", modality={"0": "T1", "1": "FLAIR"})
    with pytest.raises(ValueError, match=r"a must have one channel, got the modalities \['T1', 'FLAIR'\]"):
        aggregate(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": ["x"]}, "`task` must have one value for each of the 2 folders, got 1"),
        ({"group": {"a": "x", "c": "y"}}, "`group` must name folders among a, b, got c"),
        ({"validation_fraction": 1.0}, r"`validation_fraction` must be in \[0, 1\), got 1.0"),
        ({"on_corrupt": "ignore"}, "`on_corrupt` must be"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(two_sets(tmp_path), **arguments)
