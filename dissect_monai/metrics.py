"""Codebook, collapse and classification metrics, and bootstrap intervals by subject: pure functions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.floating[Any]]


class Interval(NamedTuple):
    """A statistic and its 95 % interval."""

    value: float
    low: float
    high: float


class KnownItems(NamedTuple):
    """The K items of a finding whose label is known."""

    label: Array  # (K,), 1 or 0
    score: Array  # (K,)
    weight: Array  # (..., K)


class Resampled(NamedTuple):
    """A statistic of all items, each counted once, and of every resample."""

    value: float
    resamples: Array  # (R,), NaN where the statistic is undefined


class MacroScore(NamedTuple):
    """A mean over findings, the score of each, and the findings that have none."""

    value: float
    per_finding: dict[str, float]
    left_out: tuple[str, ...]


def perplexity(indices: Tensor, num_embeddings: int) -> Tensor:
    """Effective number of codes in use: the exponential of the usage entropy.

    Args:
        indices: code indices of any shape, integers in [0, `num_embeddings`).
        num_embeddings: size of the codebook.

    Returns:
        A scalar in [1, `num_embeddings`].

    Raises:
        ValueError: if `indices` is empty or holds a code that the codebook lacks.

    Example:
        >>> perplexity(torch.tensor([0, 1, 1, 0]), num_embeddings=8)
        tensor(2.)
    """
    usage = _counts(indices, num_embeddings) / indices.numel()
    return torch.special.entr(usage).sum().exp()


def code_usage(indices: Tensor, num_embeddings: int) -> Tensor:
    """Share of the codes that occur at all.

    Args:
        indices: code indices of any shape, integers in [0, `num_embeddings`).
        num_embeddings: size of the codebook.

    Returns:
        A scalar in (0, 1].

    Raises:
        ValueError: if `indices` is empty or holds a code that the codebook lacks.

    Example:
        >>> code_usage(torch.tensor([0, 1, 1, 0]), num_embeddings=8)
        tensor(0.2500)
    """
    return (_counts(indices, num_embeddings) > 0).float().mean()


def effective_rank(features: Tensor) -> Tensor:
    """Number of directions that the features fill: the exponential of the entropy of their singular values.

    The features are centred first, so that a collapsed set (all rows equal) has the lowest value, 1.

    Args:
        features: shape (N, D), any float dtype.

    Returns:
        A float64 scalar in [1, min(N, D)].

    Raises:
        ValueError: if `features` is not a non-empty matrix.

    Reference:
        Roy & Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007, Definition 1.
    """
    features = _matrix(features).double()
    values = torch.linalg.svdvals(features - features.mean(0))
    # Rounding leaves singular values of this size in a constant set, where they would count as directions.
    rounding = torch.finfo(torch.float64).eps * max(features.shape) * torch.linalg.matrix_norm(features)
    values = torch.where(values > rounding, values, 0)
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp()


def feature_std(features: Tensor) -> Tensor:
    """Spread of the features on the unit sphere: about 1 if they are isotropic, 0 if they have collapsed.

    Each row is L2-normalised; the standard deviations over rows are averaged over dimensions and multiplied by √D.

    Args:
        features: shape (N, D), any float dtype.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if `features` is not a non-empty matrix.

    Reference:
        Chen & He, Exploring simple Siamese representation learning, CVPR 2021, Sec. 4.1 and Fig. 2.
    """
    features = _matrix(features)
    return F.normalize(features.float(), dim=1).std(0, correction=0).mean() * features.shape[1] ** 0.5


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
        raise ValueError(
            "`label`, scores and `weight` must have shapes (N,), (N,) and (..., N), "
            f"got {label.shape}, {score.shape} and {weight.shape}."
        )
    known = ~np.isnan(label)
    if not np.isin(label[known], (0, 1)).all():
        raise ValueError(f"`label` must hold 1, 0 or NaN, got {np.unique(label)}.")
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


def bootstrap(
    statistic: Callable[[Array], ArrayLike], subjects: ArrayLike, num_samples: int = 1000, seed: int = 0
) -> Interval:
    """95 % percentile interval of a statistic, by drawing subjects, each with all of its items, with replacement.

    Resamples on which the statistic is undefined (NaN) are left out. For the AUROC of one finding, pass
    `lambda weight: auroc(label, score, weight)`; for a macro AUROC, the mean of such values over the findings.

    Args:
        statistic: maps weights of shape (R, N), how often each item was drawn, to R values.
        subjects: subject of each of the N items.
        num_samples: number of resamples.
        seed: seed of the resamples; equal seeds and subjects give equal resamples.

    Returns:
        The statistic of all items, each counted once, and the ends of its interval.

    Raises:
        ValueError: if `num_samples` is not positive or the statistic of all items is undefined.

    Example:
        >>> error = np.array([0.1, 0.3, 0.2, 0.4])
        >>> interval = bootstrap(lambda weight: weight @ error / weight.sum(1), subjects=["a", "a", "b", "c"])
        >>> round(interval.value, 3)
        0.25
    """
    return percentile_interval(resample(statistic, subjects, num_samples, seed))


def resample(
    statistic: Callable[[Array], ArrayLike], subjects: ArrayLike, num_samples: int = 1000, seed: int = 0
) -> Resampled:
    """A statistic of resamples of the subjects; arguments and errors are those of `bootstrap`."""
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    names, item_subject = np.unique(np.asarray(subjects), return_inverse=True)
    value = float(np.asarray(statistic(np.ones((1, len(item_subject)))))[0])
    if np.isnan(value):
        raise ValueError("`statistic` must be defined on all items, got nan. Leave out findings without both classes.")
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), num_samples)
    # In blocks, so that memory does not grow with the number of resamples.
    blocks = np.array_split(draws, -(-num_samples // 100))
    values = [np.asarray(statistic(block[:, item_subject].astype(float))) for block in blocks]
    return Resampled(value, np.concatenate(values))


def percentile_interval(resampled: Resampled) -> Interval:
    """A statistic with the 2.5 and 97.5 % percentiles of its resamples, less those on which it is undefined."""
    low, high = np.nanpercentile(resampled.resamples, (2.5, 97.5))
    return Interval(resampled.value, float(low), float(high))


def mean_resampled(parts: Sequence[Resampled]) -> Resampled:
    """Mean of several statistics on the same resamples, as `mean_statistic` takes it, without computing them again."""
    values = np.stack([part.resamples for part in parts])
    with np.errstate(invalid="ignore"):
        means = np.nansum(values, axis=0) / (~np.isnan(values)).sum(0)
    return Resampled(float(np.mean([part.value for part in parts])), means)


def paired_bootstrap(
    statistic: Callable[[Array], Array],
    baseline: Callable[[Array], Array],
    subjects: ArrayLike,
    num_samples: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % interval of `statistic` − `baseline`, two methods on the same items and the same resamples.

    Args:
        statistic: as for `bootstrap`, of the method.
        baseline: as for `bootstrap`, of the method it is compared with.
        subjects: subject of each item.
        num_samples: number of resamples.
        seed: seed of the resamples.

    Returns:
        The difference and its interval; one that excludes 0 is a finding.

    Raises:
        ValueError: as for `bootstrap`.
    """
    return bootstrap(lambda weight: statistic(weight) - baseline(weight), subjects, num_samples, seed)


