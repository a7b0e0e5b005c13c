"""95 % intervals: bootstrap by subject, and what stands in where it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dissect_monai.common import Array, InputError, Interval


class Resampled(NamedTuple):
    """A statistic of all items, each counted once, and of every resample."""

    value: float
    resamples: Array  # (R,), NaN where the statistic is undefined


def bootstrap(
    statistic: Callable[[Array], ArrayLike], subjects: ArrayLike, num_samples: int = 1000, seed: int = 0
) -> Interval:
    """95 % percentile interval of a statistic, by drawing subjects, each with all of its items, with replacement.

    Resamples on which the statistic is undefined (NaN) are left out. For the AUROC of one finding, pass
    `partial(auroc, label, score)`; for the mean over findings, see `mean_resampled`.

    Args:
        statistic: maps weights of shape (R, N), how often each item was drawn, to R values.
        subjects: subject of each of the N items.
        num_samples: number of resamples.
        seed: seed of the resamples; equal seeds and subjects give equal resamples.

    Raises:
        ValueError: if the statistic of all items is undefined.

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
    names, item_subject = np.unique(np.asarray(subjects), return_inverse=True)
    value = float(np.asarray(statistic(np.ones((1, len(item_subject)))))[0])
    if np.isnan(value):
        raise InputError("`statistic` must be defined on all items, got nan. Leave out findings without both classes.")
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), num_samples)
    # In blocks, so that memory does not grow with the number of resamples.
    blocks = np.array_split(draws, -(-num_samples // 100))
    values = [np.asarray(statistic(block[:, item_subject].astype(float))) for block in blocks]
    return Resampled(value, np.concatenate(values))


def mean_resampled(parts: Sequence[Resampled]) -> Resampled:
    """Mean of several statistics on the same resamples, such as one per finding.

    A resample may leave a finding without positives: it then counts for nothing in the mean of that resample.
    """
    values = np.stack([part.resamples for part in parts])
    with np.errstate(invalid="ignore"):
        means = np.nansum(values, axis=0) / (~np.isnan(values)).sum(0)
    return Resampled(float(np.mean([part.value for part in parts])), means)


def percentile_interval(resampled: Resampled) -> Interval:
    """A statistic with the 2.5 and 97.5 % percentiles of its resamples, less those on which it is undefined."""
    low, high = np.nanpercentile(resampled.resamples, (2.5, 97.5))
    return Interval(resampled.value, float(low), float(high))


def wilson_interval(share: ArrayLike, count: ArrayLike) -> tuple[Array, Array]:
    """Wilson's 95 % interval of a share among independent units, which has a width at 0 and 1, too.

    Args:
        share: observed shares in [0, 1], any shape.
        count: number of units of each share, positive: subjects, where the items of a subject are alike; for an area
            under the ROC curve, those of the rarer class, because its variance is at most area (1 − area) / count.

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
