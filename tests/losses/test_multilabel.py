from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dissect_monai.losses.multilabel import MultiLabelLoss, positive_weights

NAN = float("nan")
NAMES = ["Opacity", "Nodule", "Rare"]


def items(*labels: list[float]) -> list[dict[str, Any]]:
    return [{"image": str(index), "label": label} for index, label in enumerate(labels)]


def test_loss_is_the_mean_over_the_known_labels() -> None:
    pred, label = torch.randn(4, 3), torch.tensor([[1, 0, NAN], [NAN, 1, 0], [0, 0, 0], [NAN, NAN, NAN]])
    known = ~label.isnan()
    expected = F.binary_cross_entropy_with_logits(pred[known], label[known])
    assert MultiLabelLoss()(pred, label).item() == pytest.approx(expected.item())


def test_positives_weigh_as_much_as_they_are_told() -> None:
    pred, weight = torch.zeros(2, 2), torch.tensor([3.0, 0.5])
    loss = MultiLabelLoss(weight)(pred, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert loss.item() == pytest.approx((3 + 0.5 + 1 + 1) / 4 * torch.log(torch.tensor(2.0)).item())


def test_unknown_labels_give_no_gradient() -> None:
    pred = torch.tensor([[2.0, -1.0], [0.5, 1e30]], requires_grad=True)
    MultiLabelLoss(torch.ones(2))(pred, torch.tensor([[NAN, 1.0], [0.0, NAN]])).backward()
    assert pred.grad is not None
    assert pred.grad[0, 0] == pred.grad[1, 1] == 0
    assert (pred.grad[[0, 1], [1, 0]] != 0).all()
    assert pred.grad.isfinite().all()


def test_a_batch_without_known_labels_has_loss_and_gradient_0() -> None:
    pred = torch.randn(2, 3, requires_grad=True)
    loss = MultiLabelLoss()(pred, torch.full((2, 3), NAN))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(pred.grad, torch.zeros(2, 3))


def test_loss_of_half_precision_logits_is_in_float32() -> None:
    pred = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = MultiLabelLoss()(pred, torch.ones(2, 3))
    loss.backward()
    assert loss.dtype == torch.float32
    assert pred.grad.dtype == torch.bfloat16


def test_weights_are_negatives_over_positives_of_the_known_labels_within_limits() -> None:
    weights = positive_weights(items([1, 0, 0], [0, 1, 0], [0, 1, NAN], [0, NAN, 0]), NAMES, "weighted")
    torch.testing.assert_close(weights, torch.tensor([3, 0.5, 1]))
    rare = items([1, 0], *[[0, 1]] * 30)
    torch.testing.assert_close(positive_weights(rare, NAMES[:2], "weighted"), torch.tensor([10, 0.1]))
    assert torch.equal(positive_weights(rare, NAMES[:2], "none"), torch.ones(2))
