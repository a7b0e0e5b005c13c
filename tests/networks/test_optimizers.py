from __future__ import annotations

import pytest
import torch
from monai.networks.nets import resnet10
from torch import nn

from dissect_monai.networks.optimizers import parameter_groups, ssl_optimizer
from dissect_monai.networks.vqssl import VQSSLNet

every_name = pytest.mark.parametrize("name", ["adamw", "lars"])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def test_biases_and_norms_do_not_decay() -> None:
    decaying, others = parameter_groups(network(), 0.1)
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert [each.ndim for each in decaying["params"]] == [4, 2]
    assert [each.ndim for each in others["params"]] == [1, 1, 1, 1]


def test_every_trainable_parameter_is_in_one_group_and_no_other() -> None:
    encoder = resnet10(spatial_dims=2, n_input_channels=1, feed_forward=False)
    net = VQSSLNet(encoder, num_embeddings=4, embedding_dim=8, hidden_dim=8)
    grouped = [id(each) for group in parameter_groups(net, 0.1) for each in group["params"]]
    expected = {id(each) for each in net.parameters() if each.requires_grad}
    assert len(grouped) == len(expected)
    assert set(grouped) == expected
    assert not expected & {id(each) for each in net.target.parameters()}


@every_name
def test_lowers_the_loss(name: str) -> None:
    net, images = network(), torch.rand(8, 1, 4, 4)
    optimizer = ssl_optimizer(net, name, 0.05 if name == "adamw" else 0.3, 1e-6)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = net(images).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@every_name
def test_decays_weights_without_gradient_from_the_loss(name: str) -> None:
    net = network()
    before = [parameter.clone() for parameter in net.parameters()]
    optimizer = ssl_optimizer(net, name, 0.1, 0.5)
    (sum(parameter.sum() for parameter in net.parameters()) * 0).backward()
    optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        assert (new.norm() < old.norm()) if new.ndim > 1 else torch.equal(old, new)


@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(0, 0), (-1, 0), (0.1, -0.1)])
def test_rejects_values_out_of_range(learning_rate: float, weight_decay: float) -> None:
    with pytest.raises(ValueError, match="`learning_rate` must be positive and `weight_decay` not negative, got"):
        ssl_optimizer(network(), "adamw", learning_rate, weight_decay)


def test_rejects_an_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match="`optimizer_name` must be adamw or lars, got 'sgd'"):
        ssl_optimizer(network(), "sgd", 0.1, 0)
