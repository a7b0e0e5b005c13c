from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from dissect_monai.common import Interval
from dissect_monai.metrics.classification import auroc, calibration_noise, expected_calibration_error
from dissect_monai.metrics.intervals import (
    bootstrap,
    calibration_interval,
    mean_resampled,
    percentile_interval,
    resample,
    wilson_interval,
)


def toy() -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores with many ties."""
    rng = np.random.default_rng(0)
    label = (rng.random(60) < 0.4).astype(float)
    return label, rng.integers(0, 7, 60) + 2 * label


# ---- bootstrap ---------------------------------------------------------------------------------------------------


def test_bootstrap_follows_its_seed() -> None:
    label, score = toy()
    intervals = [bootstrap(partial(auroc, label, score), np.arange(60), 200, seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert intervals[0].low < intervals[0].value < intervals[0].high
    assert intervals[0].value == auroc(label, score)


def test_bootstrap_resamples_subjects_not_items() -> None:
    values = np.random.default_rng(0).normal(size=40)
    items, subjects = values.repeat(5), np.arange(40).repeat(5)

    def width(subjects: np.ndarray) -> float:
        interval = bootstrap(lambda w: w @ items / w.sum(1), subjects)
        return interval.high - interval.low

    assert width(subjects) == pytest.approx(2 * 1.96 * values.std() / 40**0.5, rel=0.15)
    assert width(subjects) == pytest.approx(width(np.arange(200)) * 5**0.5, rel=0.15)


def test_bootstrap_interval_covers_the_truth() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        items = rng.normal(size=30).repeat(3) + 0.3 * rng.normal(size=90)
        interval = bootstrap(lambda w, items=items: w @ items / w.sum(1), np.arange(30).repeat(3), 200, seed)
        covered += interval.low < 0 < interval.high
    assert 86 <= covered <= 99


def test_undefined_resamples_are_left_out() -> None:
    assert bootstrap(partial(auroc, [0, 1, 1], [0, 1, 1]), np.arange(3), 100) == (1, 1, 1)


def test_a_mean_leaves_out_the_statistics_that_a_resample_leaves_undefined() -> None:
    label, score = toy()
    rare = np.where(np.arange(60) == 3, 1.0, 0.0)  # many resamples lack its positive
    statistics = [partial(auroc, label, score), partial(auroc, rare, score)]
    resampled = mean_resampled([resample(statistic, np.arange(60), 200) for statistic in statistics])
    assert np.isnan(resample(statistics[1], np.arange(60), 200).resamples).any()
    expected = bootstrap(lambda w: np.nanmean([each(w) for each in statistics], axis=0), np.arange(60), 200)
    assert percentile_interval(resampled) == pytest.approx(expected, rel=1e-12)


def test_bootstrap_rejects_what_is_undefined_on_all_items() -> None:
    with pytest.raises(ValueError, match="`statistic` must be defined on all items, got nan"):
        bootstrap(partial(auroc, [0, 0], [0, 1]), [0, 1])


# ---- calibration error -------------------------------------------------------------------------------------------


def drawn(seed: int, num_subjects: int, num_findings: int, shift: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and probabilities of two items a subject, the second with the label of the first half of the time.

    Every probability is too low by `shift`.
    """
    rng = np.random.default_rng(seed)
    findings = []
    for _ in range(num_findings):
        probability = rng.uniform(0.2, 0.8, num_subjects).repeat(2)
        chance = rng.random((num_subjects, 2))
        chance[:, 1] = np.where(rng.random(num_subjects) < 0.5, chance[:, 0], chance[:, 1])
        findings.append(((chance.ravel() < probability).astype(float), probability - shift))
    return findings


def both_intervals(
    findings: list[tuple[np.ndarray, np.ndarray]], subjects: np.ndarray, seed: int = 0
) -> tuple[Interval, Interval]:
    """Ours and the percentile interval of the mean error."""
    error, noise = (
        mean_resampled([resample(partial(of, *each), subjects, 100, seed) for each in findings])
        for of in (expected_calibration_error, calibration_noise)
    )
    return calibration_interval(error, noise), percentile_interval(error)


@pytest.mark.parametrize(
    ("num_subjects", "num_findings", "shift"), [(80, 1, 0), (80, 5, 0), (80, 5, 0.1), (40, 1, 0.1)]
)
def test_calibration_interval_covers_the_truth_and_holds_the_value(
    num_subjects: int, num_findings: int, shift: float
) -> None:
    subjects = np.arange(num_subjects).repeat(2)
    pairs = [both_intervals(drawn(seed, num_subjects, num_findings, shift), subjects, seed) for seed in range(100)]
    covers = np.array([[each.low <= shift <= each.high for each in pair] for pair in pairs]).sum(0)
    assert covers[0] >= 90
    assert covers[1] <= 70  # why percentiles do not do
    assert all(0 <= ours.low <= ours.value <= ours.high <= 1 for ours, _ in pairs)
    assert all(ours.value == percentile.value for ours, percentile in pairs)


def test_calibration_interval_shows_a_large_error() -> None:
    lows = [both_intervals(drawn(seed, 200, 1, 0.2), np.arange(200).repeat(2), seed)[0].low for seed in range(50)]
    assert np.mean(np.array(lows) > 0.05) > 0.9


# ---- Wilson ------------------------------------------------------------------------------------------------------


def test_wilson_interval_agrees_with_published_values() -> None:
    # Newcombe, Statistics in Medicine 1998, Table I, method 3.
    low, high = wilson_interval([81 / 263, 15 / 148, 0, 1 / 29], [263, 148, 20, 29])
    np.testing.assert_allclose(low, [0.2553, 0.0624, 0, 0.0061], atol=1e-4)
    np.testing.assert_allclose(high, [0.3662, 0.1605, 0.1611, 0.1718], atol=1e-4)


def test_wilson_interval_is_the_same_from_both_sides_and_ends_at_its_side() -> None:
    share = np.linspace(0, 1, 11)
    low, high = wilson_interval(share, 7)
    np.testing.assert_allclose(low, 1 - high[::-1], atol=1e-12)
    assert low[0] == 0
    assert high[-1] == 1
    assert ((low <= share) & (share <= high)).all()
