from copy import deepcopy

import pytest
import torch
from monai.networks.nets import SegResNet, resnet10
from torch import Tensor, nn

from dissect_monai.inferers import AutocastInferer
from dissect_monai.losses.pretraining import VQSSLLoss
from dissect_monai.networks.encoders import SegResNetEncoder, feature_maps, pool
from dissect_monai.networks.vqssl import FUSIONS, Decoder, Fusion, SSLOutput, VQSSLNet

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def encoder(name: str = "resnet10") -> nn.Module:
    torch.manual_seed(0)
    if name == "segresnet":
        return SegResNetEncoder(SegResNet(3, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)))
    return resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)


def small_net(name: str = "resnet10", **kwargs: object) -> VQSSLNet:
    dims = 3 if name == "segresnet" else 2
    stages = (2, 3) if dims == 3 else (2, 3, 4)
    size = {"num_embeddings": 16, "embedding_dim": 8, "hidden_dim": 32, "out_dim": 12, "predict": True}
    return VQSSLNet(encoder(name), **{"spatial_dims": dims, "stages": stages, **size, **kwargs})


def views(name: str = "resnet10", num: int = 6) -> Tensor:
    shape = (16, 16, 16) if name == "segresnet" else (32, 32)
    return torch.rand((num, 1, *shape), generator=torch.Generator().manual_seed(1))


def codes(net: VQSSLNet) -> list[Tensor]:
    return [tensor.clone() for codebook in net.codebooks for tensor in codebook.state_dict().values()]


def total(output: SSLOutput, images: Tensor) -> Tensor:
    return VQSSLLoss(reconstruction_weight=output.reconstruction is not None, objective="byol")(output, images)


@every_fusion
@pytest.mark.parametrize(("name", "width"), [("resnet10", 512), ("segresnet", 32)])
def test_embeds_every_view(name: str, width: int, fusion: str) -> None:
    net, images = small_net(name, fusion=fusion, decode=True), views(name)
    output = net(images)
    for each in (output.predictions, output.targets, output.discrete_predictions, output.discrete_targets):
        assert each.shape == (6, 12)
        assert each.isfinite().all()
    assert output.embedding.shape == (6, width)
    maps = feature_maps(net.encoder, images)
    assert [scale.indices.shape[1:] for scale in output.quantized] == [maps[i - 1].shape[2:] for i in net.stages]
    assert output.reconstruction is not None
    assert output.reconstruction.shape == images.shape
    assert output.reconstruction.min() >= 0
    assert output.reconstruction.max() <= 1


@pytest.mark.parametrize(("spatial_dims", "size"), [(2, (17, 20)), (3, (9, 8, 11))])
def test_decoder_reaches_any_image_size(spatial_dims: int, size: tuple[int, ...]) -> None:
    maps = [torch.rand(2, 8, *[side] * spatial_dims) for side in (4, 2, 1)]
    image = Decoder(spatial_dims, 8, out_channels=2, num_scales=3)(maps, size)
    assert image.shape == (2, 2, *size)
    assert ((image >= 0) & (image <= 1)).all()


def test_scale_weights_have_mean_one_and_a_scale_that_uses_more_of_its_codes_weighs_more() -> None:
    net = small_net()
    assert torch.equal(net.scale_weights(), torch.ones(3))  # before any code is used
    for codebook, used in zip(net.codebooks, (1, 4, 16), strict=True):
        codebook.ema_cluster_size[:used] = 1
    weights = net.scale_weights()
    assert weights[0] < weights[1] < weights[2]
    assert weights.mean().item() == pytest.approx(1)


