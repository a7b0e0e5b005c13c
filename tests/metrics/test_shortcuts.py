from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_embedding_collapse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from dissect_monai.metrics.probes import DEFAULT_C
from dissect_monai.metrics.representation import DomainFeatures, collapse_metrics, shortcut_metrics

TASKS = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
GROUP_OF = {"a": "x", "b": "y", "c": "y"}
SHORTCUTS = {"shortcut_task", "shortcut_task_intensity", "shortcut_within_group"}


def make_set(task: list[str], seed: int = 0, told: str = "abc") -> DomainFeatures:
    """Features that tell the tasks named by `told`, and intensities of noise."""
    rng = np.random.default_rng(seed)
    features = np.array([[5.0 * (name == each) for each in told] for name in task])
    features = np.pad(features, ((0, 0), (0, 2))) + 0.1 * rng.random((len(task), len(told) + 2))
    return DomainFeatures(features, rng.random((len(task), 6)), task, [GROUP_OF[name] for name in task])


# ---- shortcuts ---------------------------------------------------------------------------------------------------


def test_features_that_tell_the_tasks_perfectly_score_one() -> None:
    found = shortcut_metrics(make_set(TASKS), make_set(TASKS, seed=1))
    assert set(found) == SHORTCUTS
    assert found["shortcut_task"] == found["shortcut_within_group"] == 1
    assert found["shortcut_task_intensity"] < 1


def test_within_a_group_only_its_own_tasks_are_told_apart() -> None:
    found = shortcut_metrics(make_set(TASKS, told="a"), make_set(TASKS, seed=1, told="a"))
    assert found["shortcut_task"] > 0.7
    assert found["shortcut_within_group"] < 0.7


def test_agrees_with_a_logistic_regression_per_task() -> None:
    bank, items = make_set(TASKS), make_set(TASKS, seed=1)
    scaler = StandardScaler().fit(bank.intensities)
    areas = []
    for name in "abc":
        train_y, val_y = (np.array(part.task) == name for part in (bank, items))
        model = LogisticRegression(C=DEFAULT_C, tol=1e-8).fit(scaler.transform(bank.intensities), train_y)
        areas.append(roc_auc_score(val_y, model.predict_proba(scaler.transform(items.intensities))[:, 1]))
    found = shortcut_metrics(bank, items)["shortcut_task_intensity"]
    assert found == pytest.approx(np.mean(areas))


def test_a_single_task_cannot_be_told_from_others(caplog: pytest.LogCaptureFixture) -> None:
    assert shortcut_metrics(make_set(["a"] * 4), make_set(["a"] * 3)) == {}
    assert not caplog.records


def test_groups_of_one_task_have_nothing_within() -> None:
    found = shortcut_metrics(make_set(["a", "b"] * 3), make_set(["a", "b"] * 3))
    assert set(found) == SHORTCUTS - {"shortcut_within_group"}


def test_a_task_that_one_set_lacks_is_no_column(caplog: pytest.LogCaptureFixture) -> None:
    found = shortcut_metrics(make_set(["a", "b"] * 3), make_set(TASKS))
    assert found["shortcut_task"] == pytest.approx(1)  # of a and b
    assert set(found) == SHORTCUTS - {"shortcut_within_group"}
    assert not caplog.records


# ---- collapse ----------------------------------------------------------------------------------------------------


def test_agrees_with_monai() -> None:
    items = make_set(TASKS)
    features = torch.from_numpy(items.features)
    expected = compute_embedding_collapse(features, labels=torch.arange(3).repeat_interleave(4))
    found = collapse_metrics(items)
    assert found["collapse_effective_rank"] == pytest.approx(float(expected["effective_rank_score"]))
    assert found["collapse_centroid_similarity"] == pytest.approx(float(expected["centroid_similarity"]))
    pairs = [(features[:4], features[4:8]), (features[:4], features[8:]), (features[4:8], features[8:])]
    shifts = [float(compute_embedding_collapse(one, target_embeddings=other)["domain_shift"]) for one, other in pairs]
    assert found["domain_shift"] == pytest.approx(np.mean(shifts))


def test_a_collapse_is_seen() -> None:
    items = make_set(TASKS)
    line = np.outer(np.linspace(1, 2, len(TASKS)), np.ones(5))
    found = collapse_metrics(items._replace(features=line))
    assert found["collapse_centroid_similarity"] == pytest.approx(1)
    assert found["collapse_effective_rank"] > 0.7 > collapse_metrics(items)["collapse_effective_rank"]


@pytest.mark.parametrize("task", [["a"] * 4, ["a"] * 4 + ["b"], ["a"] * 4 + ["b"] * 2])
def test_a_shift_needs_two_tasks_of_three_images(task: list[str]) -> None:
    found = collapse_metrics(make_set(task))
    assert "domain_shift" not in found
    assert ("collapse_centroid_similarity" in found) == ("b" in task)
    assert np.isfinite(list(found.values())).all()


def test_tasks_of_few_images_do_not_spoil_the_shift_of_others() -> None:
    found = collapse_metrics(make_set([*TASKS[:8], "c"]))
    assert found["domain_shift"] == pytest.approx(collapse_metrics(make_set(TASKS[:8]))["domain_shift"], abs=0.3)


def test_one_image_shows_no_collapse() -> None:
    assert collapse_metrics(make_set(["a"])) == {}
