import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from helpers import images, read, sitk, subjects, write, write_images

from dissect_monai.common import InputError, Item
from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.volume_lists import aggregate, read_segmentation, read_volumes, refuse_overlap

LABELS = {"0": "background", "1": "spleen", "2": "liver"}


# --- several data sets as one


def write_volume(path: Path, shape: Sequence[int] = (4, 5, 6)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, dtype=np.int16), np.diag([2, 1, 1, 1])), path)
    return path.name


def write_set(folder: Path, training: int = 3, validation: int = 0, **spec: Any) -> Path:
    """A folder whose subjects are called 0, 1, ..."""
    names = [write_volume(folder / f"{index}.nii.gz") for index in range(training + validation)]
    items = [{"image": name, "subject": index} for index, name in enumerate(names)]
    write(folder / "dataset.json", {"training": items[:training], "validation": items[training:], **spec})
    return folder


def liver(folder: Path, training: int = 3, validation: int = 0, **spec: Any) -> Path:
    return write_set(folder, training, validation, **{"task": "liver", "group": "abdomen", "modality": "CT", **spec})


def two_sets(tmp_path: Path) -> list[Path]:
    brain = write_set(tmp_path / "b", 2, task="brain", group="head", modality="MR")
    return [liver(tmp_path / "a", 3, 2, modality={"0": "CT"}), brain]


def test_items_know_their_domain(tmp_path: Path) -> None:
    folders = two_sets(tmp_path)
    datalist = aggregate(folders)
    assert [len(split) for split in datalist[:3]] == [5, 2, 0]
    assert (datalist.task_names, datalist.group_names) == (["brain", "liver"], ["abdomen", "head"])
    assert datalist.training[0] == {
        "image": str(tmp_path / "a" / "0.nii.gz"), "subject": "a/0", "task": "liver", "group": "abdomen",
        "modality": "CT", "origin": (str(tmp_path / "a"), "0"),
    }  # fmt: skip
    last = datalist.training[-1]
    assert [last[key] for key in ("subject", "task", "modality")] == ["b/1", "brain", "MR"]
    assert {item["task"] for item in datalist.validation} == {"liver"}
    assert datalist.headers == {item["image"]: ((4, 5, 6), (2, 1, 1)) for item in datalist.items()}
    assert subjects(aggregate(str(folders[1])).training) == {"0", "1"}  # one folder keeps its subjects


def test_planes_that_differ_within_a_task_are_told_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_set(tmp_path / "a", 3, task="t", group="g", modality="MR", labels={"1": "x"})
    for index, spacing in enumerate([(1, 1, 4), (1, 1, 4), (4, 1, 1)]):
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([*spacing, 1])), folder / f"{index}.nii.gz")
        nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.int16), np.diag([*spacing, 1])), folder / f"l{index}.nii.gz")
    listed = read(folder / "dataset.json")
    write(
        folder / "dataset.json",
        {**listed, "training": [{**item, "label": f"l{item['image']}"} for item in listed["training"]]},
    )
    told = r"several planes, 2 axial \(such as .*0.nii.gz\), 1 sagittal \(such as .*2.nii.gz\): choose one for all by"
    for read_set in (aggregate, partial(read_segmentation, validation_fraction=0)):
        caplog.clear()
        read_set(folder, spatial_dims=2)
        assert re.search(told, caplog.text)
        caplog.clear()
        read_set(folder, spatial_dims=2, slice_axis="axial")
        read_set(folder)
        assert "several planes" not in caplog.text
    with pytest.raises(ValueError, match=r"the slices of task 't' must be of one plane for a contrast of places, got"):
        aggregate(folder, spatial_dims=2, position=True)


def test_a_folder_of_volumes_needs_no_list_when_its_domain_is_given(tmp_path: Path) -> None:
    for name in "ab":
        for index in range(2):
            write_volume(tmp_path / name / "sub" / f"{index}.nii.gz")
    datalist = aggregate([tmp_path / "a", tmp_path / "b"], {"a": "x", "b": "y"}, "body", modality="CT")
    assert [item["task"] for item in datalist.training] == ["x", "x", "y", "y"]
    assert datalist.group_names == ["body"]
    assert subjects(datalist.training) == {f"{name}/sub/{index}.nii.gz" for name in "ab" for index in range(2)}


