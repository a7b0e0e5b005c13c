"""A bundle that is not among the four needs JSON alone: public names of this package, of MONAI and of torch."""

import shutil
from pathlib import Path

import pytest
from helpers import checkpoint, run_config, same, settings, weights, write
from monai.networks.nets import DenseNet121

TRAIN = {
    "imports": ["$import torch", "$import dissect_monai"],
    "bundle_root": "$dissect_monai.bundle_root('pneumonia_densenet')",
    "output_dir": "@bundle_root",
    "ckpt_dir": "$str(@output_dir) + '/checkpoints'",
    "model_path": "$str(@output_dir) + '/models/model.pt'",
    "device": "cpu",
    "dataset_dir": None,
    "findings": ["consolidation", "cysts"],
    "image_size": 32,
    "max_epochs": 1,
    "batch_size": 8,
    "learning_rate": 0.001,
    "weight_decay": 0.01,
    "seed": 0,
    "resume": False,
    "resume_from": "$dissect_monai.checkpoint_to_resume(@resume, @ckpt_dir)",
    "all_items": {"_target_": "dissect_monai.read_datalist", "dataset_dir": "@dataset_dir"},
    "datalist": "$@all_items.with_findings(@findings)",
    "network_def": {"_target_": "DenseNet121", "spatial_dims": 2, "in_channels": 1, "out_channels": "$len(@findings)"},
    "network": {"_target_": "dissect_monai.place_network", "network": "@network_def", "device": "@device"},
    "loss": {"_target_": "dissect_monai.MultiLabelLoss"},
    "optimizer": {
        "_target_": "dissect_monai.adamw", "network": "@network", "learning_rate": "@learning_rate",
        "weight_decay": "@weight_decay",
    },
    "settings": "$dissect_monai.run_settings(label_names=@findings, num_images=len(@train#dataset))",
    "train": {
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True,
                 "reader": {"_target_": "dissect_monai.ImageFileReader", "spatial_dims": 2}},
                {"_target_": "Resized", "keys": "image", "spatial_size": "$[@image_size] * 2"},
                {"_target_": "ScaleIntensityd", "keys": "image"},
                {"_target_": "EnsureTyped", "keys": ["image", "label"], "dtype": "$torch.float32", "track_meta": False},
                {"_target_": "SelectItemsd", "keys": ["image", "label"]},
            ],
        },
        "dataset": {
            "_target_": "dissect_monai.cached_dataset", "data": "$@datalist.training",
            "transform": "@train#preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader", "dataset": "@train#dataset", "batch_size": "@batch_size", "shuffle": True,
        },
        "handlers": [
            {"_target_": "dissect_monai.EpochSeedHandler", "seed": "@seed"},
            {"_target_": "dissect_monai.FiniteLoss"},
            {"_target_": "ValidationHandler", "validator": "@validate#evaluator", "interval": 1},
            {"_target_": "dissect_monai.BestWeights", "evaluator": "@validate#evaluator", "weights": "@network_def",
             "weights_path": "@model_path", "settings": "@settings"},
            {"_target_": "dissect_monai.TrainingCheckpoint", "ckpt_dir": "@ckpt_dir", "settings": "@settings",
             "save_dict": {"network": "@network_def", "optimizer": "@optimizer"}, "resume_from": "@resume_from"},
        ],
        "trainer": {
            "_target_": "SupervisedTrainer", "max_epochs": "@max_epochs", "device": "@device", "network": "@network",
            "train_data_loader": "@train#dataloader", "optimizer": "@optimizer", "loss_function": "@loss",
            "train_handlers": "@train#handlers", "decollate": False,
        },
    },
    "validate": {
        "dataset": {
            "_target_": "dissect_monai.cached_dataset", "data": "$@datalist.validation",
            "transform": "@train#preprocessing",
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "network": "@network", "decollate": False,
            "val_data_loader": {"_target_": "DataLoader", "dataset": "@validate#dataset", "batch_size": "@batch_size"},
            "val_handlers": [{"_target_": "dissect_monai.ClassificationMetrics", "label_names": "@findings"}],
        },
    },
    "initialize": ["$dissect_monai.begin()"],
    "run": [
        "$dissect_monai.check_training(False, @dataset_dir, @output_dir, @resume_from, @datalist, @batch_size)",
        "$@train#trainer.run()",
    ],
}  # fmt: skip


@pytest.fixture
def train(tmp_path: Path) -> Path:
    folder = tmp_path / "bundles" / "pneumonia_densenet" / "configs"
    write(folder / "metadata.json", {"version": "0.1.0"})
    return write(folder / "train.json", TRAIN)


def test_it_trains_resumes_and_its_weights_load(train: Path, dataset_dir: Path, tmp_path: Path) -> None:
    run_config(train, dataset_dir=dataset_dir, output_dir=tmp_path / "once", max_epochs=2)
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    (tmp_path / "twice" / "checkpoints" / "checkpoint_epoch=2.pt").unlink()
    run_config(train, dataset_dir=dataset_dir, output_dir=tmp_path / "twice", max_epochs=2, resume=True)
    assert same(*(checkpoint(tmp_path / name, 2)["network"] for name in ("once", "twice")))
    said = settings(tmp_path / "once")
    assert (said["image_size"], said["label_names"]) == (32, ["consolidation", "cysts"])
    DenseNet121(spatial_dims=2, in_channels=1, out_channels=2).load_state_dict(weights(tmp_path / "once"))
