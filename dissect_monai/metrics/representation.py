"""What frozen features and codes show: usage, rank, collapse, shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor

from dissect_monai.common import Array
from dissect_monai.metrics.classification import both_classes, macro_auroc
from dissect_monai.metrics.probes import DEFAULT_C, logistic_regression


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

    Features (N, D) are centred first, so that a collapsed set (all rows equal) has the lowest value, 1; the largest is
    min(N, D).

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
    names, groups = (np.array([*each], dtype=str) for each in (group_of, group_of.values()))
    is_task = np.array(task)[:, None] == names
    counts = np.array(group)[:, None] == groups if within_group else True
    return np.where(is_task.any(1, keepdims=True) & counts, is_task, np.nan)


def shortcut_metrics(bank: DomainFeatures, items: DomainFeatures) -> dict[str, float]:
    """Macro AUROC over tasks with which a linear probe, fitted on the bank, tells the task of an item: 0.5 is chance.

    The inverse strength of the probe's penalty is fixed, `DEFAULT_C`, as the items are those that are scored.

    Returns:
        `shortcut_task` from the features, `shortcut_task_intensity` from the intensities, and `shortcut_within_group`
        from the features, for the tasks that share a group and among the items of it. Tasks count that both bank and
        items hold; a metric without two tasks to tell apart is left out.
    """
    group_of = {task: group for task, group in zip(bank.task, bank.group, strict=True) if task in set(items.task)}
    metrics = {}
    for name, train_x, val_x in (
        ("shortcut_task", bank.features, items.features),
        ("shortcut_task_intensity", bank.intensities, items.intensities),
        ("shortcut_within_group", bank.features, items.features),
    ):
        within = name == "shortcut_within_group"
        train_y, val_y = (task_labels(part.task, part.group, group_of, within) for part in (bank, items))
        told = both_classes(train_y, val_y)
        if told.any():
            scores = logistic_regression(train_x, train_y[:, told], val_x, DEFAULT_C)
            metrics[name] = macro_auroc(val_y[:, told], scores)
    return metrics


def collapse_metrics(items: DomainFeatures) -> dict[str, float]:
    """MONAI's indicators of a collapse of the features; of fewer than two items there are none.

    Returns:
        `collapse_effective_rank` in [0, 1], 1 if the features have collapsed to a line; and from two tasks on
        `collapse_centroid_similarity`, 1 if their means have one direction.
    """
    if len(items.task) < 2:
        return {}
    labels = torch.from_numpy(np.unique(items.task, return_inverse=True)[1])
    indicators = EmbeddingCollapseMetric(include_indicators=["effective_rank", "centroid_similarity"])
    scores = indicators(torch.from_numpy(items.features), labels)
    metrics = {
        "collapse_effective_rank": scores["effective_rank_score"],
        "collapse_centroid_similarity": scores["centroid_similarity"],
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}
