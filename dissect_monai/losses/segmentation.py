"""Loss of a segmentation of which a part is annotated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dissect_monai.transforms.labels import IGNORED


class AnnotatedLoss(nn.Module):
    """A loss over all voxels of a batch alike, such as MONAI's `DiceCELoss` with `batch`, of the annotated ones."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (B, C, *spatial) and classes (B, 1, *spatial), `IGNORED` where nobody has annotated."""
        annotated = target[:, 0] != IGNORED
        if not annotated.any():
            return logits.sum() * 0
        # As one image of one axis.
        return self.loss(logits.movedim(1, 0)[:, annotated][None], target[:, 0][annotated][None, None])
