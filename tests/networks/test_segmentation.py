from copy import deepcopy

import pytest
import torch
from helpers import small_segresnet
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor

from dissect_monai.networks.segmentation import DeepSupervisionNet, init_class_prior


def images(spatial_dims: int) -> Tensor:
    return torch.randn(2, 1, *[8] * spatial_dims, generator=torch.Generator().manual_seed(1))


def labels(spatial_dims: int) -> Tensor:
    return torch.randint(0, 3, (2, 1, *[8] * spatial_dims), generator=torch.Generator().manual_seed(2)).float()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_an_untrained_network_calls_every_structure_rare(spatial_dims: int) -> None:
    network = small_segresnet(spatial_dims)
    before = deepcopy(network.state_dict())
    init_class_prior(network)
    background, *structures = network.conv_final[-1].conv.bias.softmax(0).tolist()
    assert [each / (each + background) for each in structures] == pytest.approx([0.01, 0.01])
    changed = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["conv_final.2.conv.bias"]


def test_coarser_levels_start_rare_too() -> None:
    heads = DeepSupervisionNet(small_segresnet(blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1)), 2).heads
    shares = [head.bias.softmax(0).tolist() for head in heads]
    assert shares == [pytest.approx([0.98019, 0.0099, 0.0099], abs=1e-4)] * 2


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_in_training_there_are_logits_of_every_level(spatial_dims: int) -> None:
    deep = {"blocks_down": (1, 1, 1, 1), "blocks_up": (1, 1, 1)}
    for num_heads in (1, 2):
        network = DeepSupervisionNet(small_segresnet(spatial_dims, **deep), num_heads).train()
        shapes = [tuple(each.shape) for each in network(images(spatial_dims))]
        assert shapes == [(2, 3, *[size] * spatial_dims) for size in (8, 4, 2)[: num_heads + 1]]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_first_logits_are_those_of_the_segresnet(spatial_dims: int) -> None:
    plain = small_segresnet(spatial_dims)
    network = DeepSupervisionNet(small_segresnet(spatial_dims), 1)
    batch = images(spatial_dims)
    torch.testing.assert_close(network.train()(batch)[0], plain.train()(batch), rtol=0, atol=0)
    output = network.eval()(batch)
    assert isinstance(output, Tensor)
    torch.testing.assert_close(output, plain.eval()(batch), rtol=0, atol=0)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_level_learns(spatial_dims: int) -> None:
    network = DeepSupervisionNet(small_segresnet(spatial_dims), 1).train()
    loss = DeepSupervisionLoss(DiceCELoss(include_background=False, to_onehot_y=True, softmax=True))
    output = network(images(spatial_dims))
    value = loss(output, labels(spatial_dims))
    value.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.heads[0].weight.grad.abs().sum() > 0
    assert network.segresnet.conv_final[-1].conv.weight.grad.abs().sum() > 0
    # the loss is that of both levels, the coarser one with half the weight
    one = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    coarse = torch.nn.functional.interpolate(labels(spatial_dims), scale_factor=0.5, mode="nearest-exact")
    expected = one(output[0], labels(spatial_dims)) + 0.5 * one(output[1], coarse)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("num_heads", [-1, 0, 2, 3])
def test_heads_out_of_range_are_refused(num_heads: int) -> None:
    with pytest.raises(
        ValueError, match=rf"`num_heads` must be at least 1 and fewer than the 2 levels, got {num_heads}"
    ):
        DeepSupervisionNet(small_segresnet(3), num_heads)
