"""Plain weights and what they depend on: files that other runs and other bundles load."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from dissect_monai.common import InputError
from dissect_monai.writing import save_atomically, written_atomically

logger = logging.getLogger(__name__)
TRAIN_FIRST = "train first, or give the right --pretrained"
HEAD = {"fc.weight", "fc.bias"}  # of a MONAI ResNet that classifies
SEGRESNET_ENCODER = ("convInit.", "down_layers.")
LAST_LAYER = "conv_final.2."  # of a SegResNet, whose outputs are classes, or the image itself
SEGRESNET_REMEDY = (
    "Is it a SegResNet of the same spatial_dims, init_filters, blocks, input and output channels, as the JSON beside "
    "the weights says, and no checkpoint? Weights of an encoder alone have the keys convInit and down_layers."
)


def save_weights(weights: nn.Module, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a plain state dict, and beside it as JSON what it depends on: `models/model.pt` and `models/model.json`."""
    with written_atomically(Path(path).with_suffix(".json")) as file:
        file.write((json.dumps(settings, indent=4) + "\n").encode())
    save_atomically(weights.state_dict(), path)


def read_settings(weights_path: str | Path) -> dict[str, Any]:
    """What the weights at a path depend on, as `TrainingCheckpoint` wrote it beside them; nothing without weights.

    Raises:
        FileNotFoundError: if there are weights, and no settings beside them.
        ValueError: if the settings are no JSON object.
    """
    path = Path(weights_path).with_suffix(".json")
    if not path.is_file():
        if Path(weights_path).is_file():
            raise FileNotFoundError(
                f"there is no {path.name} beside {weights_path} to say how it was trained: copy it along from where "
                "it was trained."
            )
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} must be JSON, got: {error}.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(settings).__name__}.")
    return settings


def refuse_other_names(label_names: Sequence[str], weights_path: str | Path) -> None:
    """Refuse names for the outputs of a network that are not those that it was trained with.

    Raises:
        ValueError: naming both.
    """
    own = read_settings(weights_path).get("label_names", list(label_names))
    if list(label_names) != own:
        raise InputError(
            f"`label_names` must be those of {Path(weights_path).with_suffix('.json')}, {', '.join(own)}, "
            f"got {', '.join(label_names)}."
        )


