from __future__ import annotations

import csv
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from dissect_monai.handlers.segmentation_table import (
    CaseScores,
    metrics_by_name,
    subject_scores,
    summarize,
    write_tables,
)
from dissect_monai.metrics.intervals import bootstrap
from dissect_monai.metrics.segmentation import StructureScore


def found(name: str, dice: float, hd95: float = 4.0, surface_dice: float = 0.9) -> StructureScore:
    return StructureScore(name, (1, 2), dice, hd95, surface_dice, 10.0, 9.0, "scored")


def missed(name: str) -> StructureScore:
    return StructureScore(name, (3,), 0.0, nan, 0.0, 5.0, 0.0, "missed")


def unlabelled(name: str, pred_ml: float = 0.0) -> StructureScore:
    return StructureScore(name, (4,), nan, nan, nan, 0.0, pred_ml, "false_positive" if pred_ml else "absent")


CASES = [
    CaseScores("a.nii", "A", [found("liver", 0.9, 2), found("left kidney", 0.7, 6), unlabelled("spleen", 1.5)]),
    CaseScores("b1.nii", "B", [found("liver", 0.8, 3), missed("left kidney"), unlabelled("spleen")]),
    CaseScores("b2.nii", "B", [found("liver", 0.6, 5), found("left kidney", 0.5, 8), unlabelled("spleen", 2.0)]),
    CaseScores("c.nii", "C", [found("liver", 0.4, 9), unlabelled("left kidney"), unlabelled("spleen")]),
]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_line_of_a_structure_is_the_mean_over_subjects_that_have_it() -> None:
    _, liver, kidney, _ = summarize(CASES)
    assert (liver.structure, liver.n, kidney.n) == ("liver", 3, 2)
    assert liver.dice.value == pytest.approx(np.mean([0.9, 0.7, 0.4]))
    assert liver.dice_std == pytest.approx(np.std([0.9, 0.7, 0.4], ddof=1))
    assert kidney.dice.value == pytest.approx(np.mean([0.7, 0.25]))  # a missed one is 0
    assert kidney.hd95.value == pytest.approx(np.mean([6, 8]))  # and has no distance


def test_the_first_line_counts_every_subject_alike() -> None:
    mean = summarize(CASES)[0]
    subjects = [(0.9 + 0.7) / 2, (0.7 + 0.25) / 2, 0.4]
    assert (mean.structure, mean.n) == ("mean", 3)
    assert mean.dice.value == pytest.approx(np.mean(subjects))
    assert mean.dice_std == pytest.approx(np.std(subjects, ddof=1))
    assert mean.hd95.value == pytest.approx(np.mean([4, (4 + 8) / 2, 9]))


def test_intervals_are_those_of_the_bootstrap_by_subject() -> None:
    mean = summarize(CASES, num_samples=200, seed=3)[0]
    values = np.array([0.8, 0.475, 0.4])
    expected = bootstrap(lambda weight: weight @ values / weight.sum(1), ["A", "B", "C"], 200, 3)
    np.testing.assert_allclose(mean.dice, expected)
    assert mean.dice.low < mean.dice.value < mean.dice.high


def test_missed_and_false_positives_are_counted_per_case() -> None:
    counts = {each.structure: (each.missed, each.false_positives) for each in summarize(CASES)}
    assert counts == {"mean": (1, 2), "liver": (0, 0), "left kidney": (1, 0), "spleen": (0, 2)}


def test_a_structure_that_no_label_has_counts_for_nothing() -> None:
    spleen = summarize(CASES)[3]
    assert spleen.n == 0
    assert all(isnan(value) for value in (*spleen.dice, spleen.dice_std, *spleen.hd95, *spleen.surface_dice))
    without = [case._replace(structures=case.structures[:2]) for case in CASES]
    assert summarize(without)[0].dice == summarize(CASES)[0].dice


def test_one_subject_has_no_interval_and_no_spread() -> None:
    mean, liver = summarize([CaseScores("a.nii", "A", [found("liver", 0.9)])])
    assert mean.dice.value == liver.dice.value == 0.9
    assert all(isnan(value) for value in (mean.dice.low, mean.dice.high, mean.dice_std))


def test_structures_may_differ_between_cases() -> None:
    cases = [CaseScores("a", "A", [found("liver", 0.5)]), CaseScores("b", "B", [found("heart", 0.7)])]
    mean, liver, heart = summarize(cases)
    assert (mean.dice.value, liver.dice.value, heart.dice.value) == (0.6, 0.5, 0.7)


def test_subjects_have_the_mean_over_their_structures() -> None:
    subjects = {each.subject: each for each in subject_scores(CASES)}
    assert list(subjects) == ["A", "B", "C"]
    assert subjects["B"].dice == pytest.approx(0.475)
    assert (subjects["B"].missed, subjects["B"].false_positives) == (1, 1)
    assert subjects["C"][1:4] == (0.4, 9, 0.9)


def test_metrics_have_the_names_of_their_structures() -> None:
    metrics = metrics_by_name(summarize(CASES))
    ends = {f"{metric}_mean{end}" for metric in ("dice", "hd95", "surface_dice") for end in ("", "_low", "_high")}
    assert set(metrics) == {*ends, "dice_liver", "dice_left_kidney", "missed", "false_positives"}
    assert metrics["dice_left_kidney"] == pytest.approx(0.475)
    assert (metrics["missed"], metrics["false_positives"]) == (1, 2)


def test_tables_hold_every_case_subject_and_structure(tmp_path: Path) -> None:
    write_tables(tmp_path / "new", CASES, summarize(CASES))
    cases, subjects, summary = (table(tmp_path / "new" / f"{name}.csv") for name in ("cases", "subjects", "summary"))
    assert len(cases) == 12
    assert cases[4] == {
        "case": "b1.nii", "subject": "B", "structure": "left kidney", "values": "3", "dice": "0.0000", "hd95": "",
        "surface_dice": "0.0000", "label_ml": "5.0000", "pred_ml": "0.0000", "outcome": "missed",
    }  # fmt: skip
    assert cases[0]["values"] == "1 2"
    assert [row["subject"] for row in subjects] == ["A", "B", "C"]
    assert [row["structure"] for row in summary] == ["mean", "liver", "left kidney", "spleen"]
    assert [summary[2][name] for name in ("n", "dice", "missed")] == ["2", "0.4750", "1"]
    assert float(summary[0]["dice_low"]) < float(summary[0]["dice"]) < float(summary[0]["dice_high"])
    assert summary[3]["dice"] == summary[3]["dice_low"] == summary[3]["dice_std"] == ""


def test_no_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="`cases` must hold the scores of at least one case, got none"):
        summarize([])
