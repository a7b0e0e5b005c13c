"""Optimisers as self-supervision uses them: no weight decay on biases and norms."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer


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
    raise ValueError(f"`optimizer_name` must be adamw or lars, got {name!r}.")


def refuse_bad_rates(learning_rate: float, weight_decay: float) -> None:
    """Refuse what no optimiser can use.

    Raises:
        ValueError: if `learning_rate` is not positive or `weight_decay` is negative.
    """
    if learning_rate <= 0 or weight_decay < 0:
        raise ValueError(
            f"`learning_rate` must be positive and `weight_decay` not negative, got {learning_rate} and {weight_decay}."
        )
