"""95 % intervals where the percentile bootstrap fails: of calibration errors, and where no resample differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dissect_monai.metrics import Interval, resample

Array = NDArray[np.floating[Any]]


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
