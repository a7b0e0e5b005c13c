from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.networks.nets import resnet10, resnet18
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.losses.multilabel import MultiLabelLoss, positive_weights
from dissect_monai.metrics.probes import FeatureDataset
from dissect_monai.networks.optimizers import classifier_optimizer
from dissect_monai.networks.weights import freeze_encoder, load_pretrained, trained_part
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import AugmentedBatch

NAN = float("nan")
NAMES = ["Opacity", "Nodule", "Rare"]


def classifier(num_classes: int = 3, block: Callable[..., nn.Module] = resnet10, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"spatial_dims": 2, "n_input_channels": 1, "conv1_t_stride": 2, "widen_factor": 0.125}
    return block(**options, num_classes=num_classes, **kwargs)


def items(*labels: list[float]) -> list[dict[str, Any]]:
    return [{"image": str(index), "label": label} for index, label in enumerate(labels)]


# ---- loss --------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_the_known_labels() -> None:
    pred, label = torch.randn(4, 3), torch.tensor([[1, 0, NAN], [NAN, 1, 0], [0, 0, 0], [NAN, NAN, NAN]])
    known = ~label.isnan()
    expected = F.binary_cross_entropy_with_logits(pred[known], label[known])
    assert MultiLabelLoss()(pred, label).item() == pytest.approx(expected.item())


def test_positives_weigh_as_much_as_they_are_told() -> None:
    pred, weight = torch.zeros(2, 2), torch.tensor([3.0, 0.5])
    loss = MultiLabelLoss(weight)(pred, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert loss.item() == pytest.approx((3 + 0.5 + 1 + 1) / 4 * torch.log(torch.tensor(2.0)).item())


def test_unknown_labels_give_no_gradient() -> None:
    pred = torch.tensor([[2.0, -1.0], [0.5, 1e30]], requires_grad=True)
    MultiLabelLoss(torch.ones(2))(pred, torch.tensor([[NAN, 1.0], [0.0, NAN]])).backward()
    assert pred.grad is not None
    assert pred.grad[0, 0] == pred.grad[1, 1] == 0
    assert (pred.grad[[0, 1], [1, 0]] != 0).all()
    assert pred.grad.isfinite().all()


def test_a_batch_without_known_labels_has_loss_and_gradient_0() -> None:
    pred = torch.randn(2, 3, requires_grad=True)
    loss = MultiLabelLoss()(pred, torch.full((2, 3), NAN))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(pred.grad, torch.zeros(2, 3))


def test_loss_of_half_precision_logits_is_in_float32() -> None:
    pred = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = MultiLabelLoss()(pred, torch.ones(2, 3))
    loss.backward()
    assert loss.dtype == torch.float32
    assert pred.grad.dtype == torch.bfloat16


def test_loss_rejects_labels_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"`label` must have the shape of `pred`, \(2, 3\), got \(2, 1\)"):
        MultiLabelLoss()(torch.zeros(2, 3), torch.zeros(2, 1))


# ---- class balance -----------------------------------------------------------------------------------------------


def test_weights_are_negatives_over_positives_of_the_known_labels() -> None:
    weights = positive_weights(items([1, 0, 0], [0, 1, 0], [0, 1, NAN], [0, NAN, 0]), NAMES)
    torch.testing.assert_close(weights, torch.tensor([3, 0.5, 1]))


def test_weights_are_limited() -> None:
    rare = items([1, 0], *[[0, 1]] * 30)
    torch.testing.assert_close(positive_weights(rare, NAMES[:2]), torch.tensor([10, 0.1]))
    torch.testing.assert_close(positive_weights(rare, NAMES[:2], limit=4), torch.tensor([4, 0.25]))


def test_no_balance_is_a_weight_of_1() -> None:
    assert torch.equal(positive_weights(items([1, 0], [0, 0]), NAMES[:2], "none"), torch.ones(2))


