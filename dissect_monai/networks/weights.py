"""Plain weights and what they depend on: files that other runs and other bundles load."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.networks.nets import SegResNet
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dissect_monai.common import InputError, shorten
from dissect_monai.networks.encoders import ENCODERS, HEADS, first_convolution, head_name
from dissect_monai.networks.published import Published, flatten, recognise
from dissect_monai.networks.segmentation import EncoderDecoder
from dissect_monai.writing import load_whole, save_atomically, written_atomically

logger = logging.getLogger(__name__)
CONVERT = (
    "{path} must hold tensors alone, got {name}: to load it is to run its code. If you trust it, turn it into plain.pt "
    "by these two lines of Python, where the packages of its code are installed:\n"
    "    import torch; plain = lambda x: x if torch.is_tensor(x) else plain(x.state_dict()) if "
    'hasattr(x, "state_dict") else {{k: plain(v) for k, v in x.items()}} if isinstance(x, dict) else {{}}\n'
    '    torch.save(plain(torch.load({path!r}, map_location="cpu", weights_only=False)), "plain.pt")'
)
DAMAGED = "copy it again, or give another"
TRAIN_FIRST = "train first, or give the right `pretrained`"
HEAD_KEYS = [{f"{head}.weight", f"{head}.bias"} for head in HEADS]  # of a network that classifies
SEGRESNET_ENCODER = ("convInit.", "down_layers.")
SEGRESNET_DECODER = ("up_layers.", "up_samples.", "conv_final.")
LAST_LAYER = "conv_final.2."  # of a SegResNet, whose outputs are classes, or the image itself
SEGRESNET_SHAPE = ("init_filters", "blocks_down", "blocks_up")
SEGRESNET_REMEDY = (
    "Is it a SegResNet of the same spatial_dims, init_filters, blocks, input and output channels, as the JSON beside "
    "the weights says, and no checkpoint? Weights of an encoder alone have the keys convInit and down_layers."
)


class Parts(NamedTuple):
    """How the keys of a segmentation network begin."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    last_layer: str


SEGMENTATION: dict[type[nn.Module], Parts] = {
    SegResNet: Parts(SEGRESNET_ENCODER, SEGRESNET_DECODER, LAST_LAYER),
    EncoderDecoder: Parts(("encoder.",), ("decoder.", "head."), "head."),
}


