"""Codes that a run leaves: what they encode and decode is what training's own network does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_segresnet
from monai.networks.nets import resnet18
from torch import nn

from dissect_monai import SegResNetEncoder, VQSSLNet, load_codes
from dissect_monai.networks.codes import save_codes
from dissect_monai.networks.weights import save_weights


def resnet(spatial_dims: int) -> nn.Module:
    return resnet18(spatial_dims=spatial_dims, n_input_channels=1, conv1_t_stride=2, feed_forward=False)


CASES: dict[str, tuple[Callable[[int], nn.Module], int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "X-rays": (resnet, 2, (2, 3, 4), (64, 96), {"encoder": "resnet18"}),
    "volumes resized to cubes": (resnet, 3, (2, 4), (32, 32, 64), {"encoder": "resnet18"}),
    "patches of volumes": (
        lambda dims: SegResNetEncoder(small_segresnet(dims)), 3, (2, 3), (16, 16, 8),
        {"encoder": "SegResNet", "init_filters": 8, "blocks_down": [1, 1, 1]},
    ),
}  # fmt: skip


def pretrained(directory: Path, case: str, decode: bool = True) -> tuple[VQSSLNet, torch.Tensor]:
    make, spatial_dims, stages, size, settings = CASES[case]
    torch.manual_seed(0)
    network = VQSSLNet(
        make(spatial_dims), spatial_dims, stages=stages, num_embeddings=range(9, 9 + len(stages)), embedding_dim=8,
        hidden_dim=8, decode=decode, predict=False, fusion="replace",
    )  # fmt: skip
    images = torch.rand(4, 1, *size)
    for _ in range(2):
        network(images)  # moves the codes and the statistics of the norms
    settings = {**settings, "spatial_dims": spatial_dims, "stages": list(stages), "metric": "cosine"}
    save_weights(network.encoder, directory / "models" / "model.pt", settings)
    save_codes(network, directory / "codes")
    return network.eval(), images


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_training_and_decode_to_its_reconstruction(case: str, tmp_path: Path) -> None:
    network, images = pretrained(tmp_path, case)
    with torch.no_grad():
        output = network(images)
    codes = load_codes(tmp_path)
    nn.Sequential(codes).train()  # stays in evaluation mode
    indices = codes.encode(images)
    for found, scale in zip(indices, output.quantized, strict=True):
        assert torch.equal(found, scale.indices)
    torch.testing.assert_close(codes.decode(indices), output.reconstruction)
    sizes = [scale.indices.shape[1:] for scale in output.quantized]
    assert codes.decode(indices, image_size=sizes[0]).shape == (4, 1, *sizes[0])
    assert torch.equal(codes.encode(images.double())[0], indices[0])
    for counts, found, number in zip(codes.histograms(indices), indices, codes.num_embeddings, strict=True):
        np.testing.assert_array_equal(counts, [np.bincount(each.flatten(), minlength=number) for each in found])


def test_codes_of_a_pretraining_without_reconstruction_say_why_they_cannot_decode(tmp_path: Path) -> None:
    pretrained(tmp_path, "X-rays")
    _, images = pretrained(tmp_path, "X-rays", decode=False)  # leaves no decoder of the earlier run
    codes = load_codes(tmp_path)
    with pytest.raises(ValueError, match="pretrain with a positive `reconstruction_weight`"):
        codes.decode(codes.encode(images))


def test_refuses_folders_without_codes_and_codes_of_other_scales(tmp_path: Path) -> None:
    network, images = pretrained(tmp_path, "X-rays")
    codes = load_codes(tmp_path)
    with pytest.raises(ValueError, match=r"`images` must be float in \[0, 1\], got torch.uint8"):
        codes.encode(images.byte())
    with pytest.raises(ValueError, match="`indices` must have 3 tensors, one per stage, got 2"):
        codes.decode(codes.encode(images)[:2])
    settings = {"encoder": "resnet18", "spatial_dims": 2, "stages": [2, 3, 4]}
    save_weights(network.encoder, tmp_path / "models" / "model.pt", settings)
    with pytest.raises(ValueError, match=r"codes does not hold the codes of .*model\.pt \('metric'\)"):
        load_codes(tmp_path / "models" / "model.pt")
    save_weights(network.encoder, tmp_path / "models" / "model.pt", {"encoder": "ViT", "spatial_dims": 2})
    with pytest.raises(ValueError, match=r"must be of an encoder among resnet10, .*, got 'ViT'"):
        load_codes(tmp_path)
    (tmp_path / "codes" / "codebooks.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"codebooks\.pt: give the `output_dir` of a finished pretraining"):
        load_codes(tmp_path)
