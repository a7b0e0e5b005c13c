"""Feature maps of encoders, stage by stage."""

from __future__ import annotations

from copy import deepcopy

import torch
from monai.networks.nets import ResNet, SegResNet
from torch import Tensor, nn

from dissect_monai.common import InputError
from dissect_monai.networks.optimizers import trained_part

PROBE_SIDE = 64  # a multiple of every stage's stride


def feature_maps(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Feature maps of every stage of a stock MONAI encoder, fine to coarse.

    A `ResNet` gives the outputs of its four residual layers, a network with `encode` (`SegResNet`) the maps of each
    level, and any other module must itself return a list of maps. Images are of shape (B, C, *spatial), maps of shape
    (B, C_i, *spatial_i).
    """
    if isinstance(encoder, ResNet):
        x = encoder.act(encoder.bn1(encoder.conv1(images)))
        maps = [encoder.layer1(x if encoder.no_max_pool else encoder.maxpool(x))]
        for layer in (encoder.layer2, encoder.layer3, encoder.layer4):
            maps.append(layer(maps[-1]))
        return maps
    encode = getattr(encoder, "encode", None)
    maps = encoder(images) if encode is None else encode(images)[1]
    if not isinstance(maps, (list, tuple)):
        raise InputError(
            f"`encoder` must be a MONAI ResNet, have `encode`, or return a list of feature maps, "
            f"got {type(encoder).__name__} returning {type(maps).__name__}."
        )
    return list(maps)


def stage_shapes(encoder: nn.Module, spatial_dims: int, in_channels: int) -> list[tuple[int, ...]]:
    """Shape (C_i, *spatial_i) of every stage's map of an image with sides of `PROBE_SIDE`."""
    # A copy, because its modules need not all be in one mode, nor on the CPU.
    with torch.no_grad():
        image = torch.zeros(1, in_channels, *[PROBE_SIDE] * spatial_dims)
        return [tuple(each.shape[1:]) for each in feature_maps(deepcopy(encoder).cpu().eval(), image)]


def pool(features: Tensor) -> Tensor:
    """Global average over the spatial axes: (B, C, *spatial) → (B, C) in float32."""
    return features.float().flatten(2).mean(-1)


class SegResNetEncoder(nn.Module):
    """The encoder of a `SegResNet` without its decoder, which would wait for a gradient that never comes.

    It uses the modules of the network and copies nothing; the keys of its state dict are those of the `SegResNet`, so
    that its weights load into one by key.
    """

    def __init__(self, segresnet: SegResNet) -> None:
        super().__init__()
        self.convInit = segresnet.convInit
        self.dropout = nn.Identity() if segresnet.dropout_prob is None else segresnet.dropout
        self.down_layers = segresnet.down_layers

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The bottleneck of images (B, in_channels, *spatial) and the maps of all levels, fine to coarse."""
        maps = [self.dropout(self.convInit(images))]
        for layer in self.down_layers:
            maps.append(layer(maps[-1]))
        return maps[-1], maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Pooled bottleneck of shape (B, C), as a headless `ResNet` returns it."""
        return pool(self.encode(images)[0])


def place_network(network: nn.Module, device: torch.device | str, mode: str = "scratch") -> nn.Module:
    """Move a network to a device, in place, with the weights of its convolutions in channels-last order.

    Returns what is to be trained: the network or, in the mode "linear_probe", its head alone, see `trained_part`.
    """
    is_3d = any(parameter.ndim == 5 for parameter in network.parameters())
    memory_format = torch.channels_last_3d if is_3d else torch.channels_last
    return trained_part(network.to(device, memory_format=memory_format), mode)  # type: ignore[call-overload]
