"""What features betray of the data set that an image comes from, and how alike those of the data sets are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics import EmbeddingCollapseMetric
from numpy.typing import NDArray

from dissect_monai.metrics import macro_auroc
from dissect_monai.probes import DEFAULT_C, linear_probe

Array = NDArray[np.floating[Any]]

MIN_ITEMS = 3  # of a task whose shift is measured: centred, two items lie on a line, and any two lines are alike


class DomainFeatures(NamedTuple):
    """Frozen features of N images, what their intensities alone say, and where each comes from."""

    features: Array  # (N, D)
    intensities: Array  # (N, number of bins)
    task: Sequence[str]
    group: Sequence[str]


def shortcut_metrics(bank: DomainFeatures, items: DomainFeatures) -> dict[str, float]:
    """Macro AUROC over tasks with which a linear probe, fitted on the bank, tells the task of an item: 0.5 is chance.

    The inverse strength of the probe's penalty is fixed, `DEFAULT_C`, as the items are those that are scored.

    Args:
        bank: training images.
        items: validation images.

    Returns:
        `shortcut_task` from the features, `shortcut_task_intensity` from the intensities, and `shortcut_within_group`
        from the features, for the tasks that share a group and among the items of it. Tasks count that both bank and
        items hold; where there is nothing to tell them from, the metric is left out.
    """
    tasks, within = _task_labels(bank, items), _task_labels(bank, items, within_group=True)
    values = {
        "shortcut_task": _separability(bank.features, items.features, *tasks),
        "shortcut_task_intensity": _separability(bank.intensities, items.intensities, *tasks),
        "shortcut_within_group": _separability(bank.features, items.features, *within),
    }
    return {name: value for name, value in values.items() if value is not None}


def collapse_metrics(items: DomainFeatures) -> dict[str, float]:
    """MONAI's indicators of a collapse of the features and of the difference between tasks.

    MONAI's `domain_shift` is a linear CKA that pairs the items of two tasks, which have nothing to do with each other,
    after centring each task. So it says how alike the shapes of two clouds of features are, not whether they lie apart,
    and it falls with the number of items: only values of the same items can be compared.

    Args:
        items: validation images.

    Returns:
        `collapse_effective_rank` in [0, 1], 1 if the features have collapsed to a line; from two tasks on
        `collapse_centroid_similarity`, 1 if their means have one direction; and `domain_shift`, the mean over pairs of
        tasks with at least 3 items, 1 for clouds of one shape. What cannot be computed is left out.
    """
    if len(items.task) < 2:
        return {}
    features = torch.from_numpy(np.asarray(items.features))
    names, labels = np.unique(items.task, return_inverse=True)
    collapse = EmbeddingCollapseMetric(include_indicators=["effective_rank", "centroid_similarity"])
    scores = collapse(features, labels=torch.from_numpy(labels))
    metrics = {
        "collapse_effective_rank": scores["effective_rank_score"],
        "collapse_centroid_similarity": scores["centroid_similarity"],
    }
    clouds = [cloud for cloud in (features[labels == task] for task in range(len(names))) if len(cloud) >= MIN_ITEMS]
    shift = EmbeddingCollapseMetric(include_indicators=["domain_shift"])
    shifts = [shift(one, target_embeddings=other)["domain_shift"] for one, other in combinations(clouds, 2)]
    if shifts:
        metrics["domain_shift"] = torch.stack(shifts).mean()
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _task_labels(bank: DomainFeatures, items: DomainFeatures, within_group: bool = False) -> tuple[Array, Array]:
    """A column for each task of both sets that can be told from others: 1, 0, or NaN for images that do not count."""
    group_of = {task: group for task, group in zip(bank.task, bank.group, strict=True) if task in set(items.task)}

    def label(task: str, group: str, name: str) -> float:
        counts = task in group_of and (not within_group or group == group_of[name])
        return float(task == name) if counts else np.nan

    train, val = (
        np.array([[label(*image, name) for name in group_of] for image in zip(part.task, part.group, strict=True)])
        for part in (bank, items)
    )
    usable = np.all([(labels == value).any(0) for labels in (train, val) for value in (0, 1)], axis=0)
    return train[:, usable], val[:, usable]


def _separability(train_x: Array, val_x: Array, train_y: Array, val_y: Array) -> float | None:
    if not train_y.shape[1]:
        return None
    scores = linear_probe(train_x, train_y, val_x, val_y, val_x, cs=(DEFAULT_C,)).scores
    return macro_auroc(val_y, scores, [str(column) for column in range(val_y.shape[1])]).value
