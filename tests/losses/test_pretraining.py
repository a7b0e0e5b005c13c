from typing import Any

import pytest
import torch
from helpers import small_resnet, small_segresnet
from torch import Tensor

from dissect_monai.inferers import AutocastInferer
from dissect_monai.losses.contrastive import hierarchical_contrast
from dissect_monai.losses.pretraining import HSSLLoss, VQSSLLoss, regression_loss, unexplained_variance
from dissect_monai.networks.hssl import HSSLNet
from dissect_monai.networks.vqssl import VQSSLNet
from dissect_monai.transforms.augment import Placement, mask_blocks
from dissect_monai.transforms.views import HierarchyTarget, ViewBatch

TERMS = ["image", "task", "group", "classification", "reconstruction"]
TASK, GROUP = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0])
both_dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def net_and_views(decode: bool = False) -> tuple[VQSSLNet, Tensor]:
    small = {"num_embeddings": 8, "embedding_dim": 8, "hidden_dim": 16, "out_dim": 8}
    net = VQSSLNet(small_resnet(), decode=decode, predict=True, **small)
    return net, torch.rand(8, 1, 32, 32)


def test_vqssl_is_the_weighted_sum_of_named_scalars() -> None:
    weights = {"continuous": 0.5, "discrete": 2.0, "commitment": 3.0, "reconstruction": 7.0}
    for decode in (True, False):
        weights |= {} if decode else {"reconstruction": 0.0}
        net, views = net_and_views(decode)
        output, loss = net(views), VQSSLLoss(*weights.values(), objective="byol")
        terms = loss.terms(output, views)
        assert list(terms) == [*weights][: 3 + decode]
        torch.testing.assert_close(terms["continuous"], regression_loss(output.predictions, output.targets))
        assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
        torch.testing.assert_close(loss(output, views), sum(weights[name] * term for name, term in terms.items()))


def test_regression_is_that_of_a_loop_over_the_pairs() -> None:
    predictions, targets = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    distances = []
    for image in range(4):
        for view, other in ((image, image + 4), (image + 4, image)):
            q = predictions[view] / predictions[view].norm()
            z = targets[other] / targets[other].norm()
            distances.append((q - z).square().sum())  # Eq. 2 of BYOL
    torch.testing.assert_close(regression_loss(predictions, targets), torch.stack(distances).mean())


def test_rejects_reconstruction_without_a_decoder() -> None:
    net, views = net_and_views()
    with pytest.raises(ValueError, match="the network has no decoder: set `decode`"):
        VQSSLLoss(reconstruction_weight=1)(net(views), views)


def make_net(spatial_dims: int = 2, dense: bool = False) -> HSSLNet:
    return HSSLNet(small_segresnet(spatial_dims, out_channels=1), 3, 2, hidden_dim=16, out_dim=8, dense=dense)


def make_batch(spatial_dims: int = 2, size: int = 8) -> ViewBatch:
    generator = torch.Generator().manual_seed(1)
    # Every task has a brightness of its own, every image a pattern.
    noise = torch.rand(4, 1, *[size] * spatial_dims, generator=generator)
    images = 0.3 * TASK.view(-1, 1, *[1] * spatial_dims) + 0.4 * noise
    views = images.repeat(2, *[1] * (spatial_dims + 1)).clamp(0, 1)
    images, masked = mask_blocks(views, 0.4, 4, generator)
    return ViewBatch(images, HierarchyTarget(views, masked, TASK, GROUP))


def only(name: str) -> HSSLLoss:
    return HSSLLoss(**{f"{term}_weight": float(term == name) for term in TERMS})


def test_the_dense_term_is_a_switch_of_network_and_loss() -> None:
    images, target = make_batch()
    target = target._replace(placement=Placement(torch.eye(2).expand(8, -1, -1), torch.zeros(8, 2)))
    output = make_net(dense=True)(images)
    assert output.dense.shape == (8, 8, 2, 2)
    terms = HSSLLoss(dense_weight=3).terms(output, target)
    assert list(terms) == [*TERMS, "dense"]
    without = HSSLLoss()(output, target)
    torch.testing.assert_close(HSSLLoss(dense_weight=3)(output, target), without + 3 * terms["dense"])
    with pytest.raises(ValueError, match="`dense_weight` is positive but the network has no head for it: set `dense`"):
        HSSLLoss(dense_weight=1)(make_net()(images), target)


