"""Encoders: MONAI's networks by name, and their feature maps, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from monai.networks import nets
from monai.networks.nets import DenseNet, EfficientNet, ResNet, SegResNet
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from dissect_monai.common import InputError

RESNETS = tuple(f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200) if hasattr(nets, f"resnet{depth}"))
SEGRESNET = "SegResNet"
ENCODERS = (*RESNETS, "densenet121", "efficientnet-b0", "swin", SEGRESNET)
HEADS = ("fc", "_fc", "class_layers.out")  # of a ResNet and of our own, of an EfficientNet, of a DenseNet
LAYERS = ("layer1", "layer2", "layer3", "layer4")  # stages of other networks that are built like ResNets
PROBE_SIDE = 64  # a multiple of every stage's stride
SHORTCUTS: dict[str, dict[str, Any]] = {  # arguments of MONAI's ResNet
    "biased": {}, "unbiased": {"bias_downsample": False}, "padded": {"shortcut_type": "A"},
}  # fmt: skip
NORMS = {  # mean and std of each of three channels in [0, 1]
    "none": ([0.0] * 3, [1.0] * 3),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "radimagenet": ([0.5] * 3, [0.5] * 3),  # Mei et al., RadImageNet, 2022, scale to [-1, 1]
}


def build_encoder(
    encoder: str,
    spatial_dims: int = 2,
    in_channels: int | None = 1,
    num_classes: int | None = None,
    init_filters: int = 16,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    pretrained_norm: str = "none",
    resnet_shortcuts: str = "biased",
) -> nn.Module:
    """A network of MONAI as an encoder or, with `num_classes`, as a classifier, untrained.

    Of images (B, 1 or in_channels, *spatial) in [0, 1] it returns pooled features (B, C), or logits (B, num_classes).
    Its four stages, see `feature_maps`, have strides of 4, 8, 16 and 32; those of a SegResNet start at 1.

    Args:
        encoder: a name of `ENCODERS`. "swin" is the transformer of a `SwinUNETR` of 48 features, with its keys.
        spatial_dims: 2 or 3.
        in_channels: of the first convolution; for several, an image of one channel is repeated. None is 1.
        num_classes: outputs of the head; None for an encoder without one.
        init_filters: of a SegResNet.
        blocks_down: of a SegResNet.
        pretrained_norm: a name of `NORMS`: how the network itself normalises images, see `normalise_first`.
        resnet_shortcuts: of a ResNet, a name of `SHORTCUTS`. Convolutions of torchvision, timm and MedicalNet are
            "unbiased"; MedicalNet's ResNet-18 and 34 have none and are "padded" with zeros.

    Raises:
        ValueError: if there is no such encoder, or "swin" lacks einops.
    """
    if resnet_shortcuts not in SHORTCUTS:
        raise InputError(f"`resnet_shortcuts` must be one of {', '.join(SHORTCUTS)}, got {resnet_shortcuts!r}.")
    shortcuts = SHORTCUTS[resnet_shortcuts]
    shape = {"init_filters": init_filters, "blocks_down": blocks_down}
    network = _build(encoder, spatial_dims, in_channels or 1, num_classes, shortcuts, shape)
    return normalise_first(network, in_channels or 1, pretrained_norm)


def encoder_of(settings: Mapping[str, Any], num_classes: int | None = None) -> nn.Module:
    """The encoder, untrained, that the settings beside weights describe.

    Raises:
        KeyError: if they name none.
        ValueError: if `build_encoder` has none of that name.
    """
    known = signature(build_encoder).parameters.keys() & settings.keys() - {"encoder", "num_classes"}
    return build_encoder(settings["encoder"], **{name: settings[name] for name in known}, num_classes=num_classes)


def _build(
    encoder: str,
    spatial_dims: int,
    in_channels: int,
    num_classes: int | None,
    shortcuts: dict[str, Any],
    shape: dict[str, Any],
) -> nn.Module:
    if encoder in RESNETS:
        head: dict[str, Any] = {"feed_forward": False} if num_classes is None else {"num_classes": num_classes}
        network = getattr(nets, encoder)
        return network(spatial_dims=spatial_dims, n_input_channels=in_channels, conv1_t_stride=2, **head, **shortcuts)
    if encoder == SEGRESNET:
        segresnet = SegResNet(spatial_dims, in_channels=in_channels, blocks_up=(), **shape)
        return SegResNetEncoder(segresnet, num_classes)
    if encoder == "swin":
        if find_spec("einops") is None:
            raise InputError(f"`encoder` {encoder} needs einops: pip install einops, or take another.")
        return SwinEncoder(spatial_dims, in_channels, num_classes)
    classes = 1 if num_classes is None else num_classes
    if encoder == "densenet121":
        densenet = nets.DenseNet121(spatial_dims, in_channels, classes)
        if num_classes is None:
            densenet.class_layers.out = nn.Identity()
        return densenet
    if encoder == "efficientnet-b0":
        efficientnet = nets.EfficientNetBN(encoder, False, False, spatial_dims, in_channels, classes)
        efficientnet.set_swish(memory_efficient=False)  # which TorchScript and ONNX do not know
        if num_classes is None:
            efficientnet._fc = nn.Identity()
        return efficientnet
    raise InputError(f"`encoder` must be one of {', '.join(ENCODERS)}, got {encoder!r}.")


class _First(nn.Module):
    """A first convolution that repeats an image of one channel, and normalises, before it pads with zeros."""

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, C, *spatial) of images (B, 1 or in_channels, *spatial) in [0, 1]."""
        if images.shape[1] == 1:
            images = images.expand([-1, self.in_channels] + [-1] * (images.dim() - 2))  # type: ignore[arg-type]
        return self._conv_forward((images - self.mean) / self.std, self.weight, self.bias)  # type: ignore[operator]


