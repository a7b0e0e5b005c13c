"""Published weights of others, in and out: their key names, and what their networks do otherwise than ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from monai.networks.nets import DenseNet, ResNet, SegResNet
from monai.networks.nets.resnet import resnet_params
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from dissect_monai.common import InputError, shorten
from dissect_monai.networks.encoders import SEGRESNET, SegResNetEncoder, channel_norm, first_convolution

HEADS = (
    "fc", "classifier", "class_layers", "head", "heads", "last_linear", "conv_seg", "projector", "projection_head",
    "prediction_head", "predictor", "prototypes", "op_threshs",
)  # fmt: skip
SWIN_HEADS = ("norm", "mask_token", "rotation_head", "rotation_pre", "contrastive_head", "contrastive_pre", "conv")


class Layout(NamedTuple):
    """How others name the tensors of one of MONAI's encoders."""

    name: str
    kinds: tuple[type[nn.Module], ...]  # MONAI's classes
    marker: str  # a key of MONAI that every such network has
    spelling: tuple[tuple[str, str], ...] = ()  # patterns and replacements that make their key of MONAI's
    heads: tuple[str, ...] = HEADS  # first names of keys that are left out
    prefix: str = ""  # of the encoder in their network

    def spell(self, key: str) -> str:
        """Their name of one of MONAI's keys."""
        for pattern, replacement in self.spelling:
            key = re.sub(pattern, replacement, key)
        return key


_RESNET = (ResNet,), "layer1.0.conv1.weight"
_DENSENET = (DenseNet,), "features.denseblock1.denselayer1.layers.conv1.weight"
_SWIN = (SwinTransformer,), "layers1.0.blocks.0.mlp.linear1.weight"
_CLASSIFIER = (r"^class_layers\.out\.", "classifier.")
_CHILDREN = ((r"^conv1\.", "0."), (r"^bn1\.", "1."), *((rf"^layer{n}\.", f"{n + 3}.") for n in range(1, 5)))

LAYOUTS = (
    Layout("ResNet of torchvision, timm or MedicalNet", *_RESNET),
    Layout("ResNet in an nn.Sequential, as RadImageNet's", *_RESNET, (*_CHILDREN, (r"^fc\.", "9.")), (*HEADS, "9")),
    Layout("DenseNet of torchvision or timm", *_DENSENET, ((r"\.layers\.", "."), _CLASSIFIER)),
    Layout("DenseNet of older torchvision", *_DENSENET, ((r"\.layers\.([a-z]+)(\d)", r".\1.\2"), _CLASSIFIER)),
    Layout("DenseNet in an nn.Sequential, as RadImageNet's", *_DENSENET,
           ((r"\.layers\.", "."), (r"^features\.", "0."), (r"^class_layers\.out\.", "1.")), (*HEADS, "1")),
    Layout("Swin transformer of MONAI's self-supervision", *_SWIN, ((r"\.linear(\d)\.", r".fc\1."),), SWIN_HEADS),
    Layout("Swin transformer of MONAI's tutorial", *_SWIN, ((r"^(layers\d\.0)\.", r"\1.0."),), SWIN_HEADS),
    Layout("Swin transformer of a SwinUNETR", *_SWIN, (), SWIN_HEADS, "swinViT."),
    Layout("SegResNet of MONAI", (SegResNet, SegResNetEncoder), "convInit.conv.weight", (), ()),
)  # fmt: skip
OWN_PREFIXES = ("", "encoder.")  # of weights that a bundle left, which need the JSON beside them
PREFERRED = ("teacher", "encoder_q", "online", "query")  # of several networks in a file


