"""Segmentation networks: their start, and deep supervision."""

from __future__ import annotations

import math

import torch
from monai.networks.layers.factories import Conv
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from dissect_monai.common import InputError

PRIOR = 0.01


def init_class_prior(network: SegResNet) -> None:
    """Make an untrained network call every structure rare: each has a probability of 0.01 against the background.

    With the usual biases of zero each class starts with the same share of all voxels, which is far more than a
    structure has. The Dice loss then pushes all structures down, and those whose features are not told apart soon
    reach probabilities at which it has no gradient: they are never found. The biases of the last convolution are
    changed in place; its first output is the background.

    Reference:
        Lin et al., Focal loss for dense object detection, ICCV 2017, Sec. 3.3, of which the probability is.
    """
    _start_rare(network.conv_final[-1].conv.bias)


def _start_rare(biases: Tensor) -> None:
    with torch.no_grad():
        biases.fill_(math.log(PRIOR / (1 - PRIOR)))
        biases[0] = 0


def decoder_maps(segresnet: SegResNet, features: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """What the decoder of a `SegResNet` makes of what its `encode` returns, coarse to fine, each twice as fine."""
    decoded = []
    for upsample, layer, skip in zip(segresnet.up_samples, segresnet.up_layers, maps[-2::-1], strict=False):
        features = layer(upsample(features) + skip)
        decoded.append(features)
    return decoded


class DeepSupervisionNet(nn.Module):
    """A `SegResNet` that, while it trains, segments at coarser levels of its decoder, too.

    Each of these levels has a 1×1×1 convolution of its own, which is not part of `segresnet`: that is what to save.

    Args:
        segresnet: the network in 2-D or 3-D.
        num_heads: how many coarser levels have an output, from the finest on; at least 1 and fewer than the levels of
            the decoder.

    Raises:
        ValueError: if `num_heads` is out of range.

    Reference:
        Lee et al., Deeply-supervised nets, AISTATS 2015, Sec. 2.
    """

    def __init__(self, segresnet: SegResNet, num_heads: int) -> None:
        super().__init__()
        levels = len(segresnet.up_layers)
        if not 1 <= num_heads < levels:
            raise InputError(f"`num_heads` must be at least 1 and fewer than the {levels} levels, got {num_heads}.")
        self.segresnet = segresnet
        classes = segresnet.conv_final[-1].out_channels
        conv = Conv[Conv.CONV, segresnet.spatial_dims]
        # Level 0 is that of the output itself.
        heads = [conv(segresnet.init_filters * 2**level, classes, 1) for level in range(1, num_heads + 1)]
        for head in heads:
            _start_rare(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, *spatial); in training a list with those of coarser levels behind, each half as fine."""
        if not self.training:
            return self.segresnet(images)
        finest, *coarser = decoder_maps(self.segresnet, *self.segresnet.encode(images))[::-1]
        others = [head(each) for head, each in zip(self.heads, coarser, strict=False)]
        return [self.segresnet.conv_final(finest), *others]
