from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.nets import SegResNet
from torch import Tensor

from dissect_monai.handlers.training import FrozenEncoder, UnseenClasses
from dissect_monai.networks.segmentation import DeepSupervisionNet, init_class_prior
from dissect_monai.networks.weights import SEGRESNET_ENCODER


def segresnet(spatial_dims: int = 3, **changes: Any) -> SegResNet:
    torch.manual_seed(0)
    arguments = {
        "spatial_dims": spatial_dims, "init_filters": 8, "out_channels": 3, "blocks_down": (1, 1, 1),
        "blocks_up": (1, 1),
    }  # fmt: skip
    return SegResNet(**arguments | changes)


def images(spatial_dims: int = 3) -> Tensor:
    return torch.randn(2, 1, *[8] * spatial_dims, generator=torch.Generator().manual_seed(1))


def labels(spatial_dims: int = 3) -> Tensor:
    return torch.randint(0, 3, (2, 1, *[8] * spatial_dims), generator=torch.Generator().manual_seed(2)).float()


def copy_of(network: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


# --- the start


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_an_untrained_network_calls_every_structure_rare(spatial_dims: int) -> None:
    network = segresnet(spatial_dims)
    before = copy_of(network)
    init_class_prior(network, share=0.02)
    background, *structures = network.conv_final[-1].conv.bias.softmax(0).tolist()
    assert [each / (each + background) for each in structures] == pytest.approx([0.02, 0.02])
    changed = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["conv_final.2.conv.bias"]


def test_coarser_levels_start_rare_too() -> None:
    heads = DeepSupervisionNet(segresnet(blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1)), 2).heads
    shares = [head.bias.softmax(0).tolist() for head in heads]
    assert shares == [pytest.approx([0.98019, 0.0099, 0.0099], abs=1e-4)] * 2


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="`share` must lie between 0 and 1"):
        init_class_prior(segresnet(), share)


# --- coarser levels


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_in_training_there_are_logits_of_every_level(spatial_dims: int) -> None:
    deep = {"blocks_down": (1, 1, 1, 1), "blocks_up": (1, 1, 1)}
    for num_heads in (1, 2):
        network = DeepSupervisionNet(segresnet(spatial_dims, **deep), num_heads).train()
        shapes = [tuple(each.shape) for each in network(images(spatial_dims))]
        assert shapes == [(2, 3, *[size] * spatial_dims) for size in (8, 4, 2)[: num_heads + 1]]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_first_logits_are_those_of_the_segresnet(spatial_dims: int) -> None:
    plain = segresnet(spatial_dims)
    network = DeepSupervisionNet(segresnet(spatial_dims), 1)
    batch = images(spatial_dims)
    torch.testing.assert_close(network.train()(batch)[0], plain.train()(batch), rtol=0, atol=0)
    output = network.eval()(batch)
    assert isinstance(output, Tensor)
    torch.testing.assert_close(output, plain.eval()(batch), rtol=0, atol=0)


def test_sides_that_are_no_power_of_two_keep_their_shape() -> None:
    shapes = [tuple(each.shape) for each in DeepSupervisionNet(segresnet(), 1).train()(torch.randn(1, 1, 12, 8, 4))]
    assert shapes == [(1, 3, 12, 8, 4), (1, 3, 6, 4, 2)]


def test_the_segresnet_keeps_its_keys() -> None:
    plain = segresnet()
    network = DeepSupervisionNet(segresnet(), 1)
    assert list(network.segresnet.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.segresnet.state_dict())
    assert {key for key in network.state_dict() if not key.startswith("segresnet.")} == {
        "heads.0.weight", "heads.0.bias",
    }  # fmt: skip


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_level_learns(spatial_dims: int) -> None:
    network = DeepSupervisionNet(segresnet(spatial_dims), 1).train()
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


def test_a_coarse_head_reaches_the_decoder_behind_it_and_no_finer_layer() -> None:
    network = DeepSupervisionNet(segresnet(), 1).train()
    network(images())[1].sum().backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("segresnet.up_layers.0") for name in reached)
    assert any(name.startswith("segresnet.down_layers.2") for name in reached)
    assert not any(name.startswith(("segresnet.up_layers.1", "segresnet.conv_final")) for name in reached)


def test_evaluation_after_training_is_that_of_the_trained_segresnet() -> None:
    network = DeepSupervisionNet(segresnet(), 1).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    sum(each.pow(2).mean() for each in network(images())).backward()
    optimizer.step()
    alone = segresnet(out_channels=3)
    alone.load_state_dict(network.segresnet.state_dict())
    torch.testing.assert_close(network.eval()(images()), alone.eval()(images()), rtol=0, atol=0)


@pytest.mark.parametrize("num_heads", [-1, 0, 2, 3])
def test_heads_out_of_range_are_refused(num_heads: int) -> None:
    with pytest.raises(
        ValueError, match=rf"`num_heads` must be at least 1 and fewer than the 2 levels, got {num_heads}"
    ):
        DeepSupervisionNet(segresnet(), num_heads)


# --- frozen encoder


def trained(num_epochs: int, max_epochs: int = 3, deep: bool = False) -> list[dict[str, Tensor]]:
    """Weights before the first epoch and after each of a training with weight decay."""
    network = segresnet(2)
    module = DeepSupervisionNet(network, 1) if deep else network
    items = [{"image": image, "label": label} for image, label in zip(images(2), labels(2), strict=True)]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        train_data_loader=DataLoader(Dataset(items), batch_size=1),
        network=module,
        optimizer=torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.5),
        loss_function=DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True)),
        train_handlers=[FrozenEncoder(network, num_epochs)],
        decollate=False,
    )
    states = [copy_of(network)]
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: states.append(copy_of(network)))
    trainer.run()
    return states


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


@pytest.mark.parametrize("deep", [False, True])
def test_the_encoder_stays_bit_for_bit_and_then_moves(deep: bool) -> None:
    states = trained(2, deep=deep)
    assert len(states) == 4
    encoder = {key for key in states[0] if key.startswith(SEGRESNET_ENCODER)}
    for before, after in pairwise(states[:3]):
        assert changed(before, after) == states[0].keys() - encoder
    assert changed(states[2], states[3]) == states[0].keys()


def test_no_epochs_freeze_nothing() -> None:
    states = trained(0, max_epochs=1)
    assert changed(states[0], states[1]) == states[0].keys()


def test_only_the_encoder_is_frozen() -> None:
    network = segresnet(2)
    frozen = {id(parameter) for parameter in FrozenEncoder(network, 1).parameters}
    names = {name.split(".")[0] for name, parameter in network.named_parameters() if id(parameter) in frozen}
    assert names == {"convInit", "down_layers"}


def test_a_negative_number_of_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_epochs` must be at least 0, got -1"):
        FrozenEncoder(segresnet(2), -1)


def test_structures_that_no_patch_shows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda engine, batch: None)
    UnseenClasses(["liver", "spleen", "aorta"]).attach(engine)
    engine.run([{"label": torch.tensor([[0.0, 2.0]])}, {"label": torch.tensor([[0.0, 0.0]])}], max_epochs=2)
    assert [record.message for record in caplog.records if "No patch" in record.message] == [
        "No patch of the first epoch shows liver, aorta: with these labels it cannot be learnt."
    ]
