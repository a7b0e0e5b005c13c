from __future__ import annotations

from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from dissect_monai.handlers.finding_table import (
    METRICS,
    finding_rows,
    left_out_rows,
    metrics_by_name,
    table_notes,
    write_findings,
)
from dissect_monai.metrics.intervals import wilson_interval
from dissect_monai.visualize.page import FindingRow

NAMES = ["Mass", "Large Hernia", "Never", "Always", "Unlabelled"]
SUBJECTS = [f"s{index // 2}" for index in range(40)]


def study() -> tuple[np.ndarray, np.ndarray]:
    """Two images of each of 20 subjects; the hernia is in both images of the last three, and always scores lowest."""
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 5)) < 0.4).astype(float)
    labels[:, 1] = np.arange(40) >= 34
    labels[:, 2], labels[:, 3], labels[:, 4] = 0, 1, np.nan
    labels[:3, 0] = np.nan
    probabilities = np.clip(0.3 + 0.2 * np.nan_to_num(labels) + 0.2 * rng.random(labels.shape), 0, 1)
    probabilities[:, 1] = np.where(labels[:, 1], 0.1, 0.2)
    return labels, probabilities


def rows(threshold: float = 0.5, **changes: np.ndarray) -> list[FindingRow]:
    labels, probabilities = study()
    thresholds = [threshold] * 5
    return finding_rows(NAMES, labels, changes.get("probabilities", probabilities), thresholds, SUBJECTS, 200)


def test_every_finding_has_a_line_with_its_counts() -> None:
    macro, *singles = rows()
    assert [row.finding for row in singles] == NAMES
    assert (macro.finding, macro.n, macro.positives) == ("macro", None, None)
    assert [(row.n, row.positives) for row in singles[1:]] == [(40, 6), (40, 0), (40, 40), (0, 0)]
    assert singles[0].n == 37


def test_findings_that_lack_a_class_have_no_metrics_and_enter_no_mean() -> None:
    found = rows()
    missing = left_out_rows(found)
    assert [row.finding for row in missing] == NAMES[2:]
    assert all(isnan(end) for row in missing for metric in METRICS for end in getattr(row, metric))
    for metric in METRICS:
        mean = np.mean([getattr(row, metric).value for row in found[1:3]])
        assert getattr(found[0], metric).value == pytest.approx(mean)


def test_a_proportion_at_0_or_1_claims_no_certainty() -> None:
    hernia = rows()[2]
    assert (hernia.sensitivity.value, hernia.specificity.value, hernia.auroc.value) == (0, 1, 0)
    # Three subjects have it and 17 do not, however many images they have.
    for interval, count in ((hernia.sensitivity, 3), (hernia.specificity, 17), (hernia.auroc, 3)):
        assert interval[1:] == pytest.approx([float(end) for end in wilson_interval(interval.value, count)])
        assert interval.high - interval.low > 0.18


def test_intervals_cover_what_is_found_by_subject_although_often_all_are_found() -> None:
    subjects = [f"s{index // 4}" for index in range(80)]
    covered = covered_by_percentiles = 0
    for seed in range(100):  # each subject is found, with all of its four images, with odds of 0.9
        scores = (np.random.default_rng(seed).random(20) < 0.9).astype(float).repeat(4)[:, None]
        labels = (np.arange(80) < 40).astype(float)[:, None]
        interval = finding_rows(["Mass"], labels, scores, [0.5], subjects, 100)[1].sensitivity
        covers = interval.low <= 0.9 <= interval.high
        covered += covers
        covered_by_percentiles += covers and interval.value < 1
    assert covered >= 90
    assert covered_by_percentiles < 80


def test_a_mean_of_certain_proportions_claims_no_certainty_either() -> None:
    macro, mass, hernia = rows(threshold=0)[:3]
    assert macro.sensitivity.value == mass.sensitivity.value == hernia.sensitivity.value == 1
    assert macro.sensitivity.high == 1
    assert macro.sensitivity.low == pytest.approx((mass.sensitivity.low + hernia.sensitivity.low) / 2)


def test_where_nothing_stands_in_there_is_no_interval() -> None:
    labels, _ = study()
    mass = rows(probabilities=np.nan_to_num(labels))[1]
    assert mass.ap.value == 1
    assert isnan(mass.ap.low)
    assert mass.auroc.value == 1
    assert mass.auroc.low < 0.9


def test_without_a_threshold_the_other_metrics_stay() -> None:
    macro, mass = rows(threshold=nan)[:2]
    for row in (macro, mass):
        assert isnan(row.sensitivity.value)
        assert isnan(row.specificity.low)
        assert row.auroc.value > 0
    assert isnan(metrics_by_name([mass])["sensitivity_Mass"])


def test_metrics_are_named_by_finding_without_blanks() -> None:
    found = rows()
    metrics = metrics_by_name(found)
    assert len(metrics) == 3 * 3 * len(METRICS)  # value, low and high of the mean and of two findings
    assert metrics["ece_Large_Hernia_high"] == found[2].ece.high
    assert metrics["auroc"] == found[0].auroc.value


def test_notes_name_what_is_left_out_with_its_counts() -> None:
    left_out, *others = table_notes(rows())
    assert left_out.endswith("Never (0 positives of 40), Always (40 positives of 40), Unlabelled (0 positives of 0).")
    assert table_notes(rows()[:3]) == others
    assert [note for note in others if "pooled" in note]


def test_the_file_leaves_blank_what_is_unknown(tmp_path: Path) -> None:
    write_findings(tmp_path / "findings.csv", rows())
    head, macro, _, hernia, never = (tmp_path / "findings.csv").read_text().splitlines()[:5]
    assert head.startswith("finding,auroc,auroc_low,auroc_high,ap,")
    assert head.endswith(",ece_low,ece_high,threshold,n,positives")
    assert macro.endswith(",,,")
    assert hernia.startswith("Large Hernia,0.0000,0.0000,0.5615,")
    assert never == "Never" + 16 * "," + "0.5,40,0"
