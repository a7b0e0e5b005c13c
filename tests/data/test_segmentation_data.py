from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import images, write

from dissect_monai.common import Item
from dissect_monai.data.datalists import SegmentationDatalist
from dissect_monai.data.segmentation import BTCV_ORGANS, read_segmentation, read_unlabelled, segmentation_of_weights
from dissect_monai.data.splits import (
    datalist_digest,
    labelled_subjects,
    refuse_untrainable,
    scored_subjects,
    shard,
    subject_digest,
)

LABELS = {"0": "background", "1": "spleen", "2": "liver"}
BTCV = [f"img{number:04d}" for number in (*range(1, 11), *range(21, 41))]


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


def two_each(count: int) -> list[Item]:
    """Two volumes of every subject."""
    return [entry(f"{name}_{time}", name) for name in map("s{:02d}".format, range(count)) for time in "ab"]


def subjects(items: list[Item]) -> set[str]:
    return {item["subject"] for item in items}


# --- classes


def test_classes_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    labels = {"10": "aorta", "0": "background", "6": "liver", "1": "spleen"}
    datalist = read_segmentation(make_set(tmp_path, labels=labels))
    assert datalist.class_names == ["spleen", "liver", "aorta"]
    assert datalist.training[0]["labels"] == {"aorta": [10], "liver": [6], "spleen": [1]}


def test_names_with_one_or_several_values_are_read_as_nnunet_has_them(tmp_path: Path) -> None:
    datalist = read_segmentation(make_set(tmp_path, labels={"kidneys": [7, 2], "background": 0, "spleen": 5}))
    assert datalist.class_names == ["kidneys", "spleen"]
    assert datalist.training[0]["labels"] == {"kidneys": [7, 2], "spleen": [5]}


def test_chosen_structures_give_the_order_of_the_classes(tmp_path: Path) -> None:
    folder = make_set(tmp_path, labels={"1": "spleen", "2": "liver", "3": "aorta"})
    assert read_segmentation(folder, structures=["aorta", "spleen"]).class_names == ["aorta", "spleen"]
    assert read_segmentation(folder, structures="liver").class_names == ["liver"]
    assert len(read_segmentation(folder, structures=["liver"]).training[0]["labels"]) == 3  # the others stay known


@pytest.mark.parametrize(
    ("structures", "got"), [(["heart", "liver"], "heart, liver"), (["liver", "liver"], "liver, liver"), ([], "")]
)
def test_unknown_and_repeated_structures_are_refused(tmp_path: Path, structures: list[str], got: str) -> None:
    with pytest.raises(ValueError, match=rf"`structures` must be different ones of spleen, liver, got {got}\.$"):
        read_segmentation(make_set(tmp_path), structures)


@pytest.mark.parametrize("labels", [None, {}, ["spleen"], {"0": "background", "x": []}])
def test_a_folder_that_names_no_structures_is_refused(tmp_path: Path, labels: Any) -> None:
    message = "must have a dataset.json that names the values of its label maps, such as"
    with pytest.raises(ValueError, match=message):
        read_segmentation(make_set(tmp_path, labels=labels))


def test_a_value_that_is_no_integer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must give integers names.*got \{'spleen': 'one'\}: correct"):
        read_segmentation(make_set(tmp_path, labels={"spleen": "one"}))


# --- folders


def test_folders_may_give_one_structure_different_values(tmp_path: Path) -> None:
    first = make_set(tmp_path / "first", [entry("a", "1"), entry("b", "2")])
    second = make_set(tmp_path / "second", [entry("a", "1"), entry("c")], labels={"spleen": 9, "liver": 4})
    datalist = read_segmentation([first, second], validation_fraction=0)
    assert datalist.class_names == ["spleen", "liver"]  # of the first
    assert [item["labels"]["spleen"] for item in datalist.training] == [[1], [1], [9], [9]]
    assert subjects(datalist.training) == {"first/1", "first/2", "second/1", "second/images/c.nii.gz"}
    assert [item["task"] for item in datalist.training] == ["first"] * 2 + ["second"] * 2


def test_folders_with_other_structures_are_refused(tmp_path: Path) -> None:
    first = make_set(tmp_path / "first")
    second = make_set(tmp_path / "second", labels={"1": "spleen"})
    message = r"same structures, got spleen, liver in .*first and spleen in .*second: what one set has not contoured"
    with pytest.raises(ValueError, match=message):
        read_segmentation([first, second])


