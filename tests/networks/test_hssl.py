"""Tests of dissect_monai.networks.hssl and of its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.networks.nets import SegResNet

from dissect_monai.inferers import AutocastInferer
from dissect_monai.losses.contrastive import HierarchicalContrastiveLoss
from dissect_monai.losses.pretraining import HSSLLoss, unexplained_variance
from dissect_monai.networks.hssl import HSSLNet, HSSLOutput
from dissect_monai.transforms.augment import BatchAugment, Corrupt, Placement
from dissect_monai.transforms.views import HierarchyTarget, HierarchyViews, ViewBatch

TERMS = ["image", "task", "group", "classification", "reconstruction"]
TASK, GROUP = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0])
both_dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def make_segresnet(spatial_dims: int = 2, in_channels: int = 1, out_channels: int = 1, **kwargs: Any) -> SegResNet:
    small = {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1), **kwargs}
    return SegResNet(spatial_dims, in_channels=in_channels, out_channels=out_channels, **small)


def make_net(spatial_dims: int = 2, in_channels: int = 1) -> HSSLNet:
    torch.manual_seed(0)
    return HSSLNet(make_segresnet(spatial_dims, in_channels, in_channels), 3, 2, hidden_dim=16, out_dim=8)


def make_batch(spatial_dims: int = 2, in_channels: int = 1) -> ViewBatch:
    generator = torch.Generator().manual_seed(1)
    size = (8,) * spatial_dims
    # Every task has a brightness of its own, every image a pattern.
    images = 0.3 * TASK.view(-1, 1, *[1] * spatial_dims) + 0.4 * torch.rand(4, in_channels, *size, generator=generator)
    views = (images.repeat(2, *[1] * (spatial_dims + 1))).clamp(0, 1)
    images, masked = Corrupt(0.4, mask_size=4)(views, generator)
    return ViewBatch(images, HierarchyTarget(views, masked, TASK, GROUP))


def only(name: str) -> HSSLLoss:
    return HSSLLoss(**{f"{term}_weight": float(term == name) for term in TERMS})


# ---- shapes and ranges -------------------------------------------------------------------------------------------


@both_dims
@pytest.mark.parametrize("in_channels", [1, 2])
def test_embeds_classifies_and_reconstructs_every_view(spatial_dims: int, in_channels: int) -> None:
    images = make_batch(spatial_dims, in_channels).images
    output = make_net(spatial_dims, in_channels)(images)
    assert output.features.shape == (8, 32, *[2] * spatial_dims)
    assert output.embedding.shape == (8, 32)
    assert [each.shape for each in output.embeddings] == [(8, 8)] * 3
    assert output.task_logits.shape == (8, 3)
    assert output.group_logits.shape == (8, 2)
    assert output.reconstruction.shape == images.shape
    assert not output.embedding.requires_grad


@both_dims
def test_terms_are_named_scalars(spatial_dims: int) -> None:
    images, target = make_batch(spatial_dims)
    terms = HSSLLoss().terms(make_net(spatial_dims)(images), target)
    assert list(terms) == TERMS
    assert all(term.shape == () and term.dtype == torch.float32 and term > 0 for term in terms.values())


def test_the_dense_term_is_a_switch_of_network_and_loss() -> None:
    torch.manual_seed(0)
    images, target = make_batch()
    target = target._replace(placement=Placement(torch.eye(2).expand(8, -1, -1), torch.zeros(8, 2)))
    net = HSSLNet(make_segresnet(), 3, 2, hidden_dim=16, out_dim=8, dense=True)
    output = net(images)
    assert output.dense is not None
    assert output.dense.shape == (8, 8, 2, 2)
    terms = HSSLLoss(dense_weight=3).terms(output, target)
    assert list(terms) == [*TERMS, "dense"]
    without = HSSLLoss()(output, target)
    torch.testing.assert_close(HSSLLoss(dense_weight=3)(output, target), without + 3 * terms["dense"])
    with pytest.raises(ValueError, match="`dense_weight` is positive but the network has no head for it: set `dense`"):
        HSSLLoss(dense_weight=1)(make_net()(images), target)


@pytest.mark.parametrize(("counts", "left_out"), [((1, 1), ["task", "group"]), ((3, 1), ["group"]), ((3, 2), [])])
def test_a_level_of_a_single_label_is_left_out(
    counts: tuple[int, int], left_out: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loss = HSSLLoss(num_tasks=counts[0], num_groups=counts[1])
    assert [name for name, weight in loss.weights.items() if not weight and name != "dense"] == left_out
    assert all(f"single {name}" in caplog.text for name in left_out)
    assert ("single" in caplog.text) == bool(left_out)


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch() -> None:
    net, images = make_net(), make_batch().images
    together, alone = net(images), net(images[:1])
    for level, own in zip(together.embeddings, alone.embeddings, strict=True):
        torch.testing.assert_close(level[:1], own)


# ---- properties --------------------------------------------------------------------------------------------------


@both_dims
def test_weights_load_key_for_key_but_for_the_last_convolution(spatial_dims: int) -> None:
    state = make_net(spatial_dims).segresnet.state_dict()
    other = make_segresnet(spatial_dims, out_channels=14)
    assert list(state) == list(other.state_dict())
    differing = [name for name, value in other.state_dict().items() if value.shape != state[name].shape]
    assert differing == ["conv_final.2.conv.weight", "conv_final.2.conv.bias"]
    kept = {name: value for name, value in state.items() if name not in differing}
    loaded = other.load_state_dict(kept, strict=False)
    assert loaded.missing_keys == differing
    assert not loaded.unexpected_keys


def test_reconstruction_is_the_output_of_the_segresnet() -> None:
    net, images = make_net(), make_batch().images
    torch.testing.assert_close(net(images).reconstruction, net.segresnet(images))


def test_forward_is_the_weighted_sum_of_the_terms() -> None:
    images, target = make_batch()
    output = make_net()(images)
    loss = HSSLLoss(0.5, 2, 3, 5, 7, temperature=0.2)
    terms = loss.terms(output, target)
    expected = sum(weight * terms[name] for name, weight in zip(TERMS, (0.5, 2, 3, 5, 7), strict=True))
    torch.testing.assert_close(loss(output, target), expected)
    contrast = HierarchicalContrastiveLoss(0.2).terms(output.embeddings, TASK, GROUP)
    assert all(torch.equal(terms[name], term) for name, term in contrast.items())


@pytest.mark.parametrize("name", TERMS)
def test_weight_zero_removes_a_term(name: str) -> None:
    images, target = make_batch()
    output = make_net()(images)
    terms = HSSLLoss().terms(output, target)
    without = HSSLLoss(**{f"{name}_weight": 0})(output, target)
    torch.testing.assert_close(without, torch.stack([term for key, term in terms.items() if key != name]).sum())
    torch.testing.assert_close(only(name)(output, target), terms[name])


def test_classification_is_the_mean_of_both_entropies() -> None:
    images, target = make_batch()
    output: HSSLOutput = make_net()(images)
    right = output._replace(
        task_logits=100 * torch.eye(3)[TASK.repeat(2)], group_logits=100 * torch.eye(2)[GROUP.repeat(2)]
    )
    assert only("classification")(right, target) < 1e-6
    unsure = right._replace(task_logits=torch.zeros(8, 3))
    torch.testing.assert_close(only("classification")(unsure, target), torch.tensor(3.0).log() / 2)


def test_reconstruction_is_judged_on_the_uncorrupted_view_and_most_where_it_is_masked() -> None:
    images, target = make_batch()
    output = make_net()(images)
    assert target.masked is not None
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


@pytest.mark.parametrize("name", TERMS)
def test_every_term_falls_when_it_is_optimised(name: str) -> None:
    net, (images, target) = make_net(), make_batch()
    loss = only(name)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    values = []
    for _ in range(25):
        value = loss(net(images), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    # A level's loss is at least the logarithm of how many positives an anchor has: 1, 3 or 1, and 3.
    floor = {"task": torch.tensor([3.0, 1, 1, 3]).log().mean().item(), "group": torch.tensor(3.0).log().item()}
    assert values[-1] - floor.get(name, 0) < 0.5 * (values[0] - floor.get(name, 0))


def test_views_and_loss_serve_a_trainer() -> None:
    data = [{"image": torch.rand(1, 8, 8), "task": "ab"[i % 2], "group": "c"} for i in range(4)]
    net = HSSLNet(make_segresnet(), num_tasks=2, num_groups=1, hidden_dim=16, out_dim=8)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(data), batch_size=4),
        network=net,
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
        loss_function=HSSLLoss(),
        prepare_batch=HierarchyViews(BatchAugment(), ["a", "b"], ["c"], corrupt=Corrupt(mask_size=2)),
        decollate=False,
    )
    trainer.run()
    assert trainer.state.output["loss"].isfinite()
    assert trainer.state.output["label"].task.tolist() == [0, 1, 0, 1]
    assert isinstance(trainer.state.output["pred"], HSSLOutput)


# ---- gradients ---------------------------------------------------------------------------------------------------


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
    net, (images, target) = make_net(spatial_dims), make_batch(spatial_dims)
    output = AutocastInferer()(images, net)
    assert output.task_logits.dtype == torch.bfloat16
    terms, expected = HSSLLoss().terms(output, target), HSSLLoss().terms(net(images), target)
    for name in TERMS:
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], expected[name], rtol=0.1, atol=0.1)
    HSSLLoss()(output, target).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


# ---- errors ------------------------------------------------------------------------------------------------------


def test_rejects_a_segresnet_that_does_not_reconstruct() -> None:
    with pytest.raises(ValueError, match="as many output as input channels, got 2 and 1; set `out_channels`"):
        HSSLNet(make_segresnet(out_channels=2), 3, 2)
    with pytest.raises(ValueError, match="must use its final convolution"):
        HSSLNet(make_segresnet(use_conv_final=False), 3, 2)


@pytest.mark.parametrize("numbers", [{"num_tasks": 0, "num_groups": 1}, {"num_tasks": 1, "num_groups": 0}])
def test_rejects_no_task_and_no_group(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        HSSLNet(make_segresnet(), **numbers)


def test_rejects_sizes_that_the_decoder_could_not_restore() -> None:
    with pytest.raises(ValueError, match=r"the spatial sizes of `images` must be multiples of 4, got \(8, 10\)"):
        make_net()(torch.rand(2, 1, 8, 10))


@pytest.mark.parametrize("name", TERMS)
def test_rejects_a_negative_weight(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}_weight` must not be negative, got -1"):
        HSSLLoss(**{f"{name}_weight": -1})


def test_rejects_a_loss_of_nothing() -> None:
    with pytest.raises(ValueError, match="one of the loss weights must be positive, got 0 for all of them"):
        HSSLLoss(0, 0, 0, 0, 0)