def test_rejects_an_unknown_balance() -> None:
    with pytest.raises(ValueError, match="`class_balance` must be one of none, weighted, got 'wieghted'"):
        positive_weights(items([1]), ["Opacity"], "wieghted")


def test_rejects_a_limit_below_1() -> None:
    with pytest.raises(ValueError, match=r"`limit` must be at least 1, got 0\.5"):
        positive_weights(items([1]), ["Opacity"], limit=0.5)


# ---- optimiser ---------------------------------------------------------------------------------------------------


def test_learning_rates_fall_from_the_head_to_the_stem() -> None:
    network = classifier()
    optimizer = classifier_optimizer(network, 0.1, 0.05, layer_decay=0.5)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    expected = {"fc": 0.1, "layer4": 0.05, "layer3": 0.025, "layer2": 0.0125, "layer1": 0.00625}
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == pytest.approx(expected.get(name.split(".")[0], 0.003125))
    assert len(rates) == len(list(network.parameters()))


def test_biases_and_norms_of_every_depth_do_not_decay() -> None:
    for group in classifier_optimizer(classifier(), 0.1, 0.05).param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_frozen_parameters_are_left_out() -> None:
    network = classifier()
    freeze_encoder(network)
    groups = classifier_optimizer(network, 0.1, 0.05).param_groups
    assert {id(each) for group in groups for each in group["params"]} == {id(each) for each in network.fc.parameters()}


@pytest.mark.parametrize("layer_decay", [0, 1.5])
def test_rejects_a_layer_decay_out_of_range(layer_decay: float) -> None:
    with pytest.raises(ValueError, match=r"`layer_decay` must be in \(0, 1\], got"):
        classifier_optimizer(classifier(), 0.1, 0, layer_decay)


def test_rejects_a_learning_rate_of_0() -> None:
    with pytest.raises(ValueError, match="`learning_rate` must be positive and `weight_decay` not negative, got 0"):
        classifier_optimizer(classifier(), 0, 0)


# ---- transfer ----------------------------------------------------------------------------------------------------


def saved(path: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), path)
    return path