def test_volumes_without_label_map_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = [entry("a"), {"image": "images/b.nii.gz"}, entry("c"), entry("d", label=None)]
    training[-1].pop("label")
    folder = make_set(tmp_path, training, test=["images/t.nii.gz", "images/u.nii.gz"])
    datalist = read_segmentation(folder, validation_fraction=0)
    assert images(datalist.training) == ["a.nii.gz", "c.nii.gz"]
    assert datalist.test == []
    assert "2 of the volumes in `training` have no label map and are left out" in caplog.text
    assert "2 of the volumes in `test` have no label map and are left out" in caplog.text


def test_a_set_without_any_label_map_is_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path, ["a.nii.gz", "b.nii.gz"])
    with pytest.raises(
        ValueError, match=r"dataset.json must list volumes with the path of a label map .*got 2 without"
    ):
        read_segmentation(folder)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    (folder / "labels" / "b.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"must list existing files, got 1 missing: .*labels/b\.nii\.gz"):
        read_segmentation(folder)
    with pytest.raises(FileNotFoundError, match="must be an existing folder"):
        read_segmentation(tmp_path / "none")


def test_a_volume_without_subject_is_one_of_its_own(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", [entry("a"), entry("b"), entry("c", "Jo")])
    assert subjects(read_segmentation(folder, validation_fraction=0).training) == {
        "images/a.nii.gz", "images/b.nii.gz", "Jo",
    }  # fmt: skip


# --- splits


def test_the_validation_split_of_the_set_is_kept(tmp_path: Path) -> None:
    datalist = read_segmentation(
        make_set(tmp_path, validation=[entry("v")], test=[entry("t")]), validation_fraction=0.9
    )
    assert [images(split) for split in datalist[:3]] == [
        ["a.nii.gz", "b.nii.gz", "c.nii.gz"], ["v.nii.gz"], ["t.nii.gz"],
    ]  # fmt: skip


def test_btcv_is_split_as_in_the_literature(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = {str(index): name for index, name in enumerate(BTCV_ORGANS, 1)}
    training = [entry(name) | {"label": f"labels/{name.replace('img', 'label')}.nii.gz"} for name in BTCV]
    folder = make_set(tmp_path, training[::-1], labels=labels)
    with caplog.at_level(logging.INFO):
        datalist = read_segmentation(folder, split_seed=7)
    assert sorted(images(datalist.validation)) == [f"img{number:04d}.nii.gz" for number in range(35, 41)]
    assert len(datalist.training) == 24
    assert datalist.class_names == list(BTCV_ORGANS)
    assert "those of BTCV: 0035 to 0040 are for validation" in caplog.text
    assert not read_segmentation(folder, validation_fraction=0).validation
    assert len(read_segmentation(folder, fold=0).validation) == 6  # drawn, not those of the literature
    assert images(read_segmentation(folder, fold=0).validation) != images(datalist.validation)


@pytest.mark.parametrize("names", [BTCV[:-1], [*BTCV[:-1], "img0041"], [*BTCV[:-1], "other"]])
def test_a_part_of_btcv_is_split_as_any_other_set(tmp_path: Path, names: list[str]) -> None:
    datalist = read_segmentation(make_set(tmp_path, [entry(name) for name in names]), validation_fraction=0.1)
    assert len(datalist.validation) == 3


def test_a_share_of_the_subjects_is_held_out(tmp_path: Path) -> None:
    folder = make_set(tmp_path, two_each(10), test=[entry("t", "t")])
    datalist = read_segmentation(folder, validation_fraction=0.3)
    assert (len(datalist.training), len(datalist.validation)) == (14, 6)
    assert not subjects(datalist.training) & subjects(datalist.validation)
    assert len(subjects(datalist.validation)) == 3
    assert images(datalist.test) == ["t.nii.gz"]
    assert read_segmentation(folder, validation_fraction=0.3) == datalist
    others = [
        subjects(read_segmentation(folder, validation_fraction=0.3, split_seed=seed).validation) for seed in (1, 2)
    ]
    assert others != [subjects(datalist.validation)] * 2


def test_the_order_of_the_list_does_not_change_the_split(tmp_path: Path) -> None:
    first = read_segmentation(make_set(tmp_path / "one", two_each(10)))
    second = read_segmentation(make_set(tmp_path / "two", two_each(10)[::-1]))
    assert subjects(first.validation) == subjects(second.validation)


@pytest.mark.parametrize(("fraction", "num_validation"), [(0.01, 1), (0.5, 2), (0.8, 2), (0.99, 2)])
def test_at_least_one_subject_is_for_validation_and_one_for_training(
    tmp_path: Path, fraction: float, num_validation: int
) -> None:
    datalist = read_segmentation(make_set(tmp_path), validation_fraction=fraction)
    assert (len(datalist.training), len(datalist.validation)) == (3 - num_validation, num_validation)


def test_nothing_is_held_out_if_not_wanted(tmp_path: Path) -> None:
    datalist = read_segmentation(make_set(tmp_path), validation_fraction=0)
    assert (len(datalist.training), datalist.validation) == (3, [])


def test_one_subject_is_not_split(tmp_path: Path) -> None:
    datalist = read_segmentation(make_set(tmp_path, two_each(1)))
    assert (len(datalist.training), datalist.validation) == (2, [])


def test_a_set_for_testing_alone_is_read(tmp_path: Path) -> None:
    folder = make_set(tmp_path, test=[entry("t", "t")])
    write(folder / "dataset.json", {**json.loads((folder / "dataset.json").read_text()), "training": []})
    datalist = read_segmentation(folder)
    assert (datalist.training, len(datalist.test)) == ([], 1)
    with pytest.raises(ValueError, match="`training` must list volumes with label maps, got none"):
        refuse_untrainable(datalist.training, datalist.validation, "last")


def test_folds_part_the_subjects(tmp_path: Path) -> None:
    folder = make_set(tmp_path, two_each(10), validation=[entry("v", "v"), entry("w", "w")], test=[entry("t", "t")])
    folds = [read_segmentation(folder, fold=fold) for fold in range(5)]
    parts = [subjects(each.validation) for each in folds]
    everyone = {f"s{index:02d}" for index in range(10)} | {"v", "w"}
    assert set.union(*parts) == everyone
    assert sum(map(len, parts)) == len(everyone)  # no subject is in two
    assert sorted(map(len, parts)) == [2, 2, 2, 3, 3]
    for each, part in zip(folds, parts, strict=True):
        assert subjects(each.training) == everyone - part
        assert len(each.training) + len(each.validation) == 22
        assert images(each.test) == ["t.nii.gz"]


def test_folds_follow_from_the_seed(tmp_path: Path) -> None:
    folder = make_set(tmp_path, two_each(10))
    assert read_segmentation(folder, fold=1) == read_segmentation(folder, fold=1)
    drawn = [subjects(read_segmentation(folder, fold=1, split_seed=seed).validation) for seed in range(3)]
    assert not drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fold": 5}, r"`fold` must be in \[0, 5\), got 5"),
        ({"fold": -1}, r"`fold` must be in \[0, 5\), got -1"),
        ({"fold": 2, "num_folds": 2}, r"`fold` must be in \[0, 2\), got 2"),
        ({"fold": 0}, "`num_folds` must be at most the 3 subjects, got 5"),
        ({"fold": 0, "num_folds": 1}, "`num_folds` must be at least 2 and"),
        ({"validation_fraction": 1}, r"`validation_fraction` in \[0, 1\), got 5 and 1"),
        ({"validation_fraction": -0.1}, "got 5 and -0.1"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_segmentation(make_set(tmp_path), **arguments)


def test_a_subject_in_two_splits_is_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path, [entry("a", "1"), entry("b", "2")], test=[entry("t", "1")])
    with pytest.raises(ValueError, match="`training` and `test` must share no subject, got 1 in both: 1"):
        read_segmentation(folder)


# --- modality


@pytest.mark.parametrize(
    ("written", "given", "modality", "in_channels"),
    [
        ("CT", None, "CT", 1),
        ({"0": "CT"}, None, "CT", 1),
        ({"0": "T1", "1": "FLAIR"}, None, ["T1", "FLAIR"], 2),
        (["T1", "FLAIR"], None, ["T1", "FLAIR"], 2),
        ("CT", "MR", "MR", 1),
        ("CT", ["T1", "T2", "PD"], ["T1", "T2", "PD"], 3),
        (None, "CT", "CT", 1),
        (None, None, "unknown", 1),
        ("", None, "unknown", 1),
        ([" CT ", None], None, ["CT", "unknown"], 2),
    ],
)
def test_the_modality_says_how_many_channels_there_are(
    tmp_path: Path, written: Any, given: Any, modality: Any, in_channels: int
) -> None:
    datalist = read_segmentation(make_set(tmp_path, modality=written), modality=given)
    assert (datalist.modality, datalist.in_channels) == (modality, in_channels)
    assert all(item["modality"] == modality for item in datalist.training + datalist.validation)


def test_volumes_without_modality_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = [entry("a", modality="CT"), entry("b"), entry("c")]
    folder = make_set(tmp_path, training)
    read_segmentation(folder, validation_fraction=0)
    assert "2 volumes have no modality" in caplog.text
    assert "images/b.nii.gz" in caplog.text
    caplog.clear()
    read_segmentation(folder, modality="CT", validation_fraction=0)
    read_unlabelled(folder, modality="CT")
    assert not caplog.text
    read_unlabelled(folder)
    assert "2 volumes have no modality" in caplog.text


def test_volumes_of_different_modalities_have_none_in_common(tmp_path: Path) -> None:
    training = [entry("a"), entry("b", modality="MR"), entry("c")]
    datalist = read_segmentation(make_set(tmp_path, training, modality="CT"), validation_fraction=0)
    assert (datalist.modality, datalist.in_channels) == (None, 1)
    assert [item["modality"] for item in datalist.training] == ["CT", "MR", "CT"]


def test_different_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    training = [entry("a"), entry("b", modality=["T1", "T2"])]
    folder = make_set(tmp_path, training, modality="CT")
    with pytest.raises(ValueError, match=r"same number of channels, got \[1, 2\] \(`modality`\)"):
        read_segmentation(folder, validation_fraction=0)


# --- volumes to segment


def test_volumes_to_segment_may_be_missing_and_need_no_labels(tmp_path: Path) -> None:
    training = [{"image": "here.nii.gz"}, {"image": "gone.nii.gz", "modality": "MR"}]
    write(tmp_path / "dataset.json", {"training": training, "test": ["also_gone.nii.gz"], "modality": {"0": "CT"}})
    items = read_unlabelled(tmp_path)
    assert images(items) == ["here.nii.gz", "gone.nii.gz", "also_gone.nii.gz"]
    assert [item["modality"] for item in items] == ["CT", "MR", "CT"]
    assert {item["modality"] for item in read_unlabelled(tmp_path, "PET")} == {"PET"}
    assert read_unlabelled(tmp_path, ["T1", "T2"])[0]["modality"] == ["T1", "T2"]


def test_a_folder_of_volumes_and_a_single_one_can_be_segmented(tmp_path: Path) -> None:
    for name in ("b.nrrd", "a.nii.gz", "notes.txt", "picture.png"):
        (tmp_path / name).touch()
    assert images(read_unlabelled(tmp_path)) == ["a.nii.gz", "b.nrrd"]
    (single,) = read_unlabelled(tmp_path / "a.nii.gz")
    assert single == {"image": str(tmp_path / "a.nii.gz"), "modality": "unknown"}
    with pytest.raises(FileNotFoundError, match="must be an existing folder"):
        read_unlabelled(tmp_path / "none")


# --- what is trained on and scored


def datalist_of(training: int = 0, validation: int = 0, test: int = 0) -> SegmentationDatalist:
    splits = [
        [
            {"image": f"{name}{index}", "subject": f"{name}{index // 2}", "task": "t", "modality": "CT"}
            for index in range(count)
        ]
        for name, count in (("a", training), ("b", validation), ("c", test))
    ]
    return SegmentationDatalist(*splits, ["liver"], "CT", 1)


def test_a_smaller_fraction_of_the_subjects_is_part_of_a_larger_one(caplog: pytest.LogCaptureFixture) -> None:
    datalist = datalist_of(training=20)
    with caplog.at_level(logging.INFO):
        parts = [labelled_subjects(datalist, fraction) for fraction in (0.01, 0.3, 0.5, 1)]
    assert [len(subjects(part)) for part in parts] == [1, 3, 5, 10]
    assert [len(part) for part in parts] == [2, 6, 10, 20]  # both volumes of every subject
    for smaller, larger in pairwise(parts):
        assert subjects(smaller) <= subjects(larger)
    assert "Training on 3 of 10 subjects with labels." in caplog.text
    assert any(labelled_subjects(datalist, 0.3, seed) != parts[1] for seed in (1, 2))
    assert labelled_subjects(datalist) == datalist.training


def test_a_fraction_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\], got 0"):
        labelled_subjects(datalist_of(training=2), 0)


@pytest.mark.parametrize(("split", "expected"), [("auto", "test"), ("test", "test"), ("validation", "validation")])
def test_the_wanted_split_is_scored(split: str, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    datalist = datalist_of(4, 3, 5)
    with caplog.at_level(logging.INFO):
        scored = scored_subjects(datalist, split, {"select": "last"})
    volumes = {"test": 5, "validation": 3}[expected]
    assert scored.items == getattr(datalist, expected)
    assert scored.facts == {"split": expected, "subjects": (volumes + 1) // 2, "volumes": volumes}
    assert scored.notes == []
    assert f"Scoring {(volumes + 1) // 2} subjects ({expected})." in caplog.text


def test_without_a_test_split_that_for_validation_is_scored() -> None:
    assert scored_subjects(datalist_of(4, 3), "auto", {}).facts["split"] == "validation"


def test_validation_volumes_of_another_set_have_chosen_nothing() -> None:
    settings = {"select": "best", "validation_data": "of another set"}
    assert scored_subjects(datalist_of(4, 3), "validation", settings).notes == []


def test_all_of_a_new_set_can_be_scored() -> None:
    assert len(scored_subjects(datalist_of(4, 3, 5), "all", {}).items) == 12


@pytest.mark.parametrize(("split", "refused"), [("test", False), ("validation", False), ("all", True)])
def test_subjects_that_the_weights_were_trained_on_are_not_scored(split: str, refused: bool) -> None:
    datalist = datalist_of(4, 3, 5)
    settings = {"trained_on": [subject_digest(item) for item in datalist.training]}
    if not refused:
        assert scored_subjects(datalist, split, settings).items == getattr(datalist, split)
        return
    with pytest.raises(
        ValueError, match=r"`all` must hold no subject that the weights were trained on, got 2: a0, a1\."
    ):
        scored_subjects(datalist, split, settings)


@pytest.mark.parametrize(
    ("knob", "own", "default", "expected"),
    [(None, "MR", "CT", "MR"), (None, None, "CT", "CT"), ("PT", "MR", "CT", "PT"), (None, None, None, "unknown")],
)
def test_the_modality_of_dataset_json_comes_before_that_of_training(
    tmp_path: Path, knob: str | None, own: str | None, default: str | None, expected: str
) -> None:
    folder = make_set(tmp_path)
    spec = {**json.loads((folder / "dataset.json").read_text()), "modality": own}
    write(folder / "dataset.json", {key: value for key, value in spec.items() if value is not None})
    assert read_segmentation(folder, modality=knob, default_modality=default).modality == expected
    assert read_unlabelled(folder, knob, default)[0]["modality"] == expected


def test_a_modality_for_every_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`modality` must be a text, or a list with one for each channel, got"):
        read_segmentation(make_set(tmp_path), modality={"a": "CT"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "select", "noted"),
    [("validation", "best", 1), ("validation", "last", 0), ("test", "best", 0), ("auto", "best", 0)],
)
def test_weights_chosen_on_the_scored_subjects_are_noted(
    split: str, select: str, noted: int, caplog: pytest.LogCaptureFixture
) -> None:
    datalist = datalist_of(4, 3, 5)
    settings = {"select": select, "validation_data": datalist_digest(datalist.validation)}
    scored = scored_subjects(datalist, split, settings)
    assert len(scored.notes) == noted
    assert ("chosen on these very subjects, so that the scores are optimistic" in caplog.text) == bool(noted)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("training", "`split` must be auto, validation, test or all, got 'training'"),
        ("test", "`test` must hold volumes with label maps to be scored, got none"),
        ("auto", "`validation` must hold volumes .*got none: list some in dataset.json, hold some out"),
    ],
)
def test_nothing_to_score_is_refused(split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored_subjects(datalist_of(4), split, {})


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_all_items_and_none_has_nothing(world_size: int) -> None:
    items = [{"image": str(index)} for index in range(5)]
    shares = [shard(items, rank, world_size) for rank in range(world_size)]
    assert all(shares)
    assert {item["image"] for share in shares for item in share} == set("01234")
    assert sum(map(len, shares)) == max(5, world_size)
    assert shard([], 0, world_size) == []


def test_the_best_weights_cannot_be_chosen_without_a_validation_split() -> None:
    refuse_untrainable(*datalist_of(4, 1)[:2], "best")
    refuse_untrainable(*datalist_of(4)[:2], "last")
    with pytest.raises(
        ValueError, match=r"`--select best` chooses the weights on a validation split, and there is none"
    ):
        refuse_untrainable(*datalist_of(4)[:2], "best")


# --- volumes that a caller lists


def test_what_a_caller_leaves_out_follows_from_the_weights() -> None:
    datalist = segmentation_of_weights({"class_names": ["liver", "spleen"], "modality": "MR"})
    assert datalist == ([], [], [], ["liver", "spleen"], "MR", 1)
    bare, own = datalist.complete([{"image": "a/1.nii", "label": "b/1.nii"}, {"image": "2.nii", "subject": "s"}])
    common = {"task": "given", "modality": "MR", "labels": {"liver": [1], "spleen": [2]}}
    assert bare == {**common, "image": "a/1.nii", "label": "b/1.nii", "subject": "1.nii"}
    assert own == {**common, "image": "2.nii", "subject": "s"}


def test_without_weights_a_caller_must_not_list_volumes() -> None:
    with pytest.raises(ValueError, match="need weights that say them"):
        segmentation_of_weights({})