class FirstConv2d(_First, nn.Conv2d):
    """In 2-D."""


class FirstConv3d(_First, nn.Conv3d):
    """In 3-D."""


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d | nn.Conv3d]:
    """Name and module of the convolution that sees the images."""
    return next((name, each) for name, each in network.named_modules() if isinstance(each, (nn.Conv2d, nn.Conv3d)))


def channel_norm(norm: str, channels: int) -> tuple[list[float], list[float]]:
    """Mean and std of each channel; those of networks that see other than three are the average of the three."""
    if norm not in NORMS:
        raise InputError(f"`pretrained_norm` must be one of {', '.join(NORMS)}, got {norm!r}.")
    means, stds = NORMS[norm]
    return (means, stds) if channels == 3 else ([sum(means) / 3] * channels, [sum(stds) / 3] * channels)


def normalise_first(network: nn.Module, in_channels: int, norm: str) -> nn.Module:
    """Let a network normalise its images, and repeat those of one channel if it sees several; its keys stay.

    So it is the same in training, evaluation and every export, and zeros are padded to normalised images, as where the
    weights come from.
    """
    means, stds = channel_norm(norm, in_channels)
    if in_channels > 1 or norm != "none":
        conv: Any = first_convolution(network)[1]
        conv.__class__ = FirstConv2d if isinstance(conv, nn.Conv2d) else FirstConv3d
        conv.norm = norm
        for name, values in (("mean", means), ("std", stds)):
            shaped = torch.tensor(values).view(1, -1, *[1] * (conv.weight.ndim - 2))
            conv.register_buffer(name, shaped, persistent=False)
    return network


def stages_of(encoder: Any) -> list[list[nn.Module]]:
    """The stem of an encoder, then its stages, each as modules that follow one another.

    Of a network that is none of `build_encoder` the stem is unknown, and the stages are what is called as in a ResNet.
    """
    if isinstance(encoder, ResNet):
        pooling = [] if encoder.no_max_pool else [encoder.maxpool]
        stem, first = [encoder.conv1, encoder.bn1, encoder.act], [*pooling, encoder.layer1]
        return [stem, first, [encoder.layer2], [encoder.layer3], [encoder.layer4]]
    if isinstance(encoder, DenseNet):
        parts: Any = encoder.features
        return [
            [parts.conv0, parts.norm0, parts.relu0],
            [parts.pool0, parts.denseblock1],
            [parts.transition1, parts.denseblock2],
            [parts.transition2, parts.denseblock3],
            [parts.transition3, parts.denseblock4, parts.norm5, encoder.class_layers.relu],
        ]
    if isinstance(encoder, EfficientNet):
        blocks, swish = list(encoder._blocks), encoder._swish
        stem = [encoder._conv_stem_padding, encoder._conv_stem, encoder._bn0, swish]
        top = [encoder._conv_head_padding, encoder._conv_head, encoder._bn1, swish]
        # A stage ends before the next stride.
        return [[*stem, blocks[0]], [blocks[1]], [blocks[2]], blocks[3:5], [*blocks[5:], *top]]
    if isinstance(encoder, SwinTransformer):
        layers = (encoder.layers1, encoder.layers2, encoder.layers3, encoder.layers4)
        return [[encoder.patch_embed, encoder.pos_drop], *([*each] for each in layers)]
    if isinstance(encoder, SegResNetEncoder):
        return [[encoder.convInit, encoder.dropout], *([each] for each in encoder.down_layers)]
    return [[], *([child] for name, child in encoder.named_children() if name in LAYERS)]


def stage_names(network: nn.Module) -> list[str]:
    """Names of the modules that end the stages, fine to coarse: of each the last that is not an activation."""
    names = {module: name for name, module in network.named_modules()}
    return [names[([each for each in stage if [*each.parameters()]] or stage)[-1]] for stage in stages_of(network)[1:]]