def mean_statistic(statistics: Sequence[Callable[[Array], ArrayLike]]) -> Callable[[Array], Array]:
    """Mean of several statistics for `bootstrap`, such as one per finding.

    A resample may leave a finding without positives: it then counts for nothing in the mean of that resample.

    Args:
        statistics: each maps weights of shape (R, N) to R values, NaN where it is undefined.

    Returns:
        Such a map; NaN where all are undefined.
    """

    def mean(weight: Array) -> Array:
        values = np.stack([np.asarray(statistic(weight)) for statistic in statistics])
        with np.errstate(invalid="ignore"):
            return np.nansum(values, axis=0) / (~np.isnan(values)).sum(0)

    return mean


def _counts(indices: Tensor, num_embeddings: int) -> Tensor:
    if indices.numel() == 0:
        raise ValueError("`indices` must not be empty, got a tensor without elements.")
    counts = torch.bincount(indices.flatten(), minlength=num_embeddings)
    if len(counts) > num_embeddings:
        raise ValueError(f"`indices` must be under `num_embeddings` = {num_embeddings}, got {len(counts) - 1}.")
    return counts


def _matrix(features: Tensor) -> Tensor:
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"`features` must have shape (N, D), not empty, got {tuple(features.shape)}. Pool them first.")
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
        raise ValueError(
            f"`label` and `score` must have shape (N, {len(findings)}), one column a finding, "
            f"got {label.shape} and {score.shape}."
        )
    scores = {name: float(metric(*columns)) for name, *columns in zip(findings, label.T, score.T, strict=True)}
    per_finding = {name: value for name, value in scores.items() if not np.isnan(value)}
    value = float(np.mean(list(per_finding.values()))) if per_finding else float("nan")
    return MacroScore(value, per_finding, tuple(name for name in scores if name not in per_finding))
