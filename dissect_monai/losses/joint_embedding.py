"""What draws the embeddings of two views of an image together, and keeps all others apart: NT-Xent, VICReg, BYOL.

All take embeddings of shape (2·B, D), the first view of every image, then the second, and return a scalar from 0 on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.common import InputError, gather_rows, rank
from dissect_monai.losses.contrastive import supervised_contrast

OBJECTIVES = ("nt_xent", "vicreg", "byol")


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's loss 2 − 2·cos, each view against the *other* view of its image, averaged over both directions.

    The targets have the shape of the online predictions; BYOL's have no gradient. The loss is at most 4.

    Reference:
        Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, Eq. 2.

    Example:
        >>> views = torch.eye(2).repeat(2, 1)
        >>> regression_loss(views, views)
        tensor(0.)
    """
    other_view = targets.roll(len(targets) // 2, dims=0)
    return 2 - 2 * F.cosine_similarity(predictions.float(), other_view.float(), dim=1).mean()


def nt_xent(embeddings: Tensor, temperature: float = 0.2) -> Tensor:
    """SimCLR's contrast: the positive of a view is the other view of its image, all other views are negatives.

    Over several processes, the views of all of them; see `supervised_contrast`, whose form with one positive it is. The
    temperature, which must be positive, divides the cosine similarities.

    Reference:
        Chen et al., A Simple Framework for Contrastive Learning (SimCLR), ICML 2020, Eq. 1.
    """
    image = torch.arange(_num_images(embeddings), device=embeddings.device)
    (loss,) = supervised_contrast(embeddings, [(image + len(image) * rank()).repeat(2)], temperature)
    return loss


def vicreg(embeddings: Tensor) -> Tensor:
    """VICReg with its published weights: (25 · invariance + 25 · variance + covariance) / 25.

    Over several processes with equally many views each, variances and covariances are those of all views, and gradients
    become those of the joined batch when `DistributedDataParallel` averages them. There must be two images or more. In
    float32, under autocast, too.

    Reference:
        Bardes et al., VICReg, ICLR 2022, Eq. 1–6, λ = μ = 25, ν = 1; means over dimensions as in the authors' code.
        Departure: divided by 25.
    """
    num_images = _num_images(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = gather_rows(embeddings.float())
        views = rows.view(-1, 2, num_images, rows.shape[1]).transpose(0, 1).flatten(1, 2)  # (2, images of all, D)
        invariance = (views[0] - views[1]).square().mean()
        centred = views - views.mean(1, keepdim=True)
        covariance = centred.transpose(1, 2) @ centred / (views.shape[1] - 1)  # (2, D, D)
        variances = covariance.diagonal(dim1=1, dim2=2)
        variance = (1 - (variances + 1e-4).sqrt()).relu().mean()
        off_diagonal = (covariance.square().sum() - variances.square().sum()) / rows.shape[1]
    return invariance + variance + off_diagonal / 25


def _num_images(embeddings: Tensor) -> int:
    if embeddings.ndim != 2 or len(embeddings) % 2:
        raise InputError(f"`embeddings` must be (2·B, D), got {tuple(embeddings.shape)}.")
    return len(embeddings) // 2
