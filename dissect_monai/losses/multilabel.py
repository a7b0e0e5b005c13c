"""Loss of a multi-label classifier, and the weights of its classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.common import Item
from dissect_monai.data.datalists import label_matrix

BALANCES = ("none", "weighted")
LIMIT = 10.0


class MultiLabelLoss(nn.Module):
    """Binary cross-entropy with logits, averaged over the known labels; unknown ones give no loss and no gradient.

    Args:
        positive_weight: factor on the loss of the positives of each finding, shape (C,), as `positive_weights` gives;
            None is 1 for all.
    """

    def __init__(self, positive_weight: Tensor | None = None) -> None:
        super().__init__()
        self.positive_weight: Tensor | None
        self.register_buffer("positive_weight", positive_weight)

    @classmethod
    def balanced(cls, items: list[Item], label_names: Sequence[str], class_balance: str = "weighted") -> MultiLabelLoss:
        """The loss with the `positive_weights` of training items."""
        return cls(positive_weights(items, label_names, class_balance))

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Loss of one batch.

        Args:
            pred: logits of shape (B, C).
            label: shape (B, C), 1, 0 or NaN (unknown).

        Returns:
            A scalar; 0 if no label is known.
        """
        known = ~label.isnan()
        if self.positive_weight is not None:
            self.positive_weight = self.positive_weight.to(pred.device)  # once: to move it waits for the device
        losses = F.binary_cross_entropy_with_logits(
            pred.float(), label.float().nan_to_num(), known.float(), pos_weight=self.positive_weight, reduction="sum"
        )
        return losses / known.sum().clamp_min(1)


def positive_weights(items: list[Item], label_names: Sequence[str], class_balance: str) -> Tensor:
    """Weight of the positives of each finding against the imbalance of its classes, in [0.1, 10].

    A weight w moves the logits up by about log w, and the probabilities with them: they rank as before, but are no
    frequencies any more, and a temperature does not repair it. For calibrated probabilities choose "none".

    Args:
        items: the labelled training items.
        label_names: names of the C findings.
        class_balance: "weighted" for negatives / positives, "none" for 1.

    Returns:
        Shape (C,); 1 for a finding without positives or without negatives.
    """
    labels = label_matrix(items, label_names)
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    balanced = (class_balance == "none") | (positives == 0) | (negatives == 0)
    weights = np.where(balanced, 1, negatives / positives.clip(1))
    return torch.from_numpy(weights.clip(1 / LIMIT, LIMIT)).float()
