"""Dense contrast: what lies at one place of an image is alike in both of its views, and unlike the rest of it."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.losses.contrastive import normalised
from dissect_monai.transforms.augment import Placement


def dense_contrast(features: Tensor, placement: Placement, temperature: float = 0.1) -> Tensor:
    """InfoNCE between the cells of two feature maps: the positive of a cell is the nearest one of the other view.

    A cell that has none within half the diagonal of a cell, as it lies outside the other view, is no anchor; the
    negatives are all other cells of that view. Both directions count. Computed in float32 at least.

    Args:
        features: maps of shape (2·B, D, *cells) of the first views of B images, then of their second ones.
        placement: of the 2·B views in their images.
        temperature: divides the cosine similarities, positive.

    Returns:
        scalar, at least 0; 0 if no view overlaps with the other.

    Reference:
        Wang et al., Dense Contrastive Learning (DenseCL), CVPR 2021, Sec. 3.3: the loss. Xie et al., Propagate Yourself
        (PixPro), CVPR 2021, Sec. 3.1: positives by place. Departure: the negatives come from the same image.
    """
    cells = features.shape[2:]
    entropies, anchors = [], []
    with torch.autocast(features.device.type, enabled=False):
        first, second = normalised(features.flatten(2)).chunk(2)
        logits = torch.einsum("bdm,bdn->bmn", first, second) / temperature
        one, two = (Placement(*parts) for parts in zip(*(part.chunk(2) for part in placement), strict=True))
        for candidates_first, view, other in ((logits.transpose(1, 2), one, two), (logits, two, one)):
            positive, is_near = _nearest(view, other, cells)
            entropies.append(F.cross_entropy(candidates_first, positive, reduction="none"))
            anchors.append(is_near)
    is_anchor = torch.cat(anchors)
    return torch.cat(entropies).where(is_anchor, 0).sum() / is_anchor.sum().clamp_min(1)


@torch.no_grad()
def _nearest(view: Placement, other: Placement, cells: torch.Size) -> tuple[Tensor, Tensor]:
    """The nearest cell in the other view of every cell in this one, (B, M), and whether it is near enough."""
    size = torch.cat([view.center.new_full((1,), length) for length in cells])  # filled there: a copy would wait
    axes = [(2 * torch.arange(length, device=size.device) + 1) / length - 1 for length in cells]
    centers = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).to(size.dtype)  # (M, dims)
    in_image = centers @ view.matrix.transpose(1, 2) + view.center[:, None]
    in_other = torch.linalg.solve(other.matrix, (in_image - other.center[:, None]).transpose(1, 2)).transpose(1, 2)
    # Cells of the other view are the unit of length; of a grid the nearest point is found axis by axis.
    place = (in_other + 1) * size / 2 - 0.5
    index = place.round().clamp_min(0).minimum(size - 1)
    is_near = (place - index).norm(dim=-1) <= 0.5 * sqrt(len(cells)) + 1e-4
    flat, *rest = index.long().unbind(-1)
    for length, along in zip(cells[1:], rest, strict=True):
        flat = flat * length + along
    return flat, is_near
