from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from monai.networks.nets import resnet10
from PIL import Image
from torch import Tensor, nn

from dissect_monai.visualize.saliency import overlay_png, saliency_maps


class Sees(nn.Module):
    """Logit 0 answers to bright squares, logit 1 to dark ones, logit 2 to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.AvgPool2d(4)
        self.fc = nn.Linear(1, 3, bias=False)
        nn.init.zeros_(self.fc.weight)
        self.fc.weight.data[:2, 0] = torch.tensor([1.0, -1.0])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer4(images).flatten(2).mean(2))


def squares(x: int, y: int) -> Tensor:
    images = torch.zeros(1, 1, 32, 32)
    images[..., x : x + 4, y : y + 4] = 1
    return images


def test_maps_have_the_size_of_the_images_and_are_in_0_to_1() -> None:
    network = resnet10(spatial_dims=2, n_input_channels=1, num_classes=3, widen_factor=0.125)
    maps = saliency_maps(network, torch.rand(3, 1, 48, 40), finding=1)
    assert maps.shape == (3, 1, 48, 40)
    assert type(maps) is Tensor
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert not maps.requires_grad


def test_maps_of_volumes_are_volumes() -> None:
    network = resnet10(spatial_dims=3, n_input_channels=1, num_classes=1, widen_factor=0.125)
    assert saliency_maps(network, torch.rand(1, 1, 16, 16, 24), finding=0).shape == (1, 1, 16, 16, 24)


@pytest.mark.parametrize(("side", "stage"), [(128, 4), (112, 4), (96, 3), (64, 3), (48, 2), (32, 2), (20, 1), (8, 1)])
def test_looks_at_the_last_stage_that_has_four_places_a_side(side: int, stage: int) -> None:
    torch.manual_seed(0)
    network = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, num_classes=1, widen_factor=0.25)
    images = torch.rand(2, 1, side, side + 32)
    expected = saliency_maps(network, images, finding=0, layer=f"layer{stage}")
    assert torch.equal(saliency_maps(network, images, finding=0), expected)
    others = [saliency_maps(network, images, finding=0, layer=f"layer{other}") for other in {1, 2, 3, 4} - {stage}]
    assert not any(torch.equal(expected, other) for other in others)


def test_no_map_is_empty_where_the_features_raise_the_logit() -> None:
    torch.manual_seed(0)
    network = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, num_classes=4, widen_factor=0.25).eval()
    images = torch.rand(24, 1, 48, 48) * torch.rand(24, 1, 1, 1)
    raised = (network(images) - network.fc.bias) > 0
    fine_alone = 0
    for finding in range(4):
        filled = saliency_maps(network, images, finding).flatten(1).any(1)
        fine_alone += int(saliency_maps(network, images, finding, layer="layer2").flatten(1).any(1).sum())
        assert filled[raised[:, finding]].all()
    assert raised.any()
    assert not raised.all()
    assert fine_alone < raised.sum()


def test_rejects_a_network_without_stages() -> None:
    with pytest.raises(ValueError, match="`layer` must name a module of the Flatten, got None"):
        saliency_maps(nn.Flatten(), squares(0, 0), finding=0)


def test_peaks_where_the_finding_is_and_in_each_image_at_its_own_place() -> None:
    maps = saliency_maps(Sees(), torch.cat([squares(4, 24), squares(20, 8)]), finding=0)
    for each, (x, y) in zip(maps, [(4, 24), (20, 8)], strict=True):
        peak = np.unravel_index(int(each[0].argmax()), (32, 32))
        assert x <= peak[0] < x + 4
        assert y <= peak[1] < y + 4
        assert each.max() == 1
        assert each[0, 31, 0] == 0


def test_what_speaks_against_a_finding_is_not_salient() -> None:
    assert saliency_maps(Sees(), squares(4, 4), finding=1).max() == 0


def test_is_0_where_nothing_speaks_for_the_finding() -> None:
    assert torch.equal(saliency_maps(Sees(), squares(4, 4), finding=2), torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("frozen", [False, True])
def test_leaves_the_network_as_it_was(frozen: bool) -> None:
    network = resnet10(spatial_dims=2, n_input_channels=1, num_classes=3, widen_factor=0.125).train()
    network.requires_grad_(not frozen)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        first, second = (saliency_maps(network, images, finding=0) for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert not images.requires_grad


def test_overlays_are_upright() -> None:
    image, saliency = torch.zeros(1, 8, 6), torch.zeros(1, 8, 6)
    image[0, 7, 0] = 1  # x = 7, y = 0: the upper right corner of the screen
    saliency[0, 0, 5] = 1
    picture = np.array(Image.open(io.BytesIO(overlay_png(image, saliency))))
    assert picture.shape == (6, 8, 3)
    assert picture[0, 7].tolist() == [255, 255, 255]
    assert picture[5, 0].max() > 100
    assert picture[3, 3].max() == 0


def test_rejects_a_layer_that_the_network_lacks() -> None:
    with pytest.raises(ValueError, match="`layer` must name a module of the Sees, got 'layer5'"):
        saliency_maps(Sees(), squares(0, 0), finding=0, layer="layer5")


def test_rejects_a_negative_finding() -> None:
    with pytest.raises(ValueError, match="`finding` must be the index of a logit, got -1"):
        saliency_maps(Sees(), squares(0, 0), finding=-1)