class Published(NamedTuple):
    """An encoder of others, as it was found in a file."""

    layout: Layout
    settings: dict[str, Any]  # its `encoder`, `spatial_dims`, `layout`, and the shortcuts of a ResNet
    tensors: dict[str, Tensor]  # by their keys, without the prefix
    left: dict[str, int]  # parts of the file that are not taken, with the number of their tensors

    def weights_for(self, encoder: nn.Module, path: object) -> dict[str, Tensor]:
        """The tensors by MONAI's keys; what the encoder has not keeps its key.

        Raises:
            ValueError: if they are of another kind of network.
        """
        if not isinstance(encoder, self.layout.kinds):
            raise InputError(
                f"{path} must hold weights of a {type(encoder).__name__}, got a {self.layout.name}: set `encoder` to "
                f"{self.settings['encoder']}, where it can be chosen, or give other weights."
            )
        own = encoder.state_dict()
        keys = {self.layout.spell(key): key for key in own}
        state = {keys.get(key, key): value for key, value in self.tensors.items()}
        # Older files do not count batches, and nothing reads the count.
        counts = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
        return sum_first_convolution(encoder, counts | state)


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries and lists, with the path to each in dots."""
    items = enumerate(content) if isinstance(content, (list, tuple)) else ()
    for key, value in content.items() if isinstance(content, Mapping) else items:
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from flatten(value, f"{prefix}{key}.")


def recognise(content: Mapping[str, Any], path: object) -> Published | None:
    """The encoder of others in the content of a file; None if there is none, or weights that a bundle has left.

    Args:
        content: of the file, in which tensors may lie in dictionaries of dictionaries.
        path: of the file, for messages.

    Raises:
        ValueError: if there are several, or a ResNet that MONAI has not.
    """
    if {"trainer", "settings"} <= content.keys():  # a checkpoint of ours
        return None
    state = dict(flatten(content))
    for layout in LAYOUTS:
        marker = layout.spell(layout.marker)
        if prefixes := [key[: -len(marker)] for key in state if f".{key}".endswith(f".{marker}")]:
            return _published(layout, state, _chosen(prefixes, path), path)
    return None


def _published(layout: Layout, state: Mapping[str, Tensor], prefix: str, path: object) -> Published | None:
    tensors, left = {}, Counter[str]()
    for key, value in state.items():
        own = key.removeprefix(prefix)
        if key.startswith(prefix) and own.split(".")[0] not in layout.heads:
            tensors[own] = value
        else:
            left[_branch(key, prefix)] += 1
    settings: dict[str, Any] = {
        "layout": layout.name,
        "spatial_dims": max(value.ndim for value in tensors.values()) - 2,
    }
    if ResNet in layout.kinds:
        if layout.spell("layer2.0.downsample.0.bias") in tensors:
            return None
        has_convolution = layout.spell("layer2.0.downsample.0.weight") in tensors
        settings["resnet_shortcuts"] = "unbiased" if has_convolution else "padded"
        return Published(layout, {"encoder": _resnet(layout, tensors, path), **settings}, tensors, dict(left))
    if not layout.spelling and prefix in OWN_PREFIXES:
        return None
    if SegResNet in layout.kinds:
        settings["init_filters"] = len(tensors[layout.marker])
        for name in ("down", "up"):
            blocks = Counter(
                key.split(".")[1] for key in tensors if re.match(rf"{name}_layers\.\d+\.\d+\.conv1\.", key)
            )
            settings |= {f"blocks_{name}": [*blocks.values()]} if blocks else {}
    encoder = "swin" if SwinTransformer in layout.kinds else "densenet121" if DenseNet in layout.kinds else SEGRESNET
    return Published(layout, {"encoder": encoder, **settings}, tensors, dict(left))


def _chosen(prefixes: list[str], path: object) -> str:
    prefixes = [prefix for prefix in prefixes if "momentum" not in prefix] or prefixes  # as of MoCo v3
    preferred = [prefix for word in PREFERRED for prefix in prefixes if word in prefix]
    if len(prefixes) > 1 and not preferred:
        raise InputError(
            f"{path} must hold one encoder, got {len(prefixes)}, {shorten(prefixes, 5)}: save the one that you mean in "
            "a file of its own."
        )
    return [*preferred, *prefixes][0]


def _branch(key: str, prefix: str) -> str:
    """The part of a file in which a key lies: as much of it as the prefix has, and one name more."""
    names, of_prefix = key.split("."), [*prefix.split(".")[:-1], ""]
    common = next((i for i, (one, other) in enumerate(zip(names, of_prefix, strict=False)) if one != other), -1)
    return ".".join(names[: common + 1] or names)


def _resnet(layout: Layout, tensors: Mapping[str, Tensor], path: object) -> str:
    """The name of a ResNet, by its blocks."""
    stages = [layout.spell(f"layer{stage}.") for stage in range(1, 5)]
    blocks = [len({key.split(".")[1] for key in tensors if key.startswith(stage)}) for stage in stages]
    kind = "bottleneck" if f"{stages[0]}0.conv3.weight" in tensors else "basic"
    found = [name for name, (block, layers, *_) in resnet_params.items() if (block, layers) == (kind, blocks)]
    if not found:
        raise InputError(f"{path} must hold one of {', '.join(resnet_params)}, got a ResNet of {blocks} {kind} blocks.")
    return found[0]


def sum_first_convolution(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a first convolution of three channels for a network that sees one: exact away from the borders.

    Image channels that are equal are one: the kernels add up. Where each was normalised by a mean and a std of its own,
    kernels are weighed, and what is left goes into the bias or the mean of the batch norm behind.
    """
    name, conv = first_convolution(network)
    kernel = state.get(f"{name}.weight")
    if kernel is None or kernel.ndim != conv.weight.ndim or (conv.in_channels, kernel.shape[1]) != (1, 3):
        return state
    norm = getattr(conv, "norm", "none")
    (mean,), (std,) = channel_norm(norm, 1)
    sums = kernel.double().flatten(2).sum(2).unbind(1)
    parts = [*zip(kernel.float().unbind(1), sums, *channel_norm(norm, 3), strict=True)]
    weighed = [each * (std / own) for each, _, _, own in parts]
    summed = (weighed[0] + weighed[1] + weighed[2]).unsqueeze(1)
    offset = torch.stack([each * (mean - own) / scale for _, each, own, scale in parts]).sum(0)
    # To its bias, or taken off the mean of the batch norm behind it.
    bias, mean_behind = f"{name}.bias", f"{name.replace('conv', 'norm' if '.' in name else 'bn')}.running_mean"
    shifted = {bias: 1, mean_behind: -1}.items()
    found = {key: (state[key] + sign * offset).float() for key, sign in shifted if key in state}
    if not found and offset.any():
        raise InputError(f"the means of three channels need a bias behind {name}: set `in_channels` to 3.")
    return state | {f"{name}.weight": summed} | found


