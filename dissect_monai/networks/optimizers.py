"""Optimisers as self-supervision uses them: no weight decay on biases and norms."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from dissect_monai.common import InputError


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: weights of linear and convolutional layers decay, biases and norms do not.

    Args:
        network: module whose parameters with `requires_grad` are taken.
        weight_decay: decay of the first group; that of the second is 0.
    """
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def ssl_optimizer(network: nn.Module, name: str, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW or LARS over the two parameter groups.

    Args:
        network: module to train.
        name: `adamw`, or `lars` for large batches.
        learning_rate: positive; for `lars` about 0.2·(global batch)/256.
        weight_decay: not negative; for `lars` about 1e-6.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        You et al., Large batch training of convolutional networks (LARS), arXiv 1708.03888; values for LARS from
        Grill et al., BYOL, NeurIPS 2020, Sec. 3.3.
    """
    refuse_bad_rates(learning_rate, weight_decay)
    groups = parameter_groups(network, weight_decay)
    if name == "adamw":
        return AdamW(groups, lr=learning_rate, fused=True)
    if name == "lars":
        from pytorch_optimizer import LARS  # slow to import, and seldom wanted

        return LARS(groups, lr=learning_rate)
    raise InputError(f"`optimizer_name` must be adamw or lars, got {name!r}.")


def refuse_bad_rates(learning_rate: float, weight_decay: float) -> None:
    """Refuse what no optimiser can use.

    Raises:
        ValueError: if `learning_rate` is not positive or `weight_decay` is negative.
    """
    if learning_rate <= 0 or weight_decay < 0:
        raise InputError(
            f"`learning_rate` must be positive and `weight_decay` not negative, got {learning_rate} and {weight_decay}."
        )


# Parts of a MONAI ResNet from the top down; what is left below is the stem.
PARTS = ("fc", "layer4", "layer3", "layer2", "layer1")


def classifier_optimizer(
    network: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> Optimizer:
    """AdamW with a learning rate per depth: learning_rate · layer_decay^d, d = 0 for the head and 5 for the stem.

    Biases and norms have no weight decay. Frozen parameters are left out.

    Args:
        network: a MONAI `ResNet`, not its DDP or compiled wrapper.
        learning_rate: that of the head, positive.
        weight_decay: not negative.
        layer_decay: in (0, 1]; 1 gives all layers the same rate.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        Howard & Ruder, Universal language model fine-tuning (ULMFiT), ACL 2018, Sec. 3.2: discriminative rates.
    """
    refuse_bad_rates(learning_rate, weight_decay)
    if not 0 < layer_decay <= 1:
        raise InputError(f"`layer_decay` must be in (0, 1], got {layer_decay}.")
    parts = [nn.ModuleList() for _ in range(len(PARTS) + 1)]
    for name, child in network.named_children():
        parts[PARTS.index(name) if name in PARTS else len(PARTS)].append(child)
    groups = [
        {**group, "lr": learning_rate * layer_decay**depth}
        for depth, part in enumerate(parts)
        for group in parameter_groups(part, weight_decay)
        if group["params"]
    ]
    return AdamW(groups, lr=learning_rate, fused=True)
