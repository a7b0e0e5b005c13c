"""Supervised contrast over a hierarchy of labels, exact and without an N×N matrix, and retrieval accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dissect_monai.common import LEVELS, InputError, gather, gather_rows, rank, world_size

# Similarities of one block of rows: on CPU they stay in the second-level cache, on GPU they bound the memory.
BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**27}


def hierarchical_contrast(
    embeddings: Sequence[Tensor], task: Tensor, group: Tensor, temperature: float = 0.1
) -> dict[str, Tensor]:
    """Supervised contrast at three levels: embeddings of one image, of one task and of one group attract each other.

    The terms "image", "task" and "group", scalars; each is `supervised_contrast` with other labels, all embeddings of
    the batch being candidates. Over several processes they are those of the joined batch, see there.

    Args:
        embeddings: of the three levels, each of V ≥ 2 views of each of B items, shape (V·B, D): all first views, then
            all second ones, and so on.
        task: integer task of each item, shape (B,).
        group: integer group of each item, shape (B,).
        temperature: divides the cosine similarities, positive; smaller weighs the nearest negatives more.

    Reference:
        Zheng et al., Hierarchical Self-Supervised Learning, MICCAI 2021 (arXiv 2107.04886): the levels. Khosla et al.,
        Supervised Contrastive Learning, NeurIPS 2020, Eq. 2: the form of all three. Independent implementation from
        the abstract of the former.
    """
    items = len(task)
    image = torch.arange(items, device=task.device) + items * rank()
    losses = {}
    for name, level, labels in zip(LEVELS, embeddings, (image, task, group), strict=True):
        num_views, rest = divmod(len(level), items)
        if num_views < 2 or rest:
            raise InputError(
                f"`embeddings` must hold two or more views of each of the {items} items, got {len(level)}."
            )
        (losses[name],) = supervised_contrast(level, [labels.repeat(num_views)], temperature)
    return losses


def position_contrast(
    embeddings: Tensor, task: Tensor, place: Tensor, temperature: float = 0.1, num_bins: int = 8
) -> Tensor:
    """Supervised contrast of places: what lies at the same part of its volume in the same task attracts each other.

    The mean of two contrasts, whose positives share one of `num_bins` equal parts of their volumes, or one of those
    that are shifted by half a part: so no border keeps neighbours apart. An item without a place has its views alone.

    Args:
        embeddings: of V views of each of B items, shape (V·B, D): all first views, then all second ones, and so on.
        task: integer task of each item, shape (B,).
        place: of each item in its volume, in [0, 1], or NaN, shape (B,).
        temperature: as in `supervised_contrast`.
        num_bins: parts of a volume.

    Reference:
        Zeng et al., Positional contrastive learning, MICCAI 2021, Sec. 2.2: positives by the place of slices. Chaitanya
        et al., Contrastive learning of global and local features, NeurIPS 2020, Sec. 3.1: parts of volumes. Departure:
        two sets of parts.
    """
    unknown = -1 - torch.arange(len(task), device=task.device) - len(task) * rank()
    labels = []
    for shift in (0, 0.5):
        part = task * (num_bins + 1) + (place.nan_to_num() * num_bins + shift).long().clamp_max(num_bins)
        labels.append(part.where(place.isfinite(), unknown).repeat(len(embeddings) // len(task)))
    return torch.stack(supervised_contrast(embeddings, labels, temperature)).mean()


def supervised_contrast(embeddings: Tensor, labels: Sequence[Tensor], temperature: float = 0.1) -> list[Tensor]:
    """Mean over anchors i of −1/|P(i)| Σ_p∈P(i) log( exp(z_i·z_p / τ) / Σ_a≠i exp(z_i·z_a / τ) ), for each labelling.

    P(i) are the other embeddings with the label of i; an anchor without any contributes nothing, and without any
    anchor the loss is 0. All labellings share the denominator, which is summed in blocks of rows and again in the
    backward pass: time O(N²·D), memory O(N·D). Computed in float32 at least, under autocast, too.

    Over several processes with equally many embeddings each, all return the loss of the joined batch, and gradients
    become that of the joined batch when `DistributedDataParallel` averages them; all must call it, in the same order.

    Args:
        embeddings: shape (N, D); normalised here.
        labels: integers of shape (N,), any values.
        temperature: τ, positive.

    Returns:
        one scalar per labelling, at least 0.

    Reference:
        Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, Eq. 2.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = gather_rows(normalised(embeddings))
        denominators = _LogDenominators.apply(rows, 1 / temperature)
        return [_contrast(rows, denominators, gather(each), temperature) for each in labels]


