"""The pretraining network: an encoder, its multi-scale discrete bottleneck and its momentum target."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import log
from typing import Any, NamedTuple, cast

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.common import InputError
from dissect_monai.networks.encoders import feature_maps, pool, stage_shapes
from dissect_monai.networks.quantizers import EMACodebook, MultiScaleQuantizer, Quantized

FUSIONS = ("attention", "add", "concat", "replace")


class SSLOutput(NamedTuple):
    """What the pretraining network returns for V = 2·B views; read it by name."""

    predictions: Tensor  # (V, out_dim), of the continuous embedding: predictions, or projections without a target
    targets: Tensor | None  # (V, out_dim), target projection of the continuous embedding, no gradient
    discrete_predictions: Tensor  # (V, out_dim), the same two of the fused discrete embedding
    discrete_targets: Tensor | None
    quantized: list[Quantized]  # one per chosen stage, fine to coarse
    embedding: Tensor  # (V, C), pooled features of the last stage of the online encoder
    reconstruction: Tensor | None  # (V, in_channels, *spatial) in [0, 1], None without a decoder


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Projection or prediction head of BYOL (Grill et al., NeurIPS 2020, Sec. 3.3): linear, BN, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim),
    )


class Fusion(nn.Module):
    """Fuses the quantised map of one stage with the continuous map it was made from.

    Args:
        embedding_dim: channels D of both maps.
        mode: `attention` (the quantised map queries the continuous one), `add`, `concat` (back to D channels by a
            linear layer) or `replace` (the quantised map alone).
        num_heads: attention heads; D must be divisible by it.
    """

    def __init__(self, embedding_dim: int, mode: str = "attention", num_heads: int = 8) -> None:
        super().__init__()
        if mode not in FUSIONS:
            raise InputError(f"`fusion` must be one of {', '.join(FUSIONS)}, got {mode!r}.")
        if mode == "attention" and embedding_dim % num_heads:
            raise InputError(
                f"`embedding_dim` must be a multiple of the {num_heads} attention heads, got {embedding_dim}: "
                "change it or use another `fusion`."
            )
        self.mode = mode
        self.mix: nn.Module = nn.Identity()
        if mode == "attention":
            self.mix = nn.MultiheadAttention(embedding_dim, num_heads, batch_first=True)
        elif mode == "concat":
            self.mix = nn.Linear(2 * embedding_dim, embedding_dim)

    def forward(self, quantized: Tensor, projected: Tensor) -> Tensor:
        """Fuse two maps of shape (B, D, *spatial) into one of the same shape."""
        if self.mode == "replace":
            return quantized
        if self.mode == "add":
            return quantized + projected
        # Channels must become the last axis by a transpose: a view would mix positions with channels.
        query, value = quantized.flatten(2).transpose(1, 2), projected.flatten(2).transpose(1, 2)
        if isinstance(self.mix, nn.MultiheadAttention):
            tokens = query + self.mix(query, value, value, need_weights=False)[0]
        else:
            tokens = self.mix(torch.cat([query, value], dim=2))
        return tokens.transpose(1, 2).reshape_as(quantized)


class Decoder(nn.Module):
    """Reconstructs the image from the quantised maps alone, coarse to fine: all it sees went through the bottleneck."""

    def __init__(self, spatial_dims: int, embedding_dim: int, out_channels: int, num_scales: int) -> None:
        super().__init__()
        self.interpolation = {2: "bilinear", 3: "trilinear"}[spatial_dims]
        self.blocks = nn.ModuleList(
            Convolution(spatial_dims, embedding_dim, embedding_dim, norm="BATCH", act="RELU") for _ in range(num_scales)
        )
        self.refine = Convolution(spatial_dims, embedding_dim, embedding_dim // 2, norm="BATCH", act="RELU")
        self.head = Conv[Conv.CONV, spatial_dims](embedding_dim // 2, out_channels, kernel_size=3, padding=1)

    def forward(self, maps: Sequence[Tensor], image_size: Sequence[int]) -> Tensor:
        """Decode maps (B, embedding_dim, *spatial_i), fine to coarse, to an image (B, out_channels, *image_size)."""
        x = self.blocks[-1](maps[-1])
        for block, skip in zip(reversed(self.blocks[:-1]), reversed(maps[:-1]), strict=True):
            x = block(self._resize(x, skip.shape[2:]) + skip)
        # The last factor of 4 is split: at full resolution only the one-channel head runs.
        x = self.refine(self._resize(x, [max(1, size // 2) for size in image_size]))
        return self._resize(self.head(x), image_size).float().sigmoid()

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, size=tuple(size), mode=self.interpolation, align_corners=False)


class VQSSLNet(nn.Module):
    """Self-supervision with a multi-scale discrete bottleneck, in 2-D and 3-D.

    The online encoder's chosen stages are projected to a common width and quantised by one EMA codebook each; the
    quantised maps are fused with the continuous ones, pooled, weighted by the entropy of their codebook's use and
    concatenated to the discrete embedding. The continuous embedding is the pooled last stage. Both are projected for
    `VQSSLLoss`; for BYOL, a momentum target computes both for the other view, and predictors regress them.

    Args:
        encoder: stock MONAI `ResNet` or a network with `encode`, such as `SegResNetEncoder`; see `feature_maps`.
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        stages: stages to quantise, counted from 1, increasing; a ResNet's stages 2, 3, 4 have strides 8, 16, 32.
        num_embeddings: codes per codebook, one number for all or one per stage.
        embedding_dim: width D of the codes.
        metric: `cosine` or `euclidean` lookup.
        decay: EMA decay of the codebooks in [0, 1).
        fusion: `attention`, `add`, `concat` or `replace`; see `Fusion`.
        hidden_dim: width of the hidden layer of the heads.
        out_dim: width of the projections.
        decode: whether to build the decoder for the reconstruction term.
        predict: whether to build the predictors and the momentum target, which BYOL alone needs.

    Raises:
        ValueError: if `stages` is empty, not increasing, or names a stage that the encoder does not have.

    Reference:
        Singh and Mishra, DiSSECT, arXiv 2509.18765; Grill et al., BYOL, NeurIPS 2020. Independent implementation from
        the abstract and the method's described predecessors. Departures: the *online* features are quantised, so that
        the bottleneck trains the encoder; each embedding has its own projector; scale weights come from the EMA
        counts, which are equal on all ranks.
    """

    def __init__(
        self,
        encoder: nn.Module,
        spatial_dims: int = 2,
        in_channels: int = 1,
        stages: Sequence[int] = (2, 3, 4),
        num_embeddings: int | Sequence[int] = 256,
        embedding_dim: int = 64,
        metric: str = "cosine",
        decay: float = 0.99,
        fusion: str = "replace",
        hidden_dim: int = 4096,
        out_dim: int = 256,
        decode: bool = False,
        predict: bool = False,
    ) -> None:
        super().__init__()
        channels = [shape[0] for shape in stage_shapes(encoder, spatial_dims, in_channels)]
        if not stages or list(stages) != sorted(set(stages)) or stages[0] < 1 or stages[-1] > len(channels):
            raise InputError(
                f"`stages` must be increasing numbers from 1 to {len(channels)} (the encoder's stages), got {stages}."
            )
        self.stages = tuple(stages)
        self.quantizer = MultiScaleQuantizer(
            spatial_dims,
            [channels[stage - 1] for stage in stages],
            num_embeddings,
            embedding_dim,
            decay=decay,
            metric=metric,
        )
        self.fusions = nn.ModuleList(Fusion(embedding_dim, fusion) for _ in stages)
        widths = {"continuous": channels[-1], "discrete": embedding_dim * len(stages)}
        self.projectors = nn.ModuleDict({name: mlp(width, hidden_dim, out_dim) for name, width in widths.items()})
        self.predictors = nn.ModuleDict(
            {name: mlp(out_dim, hidden_dim, out_dim) if predict else nn.Identity() for name in self.projectors}
        )
        self.decoder = Decoder(spatial_dims, embedding_dim, in_channels, len(stages)) if decode else None
        self.encoder = encoder
        self.target = nn.ModuleDict(deepcopy(self._online())).requires_grad_(False) if predict else None

    @property
    def codebooks(self) -> list[EMACodebook]:
        """One codebook per chosen stage, fine to coarse; only online features in training mode move them."""
        return cast("list[EMACodebook]", list(self.quantizer.codebooks))

    def forward(self, images: Tensor) -> SSLOutput:
        """Embed V views, shape (V, in_channels, *spatial), float in [0, 1], with the online and the target network."""
        embedding, projections, quantized = self._project(self._online(), images, is_online=True)
        targets: dict[str, Tensor] = {}
        if self.target is not None:
            with torch.no_grad():
                _, targets, _ = self._project(self.target, images, is_online=False)
        predictions = {name: self.predictors[name](projection) for name, projection in projections.items()}
        reconstruction = None
        if self.decoder is not None:
            reconstruction = self.decoder([scale.features for scale in quantized], images.shape[2:])
        return SSLOutput(
            predictions=predictions["continuous"],
            targets=targets.get("continuous"),
            discrete_predictions=predictions["discrete"],
            discrete_targets=targets.get("discrete"),
            quantized=quantized,
            embedding=embedding.detach(),
            reconstruction=reconstruction,
        )

    def _online(self) -> dict[str, nn.Module]:
        """What the target follows: all of the online network but codebooks, predictors and decoder."""
        return {
            "encoder": self.encoder,
            "projections": self.quantizer.projections,
            "fusions": self.fusions,
            "heads": self.projectors,
        }

    def _project(
        self, branch: Any, images: Tensor, is_online: bool
    ) -> tuple[Tensor, dict[str, Tensor], list[Quantized]]:
        """Continuous embedding, projections of both embeddings, quantised stages: of the online network or target."""
        maps = feature_maps(branch["encoder"], images)
        quantized = []
        for codebook, projection, stage in zip(self.codebooks, branch["projections"], self.stages, strict=True):
            quantize = codebook if is_online else codebook.lookup  # the target must not move the codes
            quantized.append(quantize(projection(maps[stage - 1])))
        fused = [
            fusion(scale.features, scale.projected) for fusion, scale in zip(branch["fusions"], quantized, strict=True)
        ]
        pooled = [pool(scale) * weight for scale, weight in zip(fused, self.scale_weights(), strict=True)]
        embeddings = {"continuous": pool(maps[-1]), "discrete": torch.cat(pooled, dim=1)}
        projections = {name: branch["heads"][name](each) for name, each in embeddings.items()}
        return embeddings["continuous"], projections, quantized

    @torch.no_grad()
    def scale_weights(self) -> Tensor:
        """Weight of each scale, (num_stages,), mean 1: softmax of the relative entropy of its codebook's use."""
        entropies = []
        for codebook in self.codebooks:
            usage = codebook.ema_cluster_size / codebook.ema_cluster_size.sum().clamp(min=1e-12)
            entropies.append(torch.special.entr(usage).sum() / log(len(usage)))
        return torch.stack(entropies).softmax(0) * len(entropies)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target: target ← momentum·target + (1 − momentum)·online, with `momentum` in [0, 1]."""
        if self.target is None:
            raise InputError("the network has no target to move: set `predict`.")
        online: list[Tensor] = [parameter for part in self._online().values() for parameter in part.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), online, 1 - momentum)
