"""What the training of a segmentation adds to a `SegResNet`: its start, logits of coarser levels, a frozen encoder."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.networks.layers.factories import Conv
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from dissect_monai.weights import SEGRESNET_ENCODER

logger = logging.getLogger(__name__)


def start_rare(network: SegResNet, share: float = 0.01) -> None:
    """Make an untrained network call every structure rare.

    With the usual biases of zero each class starts with the same share of all voxels, which is far more than a
    structure has. The Dice loss then pushes all structures down, and those whose features are not told apart soon
    reach probabilities at which it has no gradient: they are never found.

    Args:
        network: the biases of its last convolution are changed in place; its first output is the background.
        share: probability of each structure against the background, in (0, 1).

    Raises:
        ValueError: if `share` is out of range.

    Reference:
        Lin et al., Focal loss for dense object detection, ICCV 2017, Sec. 3.3, of which the default is.
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must lie between 0 and 1, got {share}.")
    _start_rare(network.conv_final[-1].conv.bias, share)


def _start_rare(biases: Tensor, share: float = 0.01) -> None:
    """As `start_rare`, of the biases of one convolution."""
    with torch.no_grad():
        biases.fill_(math.log(share / (1 - share)))
        biases[0] = 0


class DeepSupervisionNet(nn.Module):
    """A `SegResNet` that, while it trains, segments at coarser levels of its decoder, too.

    Each of these levels has a 1×1×1 convolution of its own, which is not part of `segresnet`: that is what to save.

    Args:
        segresnet: the network in 2-D or 3-D.
        num_heads: how many coarser levels have an output, from the finest on; at least 1 and fewer than the levels of
            the decoder.

    Raises:
        ValueError: if `num_heads` is out of range.

    Reference:
        Lee et al., Deeply-supervised nets, AISTATS 2015, Sec. 2.
    """

    def __init__(self, segresnet: SegResNet, num_heads: int = 2) -> None:
        super().__init__()
        levels = len(segresnet.up_layers)
        if not 1 <= num_heads < levels:
            raise ValueError(f"`num_heads` must be at least 1 and fewer than the {levels} levels, got {num_heads}.")
        self.segresnet = segresnet
        classes = segresnet.conv_final[-1].out_channels
        conv = Conv[Conv.CONV, segresnet.spatial_dims]
        # Level 0 is that of the output itself.
        heads = [conv(segresnet.init_filters * 2**level, classes, 1) for level in range(1, num_heads + 1)]
        for head in heads:
            _start_rare(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, *spatial); in training a list with those of coarser levels behind, each half as fine.

        Args:
            images: shape (B, in_channels, *spatial).
        """
        if not self.training:
            return self.segresnet(images)
        features, maps = self.segresnet.encode(images)
        skips = maps[::-1][1:]
        decoded = []
        for upsample, layer, skip in zip(self.segresnet.up_samples, self.segresnet.up_layers, skips, strict=False):
            features = layer(upsample(features) + skip)
            decoded.append(features)
        finest, *coarser = decoded[::-1]
        others = [head(each) for head, each in zip(self.heads, coarser, strict=False)]
        return [self.segresnet.conv_final(finest), *others]


class UnseenClasses:
    """Says after the first epoch which structures no patch has shown, such as when few labels are left.

    Args:
        class_names: structures of the classes 1, 2, ... of the batches' "label".
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.seen: set[int] = set()

    def attach(self, engine: Engine) -> None:
        """Look at the first epoch of `engine`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), self._report)

    def __call__(self, engine: Engine) -> None:
        """Remember the classes of one batch."""
        if engine.state.epoch == 1 and len(self.seen) < len(self.class_names):
            self.seen |= {*torch.as_tensor(engine.state.batch["label"]).unique().int().tolist()} - {0}

    def _report(self, engine: Engine) -> None:
        unseen = [name for index, name in enumerate(self.class_names, start=1) if index not in self.seen]
        if unseen:
            logger.warning(
                "No patch of the first epoch shows %s: with these labels it cannot be learnt.", ", ".join(unseen)
            )


class FrozenEncoder:
    """Keeps the encoder of a `SegResNet` as it is for the first epochs, so that a new head does not spoil it.

    Its gradients are dropped before the optimiser sees them, which works in any number of processes: optimisers of
    PyTorch leave parameters without gradient alone, weight decay included.

    Args:
        network: the network.
        num_epochs: how many epochs, at least 0.

    Raises:
        ValueError: if `num_epochs` is negative.
    """

    def __init__(self, network: SegResNet, num_epochs: int) -> None:
        if num_epochs < 0:
            raise ValueError(f"`num_epochs` must be at least 0, got {num_epochs}.")
        self.parameters = [each for name, each in network.named_parameters() if name.startswith(SEGRESNET_ENCODER)]
        self.num_epochs = num_epochs

    def attach(self, engine: Engine) -> None:
        """Run after every backward pass."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Drop the gradients of the encoder, if it is early."""
        if engine.state.epoch <= self.num_epochs:
            for parameter in self.parameters:
                parameter.grad = None
