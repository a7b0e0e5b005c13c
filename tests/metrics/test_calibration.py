from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import recall_score, roc_curve

from dissect_monai.metrics.classification import (
    calibration_noise,
    expected_calibration_error,
    fit_temperature,
    reliability,
    sensitivity,
    specificity,
    youden_threshold,
)
from dissect_monai.metrics.intervals import bootstrap

METRICS = {
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


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def known_temperature(temperature: float, shape: tuple[int, ...] = (20000, 2)) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large, and labels drawn from the right ones."""
    rng = np.random.default_rng(0)
    logit = rng.normal(-1, 2, shape)
    return logit * temperature, (rng.random(shape) < sigmoid(logit)).astype(float)


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
def test_bootstrap_takes_every_metric(metric: Callable) -> None:
    label, score = toy()
    interval = bootstrap(lambda weight: metric(label, score, weight), np.arange(len(label)), 200)
    assert interval.value == pytest.approx(metric(label, score))
    assert interval.low < interval.high


def test_probabilities_that_are_frequencies_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(200_000)
    label = rng.random(200_000) < probability
    assert expected_calibration_error(label, probability) < 0.01
    assert expected_calibration_error(label, probability**2) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)


def test_certain_and_wrong_is_the_largest_error() -> None:
    assert expected_calibration_error([0, 1], [1, 0]) == 1
    assert expected_calibration_error([0, 1], [0, 1]) == 0


def test_the_noise_of_a_resample_bounds_what_its_error_gains() -> None:
    rng = np.random.default_rng(0)
    label, probability = np.where(rng.random(40) < 0.1, np.nan, rng.random(40) < 0.3), rng.random(40)
    weight = rng.multinomial(40, np.full(40, 1 / 40), 50).astype(float)
    noise = calibration_noise(label, probability, weight)
    gained = expected_calibration_error(label, probability, weight) - expected_calibration_error(label, probability)
    assert noise.shape == (50,)
    assert (np.abs(gained) <= noise + 1e-12).all()
    assert calibration_noise(label, probability) == 0


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


def test_reliability_agrees_with_sklearn_and_with_the_calibration_error() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(300) ** 3
    label = (rng.random(300) < probability).astype(float)
    bins = reliability(label, probability, 10)
    frequency, confidence = calibration_curve(label, probability, n_bins=10)
    np.testing.assert_allclose(bins.frequency, frequency)
    np.testing.assert_allclose(bins.confidence, confidence)
    error = bins.num_items @ np.abs(bins.frequency - bins.confidence) / bins.num_items.sum()
    assert error == pytest.approx(expected_calibration_error(label, probability, num_bins=10))


def test_reliability_has_no_empty_bins() -> None:
    bins = reliability([0, 1, 1, np.nan], [0, 0.95, 1, 0.5], 10)
    np.testing.assert_allclose(bins, [[0, 0.975], [0, 1], [1, 2]])
    assert bins.num_items.dtype == int
    assert len(reliability([np.nan], [0.5]).num_items) == 0


@pytest.mark.parametrize("threshold", [-1, 0, 0.3, 0.5, 1, 2])
def test_operating_point_agrees_with_sklearn(threshold: float) -> None:
    label, score = toy()
    called = score >= threshold
    assert sensitivity(label, score, threshold) == pytest.approx(recall_score(label, called))
    assert specificity(label, score, threshold) == pytest.approx(recall_score(label, called, pos_label=0))


@pytest.mark.parametrize("seed", range(10))
def test_youden_threshold_is_as_good_as_the_best_point_of_the_curve(seed: int) -> None:
    label, score = toy(40, seed)
    threshold = youden_threshold(label, score)
    false_positive_rate, true_positive_rate, _ = roc_curve(label, score)
    index = sensitivity(label, score, threshold) + specificity(label, score, threshold) - 1
    assert index == pytest.approx((true_positive_rate - false_positive_rate).max())
    assert np.abs(score - threshold).min() == pytest.approx(np.diff(np.unique(score)).min() / 2, rel=1.1)


def test_youden_threshold_lies_halfway_and_prefers_to_miss_none() -> None:
    assert youden_threshold([0, 0, 1, 1], [1, 2, 4, 9]) == 3
    assert youden_threshold([0, 1, 0, 1], [1, 2, 3, 4]) == 1.5
    assert youden_threshold([0, 1, np.nan], [1, 2, 1.6]) == 1.5


@pytest.mark.parametrize(("label", "score"), [([1, 1, 0], [1, 2, 3]), ([0, 1, 1], [2, 2, 2])])
def test_a_useless_score_calls_all_positive(label: list[float], score: list[float]) -> None:
    threshold = youden_threshold(label, score)
    assert sensitivity(label, score, threshold) == 1
    assert specificity(label, score, threshold) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_known_temperature_is_found(temperature: float) -> None:
    assert fit_temperature(*known_temperature(temperature)) == pytest.approx(temperature, rel=0.03)


def test_temperature_agrees_with_brute_force_and_scipy() -> None:
    logit, label = known_temperature(2.5, (60, 3))
    label[::5, 1] = np.nan
    known = ~np.isnan(label)

    def likelihood(temperature: float) -> float:
        probability = sigmoid(logit[known] / temperature)
        return -np.log(np.where(label[known] == 1, probability, 1 - probability) + 1e-300).mean()

    grid = np.geomspace(0.05, 20, 2001)
    temperature = fit_temperature(logit, label)
    assert temperature == pytest.approx(grid[np.argmin([likelihood(each) for each in grid])], rel=0.005)
    assert temperature == pytest.approx(minimize_scalar(likelihood, bounds=(0.05, 20), method="bounded").x, rel=1e-4)


def test_temperature_one_leaves_what_is_calibrated() -> None:
    logit, label = known_temperature(2)
    assert fit_temperature(logit / fit_temperature(logit, label), label) == pytest.approx(1)


def test_temperature_repairs_the_calibration_error() -> None:
    logit, label = known_temperature(4, (20000,))
    repaired = sigmoid(logit / fit_temperature(logit, label))
    assert expected_calibration_error(label, repaired) < 0.02 < expected_calibration_error(label, sigmoid(logit))


def test_temperature_without_an_optimum_is_an_end_of_its_range() -> None:
    assert fit_temperature([[-1, 1000]], [[0, 1]]) == pytest.approx(0.05)
    assert fit_temperature([[-1, 1000]], [[1, 0]]) == pytest.approx(20)


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


def test_operating_points_need_their_class_and_a_threshold() -> None:
    assert np.isnan(sensitivity([0, 0], [0, 1], 0.5))
    assert np.isnan(specificity([1, 1], [0, 1], 0.5))
    assert np.isnan(sensitivity([0, 1], [0, 1], float("nan")))
    assert np.isnan(specificity([0, 1], [0, 1], float("nan")))


@pytest.mark.parametrize("label", [[0, 0], [1, np.nan], [np.nan, np.nan]])
def test_youden_threshold_needs_both_classes(label: list[float]) -> None:
    assert np.isnan(youden_threshold(label, [0, 1]))


def test_rejects_disagreeing_shapes() -> None:
    with pytest.raises(ValueError, match=r"must have shapes \(N,\), \(N,\) and \(..., N\), got \(2,\), \(3,\)"):
        expected_calibration_error([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match=r"got \(2,\), \(2,\) and \(1, 3\)"):
        sensitivity([0, 1], [0, 1], 0.5, np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"must have the same shape, got \(2, 3\) and \(6,\)"):
        fit_temperature(np.zeros((2, 3)), np.zeros(6))


def test_rejects_labels_that_are_no_labels() -> None:
    with pytest.raises(ValueError, match=r"`label` must hold 1, 0 or NaN, got \[-1\.  1\.\]"):
        youden_threshold([1, -1], [0, 1])


def test_rejects_probabilities_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"`probability` must be in \[0, 1\], got -3 to 0.5. Apply a sigmoid"):
        expected_calibration_error([0, 1], [0.5, -3])
    with pytest.raises(ValueError, match="`num_bins` must be at least 1, got 0"):
        reliability([0, 1], [0, 1], 0)


@pytest.mark.parametrize("logit", [np.nan, np.inf])
def test_rejects_a_temperature_of_nothing(logit: float) -> None:
    with pytest.raises(ValueError, match="`logit` must be finite where `label` is known"):
        fit_temperature([[0.5, logit]], [[1, 0]])
    with pytest.raises(ValueError, match="`logit` must be finite where `label` is known"):
        fit_temperature([[0.5]], [[np.nan]])
