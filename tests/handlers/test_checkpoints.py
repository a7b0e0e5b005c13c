from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import counting_engine
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.networks.nets import resnet10
from monai.optimizers import WarmupCosineSchedule
from torch import nn
from torch.utils.data import DistributedSampler

from dissect_monai.handlers.checkpoints import TrainingCheckpoint, newest_checkpoint
from dissect_monai.handlers.training import EpochSeedHandler, TargetMomentumHandler
from dissect_monai.losses.pretraining import VQSSLLoss
from dissect_monai.networks.optimizers import adamw
from dissect_monai.networks.vqssl import VQSSLNet
from dissect_monai.networks.weights import read_settings
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import Views

EPOCHS = 4


def checkpoint(folder: Path, module: nn.Module, **kwargs: Any) -> TrainingCheckpoint:
    return TrainingCheckpoint(folder, {"network": module}, module, folder / "models" / "model.pt", **kwargs)


class Training:
    """The pretraining run of the bundle, in small."""

    def __init__(self, folder: Path, max_epochs: int, resume_from: str | None = None, init_seed: int = 0) -> None:
        torch.manual_seed(init_seed)
        encoder = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
        self.network = VQSSLNet(encoder, num_embeddings=8, embedding_dim=8, hidden_dim=16, out_dim=8, decode=True)
        self.optimizer = adamw(self.network, 1e-3, 0.05)
        self.schedule = WarmupCosineSchedule(self.optimizer, warmup_steps=3, t_total=3 * EPOCHS)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (13, 1, 32, 32), dtype=torch.uint8, generator=generator)
        dataset = Dataset([{"image": image} for image in images])
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, drop_last=True)
        self.views = Views(BatchAugment(2))
        state = {"network": self.network, "optimizer": self.optimizer, "lr_scheduler": self.schedule}
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=max_epochs,
            train_data_loader=DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=VQSSLLoss(reconstruction_weight=1),
            prepare_batch=self.views,
            decollate=False,
            train_handlers=[
                EpochSeedHandler(0, epoch_seeded=[sampler, self.views]),
                LrScheduleHandler(self.schedule, print_lr=False, epoch_level=False),
                TargetMomentumHandler(self.network, 0.9, num_iterations=3 * EPOCHS),
                TrainingCheckpoint(folder, state, encoder, folder / "model.pt", resume_from=resume_from),
            ],
        )
        self.trainer.logger.setLevel(logging.ERROR)

    def run(self) -> Training:
        self.trainer.run()
        return self


def test_two_and_two_epochs_are_four_bit_for_bit(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", EPOCHS).run()
    Training(tmp_path / "parts", 2).run()
    resumed = Training(tmp_path / "parts", EPOCHS, newest_checkpoint(tmp_path / "parts"), init_seed=1).run()
    assert resumed.trainer.state.iteration == 3 * EPOCHS
    for ours, theirs in (
        (resumed.network.state_dict(), whole.network.state_dict()),
        (torch.load(tmp_path / "parts" / "model.pt"), torch.load(tmp_path / "whole" / "model.pt")),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for ours, theirs in zip(resumed.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()


def test_saves_at_the_interval_and_at_the_end_and_keeps_the_newest(tmp_path: Path) -> None:
    def epochs_left(**kwargs: int) -> list[str]:
        folder = tmp_path / str(kwargs)
        engine, module = counting_engine(max_epochs=5), nn.Linear(1, 1)
        checkpoint(folder, module, **kwargs).attach(engine)
        engine.run(range(3), max_epochs=5)
        return sorted(path.name[-4] for path in folder.glob("*.pt"))

    assert epochs_left(interval=1, num_kept=2) == ["4", "5"]
    assert epochs_left(interval=2, num_kept=9) == ["2", "4", "5"]
    assert epochs_left(interval=9, num_kept=1) == ["5"]


def test_other_ranks_load_but_do_not_save(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module, rank=1).attach(engine)
    engine.run(range(3), max_epochs=1)
    assert not list(tmp_path.iterdir())


def test_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    for age, name in enumerate(["checkpoint_epoch=10.pt", "checkpoint_epoch=3.pt", "checkpoint_epoch=20.pt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    for foreign in (
        "model.pt",
        "checkpoint_epoch=best.pt",
        ".checkpoint_epoch=30.pt.7.tmp",
        "checkpoint_epoch=9.pt.bak",
    ):
        (tmp_path / foreign).touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_epoch=10.pt")


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_says_that_there_is_nothing_to_resume_from(tmp_path: Path, folder: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint_epoch=N\.pt in .*: check --output_dir"):
        newest_checkpoint(tmp_path / folder)


def test_refuses_to_resume_a_run_with_other_batches(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module).attach(engine)
    engine.run(range(3), max_epochs=1)
    engine = counting_engine()
    engine.state.epoch_length = 5
    checkpoint(tmp_path, module, resume_from=newest_checkpoint(tmp_path)).attach(engine)
    with pytest.raises(ValueError, match=r"of a run with iterations an epoch 3 \(now 5\): resume with the same knobs"):
        engine.run(range(5), max_epochs=2)


def test_refuses_to_resume_a_run_with_other_knobs(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module, settings={"encoder": "resnet18", "stages": [2, 3]}).attach(engine)
    engine.run(range(3), max_epochs=1)
    newest = newest_checkpoint(tmp_path)
    engine = counting_engine()
    checkpoint(tmp_path, module, settings={"encoder": "resnet50", "stages": [2, 3]}, resume_from=newest).attach(engine)
    with pytest.raises(ValueError, match=r"is of a run with encoder resnet18 \(now resnet50\): resume with"):
        engine.run(range(3), max_epochs=2)


def test_what_the_weights_depend_on_lies_beside_them(tmp_path: Path) -> None:
    engine, settings = counting_engine(), {"encoder": "resnet18", "image_size": 48, "stages": [2, 3]}
    checkpoint(tmp_path, nn.Linear(1, 1), settings=settings).attach(engine)
    engine.run(range(3), max_epochs=1)
    assert read_settings(tmp_path / "models" / "model.pt") == settings


def test_refuses_to_resume_beyond_the_last_epoch(tmp_path: Path) -> None:
    engine, module = counting_engine(), nn.Linear(1, 1)
    checkpoint(tmp_path, module).attach(engine)
    engine.run(range(3), max_epochs=3)
    engine = counting_engine(max_epochs=2)
    checkpoint(tmp_path, module, resume_from=newest_checkpoint(tmp_path)).attach(engine)
    with pytest.raises(ValueError, match="has done 3 epochs, more than --max_epochs 2: raise it"):
        engine.run(range(3), max_epochs=2)


@pytest.mark.parametrize("kwargs", [{"interval": 0}, {"num_kept": 0}])
def test_rejects_counts_below_one(tmp_path: Path, kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`interval` and `num_kept` must be at least 1, got"):
        checkpoint(tmp_path, nn.Linear(1, 1), **kwargs)
