from functools import partial

import numpy as np
import pytest

from dissect_monai.metrics.classification import auroc
from dissect_monai.metrics.intervals import bootstrap, mean_resampled, percentile_interval, resample, wilson_interval


def toy() -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores with many ties."""
    rng = np.random.default_rng(0)
    label = (rng.random(60) < 0.4).astype(float)
    return label, rng.integers(0, 7, 60) + 2 * label


def test_bootstrap_follows_its_seed() -> None:
    label, score = toy()
    intervals = [bootstrap(partial(auroc, label, score), np.arange(60), 200, seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert intervals[0].low < intervals[0].value < intervals[0].high
    assert intervals[0].value == auroc(label, score)


def test_bootstrap_resamples_subjects_not_items() -> None:
    values = np.random.default_rng(0).normal(size=40)
    items, subjects = values.repeat(5), np.arange(40).repeat(5)

    def width(subjects: np.ndarray) -> float:
        interval = bootstrap(lambda w: w @ items / w.sum(1), subjects)
        return interval.high - interval.low

    assert width(subjects) == pytest.approx(2 * 1.96 * values.std() / 40**0.5, rel=0.15)
    assert width(subjects) == pytest.approx(width(np.arange(200)) * 5**0.5, rel=0.15)


def test_a_mean_leaves_out_the_statistics_that_a_resample_leaves_undefined() -> None:
    label, score = toy()
    rare = np.where(np.arange(60) == 3, 1.0, 0.0)  # many resamples lack its positive
    statistics = [partial(auroc, label, score), partial(auroc, rare, score)]
    resampled = mean_resampled([resample(statistic, np.arange(60), 200) for statistic in statistics])
    assert np.isnan(resample(statistics[1], np.arange(60), 200).resamples).any()
    expected = bootstrap(lambda w: np.nanmean([each(w) for each in statistics], axis=0), np.arange(60), 200)
    assert percentile_interval(resampled) == pytest.approx(expected, rel=1e-12)


def test_undefined_resamples_are_left_out_but_all_items_must_be_defined() -> None:
    assert bootstrap(partial(auroc, [0, 1, 1], [0, 1, 1]), np.arange(3), 100) == (1, 1, 1)
    with pytest.raises(ValueError, match="`statistic` must be defined on all items, got nan"):
        bootstrap(partial(auroc, [0, 0], [0, 1]), [0, 1])


def test_wilson_interval_agrees_with_published_values() -> None:
    # Newcombe, Statistics in Medicine 1998, Table I, method 3.
    share = np.array([81 / 263, 15 / 148, 0, 1 / 29])
    low, high = wilson_interval(share, [263, 148, 20, 29])
    np.testing.assert_allclose(low, [0.2553, 0.0624, 0, 0.0061], atol=1e-4)
    np.testing.assert_allclose(high, [0.3662, 0.1605, 0.1611, 0.1718], atol=1e-4)
    np.testing.assert_allclose(wilson_interval(1 - share, [263, 148, 20, 29]), [1 - high, 1 - low], atol=1e-12)
