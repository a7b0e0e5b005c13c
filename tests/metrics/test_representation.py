import numpy as np
import pytest
import torch
from monai.metrics import compute_embedding_collapse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from dissect_monai.metrics.probes import DEFAULT_C
from dissect_monai.metrics.representation import (
    DomainFeatures,
    code_usage,
    collapse_metrics,
    effective_rank,
    feature_std,
    perplexity,
    shortcut_metrics,
    task_labels,
)

TASKS = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
GROUP_OF = {"a": "x", "b": "y", "c": "y"}
SHORTCUTS = {"shortcut_task", "shortcut_task_intensity", "shortcut_within_group"}


def make_set(task: list[str], seed: int = 0, told: str = "abc") -> DomainFeatures:
    """Features that tell the tasks named by `told`, and intensities of noise."""
    rng = np.random.default_rng(seed)
    features = np.array([[5.0 * (name == each) for each in told] for name in task])
    features = np.pad(features, ((0, 0), (0, 2))) + 0.1 * rng.random((len(task), len(told) + 2))
    return DomainFeatures(features, rng.random((len(task), 6)), task, [GROUP_OF[name] for name in task])


@pytest.mark.parametrize("shape", [(64,), (4, 16), (2, 4, 8)])
def test_codebook_metrics_of_even_usage_and_of_one_code(shape: tuple[int, ...]) -> None:
    indices = torch.arange(64).remainder(16).reshape(shape)
    torch.testing.assert_close(perplexity(indices, 32), torch.tensor(16.0))
    torch.testing.assert_close(code_usage(indices, 32), torch.tensor(0.5))
    assert perplexity(torch.full(shape, 3), 8) == 1
    assert code_usage(torch.full(shape, 3), 8) == 1 / 8


def test_effective_rank_agrees_with_its_definition_and_ignores_scale_offset_and_rotation() -> None:
    torch.manual_seed(0)
    features = torch.randn(30, 6).double()
    values = np.linalg.svd((features - features.mean(0)).numpy(), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(features).item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(6, 6).double())[0]
    torch.testing.assert_close(effective_rank(features), effective_rank(3 * features @ rotation + 1))


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


def test_labels_of_tasks_leave_out_other_tasks_and_other_groups() -> None:
    task, group = ["a", "b", "c", "d"], ["x", "y", "y", "y"]
    everywhere, within = (task_labels(task, group, GROUP_OF, within_group) for within_group in (False, True))
    np.testing.assert_array_equal(everywhere, [*np.eye(3), [np.nan] * 3])
    np.testing.assert_array_equal(
        within, [[1, np.nan, np.nan], [np.nan, 1, 0], [np.nan, 0, 1], [np.nan, np.nan, np.nan]]
    )
    assert task_labels(task, group, {}).shape == (4, 0)


def test_features_that_tell_the_tasks_perfectly_score_one_and_within_a_group_only_its_own_count() -> None:
    found = shortcut_metrics(make_set(TASKS), make_set(TASKS, seed=1))
    assert set(found) == SHORTCUTS
    assert found["shortcut_task"] == found["shortcut_within_group"] == 1
    assert found["shortcut_task_intensity"] < 1
    found = shortcut_metrics(make_set(TASKS, told="a"), make_set(TASKS, seed=1, told="a"))
    assert found["shortcut_task"] > 0.7 > found["shortcut_within_group"]


def test_a_shortcut_agrees_with_a_logistic_regression_per_task() -> None:
    bank, items = make_set(TASKS), make_set(TASKS, seed=1)
    scaler = StandardScaler().fit(bank.intensities)
    areas = []
    for name in "abc":
        train_y, val_y = (np.array(part.task) == name for part in (bank, items))
        model = LogisticRegression(C=DEFAULT_C, tol=1e-8).fit(scaler.transform(bank.intensities), train_y)
        areas.append(roc_auc_score(val_y, model.predict_proba(scaler.transform(items.intensities))[:, 1]))
    assert shortcut_metrics(bank, items)["shortcut_task_intensity"] == pytest.approx(np.mean(areas))


@pytest.mark.parametrize(
    ("bank", "items", "expected"),
    [
        (["a"] * 4, ["a"] * 3, set()),
        (["a"] * 4, ["b"] * 4, set()),
        (["a", "b"] * 3, ["a", "b"] * 3, SHORTCUTS - {"shortcut_within_group"}),
        (["a", "b"] * 3, TASKS, SHORTCUTS - {"shortcut_within_group"}),  # c is no column
    ],
)
def test_what_cannot_be_told_is_left_out_without_a_warning(
    bank: list[str], items: list[str], expected: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert set(shortcut_metrics(make_set(bank), make_set(items))) == expected
    assert not caplog.records


def test_collapse_agrees_with_monai_and_is_seen() -> None:
    items = make_set(TASKS)
    features = torch.from_numpy(items.features)
    expected = compute_embedding_collapse(features, labels=torch.arange(3).repeat_interleave(4))
    found = collapse_metrics(items)
    assert found["collapse_effective_rank"] == pytest.approx(float(expected["effective_rank_score"]))
    assert found["collapse_centroid_similarity"] == pytest.approx(float(expected["centroid_similarity"]))
    line = np.outer(np.linspace(1, 2, len(TASKS)), np.ones(5))
    collapsed = collapse_metrics(items._replace(features=line))
    assert collapsed["collapse_centroid_similarity"] == pytest.approx(1)
    assert collapsed["collapse_effective_rank"] > 0.7 > found["collapse_effective_rank"]
    assert collapse_metrics(make_set(["a"])) == {}
    assert collapse_metrics(make_set(["a"] * 4)).keys() == {"collapse_effective_rank"}
