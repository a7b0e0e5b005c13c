from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import in_two_processes
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.losses.joint_embedding import nt_xent, regression_loss, vicreg

LOSSES = {"nt_xent": nt_xent, "vicreg": vicreg}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def embeddings(num_images: int = 8, dim: int = 5) -> Tensor:
    return torch.randn(2 * num_images, dim, generator=torch.Generator().manual_seed(0))


def test_nt_xent_is_that_of_the_oracle() -> None:
    views = embeddings()
    oracle = NTXentLoss(temperature=0.2)(views, torch.arange(8).repeat(2))
    torch.testing.assert_close(nt_xent(views), oracle)


def test_vicreg_is_that_of_a_loop() -> None:
    first, second = (2 * embeddings()).chunk(2)
    invariance = F.mse_loss(first, second)
    variance = covariance = torch.zeros(())
    for view in (first, second):
        variance = variance + torch.relu(1 - torch.sqrt(view.var(0) + 1e-4)).mean()
        matrix = torch.cov(view.T)
        covariance = covariance + sum(matrix[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
    expected = (25 * invariance + 25 * variance / 2 + covariance) / 25
    torch.testing.assert_close(vicreg(torch.cat([first, second])), expected)


@every_loss
def test_half_precision_is_summed_in_float32(loss: Callable[[Tensor], Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(embeddings().bfloat16()).dtype == torch.float32


@every_loss
@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 1)])
def test_rejects_what_are_not_two_views(loss: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`embeddings` must be \(2·B, D\), got"):
        loss(torch.rand(shape))


def joined(views: Tensor) -> Tensor:
    return nt_xent(views) + 2 * vicreg(views)


def one_rank(rank: int, directory: Path, part: Tensor) -> None:
    views = part.clone().requires_grad_()
    loss = joined(views)
    loss.backward()
    # DistributedDataParallel averages the parameters' gradients.
    torch.save((loss.detach(), views.grad / 2), directory / f"{rank}.pt")


def test_two_processes_give_loss_and_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    views = embeddings()
    first, second = views.view(2, 8, 5).split([4, 4], dim=1)
    parts = [first.reshape(8, 5), second.reshape(8, 5)]
    in_two_processes(one_rank, tmp_path, parts)
    views.requires_grad_()
    loss = joined(views)
    loss.backward()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    gradients = [gradient.view(2, 4, 5) for _, gradient in results]
    for value, _ in results:
        torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(torch.cat(gradients, 1).reshape(16, 5), views.grad)


def test_regression_passes_a_gradient_to_both_sides() -> None:
    first, second = (each.requires_grad_() for each in (embeddings(), embeddings().flip(0)))
    regression_loss(first, second).backward()
    assert first.grad.abs().sum() > 0
    assert second.grad.abs().sum() > 0
