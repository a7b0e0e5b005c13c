"""95 % intervals: bootstrap by subject, and what stands in where it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dissect_monai.common import InputError
from dissect_monai.common import Interval as Interval

Array = NDArray[np.floating[Any]]


class Resampled(NamedTuple):
    """A statistic of all items, each counted once, and of every resample."""

    value: float
    resamples: Array  # (R,), NaN where the statistic is undefined


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
        raise InputError(f"`num_samples` must be at least 1, got {num_samples}.")
    names, item_subject = np.unique(np.asarray(subjects), return_inverse=True)
    value = float(np.asarray(statistic(np.ones((1, len(item_subject)))))[0])
    if np.isnan(value):
        raise InputError("`statistic` must be defined on all items, got nan. Leave out findings without both classes.")
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


def calibration_interval(
    error: Callable[[Array], Array],
    noise: Callable[[Array], Array],
    subjects: ArrayLike,
    num_samples: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % interval of a calibration error, by drawing subjects with replacement; it always holds the value.

    Chance moves the gaps of the bins, and as their absolute values are summed, it mostly adds: the value lies above the
    true error, and the resamples lie above the value, so that their percentiles are too high, bias-corrected or not.
    The upper end is that of the basic bootstrap, 2 value − q(2.5 %) of the resamples, and at least the value. The lower
    end is value − q(97.5 %) of the noise: no error moves by more, by the triangle inequality. That of the basic
    bootstrap, 2 value − q(97.5 %) of the resamples, is still too high: they show less bias than the value has.

    Args:
        error: maps weights of shape (R, N) to R values, such as `expected_calibration_error` or a mean of such.
        noise: the same of `calibration_noise`.
        subjects: subject of each of the N items.
        num_samples: number of resamples.
        seed: seed of the resamples.

    Returns:
        The error of all items and its interval, within [0, 1].

    Raises:
        ValueError: as for `bootstrap`.

    Reference:
        Davison & Hinkley, Bootstrap methods and their application, 1997, Sec. 5.2, for the basic bootstrap. The lower
        end departs from it: with it, simulated intervals of calibrated probabilities and of means over findings often
        held neither the true error nor the value.
    """
    value, errors = resample(error, subjects, num_samples, seed)
    moved = resample(noise, subjects, num_samples, seed).resamples
    low, high = value - np.nanpercentile(moved, 97.5), 2 * value - np.nanpercentile(errors, 2.5)
    return Interval(value, max(0.0, float(low)), min(1.0, max(value, float(high))))


def wilson_interval(share: ArrayLike, count: ArrayLike) -> tuple[Array, Array]:
    """Wilson's 95 % interval of a share among independent units, which has a width at 0 and 1, too.

    Where the items of a subject are alike, as they are at 0 and 1, it is the subjects that are independent, so that
    their number is to be counted and not that of the items.

    Args:
        share: observed shares in [0, 1], any shape.
        count: number of units of each share, positive; for an area under the ROC curve, of the rarer class, because its
            variance is at most area (1 − area) / count.

    Returns:
        Lower and upper ends, in [0, 1] and on their side of the share.

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927. For the area: Birnbaum
        & Klose, Bounds for the variance of the Mann–Whitney statistic, Ann. Math. Statist. 1957.

    Example:
        >>> [round(float(end), 3) for end in wilson_interval(0, 10)]
        [0.0, 0.278]
    """
    share = np.asarray(share, dtype=float)
    z2 = 1.96**2 / np.asarray(count)
    center = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return np.clip(center - half, 0, share), np.clip(center + half, share, 1)
