"""Volumes through VQ-SSL: `pretrain_vq_ssl`'s train.json with volumes.json over it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, network_state, read, refused, two_processes, write
from monai.bundle import ConfigParser, ConfigWorkflow, run
from monai.networks.nets import SegResNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dissect_monai.networks.encoders import SegResNetEncoder
from dissect_monai.networks.weights import has_decoder, load_weights
from dissect_monai.phantoms.volumes import write_volume_phantoms

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = ROOT / "bundles" / "pretrain_vq_ssl" / "configs"
TRAIN, VOLUMES, SEVERAL = (CONFIGS / f"{name}.json" for name in ("train", "volumes", "multi_gpu_train"))
HSSL = ROOT / "bundles" / "hssl_multidomain" / "configs" / "train.json"
TASKS = ("abdomen_ct", "heart_mr")
TINY = {
    "pixdim": [12, 12, 12],
    "patch_size": [16, 16, 16],
    "init_filters": 8,
    "blocks_down": [1, 1, 1],
    "iterations_per_epoch": 2,
    "batch_size": 4,
    "max_epochs": 1,
    "warmup_epochs": 0,
    "num_embeddings": 16,
    "embedding_dim": 16,
    "hidden_dim": 32,
    "num_workers": 0,
    "log_interval": 1,
    "amp": False,
}
SAME_KNOBS = {
    *("task", "group", "modality", "validation_fraction", "cache_dir", "on_corrupt", "num_workers", "seed"),
    *("spatial_dims", "pixdim", "patch_size", "a_min", "a_max", "init_filters", "blocks_down", "hidden_dim"),
    *("sampling_temperature", "max_epochs", "iterations_per_epoch", "batch_size"),
}


@pytest.fixture(scope="session")
def volume_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Phantoms of two tasks, few and small."""
    folders = write_volume_phantoms(tmp_path_factory.mktemp("volumes"), 3, 2, 2, image_size=24, tasks=TASKS)
    return [str(folder) for folder in folders]


