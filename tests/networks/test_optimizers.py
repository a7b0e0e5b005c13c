from __future__ import annotations

import pytest
import torch
from monai.networks.nets import resnet10
from torch import nn

from dissect_monai.networks.optimizers import adamw
from dissect_monai.networks.vqssl import VQSSLNet


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def classifier() -> nn.Module:
    return resnet10(spatial_dims=2, n_input_channels=1, num_classes=3, widen_factor=0.125)


def test_biases_and_norms_do_not_decay() -> None:
    decaying, others = adamw(network(), 0.1, 0.1).param_groups
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert [each.ndim for each in decaying["params"]] == [4, 2]
    assert [each.ndim for each in others["params"]] == [1, 1, 1, 1]


def test_every_trainable_parameter_is_in_one_group_and_no_other() -> None:
    encoder = resnet10(spatial_dims=2, n_input_channels=1, feed_forward=False)
    net = VQSSLNet(encoder, num_embeddings=4, embedding_dim=8, hidden_dim=8)
    grouped = [id(each) for group in adamw(net, 0.1, 0.1).param_groups for each in group["params"]]
    expected = {id(each) for each in net.parameters() if each.requires_grad}
    assert len(grouped) == len(expected)
    assert set(grouped) == expected
    assert not expected & {id(each) for each in net.target.parameters()}


def test_lowers_the_loss() -> None:
    net, images, losses = network(), torch.rand(8, 1, 4, 4), []
    optimizer = adamw(net, 0.05, 1e-6)
    for _ in range(20):
        optimizer.zero_grad()
        loss = net(images).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_decays_weights_without_gradient_from_the_loss() -> None:
    net = network()
    before = [parameter.clone() for parameter in net.parameters()]
    (sum(parameter.sum() for parameter in net.parameters()) * 0).backward()
    adamw(net, 0.1, 0.5).step()
    for old, new in zip(before, net.parameters(), strict=True):
        assert (new.norm() < old.norm()) if new.ndim > 1 else torch.equal(old, new)


def test_learning_rates_fall_from_the_head_to_the_stem() -> None:
    net = classifier()
    groups = adamw(net, 0.1, 0.05, layer_decay=0.5).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    expected = {"fc": 0.1, "layer4": 0.05, "layer3": 0.025, "layer2": 0.0125, "layer1": 0.00625}
    for name, parameter in net.named_parameters():
        assert rates[id(parameter)] == pytest.approx(expected.get(name.split(".")[0], 0.003125))
    assert len(rates) == len(list(net.parameters()))
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(0, 0), (-1, 0), (0.1, -0.1)])
def test_rejects_values_out_of_range(learning_rate: float, weight_decay: float) -> None:
    with pytest.raises(ValueError, match="`learning_rate` must be positive and `weight_decay` not negative, got"):
        adamw(network(), learning_rate, weight_decay)


@pytest.mark.parametrize("layer_decay", [0, 1.5])
def test_rejects_a_layer_decay_out_of_range(layer_decay: float) -> None:
    with pytest.raises(ValueError, match=r"`layer_decay` must be in \(0, 1\], got"):
        adamw(classifier(), 0.1, 0, layer_decay)
