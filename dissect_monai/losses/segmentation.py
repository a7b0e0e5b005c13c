"""Loss of a segmentation of which a part is annotated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dissect_monai.transforms.labels import IGNORED


class AnnotatedLoss(nn.Module):
    """A loss of the voxels that are annotated, all others being left out.

    Args:
        loss: of logits and classes, over all voxels of a batch alike, as MONAI's `DiceCELoss` with `batch` true.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar; 0 where nothing is annotated.

        Args:
            logits: shape (B, C, *spatial).
            target: classes of shape (B, 1, *spatial), `IGNORED` (255) where nobody has annotated.
        """
        annotated = target[:, 0] != IGNORED
        if not annotated.any():
            return logits.sum() * 0
        # As one image of one axis.
        return self.loss(logits.movedim(1, 0)[:, annotated][None], target[:, 0][annotated][None, None])
