"""MONAI's federated client runs the bundle of segmentation as it is."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, read, tiny_knobs, write
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

KNOBS = {
    **tiny_knobs("seg_finetune_btcv"), "iterations_per_epoch": 10, "batch_size": 8, "max_epochs": 2,
    "schedule_epochs": 2, "select": "last",
}  # fmt: skip


def client(name: str, dataset_dir: Path, output_dir: Path, **own: Any) -> MonaiAlgo:
    knobs: dict[str, Any] = {**KNOBS, **own, "dataset_dir": str(dataset_dir), "output_dir": str(output_dir)}
    algorithm = MonaiAlgo(
        str(ROOT / "bundles" / "seg_finetune_btcv"), send_weight_diff=False, train_kwargs=dict(knobs),
        eval_kwargs=dict(knobs), config_evaluate_filename="configs/train.json",
    )  # fmt: skip
    algorithm.initialize({ExtraItems.CLIENT_NAME: name})
    return algorithm


@pytest.fixture
def hospitals(volume_dirs: list[Path], tmp_path: Path) -> list[Path]:
    """Two data sets with half of the training volumes each, and the same two for validation."""
    folder = volume_dirs[0]
    datalist = read(folder / "dataset.json")
    hospitals = [tmp_path / name for name in ("first", "second")]
    for index, hospital in enumerate(hospitals):
        shutil.copytree(folder, hospital)
        write(hospital / "dataset.json", {**datalist, "training": datalist["training"][index::2]})
    return hospitals


def sent_by(algorithm: MonaiAlgo) -> dict[str, Any]:
    """The weights of a client as they arrive elsewhere: without a copy they are its network's own memory."""
    return {key: np.array(value) for key, value in algorithm.get_weights().weights.items()}


@pytest.mark.parametrize(
    "own", [{}, {"spatial_dims": 2, "pixdim": [12, 12], "patch_size": [16, 16]}], ids=["volumes", "slices"]
)
def test_two_rounds_of_two_hospitals_learn_one_network(
    hospitals: list[Path], tmp_path: Path, own: dict[str, Any]
) -> None:
    clients = [client(each.name, each, tmp_path / f"output_{each.name}", **own) for each in hospitals]
    shared = sent_by(clients[0])
    scores = [clients[0].evaluate(ExchangeObject(weights=shared)).metrics["dice_mean"]]
    for _ in range(2):
        for each in clients:
            each.train(ExchangeObject(weights=shared))
        trained = [sent_by(each) for each in clients]
        assert any((trained[0][key] != trained[1][key]).any() for key in shared)
        shared = {key: np.mean([each[key] for each in trained], axis=0, dtype=shared[key].dtype) for key in shared}
        metrics = [each.evaluate(ExchangeObject(weights=shared)).metrics for each in clients]
        # The same volumes are validated in both, by the same weights.
        assert metrics[0]["dice_mean"] == pytest.approx(metrics[1]["dice_mean"])
        scores.append(metrics[0]["dice_mean"])
    assert scores[2] > scores[0]
    for each in clients:
        each.finalize()
