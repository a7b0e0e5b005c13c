from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from dissect_monai.metrics.classification import calibration_noise, expected_calibration_error
from dissect_monai.metrics.intervals import Interval, bootstrap, calibration_interval, wilson_interval


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


def intervals(num_subjects: int, num_findings: int, shift: float) -> list[tuple[Interval, Interval]]:
    """Ours and the percentile interval of the mean error, of a hundred studies; the true error is `shift`."""
    subjects, pairs = np.arange(num_subjects).repeat(2), []
    for seed in range(100):
        findings = drawn(seed, num_subjects, num_findings, shift)
        error, noise = (
            lambda weight, of=of, findings=findings: np.mean([of(*each, weight) for each in findings], axis=0)
            for of in (expected_calibration_error, calibration_noise)
        )
        pairs.append((calibration_interval(error, noise, subjects, 100, seed), bootstrap(error, subjects, 100, seed)))
    return pairs


@pytest.mark.parametrize(
    ("num_subjects", "num_findings", "shift"), [(80, 1, 0), (80, 5, 0), (80, 5, 0.1), (40, 1, 0.1)]
)
def test_calibration_interval_covers_the_truth_and_holds_the_value(
    num_subjects: int, num_findings: int, shift: float
) -> None:
    pairs = intervals(num_subjects, num_findings, shift)
    covers = np.array([[each.low <= shift <= each.high for each in pair] for pair in pairs]).sum(0)
    assert covers[0] >= 90
    assert covers[1] <= 70  # what it is there for
    assert all(0 <= ours.low <= ours.value <= ours.high <= 1 for ours, _ in pairs)
    assert all(ours.value == percentile.value for ours, percentile in pairs)


def test_calibration_interval_shows_a_large_error() -> None:
    lows = [ours.low for ours, _ in intervals(num_subjects=200, num_findings=1, shift=0.2)]
    assert np.mean(np.array(lows) > 0.05) > 0.9


def test_calibration_interval_draws_subjects_not_items() -> None:
    ((label, probability),) = drawn(0, 100, 1, 0.2)
    label, probability = label.repeat(4), probability.repeat(4)
    statistics = [partial(of, label, probability) for of in (expected_calibration_error, calibration_noise)]
    items, subjects = (calibration_interval(*statistics, of, 200) for of in (np.arange(800), np.arange(200).repeat(4)))
    assert subjects.low > 0
    assert subjects.value - subjects.low > 1.5 * (items.value - items.low)


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
