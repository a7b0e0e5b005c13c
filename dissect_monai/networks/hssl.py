"""The network of hierarchical self-supervision: a segmentation network with heads on its bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from monai.networks.layers.factories import Conv
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from dissect_monai.common import LEVELS, InputError
from dissect_monai.networks.encoders import pool


class HSSLOutput(NamedTuple):
    """What `HSSLNet` returns for V·B views; read it by name."""

    embedding: Tensor  # (V·B, C), pooled features of the bottleneck, no gradient
    embeddings: tuple[Tensor, ...]  # (V·B, out_dim) each, for the image, task and group level
    task_logits: Tensor  # (V·B, num_tasks)
    group_logits: Tensor  # (V·B, num_groups)
    reconstruction: Tensor  # (V·B, in_channels, *spatial), float32
    dense: Tensor | None = None  # (V·B, out_dim, *spatial / stride) of the bottleneck; None without its head


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
        dense: whether to build the head of the dense contrast.

    Raises:
        ValueError: if `segresnet` cannot reconstruct its input.

    Reference:
        Zheng et al., Hierarchical Self-Supervised Learning, MICCAI 2021 (arXiv 2107.04886). Independent implementation
        from the abstract; the width of the embeddings is that of Chen et al., SimCLR, ICML 2020, Sec. 2.1, and the
        heads are theirs, without batch normalisation: no embedding depends on the rest of the batch, so that several
        processes compute what one does.
    """

    def __init__(
        self,
        segresnet: SegResNet,
        num_tasks: int,
        num_groups: int,
        hidden_dim: int = 512,
        out_dim: int = 128,
        dense: bool = False,
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
        self.projectors = nn.ModuleDict({level: _mlp(nn.Linear, width, hidden_dim, out_dim) for level in LEVELS})
        self.task_classifier = nn.Linear(width, num_tasks)
        self.group_classifier = nn.Linear(width, num_groups)
        conv = partial(Conv[Conv.CONV, segresnet.spatial_dims], kernel_size=1)
        self.dense_projector = _mlp(conv, width, hidden_dim, out_dim) if dense else None

    def forward(self, images: Tensor) -> HSSLOutput:
        """Embed, classify and reconstruct views, (V·B, in_channels, *spatial) in [0, 1], of multiples of the stride."""
        features, maps = self.segresnet.encode(images)
        pooled = pool(features)
        return HSSLOutput(
            embedding=pooled.detach(),
            embeddings=tuple(projector(pooled) for projector in self.projectors.values()),
            task_logits=self.task_classifier(pooled),
            group_logits=self.group_classifier(pooled),
            reconstruction=self.segresnet.decode(features, maps[::-1]).float(),
            dense=None if self.dense_projector is None else self.dense_projector(features),
        )


def _mlp(layer: Callable[[int, int], nn.Module], in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(layer(in_dim, hidden_dim), nn.ReLU(inplace=True), layer(hidden_dim, out_dim))