def refuse_missing_weights(path: str | Path, remedy: str = TRAIN_FIRST) -> None:
    """Refuse a path at which there is no file, before work is spent on what needs it.

    Raises:
        FileNotFoundError: naming the path.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there are no weights at {Path(path).absolute()}: {remedy}.")


def load_torch(path: str | Path, remedy: str) -> dict[str, Any]:
    """Load a dictionary of plain tensors and values onto the CPU.

    Args:
        path: what `torch.save` wrote.
        remedy: what to do if it cannot be loaded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated or holds something else.
    """
    refuse_missing_weights(path, remedy)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
        raise InputError(f"{path} cannot be loaded, it is damaged or no file of torch.save: {remedy}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dictionary, got a {type(content).__name__}: {remedy}.")
    return content


def load_encoder(encoder: nn.Module, path: str | Path, without: Sequence[str] = ()) -> nn.Module:
    """Load a plain state dict into an encoder, every key or none.

    Args:
        encoder: the module to fill.
        path: a `model.pt` as `TrainingCheckpoint` writes it.
        without: prefixes of the keys of `encoder` that keep their values and that the file must not have: a new head.

    Returns:
        the same module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if keys are missing, unexpected, no tensors or of another shape, or tensors hold NaN or infinity; up
            to five of each are named.
    """
    state = load_torch(path, TRAIN_FIRST)
    _load_state(encoder, state, path, without, "Is it the same encoder (--encoder)?")
    logger.info("Loaded all %d tensors of %s.", len(state), path)
    return encoder


def has_decoder(path: str | Path) -> bool:
    """Whether the weights at a path are of a whole `SegResNet`, or there are none yet; else they are of its encoder.

    Raises:
        ValueError: if they cannot be loaded.
    """
    if not Path(path).is_file():
        return True
    return _is_whole(load_torch(path, TRAIN_FIRST))


def load_segresnet(network: SegResNet, path: str | Path) -> SegResNet:
    """Load a plain state dict into a `SegResNet`: of all of it, or of its encoder alone, as others pretrain it.

    Args:
        network: the network to fill; without weights of the decoder, its decoder stays as it is.
        path: a `model.pt` as `TrainingCheckpoint` writes it; one of an encoder has the keys `convInit` and
            `down_layers` and no others.

    Returns:
        the same network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as for `load_encoder`.
    """
    state = load_torch(path, TRAIN_FIRST)
    left = [] if _is_whole(state) else _decoder_of(network)
    _load_state(network, state, path, left, SEGRESNET_REMEDY)
    logger.info("Loaded all %d tensors of %s.", len(state), path)
    if left:
        parts = ", ".join(part.rstrip(".") for part in left)
        logger.info("They are of an encoder alone: %s of the network were left as they were.", parts)
    return network


def load_segmentation(network: SegResNet, path: str | Path) -> SegResNet:
    """Load the weights of a whole segmentation network, as seg_finetune_btcv trains it.

    Args:
        network: the network to fill.
        path: a `model.pt` with a JSON beside it that has `class_names`.

    Returns:
        the same network.

    Raises:
        FileNotFoundError: if there is no such file, or no JSON beside it.
        ValueError: as for `load_encoder`, or if they are weights of pretraining, whose outputs are no classes.
    """
    refuse_missing_weights(path)
    if "class_names" not in read_settings(path):
        raise InputError(
            f"{path} must be weights of a segmentation, got some without `class_names` in the JSON beside them, as "
            "pretraining leaves them: train with --pretrained and give the model.pt of that run."
        )
    state = load_torch(path, TRAIN_FIRST)
    _load_state(network, state, path, [], SEGRESNET_REMEDY)
    logger.info("Loaded all %d tensors of %s.", len(state), path)
    return network


def transfer_segresnet(network: SegResNet, path: str | Path, class_names: Sequence[str]) -> SegResNet:
    """Start a segmentation from the weights of another run: of a whole `SegResNet`, or of its encoder alone.

    The last layer is taken over only from a network that segments the same structures, as the JSON beside the weights
    says. All other keys must fit. A line of the log says how many tensors were loaded, and which parts were left.

    Args:
        network: the network to fill.
        path: a `model.pt` of hssl_multidomain, of pretrain_vq_ssl on volumes, or of a segmentation.
        class_names: structures of the classes 1, 2, ... of `network`.

    Returns:
        the same network.

    Raises:
        FileNotFoundError: if there is no such file, or no JSON beside it.
        ValueError: as for `load_encoder`, or if they are weights for 2-D images.
    """
    state, settings = load_torch(path, TRAIN_FIRST), read_settings(path)
    dims = settings.get("spatial_dims", network.spatial_dims)
    if dims != network.spatial_dims:
        raise InputError(f"{path} must hold weights for {network.spatial_dims}-D images, got some for {dims}-D ones.")
    left = [] if _is_whole(state) else _decoder_of(network)
    if not left and settings.get("class_names") != list(class_names):
        left = [LAST_LAYER]
    taken = {key: value for key, value in state.items() if not str(key).startswith(LAST_LAYER) or not left}
    _load_state(network, taken, path, left, SEGRESNET_REMEDY)
    logger.info(
        "Loaded %d of %d tensors of %s into %d of %d of the network; left as they were: %s.",
        len(taken), len(state), path, len(taken), len(network.state_dict()),
        ", ".join(part.rstrip(".") for part in left) or "none",
    )  # fmt: skip
    return network


def _is_whole(state: Mapping[str, Any]) -> bool:
    return not all(str(key).startswith(SEGRESNET_ENCODER) for key in state)


def _decoder_of(network: SegResNet) -> list[str]:
    """Beginnings of the keys of all but the encoder."""
    keys = (key for key in network.state_dict() if not key.startswith(SEGRESNET_ENCODER))
    return list(dict.fromkeys(f"{key.split('.')[0]}." for key in keys))


def _load_state(
    module: nn.Module, state: dict[str, Any], path: str | Path, without: Sequence[str], remedy: str
) -> None:
    """Fill `module`, but for the keys that begin as in `without`, or refuse."""
    kept = {key: value for key, value in module.state_dict().items() if key.startswith(tuple(without))}
    own = {key: value for key, value in module.state_dict().items() if key not in kept}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "not a tensor": [key for key in own if key in state and key not in tensors],
        "of another shape": [key for key in own if key in tensors and own[key].shape != tensors[key].shape],
    }
    found = [f"{len(keys)} {what} ({_few(keys)})" for what, keys in problems.items() if keys]
    if found:
        if set(own) - set(state) == HEAD:
            remedy = "They have no head: train the classifier first."
        elif set(state) - set(own) == HEAD:
            remedy = "They are of a trained classifier: give the encoder that pretraining has left."
        raise InputError(f"the weights in {path} do not fit the {type(module).__name__}: {'; '.join(found)}. {remedy}")
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise InputError(
            f"the weights in {path} must be finite, got NaN or infinity in {len(broken)} of {len(state)} tensors "
            f"({_few(broken)}): train again or take an older checkpoint."
        )
    module.load_state_dict(state | kept)


def _few(keys: Sequence[Any]) -> str:
    return ", ".join(map(str, keys[:5]))


MODES = ("linear_probe", "finetune", "scratch")


def load_pretrained(network: nn.Module, path: str | Path) -> nn.Module:
    """Fill all of a ResNet but its head `fc` with the weights of a pretrained encoder, every key or none.

    Args:
        network: a MONAI `ResNet` with `num_classes`.
        path: models/model.pt of the pretraining bundle.

    Returns:
        the same network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if keys are missing, unexpected or of another shape; up to five of each are named.
    """
    return load_encoder(network, path, without=["fc."])


def freeze_encoder(network: nn.Module) -> nn.Module:
    """Freeze all but the head `fc`, and put the network into eval mode.

    Give the trainer the head alone (see `trained_part`): a trainer calls `train()` on what it is given, which would
    let the encoder's batch norms drift.

    Args:
        network: a MONAI `ResNet` with `num_classes`.

    Returns:
        the head.
    """
    network.eval().requires_grad_(False)
    head: nn.Module = network.get_submodule("fc")
    return head.requires_grad_(True)


def refuse_bad_mode(mode: str, pretrained: str | None) -> None:
    """Refuse weights that "scratch" would not use, and "finetune" without weights; a probe of random features is fine.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: saying what to do.
    """
    if mode == "scratch" and pretrained:
        raise InputError(
            f"`--mode` scratch starts from no weights, got --pretrained {pretrained}: give one of the two."
        )
    if mode == "finetune" and not pretrained:
        raise InputError("`--mode` finetune needs weights: give --pretrained models/model.pt, or --mode scratch.")
    if pretrained:
        refuse_missing_weights(pretrained)


def trained_part(network: nn.Module, mode: str) -> nn.Module:
    """What the trainer trains: in "linear_probe" the head alone, on a `FeatureDataset`; else all of the network.

    Args:
        network: a MONAI `ResNet` with `num_classes`; for "linear_probe" its encoder is frozen.
        mode: "linear_probe", "finetune" or "scratch".

    Raises:
        ValueError: if `mode` is unknown.
    """
    if mode not in MODES:
        raise InputError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    return freeze_encoder(network) if mode == "linear_probe" else network