@torch.no_grad()
def retrieval_accuracy(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Share of the embeddings (N, D) whose nearest other one, by cosine, has the same label; of this process alone.

    Of several views of an image leave all but one out where the other view of an image is no worthy answer.

    Example:
        >>> retrieval_accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([5, 5, 7]))
        tensor(0.6667)
    """
    nearest = torch.empty_like(labels, dtype=torch.long)
    with torch.autocast(embeddings.device.type, enabled=False):
        for block, similarities in _similarities(normalised(embeddings), 0, len(labels)):
            nearest[block] = similarities.argmax(1)
    return (labels[nearest] == labels).float().mean()


def _contrast(rows: Tensor, denominators: Tensor, labels: Tensor, temperature: float) -> Tensor:
    # The first place of its label in sorted order numbers a class; not `unique`, which waits for the GPU.
    classes = torch.searchsorted(labels.sort().values, labels)
    sizes = torch.zeros_like(denominators).index_add_(0, classes, torch.ones_like(denominators))
    # Σ_i z_i·(S − z_i) = ‖S‖² − Σ_i ‖z_i‖² over the anchors of a class whose embeddings sum to S.
    similarities = torch.zeros_like(rows).index_add(0, classes, rows).square().sum(1)
    similarities = similarities - torch.zeros_like(denominators).index_add(0, classes, rows.square().sum(1))
    positives = (similarities / (sizes - 1).clamp_min(1)).where(sizes > 1, 0).sum() / temperature
    anchors = sizes[classes] > 1
    return (denominators.where(anchors, 0).sum() - positives) / anchors.sum().clamp_min(1)


class _LogDenominators(torch.autograd.Function):
    """log Σ_a≠i exp(scale · z_i·z_a) of rows z (N, D) → (N,); a process computes its own rows, forward and backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: float) -> Tensor:
        own = len(rows) // world_size()
        ctx.start, ctx.scale = own * rank(), scale
        result = rows.new_empty(own)
        for block, logits in _similarities(rows, ctx.start, ctx.start + own, scale):
            largest = logits.amax(1)
            sums = logits.sub_(largest[:, None]).exp_().sum(1)
            result[block.start - ctx.start : block.stop - ctx.start] = sums.log_().add_(largest)
        result = gather(result)
        ctx.save_for_backward(rows, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, result = ctx.saved_tensors
        own = len(rows) // world_size()
        grad_rows = torch.zeros_like(rows)
        with torch.autocast(rows.device.type, enabled=False):
            for block, logits in _similarities(rows, ctx.start, ctx.start + own, ctx.scale):
                # z_i is anchor of its own denominator and candidate in those of all others.
                candidate = (logits - result).exp_().mul_(grad)
                anchor = logits.sub_(result[block, None]).exp_().mul_(grad[block, None])
                torch.mm(anchor.add_(candidate), rows, out=grad_rows[block])
        return grad_rows.mul_(ctx.scale), None


def _similarities(rows: Tensor, start: int, stop: int, scale: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """Products of the rows `start` to `stop` with all, a block at a time in one buffer; −inf with themselves."""
    size = max(1, BLOCK_BYTES.get(rows.device.type, 2**27) // (len(rows) * rows.element_size()))
    buffer = rows.new_empty(min(size, stop - start), len(rows))
    for first in range(start, stop, size):
        block = slice(first, min(first + size, stop))
        part = buffer[: block.stop - first]
        torch.addmm(part, rows[block], rows.t(), beta=0, alpha=scale, out=part)
        part.diagonal(first).fill_(-torch.inf)
        yield block, part


def normalised(embeddings: Tensor) -> Tensor:
    """Vectors along axis 1 of norm 1, in float32 at least."""
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
