import logging

import pytest
import torch
from helpers import Writer, small_resnet
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from torch import nn

from dissect_monai.handlers.representation import RepresentationMonitor
from dissect_monai.losses.pretraining import VQSSLLoss
from dissect_monai.networks.vqssl import VQSSLNet
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import Views

TERMS = {"continuous": 1.0, "discrete": 1.0, "cross": 0.0, "commitment": 0.0, "reconstruction": 0.5}


def run(writer: Writer | None, interval: int = 2, attach: bool = True, collapsed: bool = False) -> nn.Module:
    """Five epochs of two iterations."""
    encoder = small_resnet(widen_factor=0.25)
    network = VQSSLNet(encoder, num_embeddings=8, embedding_dim=8, hidden_dim=16, out_dim=8, decode=True, predict=False)
    if collapsed:
        nn.init.zeros_(encoder.conv1.weight)
        encoder.conv1.requires_grad_(False)
    loss = VQSSLLoss(**{f"{name}_weight": weight for name, weight in TERMS.items()}, objective="nt_xent")
    data = [{"image": torch.randint(256, (1, 32, 32), dtype=torch.uint8)} for _ in range(24)]
    monitor = RepresentationMonitor(encoder, loss, DataLoader(Dataset(data), batch_size=5), writer, interval)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=5,
        train_data_loader=DataLoader(Dataset(data), batch_size=12),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1e-3),
        loss_function=loss,
        prepare_batch=Views(BatchAugment()),
        decollate=False,
        train_handlers=[monitor] if attach else [],
    )
    trainer.logger.setLevel(logging.CRITICAL)
    trainer.run()
    return network


def test_writes_shares_of_the_gradient_and_the_rank_at_its_interval() -> None:
    run(writer := Writer())
    assert set(writer.scalars) == {*(f"gradient/{name}" for name in TERMS), "collapse/effective_rank_unaugmented"}
    for name, weight in TERMS.items():
        values = writer.scalars[f"gradient/{name}"]
        assert list(values) == [1, 3, 7]  # first iterations of the epochs 1, 2 and 4
        assert all((value > 0) == (weight > 0) for value in values.values())
    shares = sum(writer.values(f"gradient/{name}") for name in TERMS)
    torch.testing.assert_close(shares, torch.ones(3))
    ranks = writer.scalars["collapse/effective_rank_unaugmented"]
    assert list(ranks) == [2, 4, 8]
    assert all(1 < rank <= 23 for rank in ranks.values())


def test_changes_nothing_in_the_run() -> None:
    states = [run(Writer(), interval=1).state_dict(), run(None, attach=False).state_dict()]
    assert all(torch.equal(first, second) for first, second in zip(*(each.values() for each in states), strict=True))


def test_warns_of_a_low_rank(caplog: pytest.LogCaptureFixture) -> None:
    run(Writer())
    assert not caplog.records
    run(Writer(), collapsed=True)
    assert "The features of epoch 4 fill 1.0 of 23 directions: try" in caplog.text
