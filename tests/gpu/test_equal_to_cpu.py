"""What runs on a GPU computes what the CPU does, within the tolerances that stand here."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import SegResNet, resnet10
from torch import Tensor, nn

from dissect_monai.inferers import WindowInferer
from dissect_monai.losses.contrastive import supervised_contrast
from dissect_monai.losses.joint_embedding import OBJECTIVES
from dissect_monai.losses.pretraining import HSSLLoss, VQSSLLoss
from dissect_monai.networks.hssl import HSSLNet
from dissect_monai.networks.quantizers import EMACodebook
from dissect_monai.networks.vqssl import VQSSLNet
from dissect_monai.transforms import augment
from dissect_monai.transforms.augment import BatchAugment, mask_blocks
from dissect_monai.transforms.spatial import to_original_grid
from dissect_monai.transforms.views import HierarchyViews

pytestmark = pytest.mark.gpu
TASKS, GROUPS = ["spleen", "pancreas", "heart"], ["abdomen", "thorax"]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in float32, not TF32, and the same random draws on both devices."""

    def uniform(draw: augment._Draw, low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(draw.batch, *shape).uniform_(low, high).to(draw.device)

    monkeypatch.setattr(augment._Draw, "uniform", uniform)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Distance relative to the largest value."""
    scale = float(expected.detach().abs().max().clamp_min(1e-6))
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", [(16, 32, 14, 14), (2, 32, 12, 12, 12)], ids=["2d", "3d"])
def test_codebooks_move_alike(metric: str, shape: tuple[int, ...], device: torch.device) -> None:
    torch.manual_seed(0)
    books = [EMACodebook(128, 32, metric=metric, revive_fraction=0)]
    books.append(deepcopy(books[0]).to(device))
    for features in torch.randn(3, *shape):
        inputs = [features.clone().requires_grad_(), features.to(device).requires_grad_()]
        expected, actual = (book(each) for book, each in zip(books, inputs, strict=True))
        same = actual.indices.cpu() == expected.indices
        assert same.float().mean() > 0.9999  # rounding may decide between two codes
        close(actual.commitment.detach(), expected.commitment.detach(), 1e-5)
        for output in (expected, actual):
            (output.features.square().mean() + output.commitment).backward()
        where = same.unsqueeze(1).expand_as(expected.features)
        close(inputs[1].grad.cpu()[where], inputs[0].grad[where], 1e-4)
        close(books[1].embedding.weight, books[0].embedding.weight, 1e-2)  # of the few, one may move a small cluster


@pytest.mark.parametrize("shape", [(48, 40), (24, 20, 16)], ids=["2d", "3d"])
def test_views_are_alike(shape: tuple[int, ...], device: torch.device) -> None:
    images = torch.nn.functional.interpolate(torch.rand(8, 1, *[6] * len(shape)), size=shape).mul(255).byte()
    views = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(3)
        views.append(BatchAugment(len(shape))(images.to(where)))
    close(views[1], views[0], 1e-3)


def test_contrast_and_its_gradient_are_alike(device: torch.device) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(1024, 64), [torch.arange(512).repeat(2), torch.arange(1024) % 7]
    expected, actual = embeddings.clone().requires_grad_(), embeddings.to(device).requires_grad_()
    losses = [
        torch.stack(supervised_contrast(each, [y.to(each.device) for y in labels])) for each in (expected, actual)
    ]
    close(losses[1].detach(), losses[0].detach(), 1e-5)
    for loss in losses:
        loss.sum().backward()
    assert expected.grad is not None
    assert actual.grad is not None
    close(actual.grad, expected.grad, 1e-4)


def losses_of(network: nn.Module, loss: nn.Module, images: Tensor, target: object) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the largest parameter."""
    value = loss(network(images), target)
    value.backward()
    return value.detach(), max((p.grad for p in network.parameters() if p.grad is not None), key=Tensor.numel)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_pretraining_is_alike(objective: str, device: torch.device) -> None:
    torch.manual_seed(0)
    encoder = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
    network = VQSSLNet(encoder, num_embeddings=16, hidden_dim=64, decode=True, predict=objective == "byol")
    images, loss = torch.rand(16, 1, 64, 64), VQSSLLoss(objective=objective)
    copy = deepcopy(network).to(device)
    expected, actual = (losses_of(net, loss, x, x) for net, x in ((network, images), (copy, images.to(device))))
    close(actual[0], expected[0], 1e-3)
    assert torch.nn.functional.cosine_similarity(actual[1].cpu().flatten(), expected[1].flatten(), dim=0) > 0.99


def test_the_loss_of_hierarchical_pretraining_is_alike(device: torch.device) -> None:
    torch.manual_seed(0)
    segresnet = SegResNet(3, out_channels=1, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    network, found = HSSLNet(segresnet, len(TASKS), len(GROUPS), hidden_dim=32, position=True, dense_level=1), []
    copy = deepcopy(network).to(device)
    batch = {"image": torch.rand(4, 1, 16, 16, 16), "task": [*TASKS, "spleen"], "group": [GROUPS[0]] * 3 + [GROUPS[1]]}
    batch["place"] = torch.rand(4)
    for net, where in ((network, torch.device("cpu")), (copy, device)):
        torch.manual_seed(1)
        images, target = HierarchyViews(BatchAugment(3), TASKS, GROUPS)(batch, where)
        found.append(
            losses_of(net, HSSLLoss(num_tasks=3, num_groups=2, position_weight=1, dense_weight=1), images, target)
        )
    close(found[1][0], found[0][0], 1e-3)
    assert torch.nn.functional.cosine_similarity(found[1][1].cpu().flatten(), found[0][1].flatten(), dim=0) > 0.99


def test_masks_lie_on_the_device(device: torch.device) -> None:
    images, masked = mask_blocks(torch.rand(16, 1, 32, 32, device=device), 0.5, 4)
    assert masked.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert not images[masked].any()


@pytest.mark.parametrize("channels", [1, 4], ids=["labels", "logits"])
def test_the_original_grid_is_alike(channels: int, device: torch.device) -> None:
    torch.manual_seed(0)
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    pred = torch.randint(0, 4, (1, 40, 36, 30)).byte() if channels == 1 else torch.randn(channels, 40, 36, 30)
    own = np.diag([0.8, 0.9, 2.5, 1.0])
    maps = [to_original_grid(MetaTensor(pred.to(where), affine=affine), (70, 60, 24), own) for where in ("cpu", device)]
    assert (maps[1].cpu().as_tensor() == maps[0].as_tensor()).float().mean() > 0.999  # between two equal classes


def test_windows_are_stitched_alike(device: torch.device) -> None:
    torch.manual_seed(0)
    network = SegResNet(3, out_channels=3, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)).eval()
    volume, inferer = torch.rand(1, 1, 24, 20, 28), WindowInferer((16, 16, 16))
    with torch.no_grad():
        expected = inferer(volume, network)
        close(inferer(volume.to(device), deepcopy(network).to(device)), expected, 1e-3)
