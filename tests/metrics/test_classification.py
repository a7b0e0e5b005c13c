from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score, roc_curve

from dissect_monai.metrics.classification import (
    auroc,
    average_precision,
    both_classes,
    calibration_noise,
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


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def known_temperature(temperature: float, shape: tuple[int, ...] = (20000, 2)) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large, and labels drawn from the right ones."""
    rng = np.random.default_rng(0)
    logit = rng.normal(-1, 2, shape)
    return logit * temperature, (rng.random(shape) < sigmoid(logit)).astype(float)


# ---- all metrics -------------------------------------------------------------------------------------------------


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


# ---- ranking -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "sklearns"), [(auroc, roc_auc_score), (average_precision, average_precision_score)], ids=["auroc", "ap"]
)
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_ranking_agrees_with_sklearn_with_and_without_weights(ours: Callable, sklearns: Callable, levels: int) -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(60) < 0.4).astype(float)
    score = rng.integers(0, levels, 60) + 2 * label
    assert ours(label, score) == pytest.approx(sklearns(label, score))
    weight = rng.integers(0, 4, (5, 60))
    assert ours(label, score, weight) == pytest.approx([sklearns(label, score, sample_weight=row) for row in weight])


@pytest.mark.parametrize("metric", [auroc, average_precision])
@pytest.mark.parametrize("label", [[0, 0, 0], [1, 1, 1]])
def test_a_single_class_has_no_score(metric: Callable, label: list[float]) -> None:
    assert np.isnan(metric(label, [0.1, 0.2, 0.3]))
    assert np.isnan(metric(label, [0.1, 0.2, 0.3], np.ones((4, 3)))).all()


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


def test_both_classes_must_be_in_every_matrix() -> None:
    one, two = np.array([[0, 1, 0], [1, 1, np.nan], [1, 0, 1]]), np.array([[0.0, 1, 0], [0, 0, 1]])
    assert both_classes(one).tolist() == [True] * 3
    assert both_classes(one, two).tolist() == [False, True, True]


# ---- calibration -------------------------------------------------------------------------------------------------


def test_probabilities_that_are_frequencies_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(200_000)
    label = rng.random(200_000) < probability
    assert expected_calibration_error(label, probability) < 0.01
    assert expected_calibration_error(label, probability**2) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)
    assert expected_calibration_error([0, 1], [1, 0]) == 1
    assert expected_calibration_error([0, 1], [0, 1]) == 0


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


def test_the_noise_of_a_resample_bounds_what_its_error_gains() -> None:
    rng = np.random.default_rng(0)
    label, probability = np.where(rng.random(40) < 0.1, np.nan, rng.random(40) < 0.3), rng.random(40)
    weight = rng.multinomial(40, np.full(40, 1 / 40), 50).astype(float)
    noise = calibration_noise(label, probability, weight)
    gained = expected_calibration_error(label, probability, weight) - expected_calibration_error(label, probability)
    assert noise.shape == (50,)
    assert (np.abs(gained) <= noise + 1e-12).all()
    assert calibration_noise(label, probability) == 0


def test_calibration_error_is_the_gap_of_sklearns_curve() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(300) ** 3
    label = (rng.random(300) < probability).astype(float)
    frequency, confidence = calibration_curve(label, probability, n_bins=10)
    num_items = np.histogram(probability, 10, (0, 1))[0]
    expected = num_items[num_items > 0] @ np.abs(frequency - confidence) / 300
    assert expected_calibration_error(label, probability, num_bins=10) == pytest.approx(expected)


# ---- operating points --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-1, 0, 0.3, 0.5, 1, 2])
def test_operating_point_agrees_with_sklearn(threshold: float) -> None:
    label, score = toy()
    called = score >= threshold
    assert sensitivity(label, score, threshold) == pytest.approx(recall_score(label, called))
    assert specificity(label, score, threshold) == pytest.approx(recall_score(label, called, pos_label=0))


def test_operating_points_need_their_class_and_a_threshold() -> None:
    assert np.isnan(sensitivity([0, 0], [0, 1], 0.5))
    assert np.isnan(specificity([1, 1], [0, 1], 0.5))
    assert np.isnan(sensitivity([0, 1], [0, 1], float("nan")))
    assert np.isnan(specificity([0, 1], [0, 1], float("nan")))


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


# ---- temperature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_known_temperature_is_found_and_leaves_nothing_to_find(temperature: float) -> None:
    logit, label = known_temperature(temperature)
    found = fit_temperature(logit, label)
    assert found == pytest.approx(temperature, rel=0.03)
    assert fit_temperature(logit / found, label) == pytest.approx(1)


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


def test_temperature_without_an_optimum_is_an_end_of_its_range() -> None:
    assert fit_temperature([[-1, 1000]], [[0, 1]]) == pytest.approx(0.05)
    assert fit_temperature([[-1, 1000]], [[1, 0]]) == pytest.approx(20)


@pytest.mark.parametrize(
    ("logit", "label"), [([[0.5, np.nan]], [[1, 0]]), ([[0.5, np.inf]], [[1, 0]]), ([[0.5]], [[np.nan]])]
)
def test_rejects_a_temperature_of_nothing(logit: list[list[float]], label: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="`logit` must be finite where `label` is known"):
        fit_temperature(logit, label)