def test_loads_the_whole_encoder_and_leaves_the_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = classifier(feed_forward=False)
    nn.init.constant_(encoder.conv1.weight, 0.5)
    encoder.bn1.running_mean.fill_(0.25)
    network = classifier()
    head = network.fc.weight.clone()
    with caplog.at_level(logging.INFO):
        load_pretrained(network, saved(tmp_path / "model.pt", encoder))
    state = encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items() if "fc." not in key)
    assert torch.equal(network.fc.weight, head)
    assert f"Loaded all {len(state)} tensors of" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda state: state.pop("conv1.weight"), r"ResNet: 1 missing \(conv1.weight\)\. "),
        (lambda state: state.update(extra=torch.ones(1)), r"ResNet: 1 unexpected \(extra\)\. "),
        (lambda state: state.update({"fc.weight": torch.ones(3, 64)}), r"ResNet: 1 unexpected \(fc.weight\)\. "),
        (lambda state: state.update({"bn1.bias": torch.ones(9)}), r"ResNet: 1 of another shape \(bn1.bias\)\. "),
    ],
)
def test_names_the_keys_that_do_not_fit_and_loads_none(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    state = {key: torch.zeros_like(value) for key, value in classifier(feed_forward=False).state_dict().items()}
    spoil(state)
    torch.save(state, tmp_path / "model.pt")
    network = classifier()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        load_pretrained(network, tmp_path / "model.pt")
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_refuses_the_weights_of_a_deeper_encoder(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", classifier(block=resnet18, feed_forward=False))
    with pytest.raises(ValueError, match=r"unexpected \(layer1\.1\..*Is it the same encoder"):
        load_pretrained(classifier(), path)


# ---- linear probe ------------------------------------------------------------------------------------------------


def images_of(num_images: int = 10, dtype: torch.dtype = torch.float32) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (num_images, 1, 32, 32), dtype=torch.uint8, generator=generator)
    images = pixels if dtype == torch.uint8 else pixels.to(dtype) / 255
    labels = torch.tensor([[1.0, 0.0, NAN], [0.0, 1.0, 1.0]]).repeat(num_images // 2, 1)
    return Dataset([{"image": image, "label": label} for image, label in zip(images, labels, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_head_on_cached_features_is_the_whole_network_in_eval_mode(dtype: torch.dtype) -> None:
    network = classifier()
    network.bn1.running_mean.fill_(0.1)
    network.train()
    features = FeatureDataset(images_of(dtype=dtype), network, batch_size=4)
    batch = next(iter(DataLoader(features, batch_size=len(features))))
    assert batch["image"].shape == (10, network.fc.in_features)
    assert all(module.training for module in network.modules())
    network.eval()
    images = torch.stack([item["image"] for item in images_of().data])
    torch.testing.assert_close(network.fc(batch["image"]), network(images), atol=1e-6, rtol=0)
    expected = torch.stack([item["label"] for item in images_of().data])
    torch.testing.assert_close(batch["label"], expected, equal_nan=True)


def test_features_are_computed_once_and_not_before_the_weights_are_loaded() -> None:
    network, calls = classifier(), []
    network.layer4.register_forward_hook(lambda *_: calls.append(1))
    features = FeatureDataset(images_of(), network)
    assert len(features) == 10
    assert not calls
    nn.init.constant_(network.conv1.weight, 0)
    first, second = (DataLoader(features, batch_size=10) for _ in range(2))
    assert torch.equal(next(iter(first))["image"], next(iter(second))["image"])
    assert len(calls) == 1
    assert next(iter(first))["image"].std(0).max() == 0  # of the weights as they are now


def test_a_linear_probe_trains_the_head_and_nothing_else() -> None:
    network = classifier()
    head = trained_part(network, "linear_probe")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    losses = []
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=20,
        train_data_loader=DataLoader(FeatureDataset(images_of(), network), batch_size=10),
        network=head,
        optimizer=classifier_optimizer(network, 0.1, 0.0),
        loss_function=MultiLabelLoss(),
        decollate=False,
    )
    trainer.logger.setLevel(logging.ERROR)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item())
    )
    trainer.run()
    assert losses[-1] < 0.7 * losses[0]
    changed = {key for key, value in network.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"fc.weight", "fc.bias"}
    assert not any(module.training for name, module in network.named_modules() if name != "fc")


@pytest.mark.parametrize("mode", ["finetune", "scratch"])
def test_other_modes_train_the_whole_network(mode: str) -> None:
    network = classifier().train()
    assert trained_part(network, mode) is network
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_rejects_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="`mode` must be one of linear_probe, finetune, scratch, got 'probe'"):
        trained_part(classifier(), "probe")


def test_features_must_not_be_computed_in_workers() -> None:
    loader = DataLoader(FeatureDataset(images_of(2), classifier()), num_workers=1)
    with pytest.raises(ValueError, match="`num_workers` must be 0 for the features of a linear probe"):
        next(iter(loader))


# ---- augmented batches -------------------------------------------------------------------------------------------


def test_augments_images_and_leaves_labels() -> None:
    prepare = AugmentedBatch(BatchAugment(image_size=24), seed=1)
    batch = next(iter(DataLoader(images_of(dtype=torch.uint8), batch_size=4)))
    images, labels = prepare(batch, torch.device("cpu"))
    assert images.shape == (4, 1, 24, 24)
    assert images.dtype == torch.float32
    assert images.max() <= 1
    torch.testing.assert_close(labels, batch["label"], equal_nan=True)


def test_an_epoch_draws_the_same_augmentation_again() -> None:
    prepare, batch = AugmentedBatch(BatchAugment()), next(iter(DataLoader(images_of(), batch_size=4)))
    first = prepare(batch, "cpu")[0]
    prepare.set_epoch(1)
    assert not torch.equal(prepare(batch, "cpu")[0], first)
    prepare.set_epoch(0)
    assert torch.equal(prepare(batch, "cpu")[0], first)
