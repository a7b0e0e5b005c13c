"""Vector quantisation of feature maps: one EMA codebook, the multi-scale quantiser and their result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.common import InputError, rank, world_size

# Scores of one chunk of rows: on CPU they stay in the second-level cache, on GPU they bound the memory.
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**27}
COMMITMENT_COST = 0.25  # van den Oord et al., Sec. 3.2
EPSILON = 1e-5  # Laplace smoothing of the cluster sizes, as in MONAI's `EMAQuantizer`
SEED_SIZE = 1e-3  # cluster size of a code before any feature has been assigned to it


class Quantized(NamedTuple):
    """What a quantiser returns; read it by name."""

    features: Tensor  # (B, embedding_dim, *spatial), float32, straight-through
    indices: Tensor  # (B, *spatial), int64 in [0, num_embeddings)
    commitment: Tensor  # scalar, 0.25 times the mean squared distance of the input to its code
    projected: Tensor  # (B, embedding_dim, *spatial), float32, what was quantised


class EMACodebook(nn.Module):
    """Codebook that follows the features assigned to each code by an exponential moving average.

    A position takes the code of largest x·e − ½‖e‖², its nearest. In training mode the codes then move to the running
    mean of their features; over several processes they move as one process would with the concatenated batch.
    With `data_init=False` and `revive_fraction=0` it computes what MONAI's `EMAQuantizer` does, and the two always
    load each other's weights. Lookup and averages are float32 under autocast, too.

    Args:
        num_embeddings: number of codes.
        embedding_dim: number of channels of the input and of a code.
        decay: EMA decay in [0, 1); larger moves the codes more slowly.
        metric: "euclidean", or "cosine": input and codes are L2-normalised, `features` and `projected` have norm 1.
        data_init: whether the first training batch seeds the codes with evenly spaced features. Codes drawn from
            N(0, 1) lie far from most features, and the few that win a feature keep all of them.
        revive_fraction: a code whose running cluster size falls below this fraction of the mean size is dead and
            becomes a current feature, of twice that size; in [0, 1), 0 revives none.

    Raises:
        ValueError: if an argument is outside its range.

    Reference:
        van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017, Appendix A.1 (EMA updates).
        Seeding from data and reviving dead codes are our additions; both are free of random numbers, so a resumed
        run repeats an uninterrupted one.
    """

    ema_cluster_size: Tensor
    ema_w: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        decay: float = 0.99,
        metric: str = "euclidean",
        data_init: bool = True,
        revive_fraction: float = 0.05,
    ) -> None:
        super().__init__()
        if metric not in ("euclidean", "cosine"):
            raise InputError(f"`metric` must be 'euclidean' or 'cosine', got {metric!r}.")
        for name, value in {"decay": decay, "revive_fraction": revive_fraction}.items():
            if not 0 <= value < 1:
                raise InputError(f"`{name}` must be in [0, 1), got {value}.")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.decay = decay
        self.metric = metric
        self.data_init = data_init
        self.revive_fraction = revive_fraction

        self.embedding = nn.Embedding(num_embeddings, embedding_dim).requires_grad_(False)
        self.embedding.weight.copy_(self._normalised(self.embedding.weight))
        self.register_buffer("ema_cluster_size", torch.zeros(num_embeddings))
        self.register_buffer("ema_w", self.embedding.weight.detach().clone())
        self._seeded = False  # remembered, because a look at the cluster sizes waits for the GPU

    def forward(self, inputs: Tensor) -> Quantized:
        """Quantise a feature map, then, in training mode, move the codes.

        Args:
            inputs: features of shape (B, embedding_dim, *spatial), any float dtype; channels_last spares a copy.

        Returns:
            Maps of the size of the input. The gradient of `features` passes to the input unchanged, `commitment` draws
            the input to its code, and the codes get no gradient.

        Raises:
            ValueError: if the number of channels is not `embedding_dim`.
        """
        if self.training and self.data_init and not self._seeded:
            self._seed(self._rows(inputs.detach()))
        output = self.lookup(inputs)
        if self.training:
            self._update(self._rows(output.projected.detach()), output.indices.flatten())
        return output

    def lookup(self, inputs: Tensor) -> Quantized:
        """Quantise as `forward` does, but never move the codes; for a target network in training mode."""
        with torch.autocast(inputs.device.type, enabled=False):
            rows = self._normalised(self._rows(inputs))
            codes = self._normalised(self.embedding.weight.float())
            indices = _nearest(rows.detach(), codes)
            features, commitment = _StraightThrough.apply(rows, codes, indices)
        size = (len(inputs), *inputs.shape[2:])
        return Quantized(
            features=features.view(*size, -1).movedim(-1, 1),
            indices=indices.view(size),
            commitment=commitment,
            projected=rows.view(*size, -1).movedim(-1, 1),
        )

    def features_of(self, indices: Tensor) -> Tensor:
        """The codes (B, embedding_dim, *spatial) that `indices` (B, *spatial) number: `features` of a lookup."""
        return F.embedding(indices, self._normalised(self.embedding.weight.float())).movedim(-1, 1)

    def _rows(self, inputs: Tensor) -> Tensor:
        if inputs.ndim < 2 or inputs.shape[1] != self.embedding_dim:
            raise InputError(f"`inputs` must be (B, {self.embedding_dim}, *spatial), got {tuple(inputs.shape)}.")
        return inputs.float().movedim(1, -1).reshape(-1, self.embedding_dim)

    def _normalised(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.metric == "cosine" else vectors

    @torch.no_grad()
    def _seed(self, rows: Tensor) -> None:
        if not self.ema_cluster_size.any():
            seeds = self._normalised(_spread_rows(rows, self.num_embeddings, shift=0))
            self.embedding.weight.copy_(seeds)
            # Next to nothing, so that the first batches say which codes are used: features move fast at the start.
            self.ema_w.copy_(SEED_SIZE * seeds)
            self.ema_cluster_size.fill_(SEED_SIZE)
        self._seeded = True

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor) -> None:
        # Not bincount, which makes the host wait for the GPU; sums of ones are exact in any order.
        counts = torch.zeros_like(self.ema_cluster_size).index_add_(0, indices, rows.new_ones(len(rows)))
        sums = torch.zeros_like(self.ema_w).index_add_(0, indices, rows)
        self.ema_cluster_size.lerp_(_all_reduce(counts), 1 - self.decay)
        self.ema_w.lerp_(_all_reduce(sums), 1 - self.decay)
        if self.revive_fraction > 0:
            self._revive(rows, counts)
        total = self.ema_cluster_size.sum()
        sizes = (self.ema_cluster_size + EPSILON) / (total + self.num_embeddings * EPSILON) * total
        self.embedding.weight.copy_(self._normalised(self.ema_w / sizes.unsqueeze(1)))

    def _revive(self, rows: Tensor, counts: Tensor) -> None:
        # The sum of all indices differs from batch to batch; unshifted, a code would always be offered the same place.
        shift = (counts.long() * torch.arange(len(counts), device=counts.device)).sum()
        offers = _spread_rows(rows, self.num_embeddings, shift)
        least = self.revive_fraction * self.ema_cluster_size.mean()
        dead = self.ema_cluster_size < least
        # Twice the least: a code that finds no features soon gets another place, one that does moves to them fast.
        self.ema_w.copy_(torch.where(dead.unsqueeze(1), 2 * least * offers, self.ema_w))
        self.ema_cluster_size.copy_(torch.where(dead, 2 * least, self.ema_cluster_size))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seeded = False


class MultiScaleQuantizer(nn.Module):
    """One `EMACodebook` per encoder stage, each behind a 1×1 projection to a common width.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of channels of each stage.
        num_embeddings: number of codes, one for all stages or one per stage.
        embedding_dim: width to which every stage is projected.
        kwargs: the other arguments of `EMACodebook`.

    Raises:
        ValueError: if an argument is outside its range, or `num_embeddings` does not fit `in_channels`.

    Reference:
        Singh and Mishra, DiSSECT, arXiv 2509.18765: discrete bottleneck at several scales.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: Sequence[int],
        num_embeddings: int | Sequence[int],
        embedding_dim: int,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        sizes = [num_embeddings] * len(in_channels) if isinstance(num_embeddings, int) else num_embeddings
        if len(sizes) != len(in_channels):
            raise InputError(
                f"`num_embeddings` must be one number or {len(in_channels)}, one per stage, got {num_embeddings}."
            )
        self.projections = nn.ModuleList(Conv[Conv.CONV, spatial_dims](c, embedding_dim, 1) for c in in_channels)
        self.codebooks = nn.ModuleList(EMACodebook(size, embedding_dim, **kwargs) for size in sizes)

    def forward(self, features: Sequence[Tensor]) -> list[Quantized]:
        """Project and quantise every stage.

        Args:
            features: one feature map of shape (B, in_channels[i], *spatial) per stage.
        """
        stages = zip(features, self.projections, self.codebooks, strict=True)
        return [codebook(projection(stage)) for stage, projection, codebook in stages]


