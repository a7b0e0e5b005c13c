import logging
from itertools import pairwise
from typing import Any

import pytest
from helpers import images, subjects

from dissect_monai.common import Item
from dissect_monai.data.datalists import Datalist
from dissect_monai.data.identity import datalist_digest, training_record
from dissect_monai.data.splits import (
    hold_out,
    refuse_untrainable,
    scored_subjects,
    select_fraction,
    split_training,
    with_test_split,
)

pytestmark = pytest.mark.usefixtures("_images_are_nowhere")


def volumes(name: str, count: int, task: str = "t") -> list[Item]:
    """Two volumes of every subject."""
    return [
        {"image": f"{name}{index}", "subject": f"{name}{index // 2}", "task": task, "modality": "CT"}
        for index in range(count)
    ]


def datalist_of(training: int = 0, validation: int = 0, test: int = 0) -> Datalist:
    return Datalist(volumes("a", training), volumes("b", validation), volumes("c", test), task_names=["t"])


def xrays() -> list[Item]:
    items: list[Item] = [
        {"image": f"{index}", "subject": str(index // 2), "label": [float(index == 0), 1.0]} for index in range(40)
    ]
    return [*items, {"image": "a"}, {"image": "b"}]


def test_fractions_are_nested_and_keep_the_order_and_whole_subjects(caplog: pytest.LogCaptureFixture) -> None:
    items = xrays()
    with caplog.at_level(logging.INFO):
        parts = [select_fraction(items, fraction, seed=3) for fraction in (0.01, 0.1, 0.5, 1.0)]
    for part, count in zip(parts, (1, 2, 11, 22), strict=True):
        drawn = {item["subject"] for item in part if "subject" in item}
        alone = sum("subject" not in item for item in part)
        assert (len(part), len(drawn) + alone) == (2 * len(drawn) + alone, count)
        assert part == [item for item in items if item in part]
        assert f"Using {count} of 22 subjects with labels." in caplog.text
    assert all({*images(smaller)} <= {*images(larger)} for smaller, larger in pairwise(parts))
    assert parts[-1] == items
    assert images(select_fraction(items, 0.5, seed=4)) != images(parts[2])


@pytest.mark.parametrize(("names", "expected"), [(["x", "y"], "of: x."), (None, "of: finding_0.")])
def test_lost_positives_are_logged(names: list[str] | None, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    seed = next(seed for seed in range(99) if "0" not in images(select_fraction(xrays(), 0.3, seed)))
    caplog.clear()
    select_fraction(xrays(), 0.3, seed, names)
    assert expected in caplog.text


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_bad_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\]"):
        select_fraction(xrays(), fraction)


def test_tasks_without_validation_split_hold_out_whole_subjects() -> None:
    own, folders = datalist_of(6, 2), [Datalist(volumes("a", count, "u"), [], []) for count in (24, 22)]
    kept, *split = hold_out([own, *folders], 0.3, seed=0)
    assert kept == own
    training, validation = (set.union(*(subjects(each[place]) for each in split)) for place in (0, 1))
    assert (len(validation), training & validation) == (4, set())  # folders of one task hold out the same
    assert sum(len(each.items()) for each in split) == 46
    assert hold_out([folders[1], folders[0]], 0.3, seed=0) == split[::-1]
    assert hold_out(folders, 0.3, seed=1) != split
    assert hold_out(folders, 0, seed=0) == folders
    assert hold_out([datalist_of(4)], 0.5, seed=0) == [datalist_of(4)]  # fewer than two subjects would be left


def test_without_test_split_validation_is_scored_and_training_chooses(caplog: pytest.LogCaptureFixture) -> None:
    other = [volumes(name, 4, "whole") for name in "xyz"]
    datalist = Datalist(volumes("a", 10) + other[0], volumes("b", 4) + other[1], other[2], task_names=["t", "whole"])
    split = with_test_split(datalist)
    assert [each[:4] for each in split[:3]] == other
    training, validation, test = (each[4:] for each in split[:3])
    assert (len(subjects(training)), len(subjects(validation)), subjects(test)) == (4, 1, {"b0", "b1"})
    assert training + validation != volumes("a", 10)
    assert sorted(images(training + validation)) == sorted(images(volumes("a", 10)))
    assert "Task t has no test split" in caplog.text
    assert "whole" not in caplog.text


def split_of(datalist: Datalist, fraction: float = 0.2, seed: int = 0, fold: int | None = None) -> Datalist:
    return split_training(datalist, fold, 5, fraction, seed)


def test_a_share_of_the_subjects_is_for_validation_whatever_their_order(caplog: pytest.LogCaptureFixture) -> None:
    datalist = datalist_of(20, test=2)
    with caplog.at_level(logging.INFO):
        split = split_of(datalist, 0.3)
    assert (len(split.training), len(split.validation), split.test) == (14, 6, datalist.test)
    assert not subjects(split.training) & subjects(split.validation)
    assert "3 of 10 training subjects are held out for validation." in caplog.text
    turned = split_of(datalist._replace(training=datalist.training[::-1]), 0.3)
    assert subjects(turned.validation) == subjects(split.validation)
    assert any(split_of(datalist, 0.3, seed) != split for seed in (1, 2))


@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.01, 1), (0.5, 2), (0.8, 2), (0.99, 2)])
def test_at_least_one_subject_is_for_validation_and_one_for_training(fraction: float, count: int) -> None:
    split = split_of(datalist_of(6), fraction)
    assert (len(subjects(split.training)), len(subjects(split.validation))) == (3 - count, count)
    for datalist in (datalist_of(8, 2), datalist_of(2)):  # has one, or has a single subject
        assert split_of(datalist, fraction) == datalist