@pytest.fixture(scope="session")
def trained(volume_dirs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run of one epoch of two."""
    output_dir = tmp_path_factory.mktemp("trained")
    train(volume_dirs, output_dir, schedule_epochs=2)
    return output_dir


def train(dataset_dir: Any, output_dir: Path, **knobs: Any) -> None:
    knobs = {**TINY, **knobs, "dataset_dir": dataset_dir, "output_dir": str(output_dir)}
    run(config_file=[str(TRAIN), str(VOLUMES)], **knobs)


def merged() -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([TRAIN, VOLUMES])
    return parser


def weights_of(output_dir: Path) -> dict[str, Any]:
    return torch.load(output_dir / "models" / "model.pt", weights_only=True)


# ---- the same data as hssl_multidomain ---------------------------------------------------------------------------


def test_data_and_knobs_are_those_of_hssl_multidomain() -> None:
    config, other = merged().config, read(HSSL)
    assert {name: config[name] for name in SAME_KNOBS} == {name: other[name] for name in SAME_KNOBS}
    assert config["datalist"] == other["datalist"]
    assert config["crop_size"] == other["crop_size"]
    for name in ("preprocessing", "patches", "dataset", "sampler", "augment"):
        assert config["train"][name] == other["train"][name], name
    assert config["train"]["augment"]["flip_prob"] == 0


def test_settings_say_of_network_and_data_what_those_of_hssl_multidomain_say() -> None:
    of_data = {"pixdim", "patch_size", "a_min", "a_max", "tasks", "groups", "sampling_temperature", "seed"}
    config, other = merged()["settings"], read(HSSL)["settings"]
    needed = {"spatial_dims", "init_filters", "blocks_down", "validation_fraction", "amp", "data"} | of_data
    assert {name: config[name] for name in needed} == {name: other[name] for name in needed}


def test_no_required_property_is_missing(tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        [str(TRAIN), str(VOLUMES)], workflow_type="train", logging_file=False, output_dir=str(tmp_path)
    )
    workflow.initialize()
    assert workflow.check_properties() == []


# ---- training ----------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_encoder_and_load_into_a_segmentation_network(trained: Path) -> None:
    network = SegResNet(spatial_dims=3, init_filters=8, out_channels=4, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    assert weights_of(trained).keys() == SegResNetEncoder(network).state_dict().keys()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert not has_decoder(trained / "models" / "model.pt")
    load_weights(network, trained / "models" / "model.pt")
    loaded = network.state_dict()
    changed = {key for key in before if not torch.equal(before[key], loaded[key])}
    assert changed <= weights_of(trained).keys()
    assert any(key.startswith("down_layers.2") for key in changed)


def test_settings_are_written_beside_the_weights(trained: Path) -> None:
    settings = read(trained / "models" / "model.json")
    assert settings["tasks"] == ["abdomen_ct", "heart_mr"]
    assert settings["groups"] == ["abdomen", "heart"]
    assert settings["stages"] == [2, 3]
    assert settings["blocks_up"] == [1, 1]  # of a decoder that fits
    assert {name: settings[name] for name in ("pixdim", "patch_size", "init_filters", "blocks_down")} == {
        name: TINY[name] for name in ("pixdim", "patch_size", "init_filters", "blocks_down")
    }


def test_the_table_of_domains_is_written(trained: Path) -> None:
    with open(trained / "eval" / "domains.csv", encoding="utf-8") as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["abdomen_ct", "heart_mr"]


def test_tensorboard_shows_terms_codes_and_pictures_but_no_auroc_without_labels(trained: Path) -> None:
    tags = scalars_and_images(trained)
    assert {"loss/continuous", "loss/discrete", "loss/commitment", "loss/reconstruction"} <= tags
    assert {"codes/perplexity_stage2", "codes/usage_stage3", "collapse/target_std"} <= tags
    assert {"views", "reconstruction", "codes_of_stages_2_3"} <= tags
    assert "knn_auroc" not in tags


def scalars_and_images(output_dir: Path) -> set[str]:
    events = EventAccumulator(str(output_dir / "eval"))
    events.Reload()
    return {*events.Tags()["scalars"], *events.Tags()["images"]}


def test_one_epoch_and_one_more_are_bit_for_bit_two(trained: Path, volume_dirs: list[str], tmp_path: Path) -> None:
    resumed, straight = tmp_path / "resumed", tmp_path / "straight"
    shutil.copytree(trained, resumed)
    train(volume_dirs, resumed, max_epochs=2, resume=True)
    train(volume_dirs, straight, max_epochs=2)
    first, second = network_state(resumed / "checkpoints"), network_state(straight / "checkpoints")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_refuses_to_resume_on_other_patches(trained: Path, volume_dirs: list[str], tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    with refused(r"of a run with pixdim \[12, 12, 12\] \(now \[9, 9, 9\]\)"):
        train(volume_dirs, tmp_path / "out", max_epochs=2, resume=True, pixdim=[9, 9, 9])


@pytest.mark.parametrize(
    "knobs",
    [
        {"spatial_dims": 2},
        {"blocks_down": [1, 1, 1, 1], "fusion": "attention"},
        {"blocks_down": [1, 1], "stages": [1, 2], "patch_size": [12, 10, 8]},
        {"blocks_down": [1, 1, 1, 1, 1], "stages": [5]},
        {"reconstruction_weight": 0, "discrete_weight": 0, "commitment_weight": 0},
        {"cache_dir": "$@output_dir + '/cache'", "num_workers": 2},
    ],
    ids=str,
)
def test_knobs_change_the_run(volume_dirs: list[str], tmp_path: Path, knobs: dict[str, Any]) -> None:
    train(volume_dirs, tmp_path, **knobs)
    assert weights_of(tmp_path)["convInit.conv.weight"].ndim == 2 + knobs.get("spatial_dims", 3)


def test_trains_on_a_single_task(volume_dirs: list[str], tmp_path: Path) -> None:
    train(volume_dirs[0], tmp_path)
    assert read(tmp_path / "models" / "model.json")["tasks"] == ["abdomen_ct"]


def test_weights_of_another_run_start_the_encoder(trained: Path, volume_dirs: list[str], tmp_path: Path) -> None:
    weights = str(trained / "models" / "model.pt")
    train(volume_dirs, tmp_path, pretrained=weights, learning_rate=1e-12, weight_decay=0)
    before, after = weights_of(trained), weights_of(tmp_path)
    torch.testing.assert_close(after["convInit.conv.weight"], before["convInit.conv.weight"])


def test_findings_of_whole_volumes_give_an_auroc(tmp_path: Path) -> None:
    rng, splits = np.random.default_rng(0), {}
    for split, count in (("training", 4), ("validation", 4)):
        splits[split] = [{"image": f"{split}{index}.nii.gz", "label": [index % 2]} for index in range(count)]
        for item in splits[split]:
            nib.save(
                nib.Nifti1Image(rng.integers(1, 99, (20, 20, 20), dtype=np.int16), np.eye(4)), tmp_path / item["image"]
            )
    write(tmp_path / "dataset.json", {"task": "chest", "group": "body", "modality": "MR", **splits})
    train(tmp_path.as_posix(), tmp_path / "out", pixdim=[1, 1, 1], val_interval=1)
    assert {"knn_auroc", "knn_auroc_stages"} <= scalars_and_images(tmp_path / "out")


def test_two_processes_hold_one_network(volume_dirs: list[str], tmp_path: Path) -> None:
    saving = "$torch.save(@ssl_network.state_dict(), @output_dir + '/rank' + str(@rank) + '.pth')"
    more = write(tmp_path / "a.json", {"+run": [saving]})
    knobs = {**TINY, "max_epochs": 2, "dataset_dir": volume_dirs, "output_dir": tmp_path / "out"}
    result = two_processes(TRAIN, VOLUMES, SEVERAL, more, cwd=tmp_path, **knobs)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / "out" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert any("codebooks" in key for key in first)
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert all("running_" in key for key in differing), differing  # of BatchNorm, until the next step
    assert len(list(tmp_path.glob("out/eval/events*"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "out"}


def test_without_data_it_draws_phantoms_of_volumes(tmp_path: Path) -> None:
    small = {"max_epochs": 1, "iterations_per_epoch": 1, "batch_size": 2}
    run(config_file=[str(TRAIN), str(VOLUMES)], output_dir=str(tmp_path), **small)
    assert (tmp_path / "phantoms" / "head_ct" / "dataset.json").is_file()
    assert read(tmp_path / "models" / "model.json")["num_images"] == 60


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"encoder": "resnet18"}, r"--encoder has no meaning with train\.json and volumes\.json: leave it out"),
        ({"image_size": 64}, "--image_size has no meaning"),
        ({"mask_fraction": 0.5}, "no --mask_fraction"),
        ({"patch_size": [16, 16, 18]}, r"`--patch_size` must be multiples of 4, .* 3 levels .*, got \[16, 16, 18\]"),
        ({"patch_size": [16, 16]}, "`--patch_size` must be a list of 3"),
        ({"batch_size": 5}, "`--batch_size` must be even"),
        ({"stages": [3, 4]}, r"`stages` must be increasing numbers from 1 to 3 .*, got \[3, 4\]"),
        ({"init_filters": 12}, "`--init_filters` must be a multiple of 8, got 12"),
        ({"a_min": 300}, r"`--a_min` must be below --a_max, got 300 and 275\.0"),
        ({"sampling_temperature": 2}, "`--sampling_temperature`"),
        ({"task": {"nowhere": "abdomen"}}, "`task` must name folders among abdomen_ct, heart_mr, got nowhere"),
    ],
    ids=str,
)
def test_refuses_bad_knobs_before_the_data_are_read(
    volume_dirs: list[str], tmp_path: Path, knob: dict[str, Any], message: str
) -> None:
    with refused(message):
        train(volume_dirs, tmp_path / "out", **knob)
    assert not (tmp_path / "out").exists()


def test_a_slice_need_not_be_a_multiple_of_the_stride_across(volume_dirs: list[str], tmp_path: Path) -> None:
    train(volume_dirs, tmp_path, spatial_dims=2, patch_size=[16, 16, 9])
    assert (tmp_path / "models" / "model.pt").is_file()


def test_a_folder_without_a_task_is_refused(volume_dirs: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(volume_dirs[0], folder)
    dataset = read(folder / "dataset.json")
    del dataset["task"]
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    with refused("set must have a `task`, got None"):
        train(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_made_for_images_refuses_the_weights(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    weights = str(trained / "models" / "model.pt")
    for config in ("evaluate", "inference"):
        with refused("`--encoder` must be one of resnet10, .*, got 'SegResNet'"):
            run(
                config_file=str(CONFIGS / f"{config}.json"),
                dataset_dir=str(dataset_dir),
                output_dir=str(tmp_path / "out"),
                pretrained=weights,
            )
