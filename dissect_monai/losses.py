"""The loss of vector-quantised self-supervision: named terms and their weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.networks import SSLOutput


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's loss 2 − 2·cos, each view against the *other* view of its image, averaged over both directions.

    Args:
        predictions: online predictions of shape (2·B, D): the first view of every image, then the second.
        targets: target projections of the same shape and order; they get no gradient.

    Returns:
        scalar in [0, 4].

    Raises:
        ValueError: if the shapes differ or the number of views is odd.

    Reference:
        Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, Eq. 2.

    Example:
        >>> views = torch.eye(2).repeat(2, 1)
        >>> regression_loss(views, views)
        tensor(0.)
    """
    if predictions.shape != targets.shape or len(predictions) % 2:
        raise ValueError(
            "`predictions` and `targets` must have one shape (2·B, D), "
            f"got {tuple(predictions.shape)} and {tuple(targets.shape)}."
        )
    other_view = targets.detach().roll(len(targets) // 2, dims=0)
    return 2 - 2 * F.cosine_similarity(predictions.float(), other_view.float(), dim=1).mean()


def unexplained_variance(reconstruction: Tensor, views: Tensor) -> Tensor:
    """Squared error of each reconstruction over the variance of its view, averaged over the views.

    Args:
        reconstruction: shape (V, C, *spatial).
        views: the same shape; a view of one value counts with a variance of 1e-4.

    Returns:
        scalar, 0 for a perfect reconstruction and 1 for one by the mean.

    Example:
        >>> views = torch.rand(4, 1, 8, 8)
        >>> unexplained_variance(views, views)
        tensor(0.)
    """
    error = (reconstruction - views).flatten(1).square().mean(1)
    return (error / views.flatten(1).var(1, correction=0).clamp_min(1e-4)).mean()


class VQSSLLoss(nn.Module):
    """Weighted sum of the continuous, discrete, commitment and reconstruction terms.

    Weight 0 on all but `continuous_weight` is plain BYOL, the control of every experiment.

    Args:
        continuous_weight: predictions of the continuous embedding against the other view's continuous target.
        discrete_weight: mean of three regressions across the views that touch the discrete embedding: discrete on
            continuous, continuous on discrete and discrete on discrete.
        commitment_weight: sum over scales of the quantisers' commitment, which pulls features to their codes.
        reconstruction_weight: share of the uncorrupted view's variance that the decoded image leaves unexplained.

    Raises:
        ValueError: if a weight is negative or all are 0.

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
        super().__init__()
        self.weights = {
            "continuous": continuous_weight,
            "discrete": discrete_weight,
            "commitment": commitment_weight,
            "reconstruction": reconstruction_weight,
        }
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"`{name}_weight` must not be negative, got {weight}.")
        if not any(self.weights.values()):
            raise ValueError("one of the loss weights must be positive, got 0 for all of them.")

    def terms(self, output: SSLOutput, views: Tensor) -> dict[str, Tensor]:
        """Unweighted terms by name, scalars.

        Args:
            output: what `VQSSLNet` returned for 2·B views.
            views: the uncorrupted views (2·B, C, *spatial) in [0, 1], which the decoder must reconstruct.

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
            terms["reconstruction"] = unexplained_variance(output.reconstruction, views)
        elif self.weights["reconstruction"]:
            raise ValueError("`reconstruction_weight` is positive but the network has no decoder: set `decode`.")
        return terms

    def forward(self, output: SSLOutput, views: Tensor) -> Tensor:
        """Weighted sum of the terms, a scalar."""
        return torch.stack([self.weights[name] * term for name, term in self.terms(output, views).items()]).sum()