def test_folds_part_the_subjects() -> None:
    datalist = datalist_of(20, 4, 2)
    folds = [split_of(datalist, fold=fold) for fold in range(5)]
    parts = [subjects(each.validation) for each in folds]
    everyone = subjects(datalist.training + datalist.validation)
    assert set.union(*parts) == everyone
    assert sorted(map(len, parts)) == [2, 2, 2, 3, 3]  # no subject is in two
    for each, part in zip(folds, parts, strict=True):
        assert subjects(each.training) == everyone - part
        assert (len(each.training) + len(each.validation), each.test) == (24, datalist.test)
    assert split_of(datalist, fold=1) == folds[1]
    assert any(split_of(datalist, seed=seed, fold=1) != folds[1] for seed in (1, 2))
    with pytest.raises(ValueError, match="`num_folds` must be at most the 3 subjects, got 5"):
        split_of(datalist_of(6), fold=0)


@pytest.mark.parametrize(
    ("num_test", "split", "expected", "subjects"),
    [(5, "auto", "test", 3), (5, "test", "test", 3), (5, "validation", "validation", 2), (0, "auto", "validation", 2)],
)
def test_the_wanted_split_is_scored(num_test: int, split: str, expected: str, subjects: int) -> None:
    datalist = datalist_of(4, 3, num_test)
    scored = scored_subjects(datalist, split, {"select": "best", "validation_data": "of another set"})
    assert scored.items == getattr(datalist, expected)
    assert scored.facts == {"split": expected, "subjects": subjects, "volumes": len(scored.items)}
    assert scored.notes == []


def test_all_of_a_set_is_scored_if_it_is_new_to_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    datalist = datalist_of(4, 3, 5)
    assert len(scored_subjects(datalist, "all", {"in_channels": 1}).items) == 12
    assert "The weights do not say which subjects they were trained on" in caplog.text
    settings = {"trained_on": training_record(datalist.training)}
    assert scored_subjects(datalist, "test", settings).items == datalist.test
    with pytest.raises(ValueError, match="`all` must hold no subject that the weights were trained on, got 2: a0, a1"):
        scored_subjects(datalist, "all", settings)


def test_volumes_without_a_structure_of_the_weights_are_not_scored() -> None:
    datalist = datalist_of(test=2)
    for item in datalist.test:
        item |= {"label": "c.nii", "labels": {"liver": [1], "spleen": [2]}}
    assert scored_subjects(datalist, "test", {"class_names": ["heart", "spleen"]}).items == datalist.test
    with pytest.raises(ValueError, match=r"a structure of the weights \(heart\), got liver, spleen in c\.nii"):
        scored_subjects(datalist, "test", {"class_names": ["heart"]})


@pytest.mark.parametrize(
    ("split", "select", "noted"),
    [("validation", "best", 1), ("validation", "last", 0), ("test", "best", 0), ("auto", "best", 0)],
)
def test_a_choice_on_what_is_scored_is_noted(
    split: str, select: str, noted: int, caplog: pytest.LogCaptureFixture
) -> None:
    datalist = datalist_of(4, 3, 5)
    settings = {"select": select, "validation_data": datalist_digest(datalist.validation, "modality")}
    assert len(scored_subjects(datalist, split, settings).notes) == noted
    assert ("chosen on these very subjects, so that the scores are optimistic" in caplog.text) == bool(noted)


@pytest.mark.parametrize(
    ("datalist", "split", "settings", "message"),
    [
        (datalist_of(4), "test", {}, "`test` must hold volumes with label maps to be scored, got none"),
        (datalist_of(4), "auto", {}, "`validation` must hold volumes .*got none: list some in dataset.json, hold some"),
        (datalist_of(test=2), "test", {"in_channels": 2}, r"every volume must have 2 channel\(s\), got CT for c0"),
    ],
)
def test_what_cannot_be_scored_is_refused(datalist: Datalist, split: str, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored_subjects(datalist, split, settings)


def test_what_cannot_be_trained_is_refused() -> None:
    refuse_untrainable(*datalist_of(4, 1)[:2], "best")
    refuse_untrainable(*datalist_of(4)[:2], "last")
    with pytest.raises(ValueError, match="`select` best chooses the weights on a validation split, and there is none"):
        refuse_untrainable(*datalist_of(4)[:2], "best")
    with pytest.raises(ValueError, match="`training` must list volumes with label maps, got none"):
        refuse_untrainable([], datalist_of(0, 2).validation, "last")
