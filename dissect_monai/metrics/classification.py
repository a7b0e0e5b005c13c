"""AUROC, average precision and calibration of binary findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dissect_monai.common import InputError


class KnownItems(NamedTuple):
    """The K items of a finding whose label is known."""

    label: Array  # (K,), 1 or 0
    score: Array  # (K,)
    weight: Array  # (..., K)


class MacroScore(NamedTuple):
    """A mean over findings, the score of each, and the findings that have none."""

    value: float
    per_finding: dict[str, float]
    left_out: tuple[str, ...]


def auroc(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Array:
    """Area under the ROC curve: the odds that a positive scores above a negative, ties counting one half.

    Args:
        label: shape (N,), 1, 0 or NaN; items of unknown (NaN) label are ignored.
        score: shape (N,), larger for positives.
        weight: how often each item counts, shape (N,) or, for many resamples at once, (R, N); 1 by default.

    Returns:
        A scalar in [0, 1], or shape (R,). NaN where it is undefined: a class has no weight, or a score is NaN.

    Raises:
        ValueError: if the shapes disagree or a label is not 1, 0 or NaN.

    Example:
        >>> float(auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]))
        0.75
    """
    positive, negative = _weight_per_score(label, score, weight)
    below = negative.cumsum(-1) - negative / 2
    pairs = positive.sum(-1) * negative.sum(-1)
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(-1) / pairs


def average_precision(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Array:
    """Average precision: the precision at each threshold, weighted by the recall gained there.

    Arguments, result and errors are those of `auroc`.

    Example:
        >>> round(float(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])), 4)
        0.8333
    """
    positive, negative = (part[..., ::-1] for part in _weight_per_score(label, score, weight))
    found = positive.cumsum(-1)
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(found / (found + negative.cumsum(-1)))
        mean = (precision * positive).sum(-1) / positive.sum(-1)
    return np.where(negative.sum(-1) > 0, mean, np.nan)[()]


def known_items(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> KnownItems:
    """The items of known label, or none if one of them lacks its score.

    Args:
        label: shape (N,), 1, 0 or NaN (unknown).
        score: shape (N,), NaN where there is none.
        weight: shape (..., N); 1 by default.

    Raises:
        ValueError: if the shapes disagree or a label is not 1, 0 or NaN.
    """
    label, score = np.asarray(label, dtype=float), np.asarray(score, dtype=float)
    weight = np.ones(label.shape) if weight is None else np.asarray(weight, dtype=float)
    if label.ndim != 1 or score.shape != label.shape or weight.shape[-1:] != label.shape:
        raise InputError(
            "`label`, scores and `weight` must have shapes (N,), (N,) and (..., N), "
            f"got {label.shape}, {score.shape} and {weight.shape}."
        )
    known = ~np.isnan(label)
    if not np.isin(label[known], (0, 1)).all():
        raise InputError(f"`label` must hold 1, 0 or NaN, got {np.unique(label)}.")
    if np.isnan(score[known]).any():
        known = np.zeros_like(known)
    return KnownItems(label[known], score[known], weight[..., known])


def macro_auroc(label: ArrayLike, score: ArrayLike, findings: Sequence[str]) -> MacroScore:
    """Mean AUROC over the findings that have one; those without both classes or without scores are named.

    Args:
        label: shape (N, C), 1, 0 or NaN (unknown).
        score: shape (N, C); a column with NaN is left out.
        findings: C names.

    Returns:
        The mean (NaN if every finding is left out), the AUROC of each finding, and the findings left out.

    Raises:
        ValueError: if the shapes disagree or a label is not 1, 0 or NaN.
    """
    return _macro(auroc, label, score, findings)


def macro_average_precision(label: ArrayLike, score: ArrayLike, findings: Sequence[str]) -> MacroScore:
    """Mean average precision over the findings that have one; otherwise as `macro_auroc`."""
    return _macro(average_precision, label, score, findings)


def _counts(indices: Tensor, num_embeddings: int) -> Tensor:
    if indices.numel() == 0:
        raise InputError("`indices` must not be empty, got a tensor without elements.")
    counts = torch.bincount(indices.flatten(), minlength=num_embeddings)
    if len(counts) > num_embeddings:
        raise InputError(f"`indices` must be under `num_embeddings` = {num_embeddings}, got {len(counts) - 1}.")
    return counts


def _matrix(features: Tensor) -> Tensor:
    if features.ndim != 2 or features.numel() == 0:
        raise InputError(f"`features` must have shape (N, D), not empty, got {tuple(features.shape)}. Pool them first.")
    return features


def _weight_per_score(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None) -> tuple[Array, Array]:
    """Weight of the positives and of the negatives at each distinct score, ascending: (..., T) each."""
    label, score, weight = known_items(label, score, weight)
    if not len(label):
        undefined = np.zeros((*weight.shape[:-1], 1))
        return undefined, undefined
    order = np.argsort(score)
    starts = np.unique(score[order], return_index=True)[1]
    positive, negative = (weight[..., order] * share for share in (label[order], 1 - label[order]))
    return np.add.reduceat(positive, starts, axis=-1), np.add.reduceat(negative, starts, axis=-1)


def _macro(
    metric: Callable[[ArrayLike, ArrayLike], Array], label: ArrayLike, score: ArrayLike, findings: Sequence[str]
) -> MacroScore:
    label, score = np.asarray(label, dtype=float), np.asarray(score, dtype=float)
    if label.ndim != 2 or score.shape != label.shape or label.shape[1] != len(findings):
        raise InputError(
            f"`label` and `score` must have shape (N, {len(findings)}), one column a finding, "
            f"got {label.shape} and {score.shape}."
        )
    scores = {name: float(metric(*columns)) for name, *columns in zip(findings, label.T, score.T, strict=True)}
    per_finding = {name: value for name, value in scores.items() if not np.isnan(value)}
    value = float(np.mean(list(per_finding.values()))) if per_finding else float("nan")
    return MacroScore(value, per_finding, tuple(name for name in scores if name not in per_finding))


Array = NDArray[np.floating[Any]]
TEMPERATURES = (0.05, 20.0)  # `fit_temperature` stays within; separable labels would drive it to 0


class Reliability(NamedTuple):
    """Probability against frequency, in the B bins that hold an item."""

    confidence: Array  # (B,), mean probability
    frequency: Array  # (B,), share of positives
    num_items: NDArray[np.intp]  # (B,), items in the bin


def expected_calibration_error(
    label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None, num_bins: int = 15
) -> Array:
    """Expected calibration error of one finding: how far its probability is from its frequency, on average.

    With equal-width bins b of the probability p, ECE = Σ_b |g_b| with the gaps g_b = Σ_{i∈b} w_i (y_i − p_i) / Σ_i w_i.
    Chance adds to it, the more so the fewer the items, and resampling adds chance again: take `calibration_interval`.

    Args:
        label: shape (N,), 1, 0 or NaN; items of unknown (NaN) label are ignored.
        probability: shape (N,), in [0, 1].
        weight: how often each item counts, shape (N,) or, for many resamples at once, (R, N); 1 by default.
        num_bins: number of bins.

    Returns:
        A scalar in [0, 1], 0 is best, or shape (R,). NaN where nothing is known or a probability is NaN.

    Raises:
        ValueError: if the shapes disagree, a label is not 1, 0 or NaN, or a probability is outside [0, 1].

    Reference:
        Guo et al., On calibration of modern neural networks, ICML 2017, Eq. 3. Their bins are of the confidence in the
        likelier class; ours of the probability of the finding, which says more of a rare one.

    Example:
        >>> round(float(expected_calibration_error([0, 0, 0, 1], [0.1, 0.1, 0.9, 0.9])), 4)
        0.25
    """
    return np.abs(_gaps(label, probability, weight, num_bins)).sum(-1)


def calibration_noise(
    label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None, num_bins: int = 15
) -> Array:
    """How far a resample moves the gaps of `expected_calibration_error`: Σ_b |g_b(w) − g_b(1)|.

    The calibration error moves by no more than this. Arguments, shape of the result and errors are those of
    `expected_calibration_error`.

    Example:
        >>> float(calibration_noise([0, 1], [0.5, 0.5], weight=[2, 0]))
        0.5
    """
    moved = _gaps(label, probability, weight, num_bins) - _gaps(label, probability, None, num_bins)
    return np.abs(moved).sum(-1)


def reliability(label: ArrayLike, probability: ArrayLike, num_bins: int = 15) -> Reliability:
    """Points of a reliability diagram, which lie on the diagonal if the probabilities are frequencies.

    Args:
        label: shape (N,), 1, 0 or NaN; items of unknown (NaN) label are ignored.
        probability: shape (N,), in [0, 1].
        num_bins: number of equal-width bins, those of `expected_calibration_error`.

    Returns:
        Mean probability, share of positives and number of items of each bin that holds any, by rising probability.

    Raises:
        ValueError: as for `expected_calibration_error`.
    """
    label, probability, _ = known_items(label, probability)
    index = _bin(probability, num_bins)
    num_items = np.bincount(index, minlength=num_bins)
    filled = num_items > 0
    confidence, frequency = (np.bincount(index, part, num_bins)[filled] for part in (probability, label))
    num_items = num_items[filled]
    return Reliability(confidence / num_items, frequency / num_items, num_items)


def sensitivity(label: ArrayLike, score: ArrayLike, threshold: float, weight: ArrayLike | None = None) -> Array:
    """Share of the positives whose score reaches the threshold.

    Args:
        label: shape (N,), 1, 0 or NaN; items of unknown (NaN) label are ignored.
        score: shape (N,), larger for positives.
        threshold: an item is called positive if its score is equal or larger; choose it on other items.
        weight: how often each item counts, shape (N,) or, for many resamples at once, (R, N); 1 by default.

    Returns:
        A scalar in [0, 1], or shape (R,). NaN where it is undefined: no positives, or a score or the threshold is NaN.

    Raises:
        ValueError: if the shapes disagree or a label is not 1, 0 or NaN.

    Example:
        >>> float(sensitivity([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8], threshold=0.5))
        0.5
    """
    return _called_positive(1, label, score, threshold, weight)


def specificity(label: ArrayLike, score: ArrayLike, threshold: float, weight: ArrayLike | None = None) -> Array:
    """Share of the negatives whose score stays below the threshold; otherwise as `sensitivity`."""
    return 1 - _called_positive(0, label, score, threshold, weight)


def youden_threshold(label: ArrayLike, score: ArrayLike) -> float:
    """Threshold of the largest sensitivity + specificity − 1, halfway between the scores that it parts.

    Of equal optima it is the lowest, which misses fewest. If no cut is better than chance, all are called positive.

    Args:
        label: shape (N,), 1, 0 or NaN; items of unknown (NaN) label are ignored. Use validation items, not test items.
        score: shape (N,), larger for positives.

    Returns:
        The threshold, for scores that are equal or larger; NaN if a class is missing or a score is NaN.

    Raises:
        ValueError: if the shapes disagree or a label is not 1, 0 or NaN.

    Reference:
        Youden, Index for rating diagnostic tests, Cancer 1950.

    Example:
        >>> youden_threshold([0, 0, 1, 1], [0.0, 0.25, 0.75, 1.0])
        0.5
    """
    label, score, _ = known_items(label, score)
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
        T in [0.05, 20]: above 1 for an overconfident model. Labels that the sign of the logit gets all right, or worse
        than chance, have no optimum and give an end of that range.

    Raises:
        ValueError: if the shapes disagree, a label is not 1, 0 or NaN, none is known, or a logit is not finite.

    Reference:
        Guo et al., On calibration of modern neural networks, ICML 2017, Sec. 4.2; for sigmoids instead of a softmax.
    """
    logit, label = np.asarray(logit, dtype=float), np.asarray(label, dtype=float)
    if logit.shape != label.shape:
        raise InputError(f"`logit` and `label` must have the same shape, got {logit.shape} and {label.shape}.")
    label, logit, _ = known_items(label.ravel(), logit.ravel())
    if not len(label) or not np.isfinite(logit).all():
        raise InputError("`logit` must be finite where `label` is known, and some must be, got NaN, infinity or none.")
    low, high = np.log(TEMPERATURES)
    for _ in range(40):  # to 1e-11 of T
        middle = (low + high) / 2
        probability = (1 + np.tanh(logit / np.exp(middle) / 2)) / 2
        slope = ((probability - label) * logit).mean()  # of the negative log-likelihood over 1 / T
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp(middle))


