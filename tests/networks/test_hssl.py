import pytest
import torch
from helpers import small_segresnet

from dissect_monai.networks.hssl import HSSLNet

both_dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def make_net(spatial_dims: int = 2, in_channels: int = 1) -> HSSLNet:
    segresnet = small_segresnet(spatial_dims, in_channels=in_channels, out_channels=in_channels)
    return HSSLNet(segresnet, 3, 2, hidden_dim=16, out_dim=8)


def make_images(spatial_dims: int = 2, in_channels: int = 1) -> torch.Tensor:
    return torch.rand(8, in_channels, *[8] * spatial_dims, generator=torch.Generator().manual_seed(1))


@both_dims
@pytest.mark.parametrize("in_channels", [1, 2])
def test_embeds_classifies_and_reconstructs_every_view(spatial_dims: int, in_channels: int) -> None:
    images = make_images(spatial_dims, in_channels)
    net = make_net(spatial_dims, in_channels)
    output = net(images)
    assert output.embedding.shape == (8, 32)
    assert [each.shape for each in output.embeddings] == [(8, 8)] * 3
    assert output.task_logits.shape == (8, 3)
    assert output.group_logits.shape == (8, 2)
    assert not output.embedding.requires_grad
    torch.testing.assert_close(output.reconstruction, net.segresnet(images))


def test_once_trained_an_embedding_does_not_depend_on_the_rest_of_the_batch() -> None:
    net, images = make_net().eval(), make_images()
    together, alone = net(images), net(images[:1])
    for level, own in zip(together.embeddings, alone.embeddings, strict=True):
        torch.testing.assert_close(level[:1], own)


@both_dims
def test_weights_load_key_for_key_but_for_the_last_convolution(spatial_dims: int) -> None:
    state = make_net(spatial_dims).segresnet.state_dict()
    other = small_segresnet(spatial_dims, out_channels=14)
    assert list(state) == list(other.state_dict())
    differing = [name for name, value in other.state_dict().items() if value.shape != state[name].shape]
    assert differing == ["conv_final.2.conv.weight", "conv_final.2.conv.bias"]


def test_rejects_a_segresnet_that_does_not_reconstruct() -> None:
    with pytest.raises(ValueError, match="as many output as input channels, got 2 and 1; set `out_channels`"):
        HSSLNet(small_segresnet(out_channels=2), 3, 2)


def test_a_map_of_the_decoder_must_be_there() -> None:
    with pytest.raises(ValueError, match="`dense_level` must be from 0 to 2, a map of the decoder, got 3"):
        HSSLNet(small_segresnet(out_channels=1), 3, 2, dense_level=3)
