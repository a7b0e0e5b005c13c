import pytest
import torch
from helpers import small_resnet, small_segresnet
from torch import Tensor, nn

from dissect_monai.networks.encoders import SegResNetEncoder, feature_maps, pool


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_encoder_of_a_segresnet_gives_its_maps(spatial_dims: int) -> None:
    network, images = small_segresnet(spatial_dims, blocks_down=(1, 2, 1)), torch.rand(2, 1, *[16] * spatial_dims)
    encoder = SegResNetEncoder(network)
    bottleneck, maps = network.encode(images)
    assert torch.equal(encoder.encode(images)[0], bottleneck)
    for ours, reference, chosen in zip(encoder.encode(images)[1], maps, feature_maps(encoder, images), strict=True):
        assert torch.equal(ours, reference)
        assert torch.equal(ours, chosen)
    assert torch.equal(encoder(images), pool(bottleneck))


def test_encoder_of_a_segresnet_drops_out_as_it_does() -> None:
    network, images = small_segresnet(3, dropout_prob=0.5), torch.rand(1, 1, 16, 16, 16)
    encoder = SegResNetEncoder(network)
    torch.manual_seed(1)
    expected = network.encode(images)[0]
    torch.manual_seed(1)
    assert torch.equal(encoder.encode(images)[0], expected)
    assert not torch.equal(encoder.eval().encode(images)[0], expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_pooled_maps_are_the_output_of_a_stock_resnet_without_a_max_pool(spatial_dims: int) -> None:
    stock = small_resnet(spatial_dims=spatial_dims, no_max_pool=True).eval()
    images = torch.rand(2, 1, *[32] * spatial_dims)
    with torch.no_grad():
        maps = feature_maps(stock, images)
        torch.testing.assert_close(pool(maps[-1]), stock(images))
    assert [each.shape[1] for each in maps] == [8, 16, 32, 64]


def test_any_module_that_returns_maps_is_an_encoder() -> None:
    class Stages(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images[..., ::2]

    assert [each.shape[-1] for each in feature_maps(Stages(), torch.rand(1, 1, 32, 32))] == [32, 16]


def test_rejects_an_encoder_without_maps() -> None:
    with pytest.raises(ValueError, match=r"`encoder` must be one of ours, .* got Conv2d returning Tensor"):
        feature_maps(nn.Conv2d(1, 4, 3), torch.rand(1, 1, 8, 8))