@pytest.mark.parametrize("name", ["0.png", "film.mha", "film.nii.gz", "film.dcm"])
def test_films_are_no_volumes_and_the_refusal_says_which_bundles_take_them(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, 1)
    sitk.WriteImage(sitk.GetImageFromArray(np.eye(9, dtype=np.int16)), str(tmp_path / "film.mha"))
    sitk.WriteImage(sitk.GetImageFromArray(np.eye(9, dtype=np.int16)[None]), str(tmp_path / "film.dcm"))
    write_volume(tmp_path / "film.nii.gz", (4, 5))
    write(tmp_path / "dataset.json", {"training": [name]})
    for read_list in (aggregate, read_segmentation, read_volumes, partial(read_datalist, spatial_dims=3)):
        with pytest.raises(
            InputError, match=r"must hold volumes, got 2-D images in .* for the bundles pretrain_vq_ssl"
        ):
            read_list(tmp_path)
    write_volume(tmp_path / "a.nii.gz")
    write(tmp_path / "dataset.json", {"training": [name, "a.nii.gz"]})
    assert len(read_volumes(tmp_path)) == 2  # of which predictions name the one that is no volume


def test_what_is_given_goes_before_what_the_folder_says(tmp_path: Path) -> None:
    folders = two_sets(tmp_path)
    datalist = aggregate(folders, task={"b": "skull"}, group={"a": "trunk"}, modality={"b": "PET"})
    assert datalist.task_names == ["liver", "skull"]
    assert datalist.group_names == ["head", "trunk"]
    assert {item["task"]: item["modality"] for item in datalist.training} == {"liver": "CT", "skull": "PET"}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"0": "background", "1": "spleen", "2": "both", "3": "both"}, {"spleen": [1], "both": [2, 3]}),
        ({"background": 0, "spleen": "1", "both": [2, 3]}, {"spleen": [1], "both": [2, 3]}),
        ({}, {}),
        (["background", "spleen"], None),
    ],
)
def test_items_know_what_the_structures_are_called(tmp_path: Path, labels: Any, expected: Any) -> None:
    assert [item.get("labels") for item in aggregate(liver(tmp_path, labels=labels)).training] == [expected] * 3


def test_a_validation_split_is_drawn_if_asked_for(tmp_path: Path) -> None:
    folders = [liver(tmp_path / "a", 3, 2), write_set(tmp_path / "c", 10, task="heart", group="thorax", modality="MR")]
    assert {item["task"] for item in aggregate(folders).validation} == {"liver"}
    drawn = aggregate(folders, validation_fraction=0.3)
    assert [item["subject"] for item in drawn.validation if item["task"] == "liver"] == ["a/3", "a/4"]  # its own
    assert sum(item["task"] == "heart" for item in drawn.validation) == 3


