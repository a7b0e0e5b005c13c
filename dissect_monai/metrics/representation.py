"""What frozen features and codes show: usage, rank, collapse, shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor

from dissect_monai.common import Array
from dissect_monai.metrics.classification import both_classes, macro_auroc
from dissect_monai.metrics.probes import DEFAULT_C, logistic_regression

MIN_ITEMS = 3  # of a task whose shift is measured: centred, two items lie on a line, and any two lines are alike


class DomainFeatures(NamedTuple):
    """Frozen features of N images, what their intensities alone say, and where each comes from."""

    features: Array  # (N, D)
    intensities: Array  # (N, number of bins)
    task: Sequence[str]
    group: Sequence[str]


def perplexity(indices: Tensor, num_embeddings: int) -> Tensor:
    """Effective number of codes in use, in [1, `num_embeddings`]: the exponential of the usage entropy.

    Indices have any shape.

    Example:
        >>> perplexity(torch.tensor([0, 1, 1, 0]), num_embeddings=8)
        tensor(2.)
    """
    usage = torch.bincount(indices.flatten(), minlength=num_embeddings) / indices.numel()
    return torch.special.entr(usage).sum().exp()


def code_usage(indices: Tensor, num_embeddings: int) -> Tensor:
    """Share of the codes that occur at all, in (0, 1]; arguments as for `perplexity`.

    Example:
        >>> code_usage(torch.tensor([0, 1, 1, 0]), num_embeddings=8)
        tensor(0.2500)
    """
    return (torch.bincount(indices.flatten(), minlength=num_embeddings) > 0).float().mean()


def effective_rank(features: Tensor) -> Tensor:
    """Number of directions that the features fill: the exponential of the entropy of their singular values.

    The features are centred first, so that a collapsed set (all rows equal) has the lowest value, 1.

    Args:
        features: shape (N, D), any float dtype.

    Returns:
        A float64 scalar in [1, min(N, D)].

    Reference:
        Roy & Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007, Definition 1.
    """
    features = features.double()
    values = torch.linalg.svdvals(features - features.mean(0))
    # Rounding leaves singular values of this size in a constant set, where they would count as directions.
    rounding = torch.finfo(torch.float64).eps * max(features.shape) * torch.linalg.matrix_norm(features)
    values = torch.where(values > rounding, values, 0)
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp()


def feature_std(features: Tensor) -> Tensor:
    """Spread of features (N, D) on the unit sphere: about 1 if they are isotropic, 0 if they have collapsed.

    Each row is L2-normalised; the standard deviations over rows are averaged over dimensions and multiplied by √D.

    Reference:
        Chen & He, Exploring simple Siamese representation learning, CVPR 2021, Sec. 4.1 and Fig. 2.
    """
    return F.normalize(features.float(), dim=1).std(0, correction=0).mean() * features.shape[1] ** 0.5


def task_labels(
    task: Sequence[str], group: Sequence[str], group_of: Mapping[str, str], within_group: bool = False
) -> Array:
    """Labels (N, C) of the shortcut probe: of which of C tasks (`group_of`: their groups) each of N images is.

    They are 1, 0, or NaN for images of other tasks or, with `within_group`, of other groups.
    """

    def label(task: str, group: str, name: str) -> float:
        counts = task in group_of and (not within_group or group == group_of[name])
        return float(task == name) if counts else np.nan

    rows = [[label(*image, name) for name in group_of] for image in zip(task, group, strict=True)]
    return np.array(rows, dtype=float).reshape(len(rows), len(group_of))


def shortcut_metrics(bank: DomainFeatures, items: DomainFeatures) -> dict[str, float]:
    """Macro AUROC over tasks with which a linear probe, fitted on the bank, tells the task of an item: 0.5 is chance.

    The inverse strength of the probe's penalty is fixed, `DEFAULT_C`, as the items are those that are scored.

    Returns:
        `shortcut_task` from the features, `shortcut_task_intensity` from the intensities, and `shortcut_within_group`
        from the features, for the tasks that share a group and among the items of it. Tasks count that both bank and
        items hold; where there is nothing to tell them from, the metric is left out.
    """
    group_of = {task: group for task, group in zip(bank.task, bank.group, strict=True) if task in set(items.task)}
    metrics = {}
    for name, (train_x, val_x), within_group in (
        ("shortcut_task", (bank.features, items.features), False),
        ("shortcut_task_intensity", (bank.intensities, items.intensities), False),
        ("shortcut_within_group", (bank.features, items.features), True),
    ):
        train_y, val_y = (task_labels(part.task, part.group, group_of, within_group) for part in (bank, items))
        told = both_classes(train_y, val_y)
        if told.any():
            metrics[name] = macro_auroc(
                val_y[:, told], logistic_regression(train_x, train_y[:, told], val_x, DEFAULT_C)
            )
    return metrics


def collapse_metrics(items: DomainFeatures) -> dict[str, float]:
    """MONAI's indicators of a collapse of the features and of the difference between tasks.

    MONAI's `domain_shift` is a linear CKA that pairs the items of two tasks, which have nothing to do with each other,
    after centring each task. So it says how alike the shapes of two clouds of features are, not whether they lie apart,
    and it falls with the number of items: only values of the same items can be compared.

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