def _called_positive(
    truth: int, label: ArrayLike, score: ArrayLike, threshold: float, weight: ArrayLike | None
) -> Array:
    """Share of the items of one class whose score reaches the threshold."""
    label, score, drawn = known_items(label, score, weight)
    called = np.where(np.isnan(threshold), np.nan, score >= threshold)
    of_class = drawn * (label == truth)
    return _ratio(of_class @ called, of_class.sum(-1))


def _gaps(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None, num_bins: int) -> Array:
    """Labels less probabilities of each bin, summed, as a share of all items: (..., num_bins)."""
    label, probability, weight = known_items(label, probability, weight)
    gap = np.zeros((len(label), num_bins))
    gap[np.arange(len(label)), _bin(probability, num_bins)] = label - probability
    return _ratio(weight @ gap, weight.sum(-1, keepdims=True))


def _bin(probability: Array, num_bins: int) -> NDArray[np.intp]:
    """Index of the bin (b / num_bins, (b + 1) / num_bins] of each probability; the first holds 0, too."""
    if num_bins < 1:
        raise InputError(f"`num_bins` must be at least 1, got {num_bins}.")
    if len(probability) and not 0 <= probability.min() <= probability.max() <= 1:
        raise InputError(
            f"`probability` must be in [0, 1], got {probability.min():g} to {probability.max():g}. "
            "Apply a sigmoid to logits."
        )
    return np.maximum(np.ceil(probability * num_bins).astype(np.intp) - 1, 0)


def _ratio(part: Array, whole: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return part / whole


def usable_findings(labels: Array, scores: Array) -> list[int]:
    """Columns of `labels` and `scores`, both (N, C), in which both classes are known."""
    columns = zip(labels.T, scores.T, strict=True)
    return [index for index, (label, score) in enumerate(columns) if not isnan(auroc(label, score))]


def left_out(label_names: Sequence[str], usable: Sequence[int]) -> list[str]:
    """Names of the findings whose index is not among the usable ones."""
    return [name for index, name in enumerate(label_names) if index not in usable]