class _StraightThrough(torch.autograd.Function):
    """Features and commitment in one node, so that backward needs no copy beyond the gradient itself."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, codes: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        features = F.embedding(indices, codes)
        ctx.save_for_backward(rows, features)
        ctx.scale = 2 * COMMITMENT_COST / rows.numel()
        return features, COMMITMENT_COST * F.mse_loss(features, rows)

    @staticmethod
    def backward(ctx: Any, grad_features: Tensor, grad_commitment: Tensor) -> tuple[Tensor, None, None]:
        rows, features = ctx.saved_tensors
        return torch.sub(rows, features).mul_(ctx.scale * grad_commitment).add_(grad_features), None, None


def _nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest to each row; ‖x‖² is the same for all codes and left out."""
    bias = codes.square().sum(1).mul(-0.5)
    chunk = max(1, CHUNK_BYTES.get(rows.device.type, 2**27) // (len(codes) * codes.element_size()))
    if torch.compiler.is_compiling():
        chunk = max(1, len(rows))  # a compiler would unroll the loop
    scores = rows.new_empty(min(chunk, len(rows)), len(codes))
    indices = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    for part, target in zip(rows.split(chunk), indices.split(chunk), strict=True):
        # max and not argmax, which is 1.6 times slower on CPU (torch 2.13).
        target.copy_(torch.addmm(bias, part, codes.t(), out=scores[: len(part)]).max(1).indices)
    return indices


def _spread_rows(rows: Tensor, num: int, shift: Tensor | int) -> Tensor:
    """`num` evenly spaced rows of the global batch, counted on from `shift`; the same on every rank."""
    sizes = torch.zeros(world_size(), dtype=torch.long, device=rows.device)
    sizes.narrow(0, rank(), 1).fill_(len(rows))  # `sizes[rank()] = ...` makes the host wait for the GPU
    total = _all_reduce(sizes).sum()
    wanted = (torch.arange(num, device=rows.device) * total // num + shift) % total - sizes[: rank()].sum()
    own = (wanted >= 0) & (wanted < len(rows))
    return _all_reduce(torch.where(own.unsqueeze(1), rows[wanted.clamp(0, len(rows) - 1)], 0))


def _all_reduce(tensor: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
