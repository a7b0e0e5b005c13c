from __future__ import annotations

import torch
from monai.losses import DiceCELoss, DiceLoss

from dissect_monai.losses.segmentation import AnnotatedLoss
from dissect_monai.transforms.labels import IGNORED

DICE_CE = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=0, smooth_dr=1e-6)


def logits_and_target(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *shape, generator=generator), torch.randint(0, 3, (2, 1, *shape), generator=generator)


def test_ignored_voxels_have_neither_loss_nor_gradient() -> None:
    logits, target = logits_and_target(8, 6, 4)
    torch.testing.assert_close(AnnotatedLoss(DICE_CE)(logits, target), DICE_CE(logits, target))  # all are annotated
    target[0, :, :, :, 2:], target[1, :, :3] = IGNORED, IGNORED
    kept = (target != IGNORED).float()
    cross_entropy = torch.nn.functional.cross_entropy(logits, target[:, 0], ignore_index=IGNORED)
    masked = DiceLoss(include_background=False, batch=True, smooth_nr=0, smooth_dr=1e-6)
    onehot = torch.nn.functional.one_hot(target[:, 0] % IGNORED, 3).movedim(-1, 1) * kept
    loss = AnnotatedLoss(DICE_CE)(logits.requires_grad_(), target)
    torch.testing.assert_close(loss, cross_entropy + masked(logits.softmax(1) * kept, onehot))
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(1, keepdim=True) > 0).equal(kept > 0)


def test_a_batch_without_annotation_has_a_loss_of_zero() -> None:
    logits, target = logits_and_target(8, 8)
    assert AnnotatedLoss(DICE_CE)(logits, torch.full_like(target, IGNORED)) == 0
