"""Training of a multi-label classifier: loss, class balance, learning rates by depth, transfer and linear probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset, get_worker_info

from dissect_monai.augment import BatchAugment, TwoViews
from dissect_monai.data import Item, label_matrix
from dissect_monai.networks import feature_maps
from dissect_monai.optimizers import parameter_groups, refuse_bad_rates
from dissect_monai.probes import extract_features
from dissect_monai.weights import load_encoder, refuse_missing_weights

MODES = ("linear_probe", "finetune", "scratch")
BALANCES = ("none", "weighted")
# Parts of a MONAI ResNet from the top down; what is left below is the stem.
PARTS = ("fc", "layer4", "layer3", "layer2", "layer1")


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

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Loss of one batch.

        Args:
            pred: logits of shape (B, C).
            label: shape (B, C), 1, 0 or NaN (unknown).

        Returns:
            A scalar; 0 if no label is known.

        Raises:
            ValueError: if the shapes disagree.
        """
        if pred.shape != label.shape:
            raise ValueError(f"`label` must have the shape of `pred`, {tuple(pred.shape)}, got {tuple(label.shape)}.")
        known = ~label.isnan()
        weight = None if self.positive_weight is None else self.positive_weight.to(pred.device)
        losses = F.binary_cross_entropy_with_logits(
            pred.float(), label.float().nan_to_num(), known.float(), pos_weight=weight, reduction="sum"
        )
        return losses / known.sum().clamp_min(1)


def positive_weights(
    items: list[Item], label_names: Sequence[str], class_balance: str = "weighted", limit: float = 10.0
) -> Tensor:
    """Weight of the positives of each finding against the imbalance of its classes.

    A weight w moves the logits up by about log w, and the probabilities with them: they rank as before, but are no
    frequencies any more, and a temperature does not repair it. For calibrated probabilities choose "none".

    Args:
        items: the labelled training items.
        label_names: names of the C findings.
        class_balance: "weighted" for negatives / positives, "none" for 1.
        limit: weights stay in [1 / limit, limit].

    Returns:
        Shape (C,); 1 for a finding without positives or without negatives.

    Raises:
        ValueError: if `class_balance` is unknown or `limit` is below 1.
    """
    if class_balance not in BALANCES:
        raise ValueError(f"`class_balance` must be one of {', '.join(BALANCES)}, got {class_balance!r}.")
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    labels = label_matrix(items, label_names)
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    balanced = (class_balance == "none") | (positives == 0) | (negatives == 0)
    weights = np.where(balanced, 1, negatives / positives.clip(1))
    return torch.from_numpy(weights.clip(1 / limit, limit)).float()


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
        raise ValueError(f"`layer_decay` must be in (0, 1], got {layer_decay}.")
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
        raise ValueError(
            f"`--mode` scratch starts from no weights, got --pretrained {pretrained}: give one of the two."
        )
    if mode == "finetune" and not pretrained:
        raise ValueError("`--mode` finetune needs weights: give --pretrained models/model.pt, or --mode scratch.")
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
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    return freeze_encoder(network) if mode == "linear_probe" else network


class FeatureDataset(Dataset[dict[str, Tensor]]):
    """Frozen features in place of images: what the head of a linear probe trains on.

    The global averages of the last stage are computed once, in eval mode, from the images as the data set gives them.
    That happens at the first access, so after pretrained weights are loaded and after a run has resumed.

    Args:
        dataset: items {"image", "label"} without augmentation; images uint8, which are scaled to [0, 1], or float.
        network: a MONAI `ResNet` on `device`, whose head `fc` is left out.
        device: where to compute; the features are kept in main memory.
        batch_size: images at once.
        num_workers: processes that read the images. The loader of the features themselves must have none.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        network: nn.Module,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.network = network
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The feature (C,) of one image as "image", and its "label"."""
        features, labels = self._cache
        return {"image": features[index], "label": labels[index]}

    @cached_property
    def _cache(self) -> tuple[Tensor, Tensor]:
        if get_worker_info() is not None:
            raise ValueError("`num_workers` must be 0 for the features of a linear probe: each would compute them all.")
        labels: list[Tensor] = []

        def batches() -> Iterator[dict[str, Tensor]]:
            for batch in DataLoader(self.dataset, batch_size=self.batch_size, num_workers=self.num_workers):
                labels.append(batch["label"])
                yield batch

        features = extract_features(self.network, batches(), self.device, feature_maps).last
        return torch.from_numpy(features), torch.cat(labels)


class AugmentedBatch(TwoViews):
    """Augment the images of a batch on the device, and leave the labels: the `prepare_batch` of a classifier.

    Args:
        augment: makes the view of each image.
        seed: seed of all draws.
        rank: rank of this process, so that every process draws its own.
    """

    def __init__(self, augment: BatchAugment, seed: int = 0, rank: int = 0) -> None:
        super().__init__(augment, seed, rank, num_views=1)

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """View and label of `batchdata`; `kwargs` go to `Tensor.to`."""
        views = super().__call__(batchdata, device, non_blocking, **kwargs)
        return views.images, batchdata["label"].to(device=device, non_blocking=non_blocking)
