"""The losses of vector-quantised and hierarchical self-supervision: named terms and their weighted sum."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.common import InputError
from dissect_monai.losses.contrastive import hierarchical_contrast
from dissect_monai.losses.dense import dense_contrast
from dissect_monai.networks.hssl import HSSLOutput
from dissect_monai.networks.vqssl import SSLOutput
from dissect_monai.transforms.views import HierarchyTarget

MIN_VARIANCE = 0.01  # of a view in [0, 1]: noise and the rim of a body stay under it, X-rays and organs over it
logger = logging.getLogger(__name__)


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's loss 2 − 2·cos, each view against the *other* view of its image, averaged over both directions.

    Args:
        predictions: online predictions of shape (2·B, D): the first view of every image, then the second.
        targets: target projections of the same shape and order; they get no gradient.

    Returns:
        scalar in [0, 4].

    Reference:
        Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, Eq. 2.

    Example:
        >>> views = torch.eye(2).repeat(2, 1)
        >>> regression_loss(views, views)
        tensor(0.)
    """
    other_view = targets.detach().roll(len(targets) // 2, dims=0)
    return 2 - 2 * F.cosine_similarity(predictions.float(), other_view.float(), dim=1).mean()


def unexplained_variance(reconstruction: Tensor, views: Tensor, where: Tensor | None = None) -> Tensor:
    """Squared error of each reconstruction over the variance of its view, averaged over the views.

    Args:
        reconstruction: shape (V, C, *spatial).
        views: the same shape; a view with a variance under 0.01 counts with that, lest one of next to nothing outweigh
            all others.
        where: voxels whose error counts, True in (V, 1, *spatial); a view without any has no error. None takes all.

    Returns:
        scalar, 0 for a perfect reconstruction and, over all voxels, 1 for one by the mean.

    Example:
        >>> views = torch.rand(4, 1, 8, 8)
        >>> unexplained_variance(views, views)
        tensor(0.)
    """
    error = (reconstruction - views).square()
    if where is None:
        error = error.flatten(1).mean(1)
    else:
        counted = where.flatten(1).sum(1).mul(views.shape[1])
        error = error.where(where, 0).flatten(1).sum(1) / counted.clamp_min(1)
    return (error / views.flatten(1).var(1, correction=0).clamp_min(MIN_VARIANCE)).mean()


class _WeightedTerms(nn.Module):
    """Weighted sum of named terms; `weights` has a weight for each."""

    def __init__(self, **weights: float) -> None:
        super().__init__()
        if not any(weights.values()):
            raise InputError("one of the loss weights must be positive, got 0 for all of them.")
        self.weights = weights

    def terms(self, output: Any, target: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(self, output: Any, target: Any) -> Tensor:
        """Weighted sum of the terms, a scalar."""
        return torch.stack([self.weights[name] * term for name, term in self.terms(output, target).items()]).sum()


class VQSSLLoss(_WeightedTerms):
    """Weighted sum of the continuous, discrete, commitment and reconstruction terms.

    Weight 0 on all but `continuous_weight` is plain BYOL, the control of every experiment.

    Args:
        continuous_weight: predictions of the continuous embedding against the other view's continuous target.
        discrete_weight: mean of three regressions across the views that touch the discrete embedding: discrete on
            continuous, continuous on discrete and discrete on discrete.
        commitment_weight: sum over scales of the quantisers' commitment, which pulls features to their codes.
        reconstruction_weight: share of the view's variance that the decoded image leaves unexplained.

    Raises:
        ValueError: if all weights are 0.

    Reference:
        Singh and Mishra, DiSSECT, arXiv 2509.18765. Departure: the discrete embedding has predictors of its own.
    """

    def __init__(
        self,
        continuous_weight: float = 1.0,
        discrete_weight: float = 1.0,
        commitment_weight: float = 1.0,
        reconstruction_weight: float = 0.0,
    ) -> None:
        super().__init__(
            continuous=continuous_weight,
            discrete=discrete_weight,
            commitment=commitment_weight,
            reconstruction=reconstruction_weight,
        )

    def terms(self, output: SSLOutput, target: Tensor) -> dict[str, Tensor]:
        """Unweighted terms by name, scalars.

        Args:
            output: what `VQSSLNet` returned for 2·B views.
            target: the views (2·B, C, *spatial) in [0, 1], which the decoder must reconstruct.

        Raises:
            ValueError: if reconstruction has a weight but the network no decoder.
        """
        discrete = (
            regression_loss(output.discrete_predictions, output.targets),
            regression_loss(output.predictions, output.discrete_targets),
            regression_loss(output.discrete_predictions, output.discrete_targets),
        )
        terms = {
            "continuous": regression_loss(output.predictions, output.targets),
            "discrete": torch.stack(discrete).mean(),
            "commitment": torch.stack([scale.commitment for scale in output.quantized]).sum(),
        }
        if output.reconstruction is not None:
            terms["reconstruction"] = unexplained_variance(output.reconstruction, target)
        elif self.weights["reconstruction"]:
            raise InputError("`reconstruction_weight` is positive but the network has no decoder: set `decode`.")
        return terms


class HSSLLoss(_WeightedTerms):
    """Weighted sum of the image, task, group, classification, reconstruction and dense terms.

    A level whose labels are all the same teaches nothing but to collapse: with a single task or group its contrast is
    left out, whatever its weight, and the log says so.

    Args:
        image_weight: contrast that draws the views of an image together, see `hierarchical_contrast`.
        task_weight: contrast that draws the images of a task together.
        group_weight: contrast that draws the images of a group together.
        classification_weight: mean of the cross-entropies of task and group.
        reconstruction_weight: share of the uncorrupted view's variance that the reconstruction leaves unexplained:
            the mean of that over the masked voxels and that over all, or, without a mask, over all.
        dense_weight: contrast of the places within an image, see `dense_contrast`.
        temperature: of all contrasts, positive.
        num_tasks: number of tasks; None for several.
        num_groups: number of groups; None for several.

    Raises:
        ValueError: if all weights are 0, or `temperature` is not positive.

    Reference:
        Zheng et al., Hierarchical Self-Supervised Learning, MICCAI 2021 (arXiv 2107.04886). Independent implementation
        from the abstract. Departure: the reconstruction, which trains the decoder.
    """

    def __init__(
        self,
        image_weight: float = 1.0,
        task_weight: float = 1.0,
        group_weight: float = 1.0,
        classification_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        dense_weight: float = 0.0,
        temperature: float = 0.1,
        num_tasks: int | None = None,
        num_groups: int | None = None,
    ) -> None:
        for name, number in {"task": num_tasks, "group": num_groups}.items():
            if number == 1:
                logger.info("There is a single %s: its contrast is left out.", name)
        if not temperature > 0:
            raise InputError(f"`temperature` must be positive, got {temperature}.")
        super().__init__(
            image=image_weight,
            task=0.0 if num_tasks == 1 else task_weight,
            group=0.0 if num_groups == 1 else group_weight,
            classification=classification_weight,
            reconstruction=reconstruction_weight,
            dense=dense_weight,
        )
        self.temperature = temperature

    def terms(self, output: HSSLOutput, target: HierarchyTarget) -> dict[str, Tensor]:
        """Unweighted terms by name, scalars; over several processes, all must call it.

        Args:
            output: what `HSSLNet` returned for V·B views.
            target: what `HierarchyViews` keeps of the same batch.

        Raises:
            ValueError: if the batch does not hold two or more views of each item, or the dense contrast has a weight
                but the network no head for it.
        """
        terms = hierarchical_contrast(output.embeddings, target.task, target.group, self.temperature)
        num_views = len(output.task_logits) // len(target.task)
        entropies = [
            F.cross_entropy(logits.float(), labels.repeat(num_views))
            for logits, labels in ((output.task_logits, target.task), (output.group_logits, target.group))
        ]
        terms["classification"] = torch.stack(entropies).mean()
        regions = [None] if target.masked is None else [target.masked, None]
        errors = [unexplained_variance(output.reconstruction, target.views, region) for region in regions]
        terms["reconstruction"] = torch.stack(errors).mean()
        if output.dense is not None and target.placement is not None:
            terms["dense"] = dense_contrast(output.dense, target.placement, self.temperature)
        elif self.weights["dense"]:
            raise InputError("`dense_weight` is positive but the network has no head for it: set `dense`.")
        return terms
