from __future__ import annotations

import pytest
import torch
from monai.networks.nets import resnet10
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.losses.pretraining import VQSSLLoss, regression_loss
from dissect_monai.networks.vqssl import SSLOutput, VQSSLNet


def random_pair(num: int = 8, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, dim, generator=generator), torch.randn(num, dim, generator=generator)


def net_and_views(decode: bool = False) -> tuple[VQSSLNet, Tensor]:
    torch.manual_seed(0)
    encoder = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
    net = VQSSLNet(encoder, num_embeddings=8, embedding_dim=8, hidden_dim=16, out_dim=8, decode=decode)
    return net, torch.rand(8, 1, 32, 32)


# ---- shapes and ranges -------------------------------------------------------------------------------------------


def test_regression_is_a_scalar_between_zero_and_four() -> None:
    predictions, _ = random_pair()
    other = predictions.roll(4, dims=0)
    assert regression_loss(predictions, other).item() == pytest.approx(0, abs=1e-6)
    assert regression_loss(predictions, -other).item() == pytest.approx(4)
    assert 0 < regression_loss(*random_pair()) < 4


def test_terms_are_named_scalars() -> None:
    for decode, last in ((False, []), (True, ["reconstruction"])):
        net, views = net_and_views(decode)
        terms = VQSSLLoss().terms(net(views), views)
        assert list(terms) == ["continuous", "discrete", "commitment", *last]
        assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())


# ---- properties --------------------------------------------------------------------------------------------------


def test_regression_ignores_length_and_which_view_comes_first() -> None:
    predictions, targets = random_pair()
    loss = regression_loss(predictions, targets)
    torch.testing.assert_close(regression_loss(3 * predictions, 0.1 * targets), loss)
    torch.testing.assert_close(regression_loss(predictions.roll(4, 0), targets.roll(4, 0)), loss)


def test_regression_compares_with_the_other_view_of_the_same_image() -> None:
    directions = torch.eye(4)
    assert regression_loss(directions[[0, 1, 2, 3]], directions[[2, 3, 0, 1]]).item() == pytest.approx(0)
    assert regression_loss(directions[[0, 1, 2, 3]], directions[[0, 1, 2, 3]]).item() == pytest.approx(2)


def test_forward_is_the_weighted_sum_of_the_terms() -> None:
    net, views = net_and_views(decode=True)
    output = net(views)
    loss = VQSSLLoss(0.5, 2.0, 3.0, 7.0)
    terms = loss.terms(output, views)
    expected = 0.5 * terms["continuous"] + 2 * terms["discrete"] + 3 * terms["commitment"] + 7 * terms["reconstruction"]
    torch.testing.assert_close(loss(output, views), expected)


def test_only_the_continuous_weight_is_plain_byol() -> None:
    net, views = net_and_views(decode=True)
    output = net(views)
    VQSSLLoss(1, 0, 0, 0)(output, views).backward(retain_graph=True)
    gradients = [parameter.grad.clone() for parameter in net.encoder.parameters()]
    net.zero_grad()
    byol = 2 - 2 * F.cosine_similarity(output.predictions, output.targets.roll(4, 0)).mean()
    byol.backward()
    for gradient, parameter in zip(gradients, net.encoder.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


# ---- reference ---------------------------------------------------------------------------------------------------


def test_regression_is_that_of_a_loop_over_the_pairs() -> None:
    predictions, targets = random_pair()
    distances = []
    for image in range(4):
        for view, other in ((image, image + 4), (image + 4, image)):
            q = predictions[view] / predictions[view].norm()
            z = targets[other] / targets[other].norm()
            distances.append((q - z).square().sum())  # Eq. 2 of BYOL
    torch.testing.assert_close(regression_loss(predictions, targets), torch.stack(distances).mean())


# ---- gradients ---------------------------------------------------------------------------------------------------


def test_targets_get_no_gradient() -> None:
    predictions, targets = (each.requires_grad_() for each in random_pair())
    regression_loss(predictions, targets).backward()
    assert predictions.grad.abs().sum() > 0
    assert targets.grad is None


def test_half_precision_is_summed_in_float32() -> None:
    predictions, targets = random_pair()
    loss = regression_loss(predictions.bfloat16(), targets.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, regression_loss(predictions, targets), atol=0.05, rtol=0)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("predictions", "targets"), [((3, 5), (3, 5)), ((4, 5), (4, 6)), ((4, 5), (2, 5))])
def test_rejects_what_are_not_two_views(predictions: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`predictions` and `targets` must have one shape \(2·B, D\), got"):
        regression_loss(torch.rand(predictions), torch.rand(targets))


@pytest.mark.parametrize("name", ["continuous", "discrete", "commitment", "reconstruction"])
def test_rejects_a_negative_weight(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}_weight` must not be negative, got -1"):
        VQSSLLoss(**{f"{name}_weight": -1})


def test_rejects_a_loss_of_nothing() -> None:
    with pytest.raises(ValueError, match="one of the loss weights must be positive, got 0 for all of them"):
        VQSSLLoss(0, 0, 0, 0)


def test_rejects_reconstruction_without_a_decoder() -> None:
    net, views = net_and_views()
    output: SSLOutput = net(views)
    with pytest.raises(ValueError, match="the network has no decoder: set `decode`"):
        VQSSLLoss(reconstruction_weight=1)(output, views)
