"""The optimiser: no weight decay of biases and norms, and learning rates that fall with depth."""

from __future__ import annotations

from collections import defaultdict

from torch import nn
from torch.optim import AdamW

from dissect_monai.common import InputError

DEPTHS = {part: depth for depth, part in enumerate(("fc", "layer4", "layer3", "layer2", "layer1"))}  # below: the stem


def adamw(network: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0) -> AdamW:
    """AdamW for the trainable parameters of a network; biases and norms have no weight decay.

    Args:
        network: module to train; with `layer_decay` a MONAI `ResNet`, not its DDP or compiled wrapper.
        learning_rate: positive; that of the head.
        weight_decay: not negative.
        layer_decay: in (0, 1]; a layer learns at learning_rate · layer_decay^d, d from 0 (the head `fc`) to 5 (stem).

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        Howard & Ruder, Universal language model fine-tuning (ULMFiT), ACL 2018, Sec. 3.2: discriminative rates.
    """
    if learning_rate <= 0 or weight_decay < 0:
        raise InputError(
            f"`learning_rate` must be positive and `weight_decay` not negative, got {learning_rate} and {weight_decay}."
        )
    if not 0 < layer_decay <= 1:
        raise InputError(f"`layer_decay` must be in (0, 1], got {layer_decay}.")
    groups = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[DEPTHS.get(name.split(".")[0], len(DEPTHS)), parameter.ndim <= 1].append(parameter)
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