def test_target_starts_as_a_copy_of_the_online_network() -> None:
    net, images = small_net(), views()
    for name in ("encoder", "fusions"):
        online, target = getattr(net, name).state_dict(), getattr(net.target, name).state_dict()
        assert all(torch.equal(online[key], target[key]) for key in online)
    assert net.target.encoder is not net.encoder
    output = net(images)
    with torch.no_grad():
        expected = net.projectors["continuous"](pool(feature_maps(net.encoder, images)[-1]))
    torch.testing.assert_close(output.targets, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_target_moves_by_the_momentum(momentum: float) -> None:
    net = small_net()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    online = [*net.encoder.parameters(), *net.quantizer.projections.parameters(), *net.fusions.parameters()]
    online += net.projectors.parameters()
    before = [parameter.clone() for parameter in net.target.parameters()]
    net.update_target(momentum)
    for old, new, followed in zip(before, net.target.parameters(), online, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * followed)
        if momentum in (0, 1):
            assert torch.equal(new, old if momentum else followed)


def test_fusions_are_those_of_their_formulas() -> None:
    quantized, projected = torch.rand(2, 8, 3, 4), torch.rand(2, 8, 3, 4)
    assert torch.equal(Fusion(8, "replace")(quantized, projected), quantized)
    assert torch.equal(Fusion(8, "add")(quantized, projected), quantized + projected)
    fusion = Fusion(8, "attention", num_heads=1)
    query, value = (each.flatten(2).transpose(1, 2) for each in (quantized, projected))
    wq, wk, wv = fusion.mix.in_proj_weight.chunk(3)
    share = ((query @ wq.T) @ (value @ wk.T).transpose(1, 2) / 8**0.5).softmax(-1)
    expected = query + share @ (value @ wv.T) @ fusion.mix.out_proj.weight.T
    torch.testing.assert_close(fusion(quantized, projected).flatten(2).transpose(1, 2), expected)


@every_fusion
@pytest.mark.parametrize("name", ["resnet10", "segresnet"])
def test_trains_all_of_the_online_network_and_nothing_of_the_target(name: str, fusion: str) -> None:
    net, images = small_net(name, fusion=fusion, decode=True), views(name)
    total(net(images), images).backward()
    forgotten = [name for name, each in net.named_parameters() if each.requires_grad and each.grad is None]
    assert forgotten == []  # what DistributedDataParallel demands
    frozen = [*net.target.parameters(), *(codebook.embedding.weight for codebook in net.codebooks)]
    assert all(each.grad is None and not each.requires_grad for each in frozen)


def test_the_target_never_moves_the_codebooks() -> None:
    first, images = small_net(), views()
    second = deepcopy(first)
    with torch.no_grad():
        for parameter in second.target.parameters():
            parameter.mul_(-3)
    first(images)
    second(images)
    assert all(torch.equal(one, other) for one, other in zip(codes(first), codes(second), strict=True))


def test_building_it_leaves_the_encoder_as_it_was() -> None:
    stock = encoder()
    stock.bn1.eval()
    before = deepcopy(stock.state_dict())
    VQSSLNet(stock, num_embeddings=4, embedding_dim=8, hidden_dim=8)
    assert stock.training
    assert not stock.bn1.training
    assert all(torch.equal(before[key], value) for key, value in stock.state_dict().items())


def test_runs_in_bfloat16_with_results_in_float32() -> None:
    net, images = small_net(decode=True), views()
    output = AutocastInferer()(images, net)
    loss = total(output, images)
    loss.backward()
    assert output.predictions.dtype == torch.bfloat16
    assert loss.dtype == output.embedding.dtype == output.quantized[0].features.dtype == torch.float32
    assert loss.isfinite()
    assert net.encoder.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"stages": each}, "must be increasing numbers from 1 to 4")
            for each in ((), (0, 1), (2, 2), (3, 2), (4, 5))
        ),
        ({"fusion": "sum"}, "`fusion` must be one of attention, add, concat, replace, got 'sum'"),
        ({"embedding_dim": 12, "fusion": "attention"}, "must be a multiple of the 8 attention heads, got 12"),
    ],
)
def test_rejects_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_net(**arguments)
