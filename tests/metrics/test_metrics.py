from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from dissect_monai.metrics.classification import auroc, average_precision, macro_auroc, macro_average_precision
from dissect_monai.metrics.intervals import (
    bootstrap,
    mean_resampled,
    mean_statistic,
    paired_bootstrap,
    percentile_interval,
    resample,
)
from dissect_monai.metrics.representation import code_usage, effective_rank, feature_std, perplexity

PAIRS = [(auroc, roc_auc_score), (average_precision, average_precision_score)]
both_metrics = pytest.mark.parametrize(("ours", "sklearns"), PAIRS, ids=["auroc", "average_precision"])


def toy(num_items: int = 60, levels: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores with many ties."""
    rng = np.random.default_rng(seed)
    label = (rng.random(num_items) < 0.4).astype(float)
    return label, (rng.integers(0, levels, num_items) + 2 * label).round()


@pytest.mark.parametrize("shape", [(64,), (4, 16), (2, 4, 8)])
def test_codebook_metrics_of_even_usage(shape: tuple[int, ...]) -> None:
    indices = torch.arange(64).remainder(16).reshape(shape)
    torch.testing.assert_close(perplexity(indices, 32), torch.tensor(16.0))
    torch.testing.assert_close(code_usage(indices, 32), torch.tensor(0.5))


def test_one_code_is_a_perplexity_of_one() -> None:
    assert perplexity(torch.full((9,), 3), 8) == 1
    assert code_usage(torch.full((9,), 3), 8) == 1 / 8


def test_effective_rank_counts_directions_of_equal_weight() -> None:
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(200, 3))[0]
    directions = torch.linalg.qr(directions - directions.mean(0))[0]
    torch.testing.assert_close(effective_rank(torch.nn.functional.pad(directions, (0, 5))).item(), 3.0)
    assert 1 < effective_rank(directions * torch.tensor([1.0, 0.1, 0.1])) < 3


def test_effective_rank_ignores_scale_offset_and_rotation() -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 6).double()
    rotation = torch.linalg.qr(torch.randn(6, 6).double())[0]
    torch.testing.assert_close(effective_rank(features), effective_rank(3 * features @ rotation + 1))


def test_effective_rank_agrees_with_its_definition() -> None:
    torch.manual_seed(0)
    features = torch.randn(30, 5)
    values = np.linalg.svd((features - features.mean(0)).numpy(), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(features).item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_collapsed_features_have_rank_one_and_no_spread(constant: float) -> None:
    features = torch.full((20, 8), constant) + torch.arange(8) * constant / 7
    assert effective_rank(features) == 1
    assert feature_std(features) < 1e-3


def test_feature_std_is_one_for_isotropic_features_and_ignores_length() -> None:
    torch.manual_seed(0)
    features = torch.randn(4000, 16)
    assert feature_std(features).item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(feature_std(features * torch.rand(4000, 1)), feature_std(features))


@both_metrics
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_classification_metrics_agree_with_sklearn(ours: Callable, sklearns: Callable, levels: int) -> None:
    label, score = toy(levels=levels)
    assert ours(label, score) == pytest.approx(sklearns(label, score))


@both_metrics
def test_weights_agree_with_sklearn_and_with_repetition(ours: Callable, sklearns: Callable) -> None:
    label, score = toy()
    weight = np.random.default_rng(1).integers(0, 4, (5, len(label)))
    values = ours(label, score, weight)
    assert values.shape == (5,)
    for row, value in zip(weight, values, strict=True):
        assert value == pytest.approx(sklearns(label, score, sample_weight=row))
        assert value == pytest.approx(ours(label.repeat(row), score.repeat(row)))


@both_metrics
def test_unknown_labels_are_ignored(ours: Callable, sklearns: Callable) -> None:
    label, score = toy()
    known = np.arange(60) % 3 > 0
    label[~known], score[5] = np.nan, score[5]
    score[np.flatnonzero(~known)[0]] = np.nan  # a missing score of an unknown item does no harm
    assert ours(label, score) == pytest.approx(sklearns(label[known], score[known]))


@pytest.mark.parametrize("metric", [auroc, average_precision])
@pytest.mark.parametrize("label", [[0, 0, 0], [1, 1, 1], [np.nan] * 3])
def test_a_single_class_has_no_score(metric: Callable, label: list[float]) -> None:
    assert np.isnan(metric(label, [0.1, 0.2, 0.3]))
    assert np.isnan(metric(label, [0.1, 0.2, 0.3], np.ones((4, 3)))).all()


@pytest.mark.parametrize("metric", [auroc, average_precision])
def test_a_missing_score_of_a_known_item_gives_no_score(metric: Callable) -> None:
    assert np.isnan(metric([0, 1, 1], [0.1, np.nan, 0.3]))


@pytest.mark.parametrize(("macro", "metric"), [(macro_auroc, auroc), (macro_average_precision, average_precision)])
def test_macro_score_names_what_it_leaves_out(macro: Callable, metric: Callable) -> None:
    rng = np.random.default_rng(0)
    label, score = (rng.random((40, 4)) < 0.5).astype(float), rng.random((40, 4))
    label[:, 1] = 0
    score[:, 2] = np.nan
    result = macro(label, score, ["a", "b", "c", "d"])
    assert result.left_out == ("b", "c")
    assert result.per_finding == {name: metric(label[:, i], score[:, i]) for i, name in ((0, "a"), (3, "d"))}
    assert result.value == pytest.approx(np.mean(list(result.per_finding.values())))


def test_macro_score_without_findings_is_nan() -> None:
    result = macro_auroc(np.zeros((5, 2)), np.zeros((5, 2)), ["a", "b"])
    assert np.isnan(result.value)
    assert result.left_out == ("a", "b")


def test_bootstrap_follows_its_seed() -> None:
    label, score = toy()
    intervals = [bootstrap(lambda w: auroc(label, score, w), np.arange(60), 200, seed) for seed in (0, 0, 1)]
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


def test_bootstrap_interval_covers_the_truth() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        items = rng.normal(size=30).repeat(3) + 0.3 * rng.normal(size=90)
        interval = bootstrap(lambda w, items=items: w @ items / w.sum(1), np.arange(30).repeat(3), 200, seed)
        covered += interval.low < 0 < interval.high
    assert 86 <= covered <= 99


def test_bootstrap_draws_every_resample_size() -> None:
    rows = []
    bootstrap(lambda w: rows.append(len(w)) or w.sum(1), ["a", "a", "b"], num_samples=250)
    assert rows[0] == 1
    assert sum(rows[1:]) == 250
    assert max(rows) <= 100


def test_undefined_resamples_are_left_out() -> None:
    interval = bootstrap(lambda w: auroc([0, 1, 1], [0, 1, 1], w), np.arange(3), 100)
    assert interval == (1, 1, 1)


def test_mean_statistic_leaves_out_what_a_resample_leaves_undefined() -> None:
    mean = mean_statistic([lambda weight: np.array([1.0, np.nan, np.nan]), lambda weight: np.array([3.0, 5.0, np.nan])])
    np.testing.assert_array_equal(mean(np.ones((3, 1))), [2, 5, np.nan])


def test_the_mean_of_resampled_statistics_is_that_of_the_bootstrap() -> None:
    label, score = toy()
    rare = np.where(np.arange(60) == 3, 1.0, 0.0)  # many resamples lack its positive
    statistics = [partial(auroc, label, score), partial(auroc, rare, score)]
    resampled = mean_resampled([resample(statistic, np.arange(60), 200) for statistic in statistics])
    expected = bootstrap(mean_statistic(statistics), np.arange(60), 200)
    assert percentile_interval(resampled) == pytest.approx(expected, rel=1e-12)


def test_paired_bootstrap_uses_the_same_resamples() -> None:
    label, score = toy()
    difference = paired_bootstrap(
        lambda w: auroc(label, score, w), lambda w: auroc(label, 2 * score + 1, w), np.arange(60)
    )
    assert difference == (0, 0, 0)


def test_paired_interval_is_narrower_than_the_parts() -> None:
    label, score = toy(levels=10**6, num_items=200)
    noise = np.random.default_rng(3).normal(scale=1e5, size=200)
    single = bootstrap(lambda w: auroc(label, score, w), np.arange(200))
    paired = paired_bootstrap(
        lambda w: auroc(label, score, w), lambda w: auroc(label, score + noise, w), np.arange(200)
    )
    assert paired.high - paired.low < single.high - single.low


@pytest.mark.parametrize("metric", [perplexity, code_usage])
def test_rejects_bad_indices(metric: Callable) -> None:
    with pytest.raises(ValueError, match="`indices` must be under `num_embeddings` = 4, got 4"):
        metric(torch.tensor([0, 4]), 4)
    with pytest.raises(ValueError, match="`indices` must not be empty"):
        metric(torch.zeros(0, dtype=torch.long), 4)


@pytest.mark.parametrize("metric", [effective_rank, feature_std])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4)])
def test_rejects_features_that_are_no_matrix(metric: Callable, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`features` must have shape \(N, D\).*got .*Pool them first"):
        metric(torch.zeros(shape))


def test_rejects_disagreeing_shapes() -> None:
    with pytest.raises(ValueError, match=r"must have shapes \(N,\), \(N,\) and \(..., N\), got \(2,\), \(3,\)"):
        auroc([0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match=r"got \(2,\), \(2,\) and \(1, 3\)"):
        auroc([0, 1], [1, 2], np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"must have shape \(N, 2\), one column a finding, got \(4, 3\) and \(4, 3\)"):
        macro_auroc(np.zeros((4, 3)), np.zeros((4, 3)), ["a", "b"])


def test_rejects_labels_that_are_no_labels() -> None:
    with pytest.raises(ValueError, match=r"`label` must hold 1, 0 or NaN, got \[-1\.  1\.\]"):
        auroc([1, -1], [0, 1])


def test_bootstrap_rejects_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        bootstrap(lambda w: w.sum(1), [0, 1], num_samples=0)
    with pytest.raises(ValueError, match="`statistic` must be defined on all items, got nan"):
        bootstrap(lambda w: auroc([0, 0], [0, 1], w), [0, 1])
