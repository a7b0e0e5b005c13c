"""Weights of a training in the layout of torchvision and timm, or of MONAI's SwinUNETR, for use anywhere.

python scripts/export_weights.py RUN/models/model.pt resnet50.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fire
from safetensors.torch import save
from torch import nn

from dissect_monai.bundle import with_dashes
from dissect_monai.common import InputError
from dissect_monai.networks.encoders import channel_norm, encoder_of, first_convolution
from dissect_monai.networks.published import layout_of, publish
from dissect_monai.networks.weights import TRAIN_FIRST, load_torch, read_settings
from dissect_monai.writing import save_atomically, written_atomically


def main(weights: str, output: str, in_channels: int | None = None) -> None:
    """Write the encoder, and the head of a classifier, of a model.pt to a file of their own.

    Args:
        weights: a models/model.pt, with its model.json.
        output: a file of safetensors, whose header says what images it takes, or of PyTorch (.pt, .pth).
        in_channels: of the first convolution: 3 by default where torchvision has such a network, in 2-D; 1, if the
            network has one, for timm's `in_chans=1`.
    """
    try:
        facts = export(Path(weights), Path(output), in_channels)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {with_dashes(str(error))}") from error
    print(*(f"{name}: {fact}" for name, fact in facts.items()), sep="\n")


def export(weights: Path, output: Path, in_channels: int | None = None) -> dict[str, Any]:
    """Write the file, and return what to know of it."""
    if output.suffix not in (".safetensors", ".pt", ".pth"):
        raise InputError(f"`output` must end with .safetensors, .pt or .pth, got {output}.")
    network, settings = encoder_with_weights(weights)
    layout, conv = layout_of(network), first_convolution(network)[1]
    dims = conv.weight.ndim - 2
    if in_channels is None and dims == 2 and not layout.prefix and settings.get("in_channels") in (None, 1):
        in_channels = 3
    state = publish(network, in_channels)
    channels = in_channels or conv.in_channels
    norm = channel_norm(settings.get("pretrained_norm", "none"), conv.in_channels)
    mean, std = (values * (channels // conv.in_channels) for values in norm)  # one channel is repeated
    facts = {
        "layout": layout.name, "network": settings["encoder"], "tensors": len(state), "spatial_dims": dims,
        "in_channels": channels, "images": "in [0, 1], then normalised", "mean": mean, "std": std,
    }  # fmt: skip
    if "label_names" in settings:
        facts["outputs"] = settings["label_names"]
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".safetensors":
        header = {"format": "pt", **{name: json.dumps(fact) for name, fact in facts.items()}}
        with written_atomically(output) as file:
            file.write(save(state, header))
    else:
        save_atomically(state, output)
    return {"file": str(output), **facts}


def encoder_with_weights(weights: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder of a model.pt, or all of a classifier, and the settings beside it."""
    if not weights.with_suffix(".json").is_file():
        raise InputError(f"`weights` must be a models/model.pt with its model.json, got {weights}.")
    state, settings = load_torch(weights, TRAIN_FIRST), read_settings(weights)
    if "class_names" in settings:  # of a segmentation
        state = {key[len("encoder.") :]: value for key, value in state.items() if key.startswith("encoder.")}
    if "encoder" not in settings:
        raise InputError(
            f"`weights` must be of an encoder, or of all of a network with one, got those of {weights}, "
            "whose model.json names none, as of hssl_multidomain: MONAI's SegResNet loads them as they are."
        )
    network = encoder_of(settings, len(settings["label_names"]) if "label_names" in settings else None)
    layout_of(network)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{weights} must hold a {settings['encoder']}, as its model.json says, and holds other tensors: weights of "
            "a class of your own are loaded by that class as they are."
        ) from error
    return network, settings


if __name__ == "__main__":
    fire.Fire(main)
