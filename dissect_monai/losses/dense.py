"""Dense contrast: what lies at one place of an image is alike in both of its views, and unlike the rest of it."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.losses.contrastive import normalised
from dissect_monai.transforms.augment import Placement

MAX_CELLS = 4096  # of a map, of which each pair is compared: 64 MiB an image in float32


def dense_contrast(features: Tensor, placement: Placement, temperature: float = 0.1) -> Tensor:
    """InfoNCE between the cells of two feature maps: the positive of a cell is the nearest one of the other view.

    A cell that has none within half the diagonal of a cell, as it lies outside the other view, is no anchor; the
    negatives are all other cells of that view. Of maps of more than 4096 cells, as many, evenly spread, are anchors,
    and their nearest ones all negatives, so that memory does not grow further. Both directions count. Computed in
    float32 at least.

    Args:
        features: maps of shape (2·B, D, *cells) of the first views of B images, then of their second ones.
        placement: of the 2·B views in their images.
        temperature: divides the cosine similarities, positive.

    Returns:
        scalar; 0 if no view overlaps with the other.

    Reference:
        Wang et al., Dense Contrastive Learning (DenseCL), CVPR 2021, Sec. 3.3: the loss. Xie et al., Propagate Yourself
        (PixPro), CVPR 2021, Sec. 3.1: positives by place. Departure: the negatives come from the same image.
    """
    cells = features.shape[2:]
    entropies, anchors = [], []
    with torch.autocast(features.device.type, enabled=False):
        first, second = normalised(features.flatten(2)).chunk(2)
        one, two = (Placement(*parts) for parts in zip(*(part.chunk(2) for part in placement), strict=True))
        views = (first, second, *_nearest(one, two, cells)), (second, first, *_nearest(two, one, cells))
        if first.shape[2] > MAX_CELLS:
            found = [_sampled_logits(*each, temperature) for each in views]
        else:
            logits = torch.einsum("bdm,bdn->bmn", first, second) / temperature
            found = [(logits.transpose(1, 2), *views[0][2:]), (logits, *views[1][2:])]
        for candidates_first, positive, is_near in found:
            entropies.append(F.cross_entropy(candidates_first, positive, reduction="none"))
            anchors.append(is_near)
    is_anchor = torch.cat(anchors)
    return torch.cat(entropies).where(is_anchor, 0).sum() / is_anchor.sum().clamp_min(1)


def _sampled_logits(
    anchors: Tensor, others: Tensor, positive: Tensor, is_near: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, A, A) of the positives of A anchors, candidates first, place of the positive, and what is an anchor.

    A cell that is the nearest one of two anchors is no negative of either.
    """
    chosen = torch.linspace(0, anchors.shape[2] - 1, MAX_CELLS, dtype=torch.float64, device=anchors.device).long()
    positive, is_near = positive[:, chosen], is_near[:, chosen]
    candidates = others.gather(2, positive[:, None].expand(-1, others.shape[1], -1))
    logits = torch.einsum("bdm,bdn->bmn", candidates, anchors[:, :, chosen]) / temperature
    own = torch.arange(MAX_CELLS, device=anchors.device)
    twice = (positive[:, :, None] == positive[:, None]) & (own[:, None] != own)
    return logits.masked_fill(twice, -torch.inf), own.expand(len(positive), -1), is_near


@torch.no_grad()
def _nearest(view: Placement, other: Placement, cells: torch.Size) -> tuple[Tensor, Tensor]:
    """The nearest cell in the other view of every cell in this one, (B, M), and whether it is near enough."""
    size = torch.cat([view.center.new_full((1,), length) for length in cells])  # filled there: a copy would wait
    axes = [(2 * torch.arange(length, device=size.device) + 1) / length - 1 for length in cells]
    centers = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).to(size.dtype)  # (M, dims)
    in_image = centers @ view.matrix.transpose(1, 2) + view.center[:, None]
    # solve_ex, which does not wait for the device to see whether a matrix is singular: no view has a side of 0.
    in_other = torch.linalg.solve_ex(other.matrix, (in_image - other.center[:, None]).mT).result.mT
    # Cells of the other view are the unit of length; of a grid the nearest point is found axis by axis.
    place = (in_other + 1) * size / 2 - 0.5
    index = place.round().clamp_min(0).minimum(size - 1)
    is_near = (place - index).norm(dim=-1) <= 0.5 * sqrt(len(cells)) + 1e-4
    flat, *rest = index.long().unbind(-1)
    for length, along in zip(cells[1:], rest, strict=True):
        flat = flat * length + along
    return flat, is_near
