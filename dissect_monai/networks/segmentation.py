"""Segmentation networks: a SegResNet or any encoder with a decoder, their start, and deep supervision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers.factories import Conv
from monai.networks.nets import SegResNet
from monai.networks.nets.flexible_unet import SegmentationHead, UNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.common import InputError
from dissect_monai.networks.encoders import SEGRESNET, build_encoder, normalise_first, stage_shapes, stem_and_stages

PRIOR = 0.01
STRIDE = 32  # of the last stage of an encoder
DECODER_CHANNELS = (256, 128, 64, 32, 16)  # of MONAI's FlexibleUNet


class EncoderDecoder(nn.Module):
    """An encoder of `build_encoder` but SegResNet and MONAI's decoder of a `FlexibleUNet`, in 2-D and 3-D.

    The decoder gets the maps of the stem and of every stage. Images whose sides are no multiples of 32 are padded with
    zeros behind, and the logits cropped. Keys of the state dict begin with `encoder`, `decoder` or `head`.
    """

    def __init__(self, encoder: nn.Module, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.encoder = encoder
        channels = [shape[0] for shape in stage_shapes(encoder, spatial_dims, in_channels, stem_and_stages)]
        self.decoder = UNetDecoder(
            spatial_dims, (in_channels, *channels), DECODER_CHANNELS, act=("relu", {"inplace": True}), norm="batch",
            dropout=0.0, bias=False, upsample="nontrainable", pre_conv="default", interp_mode="nearest",
            align_corners=None, is_pad=False,
        )  # fmt: skip
        self.head = SegmentationHead(spatial_dims, DECODER_CHANNELS[-1], out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, out_channels, *spatial) of images (B, in_channels, *spatial)."""
        size = images.shape[2:]
        behind = [-side % STRIDE for side in reversed(size)]  # F.pad starts with the last axis
        maps = stem_and_stages(self.encoder, F.pad(images, [each for side in behind for each in (0, side)]))
        inside: tuple[Any, ...] = (..., *(slice(side) for side in size))
        return self.head(self.decoder(maps, len(maps) - 1))[inside]


def build_segmentation(
    encoder: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    init_filters: int = 16,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] = (1, 1, 1),
    pretrained_norm: str = "none",
    resnet_shortcuts: str = "biased",
) -> SegResNet | EncoderDecoder:
    """A network that segments, untrained: MONAI's `SegResNet`, or an `EncoderDecoder` of another encoder.

    Filters and blocks are those of a SegResNet; the others are described at `build_encoder`.
    """
    if encoder == SEGRESNET:
        segresnet = SegResNet(
            spatial_dims, init_filters, in_channels, out_channels, blocks_down=blocks_down, blocks_up=blocks_up
        )
        normalise_first(segresnet, in_channels, pretrained_norm)
        return segresnet
    network = build_encoder(
        encoder, spatial_dims, in_channels, pretrained_norm=pretrained_norm, resnet_shortcuts=resnet_shortcuts
    )
    return EncoderDecoder(network, spatial_dims, in_channels, out_channels)


def init_class_prior(network: SegResNet | EncoderDecoder) -> None:
    """Make an untrained network call every structure rare: each has a probability of 0.01 against the background.

    With the usual biases of zero each class starts with the same share of all voxels, which is far more than a
    structure has. The Dice loss then pushes all structures down, and those whose features are not told apart soon
    reach probabilities at which it has no gradient: they are never found. The biases of the last convolution are
    changed in place; its first output is the background.

    Reference:
        Lin et al., Focal loss for dense object detection, ICCV 2017, Sec. 3.3, of which the probability is.
    """
    _start_rare((network.head[0] if isinstance(network, EncoderDecoder) else network.conv_final[-1].conv).bias)


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
        ValueError: if `num_heads` is out of range, or the network is no SegResNet.

    Reference:
        Lee et al., Deeply-supervised nets, AISTATS 2015, Sec. 2.
    """

    def __init__(self, segresnet: SegResNet, num_heads: int) -> None:
        super().__init__()
        if not isinstance(segresnet, SegResNet):
            raise InputError(f"`deep_supervision` needs `encoder` {SEGRESNET}, got another: set it to 0.")
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
