"""The network of hierarchical self-supervision: a segmentation network with heads on its bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from monai.networks.layers.factories import Conv
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from dissect_monai.common import LEVELS, InputError, gather_rows, rank, world_size
from dissect_monai.networks.encoders import pool
from dissect_monai.networks.segmentation import decoder_maps


class HSSLOutput(NamedTuple):
    """What `HSSLNet` returns for V·B views; read it by name."""

    embedding: Tensor  # (V·B, C), pooled features of the bottleneck, no gradient
    embeddings: tuple[Tensor, ...]  # (V·B, out_dim) each, for the image, task and group level
    task_logits: Tensor  # (V·B, num_tasks)
    group_logits: Tensor  # (V·B, num_groups)
    reconstruction: Tensor  # (V·B, in_channels, *spatial), float32
    position: Tensor | None = None  # (V·B, out_dim), for the contrast of the places of slices; None without its head
    dense: Tensor | None = None  # (V·B, out_dim, *spatial / stride) of a map of the decoder; None without its head


class JointBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of vectors (N, C) by the statistics of all processes, on any device.

    The pooled features of a `SegResNet` share most of their direction. Without this, contrasts of them stand still for
    hundreds of steps.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise rows, in float32."""
        rows = rows.float()
        if not self.training or world_size() == 1:
            return super().forward(rows)
        joined = super().forward(gather_rows(rows, complete=False))
        return joined[rank() * len(rows) : (rank() + 1) * len(rows)]


class HSSLNet(nn.Module):
    """Pretrains all of a `SegResNet`: its encoder by contrast and classification, with its decoder by reconstruction.

    The pooled bottleneck feeds one projection head per level and the linear classifiers of task and group; the output
    of the `SegResNet` itself is the reconstruction. So `segresnet`, which is what to save, loads key for key into a
    `SegResNet` of other output channels but for the last convolution, `conv_final.2`, which is made small here:
    load weights to go on from afterwards.

    Args:
        segresnet: the network in 2-D or 3-D, with as many output as input channels.
        num_tasks: of the first classifier.
        num_groups: of the second.
        hidden_dim: width of the hidden layer of the projection heads.
        out_dim: width of the embeddings.
        position: whether to build the head of the contrast of places.
        dense_level: the map that the head of the dense contrast sees: 0 the bottleneck, 1 the first map of the decoder,
            twice as fine, and so on; None builds none.

    Raises:
        ValueError: if `segresnet` cannot reconstruct its input, or has no map `dense_level`.

    Reference:
        Zheng et al., Hierarchical Self-Supervised Learning, MICCAI 2021 (arXiv 2107.04886). Independent implementation
        from the abstract; the width of the embeddings is that of Chen et al., SimCLR, ICML 2020, Sec. 2.1, and so are
        the heads. Departure: features are normalised over the batch before them, see `JointBatchNorm`.
    """

    def __init__(
        self,
        segresnet: SegResNet,
        num_tasks: int,
        num_groups: int,
        hidden_dim: int = 512,
        out_dim: int = 128,
        position: bool = False,
        dense_level: int | None = None,
    ) -> None:
        super().__init__()
        out_channels = segresnet.conv_final[-1].out_channels
        if out_channels != segresnet.in_channels:
            raise InputError(
                "`segresnet` must reconstruct its input, with as many output as input channels, got "
                f"{out_channels} and {segresnet.in_channels}; set `out_channels`."
            )
        width = segresnet.init_filters * 2 ** (len(segresnet.down_layers) - 1)
        self.segresnet = segresnet
        # A random layer draws something of twenty times the variance of an image, to be unlearnt in a hundred steps.
        for parameter in segresnet.conv_final[-1].parameters():
            parameter.data.mul_(0.1)
        self.norm = JointBatchNorm(width, affine=False)
        self.projectors = nn.ModuleDict({level: _mlp(nn.Linear, width, hidden_dim, out_dim) for level in LEVELS})
        self.position_projector = _mlp(nn.Linear, width, hidden_dim, out_dim) if position else None
        self.task_classifier = nn.Linear(width, num_tasks)
        self.group_classifier = nn.Linear(width, num_groups)
        self.dense_level, self.dense_projector = dense_level or 0, None
        if dense_level is not None:
            finest = len(segresnet.up_layers)
            if not 0 <= dense_level <= finest:
                raise InputError(f"`dense_level` must be from 0 to {finest}, a map of the decoder, got {dense_level}.")
            conv = partial(Conv[Conv.CONV, segresnet.spatial_dims], kernel_size=1)
            self.dense_projector = _mlp(conv, width // 2**dense_level, hidden_dim, out_dim)

    def forward(self, images: Tensor) -> HSSLOutput:
        """Embed, classify and reconstruct views, (V·B, in_channels, *spatial) in [0, 1], of multiples of the stride."""
        features, maps = self.segresnet.encode(images)
        pooled = pool(features)
        normalised = self.norm(pooled)
        decoded = [features, *decoder_maps(self.segresnet, features, maps)]
        return HSSLOutput(
            embedding=pooled.detach(),
            embeddings=tuple(projector(normalised) for projector in self.projectors.values()),
            task_logits=self.task_classifier(normalised),
            group_logits=self.group_classifier(normalised),
            reconstruction=self.segresnet.conv_final(decoded[-1]).float(),
            position=None if self.position_projector is None else self.position_projector(normalised),
            dense=None if self.dense_projector is None else self.dense_projector(decoded[self.dense_level]),
        )


def _mlp(layer: Callable[[int, int], nn.Module], in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(layer(in_dim, hidden_dim), nn.ReLU(inplace=True), layer(hidden_dim, out_dim))
