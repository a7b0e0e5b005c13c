"""What is trained, and how: the head or all of a network, no weight decay of biases, learning rates by depth."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from torch.optim import AdamW

from dissect_monai.common import InputError
from dissect_monai.networks.encoders import head_name, stages_of

MODES = ("linear_probe", "finetune", "scratch")


def place_network(network: nn.Module, device: torch.device | str, mode: str = "scratch") -> nn.Module:
    """Move a network to a device, in place, with the weights of its convolutions in channels-last order.

    Returns what is to be trained: the network or, in the mode "linear_probe", its head alone, see `trained_part`.
    """
    is_3d = any(parameter.ndim == 5 for parameter in network.parameters())
    memory_format = torch.channels_last_3d if is_3d else torch.channels_last
    return trained_part(network.to(device, memory_format=memory_format), mode)  # type: ignore[call-overload]


def adamw(network: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0) -> AdamW:
    """AdamW for the trainable parameters of a network; biases and norms have no weight decay.

    Args:
        network: module to train; with `layer_decay` one of `build_encoder`, not its DDP or compiled wrapper.
        learning_rate: that of the head.
        weight_decay: of all other parameters.
        layer_decay: in (0, 1]; a layer learns at learning_rate · layer_decay^d, d from 0 (the head) to 5 (stem).

    Reference:
        Howard & Ruder, Universal language model fine-tuning (ULMFiT), ACL 2018, Sec. 3.2: discriminative rates.
    """
    groups, head = defaultdict(list), f"{head_name(network)}."
    depths: dict[nn.Parameter, int] = {}
    for depth, modules in enumerate(reversed(stages_of(network)), start=1):
        depths |= {parameter: depth for module in modules for parameter in module.parameters()}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            depth = 0 if name.startswith(head) else depths.get(parameter, 5)
            groups[depth, parameter.ndim <= 1].append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "lr": learning_rate * layer_decay**depth,
                "weight_decay": 0.0 if is_bias_or_norm else weight_decay,
            }
            for (depth, is_bias_or_norm), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
        lr=learning_rate,
        fused=True,
    )


def trained_part(network: nn.Module, mode: str) -> nn.Module:
    """What the trainer trains: in "linear_probe" the head alone, on a `FeatureDataset`; else all of the network.

    In "linear_probe" all but the head is frozen, and the network put into eval mode: the batch norms of an encoder that
    a trainer gets would drift. The other modes are "finetune" and "scratch".
    """
    if mode not in MODES:
        raise InputError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode != "linear_probe":
        return network
    network.eval().requires_grad_(False)
    return network.get_submodule(head_name(network)).requires_grad_(True)
