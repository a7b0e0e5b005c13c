"""One test for each defect of earlier releases of this method: what must hold here instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, STANDARD_CONFIGS
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import resnet10
from monai.transforms import Compose, RandomizableTrait
from torch import Tensor, nn

from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.splits import select_fraction
from dissect_monai.handlers.probes import ProbeHandler
from dissect_monai.losses.pretraining import VQSSLLoss
from dissect_monai.metrics.probes import extract_features
from dissect_monai.metrics.representation import code_usage
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.networks.quantizers import EMACodebook
from dissect_monai.networks.vqssl import Fusion, VQSSLNet


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False, widen_factor=0.25)


def small_net(**kwargs: Any) -> VQSSLNet:
    size = {"num_embeddings": 16, "embedding_dim": 8, "hidden_dim": 32, "out_dim": 12, "predict": True}
    return VQSSLNet(encoder(), **{**size, **kwargs})


def views(num: int = 8) -> Tensor:
    return torch.rand((num, 1, 32, 32), generator=torch.Generator().manual_seed(1))


def test_1_the_commitment_term_alone_trains_the_encoder() -> None:
    net, images = small_net(), views()
    loss = VQSSLLoss(continuous_weight=0, discrete_weight=0, commitment_weight=1)
    loss(net(images), images).backward()
    # Stage 4 is the last that is quantised, so every layer is upstream of a codebook.
    for name, parameter in net.encoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_2_cluster_sizes_are_running_counts() -> None:
    net, images = small_net(decay=0.9), views()
    for codebook in net.codebooks:
        codebook.revive_fraction = 0  # which sets sizes, too
    net(images)
    before = [codebook.ema_cluster_size.clone() for codebook in net.codebooks]
    quantized = net(images).quantized
    for size, scale, codebook in zip(before, quantized, net.codebooks, strict=True):
        counts = torch.bincount(scale.indices.flatten(), minlength=16)
        assert counts.sum() == scale.indices.numel()
        torch.testing.assert_close(codebook.ema_cluster_size, 0.9 * size + 0.1 * counts)


def test_3_the_codebook_stands_still_in_evaluation() -> None:
    net, images = small_net(), views()
    net(images)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for _ in range(3):
        net.eval()(2 * images)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_4_codes_do_not_collapse_and_dead_ones_come_back() -> None:
    def usage(metric: str, steps: int, **kwargs: Any) -> float:
        """Share of the codes in use when features lie far from codes drawn from N(0, 1): one wins every position."""
        net = small_net(stages=(2,), metric=metric)
        net.quantizer.projections[0].bias.data.fill_(5)
        net.quantizer.codebooks[0] = EMACodebook(16, 8, decay=0.9, metric=metric, **kwargs)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _ in range(steps):
                output = net(torch.rand((8, 1, 32, 32), generator=generator))
        return code_usage(output.quantized[0].indices, 16).item()

    for metric in ("euclidean", "cosine"):
        assert usage(metric, 40, data_init=False, revive_fraction=0) <= 0.25  # the defect
        assert usage(metric, 1, data_init=True, revive_fraction=0) >= 0.75
        assert usage(metric, 40, data_init=False, revive_fraction=0.05) >= 0.75
        assert usage(metric, 40) >= 0.75


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_4_codes_that_the_features_have_left_find_them_again(metric: str) -> None:
    codebook = EMACodebook(32, 8, decay=0.95, metric=metric)
    generator = torch.Generator().manual_seed(0)
    first, then = torch.randn((2, 1, 8, 1, 1), generator=generator)
    for step in range(60):
        features = 4 * (first if step < 5 else then) + torch.randn((8, 8, 8, 8), generator=generator)
        used = code_usage(codebook(features).indices, 32).item()
        if step == 5:
            assert used < 0.25  # the features have moved, the codes not yet
    assert used >= 0.6


def test_5_tokens_keep_their_places() -> None:
    torch.manual_seed(0)
    quantized, projected = torch.rand(2, 8, 3, 4), torch.rand(2, 8, 3, 4)
    order = torch.randperm(12)

    def permuted(maps: Tensor) -> Tensor:
        return maps.flatten(2)[..., order].view_as(maps)

    attention = Fusion(8, "attention")
    fused = attention(quantized, projected)
    torch.testing.assert_close(attention(permuted(quantized), permuted(projected)), permuted(fused))

    concat = Fusion(8, "concat")
    changed = projected.clone()
    changed[0, :, 1, 2] += 1
    moved = (concat(quantized, changed) - concat(quantized, projected)).abs().sum(1) > 0
    assert moved.nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.usefixtures("_images_are_nowhere")
def test_6_selection_never_uses_the_test_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = {
        split: [{"image": f"{split}{index}", "label": [float(index % 2)]} for index in range(20)]
        for split in ("training", "validation", "test")
    }
    loaders = {}
    for split, items in splits.items():
        images = rng.random((20, 1, 32, 32)) + 0.1 * np.array([item["label"] for item in items])[..., None, None]
        decoded = {
            item["image"]: {"image": torch.from_numpy(each).float()} for item, each in zip(items, images, strict=True)
        }
        loaders[split] = DataLoader(Dataset(items, lambda item, decoded=decoded: decoded[item["image"]]), batch_size=10)

    def aurocs(test: list[Any]) -> dict[str, float]:
        loaders["test"].dataset.data = test
        handler = ProbeHandler({"only": encoder()}, loaders, ["finding"], tmp_path, num_samples=1)
        evaluator = SupervisedEvaluator("cpu", loaders["test"], encoder(), val_handlers=[handler], decollate=False)
        evaluator.run()
        return {name: value for name, value in evaluator.state.metrics.items() if name.endswith("_finding")}

    # The scores are the same whatever the test labels are: turned round, they turn the AUROC round.
    given = aurocs(splits["test"])
    turned = aurocs([{**item, "label": [1 - item["label"][0]]} for item in splits["test"]])
    assert given == pytest.approx({name: 1 - value for name, value in turned.items()})

    pool = [{"image": str(index), "subject": str(index // 2)} for index in range(400)]
    one, five = ({item["image"] for item in select_fraction(pool, part, seed=0)} for part in (0.01, 0.05))
    assert one < five
    assert (len(one), len(five)) == (4, 20)

    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    for key, test in (("image", {"image": "a.png"}), ("subject", {"image": "b.png", "subject": "s"})):
        content = {"training": [{"image": "a.png", "subject": "s"}], "test": [test]}
        (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=f"`training` and `test` must share no {key}, got 1 in both"):
            read_datalist(tmp_path)


def test_7_frozen_features_leave_batch_norm_alone() -> None:
    net = small_net()
    net(views())
    before = {name: tensor.clone() for name, tensor in net.encoder.state_dict().items()}
    features = extract_features(net.encoder, [{"image": views(2)}, {"image": views(8)[2:]}], "cpu", feature_maps)
    assert all(module.training for module in net.encoder.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.encoder.state_dict().items())
    # An image has the same features in any batch.
    alone = extract_features(net.encoder, [{"image": image[None]} for image in views()], "cpu", feature_maps)
    np.testing.assert_allclose(features.stages, alone.stages, atol=1e-5)


def test_8_no_image_is_changed_at_random_in_deterministic_preprocessing() -> None:
    found = 0
    for path in sorted(ROOT.glob("bundles/*/configs/*.json")):
        parser = ConfigParser()
        parser.read_config([path] if path.stem in STANDARD_CONFIGS else [path.with_name("train.json"), path])
        for name in ("preprocessing", "validate::preprocessing", "train::preprocessing"):
            if name in parser:
                steps = Compose(parser.get_parsed_content(name)).flatten().transforms
                assert not [type(step).__name__ for step in steps if isinstance(step, RandomizableTrait)], path
                found += 1
    assert found >= 4