def save_weights(weights: nn.Module | Mapping[str, Any], path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a plain state dict, and beside it as JSON what it depends on: `models/model.pt` and `models/model.json`."""
    with written_atomically(Path(path).with_suffix(".json")) as file:
        file.write((json.dumps(settings, indent=4) + "\n").encode())
    save_atomically(weights.state_dict() if isinstance(weights, nn.Module) else dict(weights), path)


def read_settings(weights_path: str | Path | None, patches: bool = True) -> dict[str, Any]:
    """What the weights at a path depend on, as `TrainingCheckpoint` wrote it beside them; nothing without weights.

    Of published weights it is their encoder, see `recognise`. Other weights without settings, or with some that are no
    JSON object or of an unknown encoder, are refused, and without `patches` those of patches of volumes.
    """
    if not weights_path:
        return {}
    path = Path(weights_path).with_suffix(".json")
    if not path.is_file():
        if not Path(weights_path).is_file():
            return {}
        if published := recognise(load_torch(weights_path, TRAIN_FIRST), weights_path):
            return published.settings
        raise FileNotFoundError(
            f"there is no {path.name} beside {weights_path} to say how it was trained: copy it along from where it was "
            "trained. Of the published weights that docs/weights.md names it is none."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} must be JSON, got: {error}.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(settings).__name__}.")
    encoder = settings.get("encoder", ENCODERS[0])
    if encoder not in ENCODERS:
        raise InputError(
            f"{weights_path} must be of an encoder among {', '.join(ENCODERS)}, got {encoder!r}: a class of your own "
            "must be named on the command line, by --network_def#_target_."
        )
    if not patches and "patch_size" in settings:
        raise InputError(
            f"{weights_path} must be of whole images, got weights of patches of volumes, as {path.name} says: give "
            "those of a training on images."
        )
    return settings


def load_torch(path: str | Path, remedy: str) -> dict[str, Any]:
    """Load a dictionary of plain tensors and values, as `torch.save` or safetensors wrote it, onto the CPU.

    A file that is not there, damaged or of something else is refused; the message ends with `remedy`. So is one of
    sparse tensors, and one that pickles objects, with the lines that convert it.
    """
    _refuse_missing(path, remedy)
    remedy = DAMAGED if remedy == TRAIN_FIRST else remedy
    if Path(path).suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is damaged or no file of safetensors ({error}): {remedy}.") from error
    try:
        content = load_whole(path)
    except InputError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error.__cause__)):
            raise InputError(CONVERT.format(path=str(path), name=found[1])) from error
        raise InputError(f"{error}: {remedy}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dictionary, got a {type(content).__name__}: {remedy}.")
    if odd := [key for key, value in flatten(content) if value.layout != torch.strided or value.is_quantized]:
        raise InputError(
            f"{path} must hold dense tensors, got sparse or quantized ones, {shorten(odd, 5)}: save them so."
        )
    return content


def load_weights(
    network: nn.Module, path: str | Path | None, names: Sequence[str] | None = None, transfer: bool = False
) -> nn.Module:
    """Load the weights of another run, every tensor or none; a line of the log says which parts were left.

    A `SegResNet` or `EncoderDecoder` takes those of a whole one, or of its encoder alone: then its decoder keeps its
    values. To use it as a segmentation, give `names`.

    Args:
        network: the network to fill.
        path: a `model.pt`, with its `model.json` if `names` are given, or published weights; None leaves the network as
            it is.
        names: of the outputs, which those of the weights must be: the structures of the classes 1, 2, ... of a
            segmentation, or the findings.
        transfer: whether to train for `names` from weights of any other outputs. The head of a classifier keeps its
            values, the weights must have none. The last layer of a segmentation is taken over only for equal `names`.

    Returns:
        the same network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if tensors are missing, unexpected or of another shape, of which up to five are named, or hold NaN
            or infinity; or if the weights are of other outputs or other `spatial_dims`.
    """
    if not path:
        return network
    state = load_torch(path, TRAIN_FIRST)
    has_settings = Path(path).with_suffix(".json").is_file()
    published = None if has_settings else recognise(state, path)
    encoder = network.encoder if isinstance(network, EncoderDecoder) else network
    state = published.weights_for(encoder, path) if published else state
    total = len(state)
    left: tuple[str, ...] = ()
    settings = {} if names is None else published.settings if published else read_settings(path)
    if names is not None and not transfer:
        _refuse_other_names(network, path, settings, names)
    if parts := parts_of(network):
        dims = max((value.ndim for value in state.values() if isinstance(value, Tensor)), default=0) - 2  # of a kernel
        if dims in (2, 3) and dims != network.spatial_dims:
            raise InputError(
                f"{path} must hold weights for {network.spatial_dims}-D images, got some for {dims}-D ones: set "
                f"`spatial_dims` to {dims}, or give other weights."
            )
        if isinstance(network, EncoderDecoder) and not any(str(key).startswith("decoder.") for key in state):
            state = {f"encoder.{key}": value for key, value in state.items()}  # as pretraining leaves it
        if all(str(key).startswith(parts.encoder) for key in state) and (names is None or transfer):
            left = parts.decoder
        elif names is not None and settings.get("class_names") != list(names):
            left = (parts.last_layer,)
            state = {key: value for key, value in state.items() if not str(key).startswith(left)}
    elif transfer:
        left = (f"{head_name(network)}.",)
    _load_state(network, state, path, left, published)
    parts_left = [part.rstrip(".") for part in left]
    counts, origin = f"{len(state)} of {total}", ""
    if published:
        counts, origin = _said_of(published, encoder, total - len(state), parts_left)
    text = "Loaded %s tensors of %s%s; parts left as they were: %s."
    logger.info(text, counts, path, origin, ", ".join(parts_left) or "none")
    return network


def _said_of(published: Published, encoder: nn.Module, dropped: int, parts_left: list[str]) -> tuple[str, str]:
    """How many tensors of a file were taken, and what it is; `dropped` ones are of a part that the network keeps."""
    taken, unused = len(published.tensors) - dropped, dict(published.left)
    if dropped:
        unused[parts_left[0]] = dropped
    left = ", ".join(f"{part} ({number})" for part, number in unused.items()) or "nothing"
    norm = getattr(first_convolution(encoder)[1], "norm", "none")
    images = "not normalised" if norm == "none" else f"normalised as {norm}"
    origin = f", a {published.layout.name} ({published.settings['encoder']}), without {left}; images {images}"
    return f"{taken} of {taken + sum(unused.values())}", origin


def refuse_bad_mode(mode: str, pretrained: str | None) -> None:
    """Refuse weights that "scratch" would not use, that are not there, or that "finetune" requires and does not get."""
    if mode == "scratch" and pretrained:
        raise InputError(f"`mode` scratch starts from no weights, got `pretrained` {pretrained}: give one of the two.")
    if mode == "finetune" and not pretrained:
        raise InputError("`mode` finetune needs weights: set `pretrained` to a models/model.pt, or `mode` to scratch.")
    if pretrained:
        _refuse_missing(pretrained, TRAIN_FIRST)


def _refuse_missing(path: str | Path, remedy: str) -> None:
    if Path(path).is_dir():
        raise FileNotFoundError(f"weights must be a file, got the folder {Path(path).absolute()}: {remedy}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there are no weights at {Path(path).absolute()}: {remedy}.")


def parts_of(network: nn.Module) -> Parts | None:
    """The parts of a segmentation network; None of another one."""
    return next((parts for kind, parts in SEGMENTATION.items() if isinstance(network, kind)), None)


def _refuse_other_names(
    network: nn.Module, path: str | Path, settings: Mapping[str, Any], names: Sequence[str]
) -> None:
    key = "class_names" if parts_of(network) else "label_names"
    if key == "class_names" and key not in settings:
        raise InputError(
            f"{path} must be weights of a segmentation, got some without `class_names` in the JSON beside them, as "
            "pretraining leaves them: train with `pretrained` and give the model.pt of that run."
        )
    own = settings.get(key, list(names))
    if own != list(names):
        raise InputError(
            f"`{key}` must be those of {Path(path).with_suffix('.json')}, {', '.join(own)}, got {', '.join(names)}."
        )


def _load_state(
    network: nn.Module, state: dict[str, Any], path: str | Path, left: tuple[str, ...], published: Published | None
) -> None:
    """Fill all of a network but the keys that begin as in `left`, or refuse."""
    kept = {key: value for key, value in network.state_dict().items() if key.startswith(left)}
    own = {key: value.shape for key, value in network.state_dict().items() if key not in kept}
    shapes = {key: getattr(value, "shape", None) for key, value in state.items()}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key] != shapes[key]],
    }
    found = [f"{len(keys)} {what} ({shorten(keys, 5)})" for what, keys in problems.items() if keys]
    if found:
        remedy = (
            "Is it the same `encoder`, with the same spatial_dims and channels, as the JSON beside the weights says?"
        )
        first = next(iter(own), "")  # of the convolution that sees the image
        mine, theirs = (tuple(each.get(first) or ()) for each in (own, shapes))
        if mine[1:2] != theirs[1:2] and mine[:1] + mine[2:] == theirs[:1] + theirs[2:]:
            remedy = (
                f"They take images of {theirs[1]} channel(s), not {mine[1]}: set `in_channels` to {theirs[1]}, by "
                "which pictures in colours become grey (1) or grey is repeated (3), or give other weights."
            )
        elif published and "blocks_down" in published.settings:
            knobs = ", ".join(f"`{k}` to {value}" for k, value in published.settings.items() if k in SEGRESNET_SHAPE)
            remedy = f"It is a SegResNet of another shape or number of outputs: set {knobs}, or give other weights."
        elif isinstance(network, SegResNet):
            remedy = SEGRESNET_REMEDY
        elif {*problems["missing"]} in HEAD_KEYS:
            remedy = "They have no head: train the classifier first."
        elif {str(key).removeprefix("encoder.") for key in problems["unexpected"]} in HEAD_KEYS:
            remedy = "They are of a trained classifier: give the encoder that pretraining has left."
        elif published:
            remedy = f"The file is cut, or of no plain {published.settings['encoder']}: give other weights."
        if key := next(iter(problems["of another shape"]), None):
            remedy += f" {key} is {list(shapes[key] or ())} in the file, {list(own[key])} in the network."
        raise InputError(f"the weights in {path} do not fit the {type(network).__name__}: {'; '.join(found)}. {remedy}")
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise InputError(
            f"the weights in {path} must be finite, got NaN or infinity in {len(broken)} of {len(state)} tensors "
            f"({shorten(broken, 5)}): train again or take an older checkpoint."
        )
    network.load_state_dict(state | kept)
