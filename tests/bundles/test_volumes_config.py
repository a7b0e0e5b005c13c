"""Volumes through VQ-SSL: `pretrain_vq_ssl`'s train.json with volumes.json over it."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, TASKS, Recipes, read, refused, run_config, settings, tags_of, tiny_knobs, weights, write
from monai.bundle import ConfigParser
from monai.networks.nets import SegResNet

from dissect_monai.networks.encoders import SegResNetEncoder
from dissect_monai.networks.weights import load_weights

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = ROOT / "bundles" / "pretrain_vq_ssl" / "configs"
TRAIN, VOLUMES, SEVERAL = (CONFIGS / f"{name}.json" for name in ("train", "volumes", "multi_gpu_train"))
HSSL = ROOT / "bundles" / "hssl_multidomain" / "configs" / "train.json"
TINY = tiny_knobs("pretrain_vq_ssl_volumes")
SAME_KNOBS = {
    *("task", "group", "modality", "validation_fraction", "cache_dir", "on_corrupt", "num_workers", "seed"),
    *("spatial_dims", "slice_axis", "pixdim", "patch_size", "a_min", "a_max", "init_filters", "blocks_down"),
    *("hidden_dim", "sampling_temperature", "max_epochs", "iterations_per_epoch", "batch_size"),
}


@pytest.fixture
def trained(recipe_of: Recipes) -> Path:
    """Output folder of a run of two epochs."""
    return recipe_of("pretrain_vq_ssl_volumes").finished


def train(dataset_dir: Any, output_dir: Path, **knobs: Any) -> None:
    data = dataset_dir if isinstance(dataset_dir, str) else [*map(str, dataset_dir)]
    run_config([TRAIN, VOLUMES], **{**TINY, **knobs, "dataset_dir": data, "output_dir": output_dir})


PICTURES = ("in_channels", "channels", "image_size", "position")  # and the level of places


def without_pictures(part: Any) -> Any:
    """A part of the other recipe without what pictures need, which this one does not read."""
    if isinstance(part, list):
        return [without_pictures(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {key: without_pictures(part[key]) for key in part if key not in PICTURES}


def test_data_and_knobs_are_those_of_hssl_multidomain() -> None:
    merged = ConfigParser()
    merged.read_config([TRAIN, VOLUMES])
    config, other = merged.config, read(HSSL)
    assert {name: config[name] for name in SAME_KNOBS} == {name: other[name] for name in SAME_KNOBS}
    assert config["data_dir"] == other["data_dir"]  # phantoms, which the smoke run of hssl_multidomain draws
    listed = without_pictures(other["datalist"])
    assert config["datalist"] == listed
    assert config["crop_size"] == other["crop_size"]
    for name in ("preprocessing", "patches", "dataset", "sampler", "augment"):
        assert config["train"][name] == without_pictures(other["train"][name]), name
    assert config["train"]["augment"]["flip_prob"] == 0


def test_weights_are_those_of_the_encoder_and_load_into_a_segmentation_network(trained: Path) -> None:
    network = SegResNet(spatial_dims=3, init_filters=8, out_channels=4, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    assert weights(trained).keys() == SegResNetEncoder(network).state_dict().keys()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_weights(network, trained / "models" / "model.pt")
    loaded = network.state_dict()
    changed = {key for key in before if not torch.equal(before[key], loaded[key])}
    assert changed <= weights(trained).keys()
    assert any(key.startswith("down_layers.2") for key in changed)


def test_settings_are_written_beside_the_weights(trained: Path) -> None:
    said = settings(trained)
    assert (said["tasks"], said["groups"], said["stages"]) == (list(TASKS), ["abdomen", "head"], [2, 3])
    assert said["blocks_up"] == [1, 1]  # of a decoder that fits


def test_findings_of_whole_volumes_give_an_auroc(tmp_path: Path) -> None:
    rng, splits = np.random.default_rng(0), {}
    for split in ("training", "validation"):
        splits[split] = [{"image": f"{split}{index}.nii.gz", "label": [index % 2]} for index in range(4)]
        for item in splits[split]:
            voxels = rng.integers(1, 99, (20, 20, 20), dtype=np.int16)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / item["image"])
    write(tmp_path / "dataset.json", {"task": "chest", "group": "body", "modality": "MR", **splits})
    train(tmp_path.as_posix(), tmp_path / "out", pixdim=[1, 1, 1], val_interval=1)
    assert {"knn_auroc/mean", "knn_auroc/stages"} <= tags_of(tmp_path / "out")


def test_without_data_it_trains_on_phantoms_with_the_default_network_and_voxels(
    volume_dirs: list[Path], tmp_path: Path
) -> None:
    short = {"max_epochs": 1, "iterations_per_epoch": 1, "batch_size": 2}
    run_config([TRAIN, VOLUMES], data_dir=[*map(str, volume_dirs)], output_dir=tmp_path, **short)
    assert (settings(tmp_path)["phantoms"], settings(tmp_path)["num_images"]) == (True, 12)


def test_refuses_bad_knobs_before_the_data_are_read(volume_dirs: list[Path], tmp_path: Path) -> None:
    for knob, message in (
        ({"image_size": 64}, r"--image_size has no meaning with train\.json and volumes\.json: leave it out"),
        ({"stages": [3, 4]}, r"`--stages` must be increasing numbers from 1 to 3 .*, got \[3, 4\]"),
    ):
        with refused(message):
            train(volume_dirs, tmp_path / "out", **knob)
    assert not (tmp_path / "out").exists()


def test_what_is_made_for_images_refuses_the_weights(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    knobs = {"dataset_dir": dataset_dir, "output_dir": tmp_path / "out", "pretrained": trained / "models" / "model.pt"}
    for config in ("evaluate", "inference"):
        with refused("must be of whole images, got weights of patches of volumes, as model.json says"):
            run_config(CONFIGS / f"{config}.json", **knobs)
