from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score, roc_curve

from dissect_monai.metrics.classification import (
    auroc,
    average_precision,
    both_classes,
    expected_calibration_error,
    fit_temperature,
    macro_auroc,
    sensitivity,
    specificity,
    usable_findings,
    youden_threshold,
)

METRICS: dict[str, Callable[..., Any]] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "ece": expected_calibration_error,
    "sensitivity": lambda label, score, weight=None: sensitivity(label, score, 0.5, weight),
    "specificity": lambda label, score, weight=None: specificity(label, score, 0.5, weight),
}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def toy(num_items: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities with ties, of which some are 0 and 1 and many lie on the edge of a bin."""
    rng = np.random.default_rng(seed)
    probability = rng.integers(0, 31, num_items) / 30
    return (rng.random(num_items) < probability**2).astype(float), probability


@every_metric
def test_one_value_a_resample_that_agrees_with_repeated_items(metric: Callable) -> None:
    label, score = toy()
    weight = np.random.default_rng(1).integers(0, 4, (5, len(label)))
    values = metric(label, score, weight)
    assert values.shape == (5,)
    for row, value in zip(weight, values, strict=True):
        assert 0 <= value <= 1
        assert value == pytest.approx(metric(label.repeat(row), score.repeat(row)))
        assert value == pytest.approx(metric(label, score, row))


@every_metric
def test_unknown_labels_are_ignored(metric: Callable) -> None:
    label, score = toy()
    known = np.arange(len(label)) % 3 > 0
    expected = metric(label[known], score[known])
    label[~known], score[0] = np.nan, np.nan  # a missing score of an unknown item does no harm
    assert metric(label, score) == pytest.approx(expected)


@every_metric
def test_undefined_is_nan_without_a_warning(metric: Callable) -> None:
    assert np.isnan(metric([np.nan, np.nan], [0.1, 0.2]))
    assert np.isnan(metric([0, 1], [0.1, np.nan]))
    np.testing.assert_array_equal(np.isnan(metric([0, 1], [0, 1], [[1, 1], [0, 0]])), [False, True])


@pytest.mark.parametrize(
    ("ours", "sklearns"), [(auroc, roc_auc_score), (average_precision, average_precision_score)], ids=["auroc", "ap"]
)
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_ranking_agrees_with_sklearn_and_needs_both_classes(ours: Callable, sklearns: Callable, levels: int) -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(60) < 0.4).astype(float)
    score = rng.integers(0, levels, 60) + 2 * label
    assert ours(label, score) == pytest.approx(sklearns(label, score))
    weight = rng.integers(0, 4, (5, 60))
    assert ours(label, score, weight) == pytest.approx([sklearns(label, score, sample_weight=row) for row in weight])
    for single_class in (np.zeros(60), np.ones(60)):
        assert np.isnan(ours(single_class, score, weight)).all()


def test_findings_without_both_classes_or_a_score_take_no_part_in_the_mean() -> None:
    rng = np.random.default_rng(0)
    label, score = (rng.random((40, 5)) < 0.5).astype(float), rng.random((40, 5))
    label[:, 1], label[:, 4] = 0, np.nan
    label[0, 0], score[0, 0] = np.nan, np.nan
    score[1, 2] = np.nan
    assert usable_findings(label, score) == [0, 3]
    assert usable_findings(label, score) == [i for i in range(5) if not np.isnan(auroc(label[:, i], score[:, i]))]
    assert macro_auroc(label, score) == pytest.approx(np.mean([auroc(label[:, i], score[:, i]) for i in (0, 3)]))
    assert np.isnan(macro_auroc(np.zeros((5, 2)), np.zeros((5, 2))))
    assert both_classes(label, label[:1]).tolist() == [False] * 5


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_agrees_with_its_definition(num_bins: int) -> None:
    label, probability = toy()
    total = 0.0
    for index in range(num_bins):
        inside = (probability * num_bins > index) & (probability * num_bins <= index + 1)
        inside |= (index == 0) & (probability == 0)
        if inside.any():
            total += inside.sum() * abs(label[inside].mean() - probability[inside].mean())
    assert expected_calibration_error(label, probability, num_bins=num_bins) == pytest.approx(total / len(label))


def test_calibration_error_is_the_gap_of_sklearns_curve() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(300) ** 3
    label = (rng.random(300) < probability).astype(float)
    frequency, confidence = calibration_curve(label, probability, n_bins=10)
    num_items = np.histogram(probability, 10, (0, 1))[0]
    expected = num_items[num_items > 0] @ np.abs(frequency - confidence) / 300
    assert expected_calibration_error(label, probability, num_bins=10) == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "truth"), [(sensitivity, 1), (specificity, 0)])
def test_operating_point_agrees_with_sklearn_and_needs_its_class_and_a_threshold(metric: Callable, truth: int) -> None:
    label, score = toy()
    for threshold in (-1, 0, 0.3, 0.5, 1, 2):
        expected = recall_score(label, score >= threshold, pos_label=truth)
        assert metric(label, score, threshold) == pytest.approx(expected)
    assert np.isnan(metric([1 - truth] * 2, [0, 1], 0.5))
    assert np.isnan(metric([0, 1], [0, 1], np.nan))


@pytest.mark.parametrize("seed", range(10))
def test_youden_threshold_is_as_good_as_the_best_point_of_the_curve(seed: int) -> None:
    label, score = toy(40, seed)
    threshold = youden_threshold(label, score)
    false_positive_rate, true_positive_rate, _ = roc_curve(label, score)
    index = sensitivity(label, score, threshold) + specificity(label, score, threshold) - 1
    assert index == pytest.approx((true_positive_rate - false_positive_rate).max())
    assert np.abs(score - threshold).min() == pytest.approx(np.diff(np.unique(score)).min() / 2, rel=1.1)


@pytest.mark.parametrize(
    ("label", "score", "threshold"),
    [
        ([0, 0, 1, 1], [1, 2, 4, 9], 3),  # halfway
        ([0, 1, 0, 1], [1, 2, 3, 4], 1.5),  # misses none
        ([0, 1, np.nan], [1, 2, 1.6], 1.5),
        ([1, 1, 0], [1, 2, 3], 1),  # a useless score calls all positive
        ([0, 1, 1], [2, 2, 2], 2),
        ([1, np.nan], [0, 1], np.nan),  # needs both classes
        ([np.nan, np.nan], [0, 1], np.nan),
    ],
)
def test_youden_threshold_of_few_items(label: list[float], score: list[float], threshold: float) -> None:
    np.testing.assert_equal(youden_threshold(label, score), threshold)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_known_temperature_is_found_and_agrees_with_scipy(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(-1, 2, (20000, 2))
    label = np.where(rng.random(logit.shape) < 0.1, np.nan, rng.random(logit.shape) < expit(logit))
    logit *= temperature
    known = ~np.isnan(label)

    def likelihood(temperature: float) -> float:
        return -log_expit(np.where(label[known] == 1, 1, -1) * logit[known] / temperature).mean()

    found = fit_temperature(logit, label)
    assert found == pytest.approx(temperature, rel=0.03)
    assert found == pytest.approx(minimize_scalar(likelihood, bounds=(0.05, 20), method="bounded").x, rel=1e-4)


def test_temperature_without_an_optimum_is_an_end_of_its_range() -> None:
    assert fit_temperature([[-1, 1000]], [[0, 1]]) == pytest.approx(0.05)
    assert fit_temperature([[-1, 1000]], [[1, 0]]) == pytest.approx(20)


@pytest.mark.parametrize(
    ("logit", "label"), [([[0.5, np.nan]], [[1, 0]]), ([[0.5, np.inf]], [[1, 0]]), ([[0.5]], [[np.nan]])]
)
def test_rejects_a_temperature_of_nothing(logit: list[list[float]], label: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="`logit` must be finite where `label` is known"):
        fit_temperature(logit, label)