@pytest.mark.parametrize(
    ("folder", "arguments", "message"),
    [
        ({"labels": {"one": "spleen"}}, {}, "the `labels` of .*a must give integers names, .*: correct its"),
        ({"labels": {"1": None, "2": {}}}, {}, "must give integers names"),
        ({"task": None}, {}, r"a must have a `task`, got None for .*a/0\.nii\.gz: write it into its"),
        ({"task": 3}, {}, "must have a `task`, got 3"),
        ({"group": " "}, {}, "must have a `group`, got ' '"),
        ({"training": 1}, {}, r"task 'liver' must have at least two training .* got 1 \(see .*a/0"),
        ({"modality": {"0": "T1", "1": "FLAIR"}}, {}, r"must have 1 channel\(s\), got T1, FLAIR for .*a/0"),
        ({}, {"task": ["x", "y"]}, r"must have a `task`, got \['x', 'y'\] for .* or give `task`, such as \{'a': "),
        ({}, {"group": {"a": "x", "c": "y"}}, "`group` must name folders among a, got c"),
    ],
)
def test_what_cannot_be_aggregated_is_refused(tmp_path: Path, folder: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(liver(tmp_path / "a", **folder), **arguments)


def test_a_task_of_two_groups_is_refused(tmp_path: Path) -> None:
    folders = [liver(tmp_path / "a"), liver(tmp_path / "d", group="chest")]
    with pytest.raises(ValueError, match=r"task 'liver' must have one group, got 'abdomen' .*a/0.* and 'chest' .*d/0"):
        aggregate(folders)


def test_frames_and_unreadable_files_are_named_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = liver(tmp_path / "a", 5)
    write_volume(folder / "1.nii.gz", (4, 5, 6, 3))
    (folder / "3.nii.gz").write_bytes(b"nothing")
    named = r"1\.nii\.gz must be one 3-D .* \(4, 5, 6, 3\).*\n .*3\.nii\.gz must be an intact"
    with pytest.raises(ValueError, match=rf"got 2 of 5 that cannot:\n .*{named}"):
        aggregate(folder)
    assert subjects(aggregate(folder, on_corrupt="skip").training) == {"0", "2", "4"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


# --- segmentation


def entry(name: str, subject: str | None = None, **changes: Any) -> Item:
    item = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
    return {**item, **({} if subject is None else {"subject": subject}), **changes}


def make_set(folder: Path, training: Sequence[Any] = (), labels: Any = LABELS, **changes: Any) -> Path:
    """A data folder whose volumes are empty files."""
    spec = {"labels": labels, "training": list(training) or [entry("a"), entry("b"), entry("c")], **changes}
    for items in (spec.get(split, []) for split in ("training", "validation", "test")):
        for item in items:
            for path in [item] if isinstance(item, str) else [item[key] for key in ("image", "label") if key in item]:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).touch()
    write(folder / "dataset.json", {key: value for key, value in spec.items() if value is not None})
    return folder


def test_classes_are_in_the_order_of_their_values_or_as_they_are_chosen(tmp_path: Path) -> None:
    folder = make_set(tmp_path, labels={"10": "aorta", "0": "background", "6": "liver", "1": "spleen"})
    assert read_segmentation(folder).class_names == ["spleen", "liver", "aorta"]
    assert read_segmentation(folder, structures=["aorta", "spleen"]).class_names == ["aorta", "spleen"]
    one = read_segmentation(folder, structures="liver")
    assert one.class_names == ["liver"]
    assert len(one.training[0]["labels"]) == 3  # the others stay known


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (LABELS, {"structures": ["heart", "liver"]}, r"must be different ones of spleen, liver, got heart, liver\.$"),
        (LABELS, {"structures": ["liver", "liver"]}, r"must be different ones of spleen, liver, got liver, liver\.$"),
        (LABELS, {"structures": []}, r"`structures` must be different ones of spleen, liver, got \.$"),
        (None, {}, r"must have a dataset\.json that names the values of its label maps, such as"),
        ({"0": "background", "x": []}, {}, r"must have a dataset\.json that names the values of its label maps"),
        *((LABELS, {"fold": fold}, rf"`fold` must be in \[0, 5\), got {fold}") for fold in (5, -1)),
    ],
)
def test_what_cannot_be_segmented_is_refused(tmp_path: Path, labels: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_segmentation(make_set(tmp_path, labels=labels), **arguments)


def test_folders_may_give_one_structure_different_values(tmp_path: Path) -> None:
    first = make_set(tmp_path / "first", [entry("a", "1"), entry("b", "2")])
    second = make_set(tmp_path / "second", [entry("a", "1"), entry("c")], labels={"spleen": 9, "liver": 4})
    datalist = read_segmentation([first, second], validation_fraction=0)
    assert datalist.class_names == ["spleen", "liver"]  # of the first
    assert [item["labels"]["spleen"] for item in datalist.training] == [[1], [1], [9], [9]]
    assert subjects(datalist.training) == {"first/1", "first/2", "second/1", "second/images/c.nii.gz"}
    assert [item["task"] for item in datalist.training] == ["first"] * 2 + ["second"] * 2
    third = make_set(tmp_path / "third", labels={"1": "spleen"})
    message = r"same structures, got spleen, liver for .*first.* and spleen for .*third.*: what one set has not"
    with pytest.raises(ValueError, match=message):
        read_segmentation([first, third])


def test_volumes_without_label_map_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = [entry("a"), {"image": "images/b.nii.gz"}, entry("c"), {"image": "images/d.nii.gz"}]
    folder = make_set(tmp_path, training, test=["images/t.nii.gz", "images/u.nii.gz"])
    datalist = read_segmentation(folder, validation_fraction=0)
    assert images(datalist.training) == ["a.nii.gz", "c.nii.gz"]
    assert datalist.test == []
    assert "4 volumes have no label map and are left out" in caplog.text
    message = "dataset.json must list volumes with the path of a label map .*got 2 without"
    with pytest.raises(ValueError, match=message):
        read_segmentation(make_set(tmp_path / "none", ["a.nii.gz", "b.nii.gz"]))


def test_splits_are_kept_drawn_or_folded(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "own", validation=[entry("v")], test=[entry("t")])
    assert [len(split) for split in read_segmentation(folder, validation_fraction=0.9)[:3]] == [3, 1, 1]
    assert len(read_segmentation(folder, fold=1, num_folds=2).validation) == 2
    assert len(read_segmentation(make_set(tmp_path / "none")).validation) == 1
    write(folder / "dataset.json", {**read(folder / "dataset.json"), "training": [], "validation": []})
    assert [len(split) for split in read_segmentation(folder)[:3]] == [0, 0, 1]


# --- modality


@pytest.mark.parametrize(
    ("own", "given", "default", "modality"),
    [
        ({"0": "CT"}, None, None, "CT"),
        ({"0": "T1", "1": "FLAIR"}, None, None, ["T1", "FLAIR"]),
        ([" CT ", None], None, None, ["CT", "unknown"]),
        ("CT", ["T1", "T2", "PD"], "MR", ["T1", "T2", "PD"]),
        ("MR", None, "CT", "MR"),
        ("MR", "PT", "CT", "PT"),
        (None, None, "CT", "CT"),
        (None, None, None, "unknown"),
        ("", None, None, "unknown"),
    ],
)
def test_the_modality_tells_the_channels(tmp_path: Path, own: Any, given: Any, default: Any, modality: Any) -> None:
    folder, in_channels = make_set(tmp_path, modality=own), 1 if isinstance(modality, str) else len(modality)
    datalist = read_segmentation(folder, modality=given, default_modality=default)
    assert (datalist.modality, datalist.in_channels) == (modality, in_channels)
    items = [*datalist.items(), *read_volumes(folder, given, default, in_channels)]
    assert all(item["modality"] == modality for item in items)


def test_volumes_without_modality_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_set(tmp_path / "a", [entry("a", modality="CT"), entry("b"), entry("c")])
    read_segmentation(folder, modality="CT", validation_fraction=0)
    read_volumes(folder, modality="CT")
    assert not caplog.text
    read_segmentation(folder, validation_fraction=0)
    read_volumes(folder)
    assert caplog.text.count(f"2 volumes have no modality ({folder}/images/b.nii.gz)") == 2
    aggregate(liver(tmp_path / "b", modality=None))
    assert f"3 volumes have no modality ({tmp_path}/b/0.nii.gz)" in caplog.text


def test_volumes_of_different_modalities_have_none_in_common(tmp_path: Path) -> None:
    folder = make_set(tmp_path, [entry("a"), entry("b", modality="MR"), entry("c")], modality="CT")
    datalist = read_segmentation(folder, validation_fraction=0)
    assert (datalist.modality, datalist.in_channels) == (None, 1)
    assert [item["modality"] for item in datalist.training] == ["CT", "MR", "CT"]
    make_set(tmp_path, [entry("a"), entry("b", modality=["T1", "T2"])], modality="CT")
    with pytest.raises(ValueError, match=r"every volume must have 1 channel\(s\), got T1, T2 for .*b\.nii\.gz"):
        read_segmentation(tmp_path, validation_fraction=0)


# --- what nnU-Net writes


def nnunet(folder: Path, labels: dict[str, Any], *channels: str) -> Path:
    return make_set(folder, [entry("a"), entry("b")], labels, channel_names=dict(enumerate(channels or ["CT"])))


@pytest.mark.parametrize("labels", [{"background": 0, "liver": 1, "ignore": 2}, {"1": "liver", "2": "Ignore"}])
def test_the_value_of_voxels_to_ignore_is_no_structure(tmp_path: Path, labels: dict[str, Any]) -> None:
    datalist = read_segmentation(nnunet(tmp_path, labels), validation_fraction=0)
    assert (datalist.class_names, datalist.modality) == (["liver"], "CT")
    assert [(item["labels"], item["ignored"]) for item in datalist.training] == [({"liver": [1]}, [2])] * 2


def test_several_channels_and_regions_that_overlap_are_named(tmp_path: Path) -> None:
    folder = nnunet(tmp_path, {"whole": [1, 2], "core": [2], "other": 3})
    refuse_overlap(read_segmentation(folder, ["core", "other"], validation_fraction=0))
    with pytest.raises(ValueError, match=r"must not share values, got the regions whole, core \(see .*a\.nii\.gz\)"):
        refuse_overlap(read_segmentation(folder, validation_fraction=0))
    with pytest.raises(ValueError, match=r"`channel_names` must be one, got T1, FLAIR, each of which is a file"):
        read_volumes(nnunet(tmp_path, {"liver": 1}, "T1", "FLAIR"))


def test_volumes_of_another_modality_than_that_of_the_weights_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for listed, weights in (("MR", "CT"), ("T2", "CT"), ("ct", "CTA"), ("unknown", "CT"), ("T2", "MR"), ("CT", None)):
        write(tmp_path / "dataset.json", {"training": ["a.nii.gz"], "modality": listed})
        read_volumes(tmp_path, default_modality=weights)
    told = [each.getMessage().partition(" (")[0] for each in caplog.records if "weights" in each.getMessage()]
    assert told == [f"The weights are of CT, but 1 volumes are listed as {name}" for name in ("MR", "T2")]


# --- volumes to embed or to segment


def test_volumes_without_labels_may_be_missing(tmp_path: Path) -> None:
    training = [{"image": "here.nii.gz"}, {"image": "gone.nii.gz", "modality": "MR"}]
    write(tmp_path / "dataset.json", {"training": training, "test": ["also_gone.nii.gz"], "modality": {"0": "CT"}})
    found = [(Path(item["image"]).name, item["modality"]) for item in read_volumes(tmp_path)]
    assert found == [("here.nii.gz", "CT"), ("gone.nii.gz", "MR"), ("also_gone.nii.gz", "CT")]
    with pytest.raises(ValueError, match=r"every volume must have 2 channel\(s\), got CT for .*here"):
        read_volumes(tmp_path, in_channels=2)


def test_folders_of_volumes_and_a_single_one_need_no_list(tmp_path: Path) -> None:
    for name in ("b.nrrd", "a.nii.gz", "notes.txt", "picture.png"):
        (tmp_path / name).touch()
    assert images(read_volumes(tmp_path)) == ["a.nii.gz", "b.nrrd"]
    (only,) = read_volumes(tmp_path / "a.nii.gz")
    assert only == {
        "image": str(tmp_path / "a.nii.gz"),
        "subject": "a.nii.gz",
        "modality": "unknown",
        "origin": (str(tmp_path), None),
    }
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.nii").touch()
    given = read_volumes([tmp_path, tmp_path / "more"], {"more": "CT"}, "MR")
    assert [item["modality"] for item in given] == ["MR", "MR", "MR", "CT"]


# --- volumes that a caller lists


def test_items_of_a_server_take_what_they_leave_out_from_the_weights() -> None:
    settings = {"class_names": ["liver", "spleen"], "modality": "MR", "pixdim": [1, 1, 1]}
    given: Any = ([{"image": "a/1.nii", "label": "b/1.nii"}], [{"image": "2.nii", "subject": "s"}])
    datalist = read_segmentation(None, given=given, settings=settings)
    common = {"task": "given", "modality": "MR", "labels": {"liver": [1], "spleen": [2]}}
    assert datalist.training == [{**common, "image": "a/1.nii", "label": "b/1.nii", "subject": "1.nii"}]
    assert datalist.validation == [{**common, "image": "2.nii", "subject": "s"}]
    assert (datalist.class_names, datalist.in_channels) == (["liver", "spleen"], 1)
    assert read_segmentation(None, settings=settings).items() == []
    with pytest.raises(ValueError, match="need weights that say them"):
        read_segmentation(None, given=given)