@pytest.mark.parametrize(("counts", "left_out"), [((1, 1), ["task", "group"]), ((3, 1), ["group"]), ((3, 2), [])])
def test_a_level_needs_two_labels(
    counts: tuple[int, int], left_out: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loss = HSSLLoss(num_tasks=counts[0], num_groups=counts[1])
    assert [name for name, weight in loss.weights.items() if not weight and name != "dense"] == left_out
    assert all(f"single {name}" in caplog.text for name in left_out)
    assert ("single" in caplog.text) == bool(left_out)


def test_forward_is_the_weighted_sum_of_the_terms() -> None:
    images, target = make_batch()
    output = make_net()(images)
    loss = HSSLLoss(0.5, 2, 3, 5, 7, temperature=0.2)
    terms = loss.terms(output, target)
    assert list(terms) == TERMS
    expected = sum(weight * terms[name] for name, weight in zip(TERMS, (0.5, 2, 3, 5, 7), strict=True))
    torch.testing.assert_close(loss(output, target), expected)
    contrast = hierarchical_contrast(output.embeddings, TASK, GROUP, 0.2)
    assert all(torch.equal(terms[name], term) for name, term in contrast.items())


def test_classification_is_the_mean_of_both_entropies() -> None:
    images, target = make_batch()
    output = make_net()(images)
    right = output._replace(
        task_logits=100 * torch.eye(3)[TASK.repeat(2)], group_logits=100 * torch.eye(2)[GROUP.repeat(2)]
    )
    assert only("classification")(right, target) < 1e-6
    unsure = right._replace(task_logits=torch.zeros(8, 3))
    torch.testing.assert_close(only("classification")(unsure, target), torch.tensor(3.0).log() / 2)


def test_reconstruction_is_judged_on_the_uncorrupted_view_and_most_where_it_is_masked() -> None:
    images, target = make_batch()
    output = make_net()(images)
    perfect = output._replace(reconstruction=target.views)
    assert only("reconstruction")(perfect, target) == 0
    blind, seeing = (
        output._replace(reconstruction=target.views + 0.1 * where) for where in (target.masked, ~target.masked)
    )
    variance = target.views.flatten(1).var(1, correction=0)
    on_all = (0.01 * target.masked.flatten(1).float().mean(1) / variance).mean()
    has_masked = target.masked.flatten(1).any(1)
    on_masked = (0.01 * has_masked / variance).mean()
    torch.testing.assert_close(only("reconstruction")(blind, target), (on_all + on_masked) / 2)
    on_seen = (0.01 * (~target.masked).flatten(1).float().mean(1) / variance).mean()
    torch.testing.assert_close(only("reconstruction")(seeing, target), on_seen / 2)


def test_reconstruction_without_a_mask_is_judged_everywhere() -> None:
    images, target = make_batch()
    output = make_net()(images)
    loss = only("reconstruction")(output, target._replace(masked=None))
    torch.testing.assert_close(loss, unexplained_variance(output.reconstruction, target.views))


@both_dims
def test_reconstruction_trains_encoder_and_decoder(spatial_dims: int) -> None:
    net, (images, target) = make_net(spatial_dims), make_batch(spatial_dims)
    only("reconstruction")(net(images), target).backward()
    for name, parameter in net.segresnet.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert all((parameter.grad == 0).all() for parameter in net.projectors.parameters())


@pytest.mark.parametrize("name", TERMS[:4])
def test_other_terms_train_the_encoder_alone(name: str) -> None:
    net, (images, target) = make_net(), make_batch()
    only(name)(net(images), target).backward()
    assert net.segresnet.convInit.conv.weight.grad.abs().sum() > 0
    assert (net.segresnet.up_layers[0][0].conv1.conv.weight.grad == 0).all()


@both_dims
def test_half_precision_is_finite_and_close(spatial_dims: int) -> None:
    # Of 3-D convolutions of 2³ voxels torch 2.13 leaves bfloat16 gradients partly unwritten on CPUs.
    net, (images, target) = make_net(spatial_dims), make_batch(spatial_dims, size=16)
    output = AutocastInferer()(images, net)
    assert output.task_logits.dtype == torch.bfloat16
    terms, expected = HSSLLoss().terms(output, target), HSSLLoss().terms(net(images), target)
    for name in TERMS:
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], expected[name], rtol=0.1, atol=0.1)
    HSSLLoss()(output, target).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("loss", "names"),
    [(HSSLLoss, [*TERMS, "dense"]), (VQSSLLoss, ["continuous", "discrete", "commitment", "reconstruction"])],
)
def test_rejects_a_loss_of_nothing(loss: Any, names: list[str]) -> None:
    with pytest.raises(ValueError, match="one of the loss weights must be positive, got 0 for all of them"):
        loss(**{f"{name}_weight": 0 for name in names})


def test_rejects_a_temperature_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        HSSLLoss(temperature=0)