def head_name(network: nn.Module) -> str:
    """Name of the linear layer that classifies; that of a ResNet if there is none."""
    modules = dict(network.named_modules())
    return next((name for name in HEADS if isinstance(modules.get(name), nn.Linear)), HEADS[0])


def stem_and_stages(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Maps of the stem and of every stage, each (B, C_i, *spatial_i), fine to coarse; none of an unknown network."""
    if isinstance(encoder, SwinTransformer):
        return SwinTransformer.forward(encoder, images)  # with its normalisation, which is no module
    maps, stages = [], stages_of(encoder)
    for modules in stages if stages[0] else []:
        for module in modules:
            images = module(images)
        maps.append(images)
    return maps


def feature_maps(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Feature maps of every stage of an encoder, fine to coarse, without that of the stem.

    A network with `encode` (`SegResNet`) gives the maps of each level, and one that is none of `build_encoder` must
    itself return a list of maps. Images are of shape (B, C, *spatial), maps of shape (B, C_i, *spatial_i).
    """
    if maps := stem_and_stages(encoder, images):
        return maps[1:]
    encode = getattr(encoder, "encode", None)
    found = encoder(images) if encode is None else encode(images)[1]
    if not isinstance(found, (list, tuple)):
        raise InputError(
            f"`encoder` must be one of ours, have `encode`, or return a list of feature maps, "
            f"got {type(encoder).__name__} returning {type(found).__name__}."
        )
    return list(found)


def stage_shapes(
    encoder: nn.Module,
    spatial_dims: int,
    in_channels: int,
    maps_of: Callable[[nn.Module, Tensor], list[Tensor]] = feature_maps,
) -> list[tuple[int, ...]]:
    """Shape (C_i, *spatial_i) of every map of an image with sides of `PROBE_SIDE`."""
    # A copy, because its modules need not all be in one mode, nor on the CPU. Ours need not be computed.
    device = "meta" if stages_of(encoder)[0] else "cpu"
    with torch.no_grad():
        image = torch.zeros(1, in_channels, *[PROBE_SIDE] * spatial_dims, device=device)
        return [tuple(each.shape[1:]) for each in maps_of(deepcopy(encoder).to(device).eval(), image)]


def pool(features: Tensor) -> Tensor:
    """Global average over the spatial axes: (B, C, *spatial) → (B, C) in float32."""
    return features.float().flatten(2).mean(-1)


class SegResNetEncoder(nn.Module):
    """The encoder of a `SegResNet` without its decoder, which would wait for a gradient that never comes.

    It uses the modules of the network and copies nothing; the keys of its state dict are those of the `SegResNet`, so
    that its weights load into one by key. With `num_classes` it has a head `fc`.
    """

    def __init__(self, segresnet: SegResNet, num_classes: int | None = None) -> None:
        super().__init__()
        self.convInit = segresnet.convInit
        self.dropout = nn.Identity() if segresnet.dropout_prob is None else segresnet.dropout
        self.down_layers = segresnet.down_layers
        self.fc = _head(segresnet.init_filters * 2 ** (len(segresnet.down_layers) - 1), num_classes)

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The bottleneck of images (B, in_channels, *spatial) and the maps of all levels, fine to coarse."""
        maps = [self.dropout(self.convInit(images))]
        for layer in self.down_layers:
            maps.append(layer(maps[-1]))
        return maps[-1], maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Pooled bottleneck of shape (B, C), as a headless `ResNet` returns it, or logits (B, num_classes)."""
        return self.fc(pool(self.encode(images)[0]))


class SwinEncoder(SwinTransformer):
    """The transformer of MONAI's `SwinUNETR` of 48 features, as an encoder; a head `fc` with `num_classes`.

    Reference:
        Hatamizadeh et al., Swin UNETR, BrainLes 2021, Sec. 3.1; Tang et al., Self-supervised pre-training of Swin
        transformers for 3D medical image analysis, CVPR 2022, of which the 48 features are.
    """

    def __init__(self, spatial_dims: int = 3, in_channels: int = 1, num_classes: int | None = None) -> None:
        super().__init__(
            in_channels, 48, [7] * spatial_dims, [2] * spatial_dims, (2, 2, 2, 2), (3, 6, 12, 24),
            spatial_dims=spatial_dims,
        )  # fmt: skip
        self.fc = _head(2 * self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled last map of shape (B, 768), or logits (B, num_classes)."""
        return self.fc(pool(super().forward(images)[-1]))


def _head(width: int, num_classes: int | None) -> nn.Module:
    return nn.Identity() if num_classes is None else nn.Linear(width, num_classes)
