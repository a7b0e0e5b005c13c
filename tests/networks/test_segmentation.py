from copy import deepcopy

import pytest
import torch
from helpers import small_segresnet
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.nets import FlexibleUNet, SegResNet
from torch import Tensor

from dissect_monai.networks.encoders import stem_and_stages
from dissect_monai.networks.segmentation import DeepSupervisionNet, build_segmentation, init_class_prior


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


# ---- other encoders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spatial_dims", "size"), [(2, (20, 33)), (3, (8, 17, 32))])
def test_an_encoder_with_a_decoder_segments_images_of_any_size(spatial_dims: int, size: tuple[int, ...]) -> None:
    network = build_segmentation("resnet10", spatial_dims, 2, 3).eval()
    init_class_prior(network)
    batch = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(1))
    padded = torch.zeros(1, 2, *(-(-side // 32) * 32 for side in size))
    inside = (..., *(slice(side) for side in size))
    padded[inside] = batch
    with torch.no_grad():
        logits = network(batch)
        torch.testing.assert_close(logits, network(padded)[inside])
    assert logits.shape == (1, 3, *size)
    shares = logits.softmax(1).mean((0, *range(2, 2 + spatial_dims))).tolist()
    assert shares == pytest.approx([0.98, 0.01, 0.01], abs=0.02)


def test_the_decoder_sees_every_stage_and_the_stem() -> None:
    network, batch = build_segmentation("resnet10", 2, 1, 2), torch.rand(2, 1, 32, 32)
    network(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    maps = stem_and_stages(network.encoder, batch)
    assert [each.shape[1:] for each in maps] == [(64, 16, 16), *((64 * 2**n, 8 // 2**n, 8 // 2**n) for n in range(4))]
    reference = FlexibleUNet(1, 2, "resnet10")  # MONAI's own, whose stem has a stride of 1 by another kernel
    shapes = {key: value.shape for key, value in network.decoder.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.decoder.state_dict().items()}


def test_a_segresnet_is_monais_own_bit_for_bit() -> None:
    torch.manual_seed(3)
    ours = build_segmentation("SegResNet", 3, 1, 3, 8, [1, 2], [1])
    torch.manual_seed(3)
    stock = SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=3, blocks_down=[1, 2], blocks_up=[1])
    assert type(ours) is SegResNet
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in ours.state_dict().items())


def test_deep_supervision_is_of_a_segresnet_alone() -> None:
    with pytest.raises(ValueError, match="`deep_supervision` needs `encoder` SegResNet, got another: set it to 0"):
        DeepSupervisionNet(build_segmentation("resnet10", 2, 1, 2), 1)
