from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Decoded, evaluated, pick, table
from monai.data import DataLoader
from monai.networks.nets import SegResNet
from PIL import Image
from torch import nn

from dissect_monai.handlers.reconstruction import ReconstructionHandler
from dissect_monai.losses.pretraining import unexplained_variance
from dissect_monai.transforms.augment import Corrupt
from dissect_monai.transforms.views import MaskedImages
from dissect_monai.visualize.training import SLICE_GAP, SLICE_SIDE

NUM_PATCHES = 12


def segresnet(spatial_dims: int = 3) -> SegResNet:
    torch.manual_seed(0)
    return SegResNet(spatial_dims, init_filters=8, out_channels=1, blocks_down=(1, 1), blocks_up=(1,)).eval()


def patches(spatial_dims: int = 3) -> Decoded:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_PATCHES, 1, *[8] * spatial_dims), generator=generator, dtype=torch.uint8)
    items = [
        {"image": str(index), "subject": str(index // 2), "task": "ab"[index % 2], "group": "g"}
        for index in range(NUM_PATCHES)
    ]
    return Decoded(items, images)


def evaluate(
    folder: Path, network: nn.Module, dataset: Decoded | None = None, batch_size: int = 5, **kwargs: Any
) -> dict[str, float]:
    dataset = dataset or patches()
    masking = MaskedImages(Corrupt(kwargs.pop("mask_fraction", 0.4), mask_size=2))
    handler = ReconstructionHandler(folder, num_samples=50)
    loader = DataLoader(dataset, batch_size=batch_size)
    return evaluated(network, loader, handler, prepare_batch=masking).state.metrics


def test_the_input_itself_is_right_but_where_it_is_masked(tmp_path: Path) -> None:
    metrics = evaluate(tmp_path, nn.Identity())
    dataset = patches()
    views = dataset.images.float() / 255
    images, target = MaskedImages(Corrupt(0.4, mask_size=2))({"image": dataset.images})
    assert list(table(tmp_path / "reconstruction.csv")[0]) == [
        "task", "group", "patches", "subjects", "masked_error", "masked_error_low", "masked_error_high", "error",
        "error_low", "error_high",
    ]  # fmt: skip
    for offset, task in enumerate("ab"):
        own = slice(offset, None, 2)
        row = pick(table(tmp_path / "reconstruction.csv"), task=task)
        assert (row["group"], row["patches"], row["subjects"]) == ("g", "6", "6")
        within = float(unexplained_variance(images[own], views[own], target.masked[own]))
        assert metrics[f"reconstruction_error_{task}"] == pytest.approx(within, rel=1e-5)
        assert float(row["masked_error"]) == pytest.approx(within, abs=1e-4)
        assert float(row["error"]) == pytest.approx(float(unexplained_variance(images[own], views[own])), abs=1e-4)
        assert 0 < float(row["error"]) < float(row["masked_error"])


def test_intervals_hold_their_value_and_errors_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    network = segresnet()
    metrics = [evaluate(tmp_path / str(size), network, batch_size=size) for size in (1, 5)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    for row in table(tmp_path / "5" / "reconstruction.csv"):
        for name in ("masked_error", "error"):
            assert float(row[f"{name}_low"]) < float(row[name]) < float(row[f"{name}_high"])


def test_intervals_are_by_subject(tmp_path: Path) -> None:
    dataset = patches()
    for item in dataset.data:
        item["subject"] = "one"
    evaluate(tmp_path, nn.Identity(), dataset)
    for row in table(tmp_path / "reconstruction.csv"):
        assert row["subjects"] == "1"
        assert row["masked_error_low"] == row["masked_error"] == row["masked_error_high"]


def test_a_patch_without_masked_voxels_has_no_masked_error(tmp_path: Path) -> None:
    metrics = evaluate(tmp_path, nn.Identity(), mask_fraction=1e-9)
    assert all(np.isnan(value) for value in metrics.values())
    rows = table(tmp_path / "reconstruction.csv")
    assert {(row["masked_error"], float(row["error"])) for row in rows} == {("nan", 0)}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_picture_has_a_row_per_task(tmp_path: Path, spatial_dims: int) -> None:
    evaluate(tmp_path, segresnet(spatial_dims), patches(spatial_dims))
    with Image.open(tmp_path / "reconstruction.png") as picture:
        side = SLICE_SIDE + SLICE_GAP
        assert picture.size == (3 * side, 2 * side)  # target, input and reconstruction of two tasks
