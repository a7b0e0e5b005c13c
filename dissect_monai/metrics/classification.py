"""AUROC, average precision, calibration and operating points of binary findings."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dissect_monai.common import Array, InputError

TEMPERATURES = (0.05, 20.0)  # `fit_temperature` stays within; separable labels would drive it to 0


def auroc(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Array:
    """Area under the ROC curve: the odds that a positive scores above a negative, ties counting one half.

    Args:
        label: shape (N,), 1, 0 or NaN; items of unknown (NaN) label are ignored.
        score: shape (N,), larger for positives.
        weight: how often each item counts, shape (N,) or, for many resamples at once, (R, N); 1 by default.

    Returns:
        A scalar in [0, 1], or shape (R,). NaN where it is undefined: a class has no weight, or a score is NaN.

    Example:
        >>> float(auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]))
        0.75
    """
    positive, negative = _weight_per_score(label, score, weight)
    below = negative.cumsum(-1) - negative / 2
    return _ratio((positive * below).sum(-1), positive.sum(-1) * negative.sum(-1))


def average_precision(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Array:
    """Average precision: the precision at each threshold, weighted by the recall gained there; otherwise as `auroc`."""
    positive, negative = (part[..., ::-1] for part in _weight_per_score(label, score, weight))
    found = positive.cumsum(-1)
    precision = np.nan_to_num(_ratio(found, found + negative.cumsum(-1)))
    mean = _ratio((precision * positive).sum(-1), positive.sum(-1))
    return np.where(negative.sum(-1) > 0, mean, np.nan)[()]


def both_classes(*labels: Array) -> NDArray[np.bool_]:
    """Which columns have a 1 and a 0 in every one of several matrices of labels (N, C)."""
    return np.all([(each == value).any(0) for each in labels for value in (0, 1)], axis=0)


def usable_findings(labels: Array, scores: Array) -> list[int]:
    """Columns of labels and scores, (N, C) each, with both classes and a score of every item of known label."""
    missing = (np.isnan(scores) & ~np.isnan(labels)).any(0)
    return np.flatnonzero(both_classes(labels) & ~missing).tolist()


def macro_auroc(labels: Array, scores: Array) -> float:
    """Mean AUROC over the `usable_findings` of labels and scores, (N, C) each; NaN if there are none."""
    values = [float(auroc(labels[:, index], scores[:, index])) for index in usable_findings(labels, scores)]
    return float(np.mean(values)) if values else float("nan")


def expected_calibration_error(
    label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None, num_bins: int = 15
) -> Array:
    """Expected calibration error of one finding: how far its probability is from its frequency, on average.

    With equal-width bins b of the probability p, ECE = Σ_b |Σ_{i∈b} w_i (y_i − p_i)| / Σ_i w_i.
    Chance adds to it, the more so the fewer the items, and resampling adds chance again: a bootstrap interval lies too
    high.

    Label, weight and result, which is in [0, 1], are those of `auroc`; a probability must be in [0, 1].

    Reference:
        Guo et al., On calibration of modern neural networks, ICML 2017, Eq. 3. Their bins are of the confidence in the
        likelier class; ours of the probability of the finding, which says more of a rare one.
    """
    label, probability, weight = _known(label, probability, weight)
    gap = np.zeros((len(label), num_bins))
    gap[np.arange(len(label)), _bin(probability, num_bins)] = label - probability
    return np.abs(_ratio(weight @ gap, weight.sum(-1, keepdims=True))).sum(-1)


def sensitivity(label: ArrayLike, score: ArrayLike, threshold: float, weight: ArrayLike | None = None) -> Array:
    """Share of the positives whose score reaches the threshold, which is to be chosen on other items.

    Label, score, weight and result are those of `auroc`; a threshold of NaN has no result.
    """
    label, score, weight = _known(label, score, weight)
    positive = weight * (label == 1)
    return _ratio(positive @ np.where(np.isnan(threshold), np.nan, score >= threshold), positive.sum(-1))


def specificity(label: ArrayLike, score: ArrayLike, threshold: float, weight: ArrayLike | None = None) -> Array:
    """Share of the negatives whose score stays below the threshold; otherwise as `sensitivity`."""
    return 1 - sensitivity(1 - np.asarray(label, dtype=float), score, threshold, weight)


def youden_threshold(label: ArrayLike, score: ArrayLike) -> float:
    """Threshold of the largest sensitivity + specificity − 1, halfway between the scores that it parts.

    Of equal optima it is the lowest, which misses fewest. If no cut is better than chance, all are called positive.
    Label and score are those of `auroc`, of validation items. It is NaN if a class is missing or a score is NaN.

    Reference:
        Youden, Index for rating diagnostic tests, Cancer 1950.
    """
    label, score, _ = _known(label, score)
    positives, negatives = label.sum(), (1 - label).sum()
    if not positives or not negatives:
        return float("nan")
    levels, level = np.unique(score, return_inverse=True)
    missed, rejected = (np.bincount(level, part).cumsum()[:-1] for part in (label, 1 - label))
    # Youden's index × positives × negatives is a whole number, so that ties are ties.
    gain = np.append(0, rejected * positives - missed * negatives)
    cuts = np.append(levels[0], (levels[:-1] + levels[1:]) / 2)
    return float(cuts[gain.argmax()])


def fit_temperature(logit: ArrayLike, label: ArrayLike) -> float:
    """One temperature T for all findings, such that sigmoid(logit / T) has the least negative log-likelihood.

    The likelihood is convex in 1 / T, so its slope is followed by bisection of log T. No ranking changes by it.

    Args:
        logit: any shape, such as (N, C), of validation items.
        label: the same shape, 1, 0 or NaN; unknown (NaN) labels are ignored.

    Returns:
        T in [0.05, 20], above 1 for an overconfident model; an end of that range where there is no optimum.

    Reference:
        Guo et al., On calibration of modern neural networks, ICML 2017, Sec. 4.2; for sigmoids instead of a softmax.
    """
    label, logit, _ = _known(np.ravel(label), np.ravel(logit))
    if not len(label) or not np.isfinite(logit).all():
        raise InputError("`logit` must be finite where `label` is known, and some must be, got NaN, infinity or none.")
    low, high = np.log(TEMPERATURES)
    for _ in range(40):  # to 1e-11 of T
        middle = (low + high) / 2
        probability = (1 + np.tanh(logit / np.exp(middle) / 2)) / 2
        slope = ((probability - label) * logit).mean()  # of the negative log-likelihood over 1 / T
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp(middle))


def _known(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> tuple[Array, Array, Array]:
    """Label, score and weight of the K items of known label, (K,), (K,), (..., K); none if one of them has no score."""
    label, score = np.asarray(label, dtype=float), np.asarray(score, dtype=float)
    weight = np.ones(label.shape) if weight is None else np.asarray(weight, dtype=float)
    known = ~np.isnan(label)
    if np.isnan(score[known]).any():
        known = np.zeros_like(known)
    return label[known], score[known], weight[..., known]


def _weight_per_score(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None) -> tuple[Array, Array]:
    """Weight of the positives and of the negatives at each distinct score, ascending: (..., T) each."""
    label, score, weight = _known(label, score, weight)
    if not len(label):
        undefined = np.zeros((*weight.shape[:-1], 1))
        return undefined, undefined
    order = np.argsort(score)
    starts = np.unique(score[order], return_index=True)[1]
    positive, negative = (weight[..., order] * share for share in (label[order], 1 - label[order]))
    return np.add.reduceat(positive, starts, axis=-1), np.add.reduceat(negative, starts, axis=-1)


def _bin(probability: Array, num_bins: int) -> NDArray[np.intp]:
    """Index of the bin (b / num_bins, (b + 1) / num_bins] of each probability; the first holds 0, too."""
    return np.maximum(np.ceil(probability * num_bins).astype(np.intp) - 1, 0)


def _ratio(part: Array, whole: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return part / whole
