"""The losses of vector-quantised and hierarchical self-supervision: named terms and their weighted sum."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.common import InputError
from dissect_monai.losses.contrastive import hierarchical_contrast, position_contrast
from dissect_monai.losses.dense import dense_contrast
from dissect_monai.losses.joint_embedding import OBJECTIVES, nt_xent, regression_loss, vicreg
from dissect_monai.networks.hssl import HSSLOutput
from dissect_monai.networks.vqssl import SSLOutput
from dissect_monai.transforms.views import HierarchyTarget

MIN_VARIANCE = 0.01  # of a view in [0, 1]: noise and the rim of a body stay under it, X-rays and organs over it
logger = logging.getLogger(__name__)


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


class _WeightedTerms(nn.Module, ABC):
    """Weighted sum of named terms; `weights` has a weight for each."""

    def __init__(self, **weights: float) -> None:
        super().__init__()
        if not any(weights.values()):
            raise InputError("one of the loss weights must be positive, got 0 for all of them.")
        self.weights = weights

    @abstractmethod
    def terms(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Unweighted terms by name, scalars."""

    def forward(self, output: Any, target: Any) -> Tensor:
        """Weighted sum of the terms, a scalar."""
        return torch.stack([self.weights[name] * term for name, term in self.terms(output, target).items()]).sum()


class VQSSLLoss(_WeightedTerms):
    """Weighted sum of the continuous, discrete, cross, commitment and reconstruction terms.

    One objective draws the two views of an image together, of the continuous as of the discrete embedding. With weight
    0 on all but `continuous_weight` it is plain SimCLR, VICReg or BYOL, the control of every experiment.

    Args:
        continuous_weight: objective of the continuous embedding.
        discrete_weight: objective of the discrete embedding; for `byol`, the mean of three regressions across views:
            discrete on continuous, continuous on discrete and discrete on discrete.
        commitment_weight: sum over scales of the commitment, which pulls features to their codes: squared distance,
            summed over the channels of a code, as the gradient of a mean over them would be lost beside the others.
        reconstruction_weight: share of the view's variance that the decoded image leaves unexplained.
        cross_weight: 2 − 2·cos of the discrete embedding and the continuous one of the other view; not for `byol`, in
            whose discrete term it is.
        objective: `nt_xent`, `vicreg` or `byol`, which alone needs the predictors and the momentum target of the
            network, see `VQSSLNet(predict=...)`.
        temperature: of `nt_xent`, positive.

    Raises:
        ValueError: if all weights are 0, or `objective` is unknown.

    Reference:
        Singh and Mishra, DiSSECT, arXiv 2509.18765, whose objective is BYOL's. Departures: the other objectives; the
        discrete embedding has predictors of its own.
    """

    def __init__(
        self,
        continuous_weight: float = 1.0,
        discrete_weight: float = 1.0,
        commitment_weight: float = 1.0,
        reconstruction_weight: float = 0.0,
        cross_weight: float = 0.0,
        objective: str = "nt_xent",
        temperature: float = 0.2,
    ) -> None:
        if objective not in OBJECTIVES:
            raise InputError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
        super().__init__(
            continuous=continuous_weight,
            discrete=discrete_weight,
            cross=cross_weight,
            commitment=commitment_weight,
            reconstruction=reconstruction_weight,
        )
        if objective == "byol" and cross_weight:
            raise InputError("`cross_weight` must be 0 for `byol`, whose discrete term has it.")
        self.objective = objective
        self.temperature = temperature

    def terms(self, output: SSLOutput, target: Tensor) -> dict[str, Tensor]:
        """Unweighted terms by name, scalars; over several processes, all must call it.

        `target` are the views (2·B, C, *spatial) in [0, 1], which the decoder must reconstruct. A network without the
        decoder or the target that the weights ask for is refused.
        """
        terms = self._regressions(output) if self.objective == "byol" else self._similarities(output)
        terms["commitment"] = torch.stack([s.commitment * s.features.shape[1] for s in output.quantized]).sum()
        if output.reconstruction is not None:
            terms["reconstruction"] = unexplained_variance(output.reconstruction, target)
        elif self.weights["reconstruction"]:
            raise InputError("`reconstruction_weight` is positive but the network has no decoder: set `decode`.")
        return terms

    def _similarities(self, output: SSLOutput) -> dict[str, Tensor]:
        embeddings = {"continuous": output.predictions, "discrete": output.discrete_predictions}
        objective = partial(nt_xent, temperature=self.temperature) if self.objective == "nt_xent" else vicreg
        # Those of weight 0, too: DistributedDataParallel wants a gradient of every parameter.
        terms = {name: objective(embedding) for name, embedding in embeddings.items()}
        return {**terms, "cross": regression_loss(output.discrete_predictions, output.predictions)}

    def _regressions(self, output: SSLOutput) -> dict[str, Tensor]:
        if output.targets is None or output.discrete_targets is None:
            raise InputError("`objective` is byol but the network has no target: set `predict`.")
        discrete = (
            regression_loss(output.discrete_predictions, output.targets),
            regression_loss(output.predictions, output.discrete_targets),
            regression_loss(output.discrete_predictions, output.discrete_targets),
        )
        return {
            "continuous": regression_loss(output.predictions, output.targets),
            "discrete": torch.stack(discrete).mean(),
        }


class HSSLLoss(_WeightedTerms):
    """Weighted sum of the image, task, group, classification, reconstruction, position and dense terms.

    A level whose labels are all the same teaches nothing but to collapse: with a single task or group its contrast is
    left out, whatever its weight, and the log says so.

    Args:
        image_weight: contrast that draws the views of an image together, see `hierarchical_contrast`.
        task_weight: contrast that draws the images of a task together.
        group_weight: contrast that draws the images of a group together.
        classification_weight: mean of the cross-entropies of task and group.
        reconstruction_weight: share of the uncorrupted view's variance that the reconstruction leaves unexplained:
            the mean of that over the masked voxels and that over all, or, without a mask, over all.
        position_weight: contrast that draws what lies at one place of its volume together, see `position_contrast`.
        dense_weight: contrast of the places within an image, see `dense_contrast`.
        temperature: of all contrasts, positive.
        num_tasks: None for several.
        num_groups: the same.

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
        position_weight: float = 0.0,
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
            position=position_weight,
            dense=dense_weight,
        )
        self.temperature = temperature

    def terms(self, output: HSSLOutput, target: HierarchyTarget) -> dict[str, Tensor]:
        """Unweighted terms by name, scalars; over several processes, all must call it.

        A batch without two views of each item, or a network without the head that `dense_weight` asks for, is refused.
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
        if output.position is not None and target.place is not None:
            terms["position"] = position_contrast(output.position, target.task, target.place, self.temperature)
        elif self.weights["position"]:
            raise InputError("`position_weight` is positive but the network has no head for it: set `position`.")
        if output.dense is not None and target.placement is not None:
            terms["dense"] = dense_contrast(output.dense, target.placement, self.temperature)
        elif self.weights["dense"]:
            raise InputError("`dense_weight` is positive but the network has no head for it: set `dense_level`.")
        return terms