def layout_of(encoder: nn.Module) -> Layout:
    """The layout in which an encoder is published: the first, and of a Swin transformer that of a `SwinUNETR`.

    Raises:
        ValueError: if nobody but MONAI has such a network.
    """
    for layout in (*(each for each in LAYOUTS if each.prefix), *LAYOUTS[:-1]):
        if isinstance(encoder, layout.kinds):
            return layout
    raise InputError(f"a {type(encoder).__name__} is of MONAI alone, whose class loads model.pt as it is.")


def publish(encoder: nn.Module, in_channels: int | None = None) -> dict[str, Tensor]:
    """Tensors of an encoder, or of a classifier, by the keys of `layout_of`: the same outputs in their network.

    Biases of shortcuts, which others have not, go into the batch norm behind them. Images are normalised outside, as
    `channel_norm` says for the channels of the encoder; the three of a grey image alike.

    Args:
        encoder: of `build_encoder`, in any mode.
        in_channels: 3 to write a first convolution of one channel for the three equal channels of a grey image; None
            for as many as it has.
    """
    layout, state = layout_of(encoder), dict(encoder.state_dict())
    for key in [key for key in state if key.endswith("downsample.0.bias")]:
        mean = key.replace("0.bias", "1.running_mean")
        state[mean] = state[mean] - state.pop(key)
    name, conv = first_convolution(encoder)
    if in_channels == 3 and conv.in_channels == 1:
        third = conv.weight.data / 3
        # The last takes what is left by rounding, so that they add up to the same bits.
        state[f"{name}.weight"] = torch.cat([third, third, conv.weight.data - 2 * third], 1)
    elif in_channels not in (None, conv.in_channels):
        raise InputError(f"`in_channels` must be {conv.in_channels}, as the network has, or 3 of 1, got {in_channels}.")
    return {f"{layout.prefix}{layout.spell(key)}": value.contiguous() for key, value in state.items()}
