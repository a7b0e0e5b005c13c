from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.networks.nets import resnet10
from torch import nn

from dissect_monai.metrics.probes import FeatureDataset

NAN = float("nan")


def classifier() -> Any:
    torch.manual_seed(0)
    return resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, widen_factor=0.125, num_classes=3)


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


def test_features_must_not_be_computed_in_workers() -> None:
    loader = DataLoader(FeatureDataset(images_of(2), classifier()), num_workers=1)
    with pytest.raises(ValueError, match="`num_workers` must be 0 for the features of a linear probe"):
        next(iter(loader))
