import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import in_two_processes, never_waiting
from monai.losses import ContrastiveLoss
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.common import LEVELS
from dissect_monai.losses import dense
from dissect_monai.losses.contrastive import (
    BLOCK_BYTES,
    hierarchical_contrast,
    position_contrast,
    retrieval_accuracy,
    supervised_contrast,
)
from dissect_monai.losses.dense import dense_contrast
from dissect_monai.transforms.augment import BatchAugment, Placement

TASK, GROUP = torch.tensor([3, 3, 8, 8, 8, 1, -4, -4]), torch.tensor([0, 0, 1, 1, 1, 0, 1, 1])


def random_embeddings(num: int = 16, dim: int = 6, dtype: torch.dtype = torch.double, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, dtype=dtype, generator=generator).requires_grad_()


def naive_contrast(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Eq. 2 of Khosla et al. with masks of all pairs."""
    z = F.normalize(embeddings, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool)
    logits = z @ z.T / temperature
    log_prob = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~itself
    anchors = positive.any(1)
    per_anchor = -log_prob.where(positive, 0).sum(1)[anchors] / positive.sum(1)[anchors]
    return per_anchor.sum() / max(1, len(per_anchor))


def gradient(loss: Tensor, embeddings: Tensor) -> Tensor:
    return torch.autograd.grad(loss, embeddings, retain_graph=True)[0]


@pytest.mark.parametrize("num_views", [2, 3])
def test_each_level_contrasts_its_own_labels(num_views: int) -> None:
    levels = [random_embeddings(8 * num_views, dim, torch.float32, seed=dim) for dim in (4, 6, 8)]
    terms = hierarchical_contrast(levels, TASK, GROUP, 0.2)
    assert tuple(terms) == LEVELS
    for term, level, labels in zip(terms.values(), levels, (torch.arange(8), TASK, GROUP), strict=True):
        assert term.shape == ()
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, naive_contrast(level, labels.repeat(num_views), 0.2))


def test_retrieval_accuracy_is_that_of_a_search_over_all_pairs() -> None:
    embeddings = random_embeddings(200, 4)
    labels = torch.arange(200) % 3
    similarities = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=2).fill_diagonal_(-2)
    expected = (labels[similarities.argmax(1)] == labels).float().mean()
    torch.testing.assert_close(retrieval_accuracy(embeddings, labels), expected)
    assert retrieval_accuracy(embeddings, torch.zeros(200)) == 1
    assert retrieval_accuracy(embeddings, torch.arange(200)) == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-2])
def test_low_temperature_is_stable_in_float32(temperature: float) -> None:
    embeddings = random_embeddings()
    labels = TASK.repeat(2)
    single = embeddings.detach().float().requires_grad_()
    expected, actual = (supervised_contrast(each, [labels], temperature)[0] for each in (embeddings, single))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(actual, single).double(), gradient(expected, embeddings), rtol=1e-3, atol=1e-2)


def test_autocast_and_half_precision_are_computed_in_float32() -> None:
    embeddings = random_embeddings(dtype=torch.float32)
    labels = [TASK.repeat(2)]
    expected = supervised_contrast(embeddings, labels)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = supervised_contrast(embeddings, labels)[0]
        torch.testing.assert_close(gradient(actual, embeddings), gradient(expected, embeddings))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    half = embeddings.detach().bfloat16()
    torch.testing.assert_close(supervised_contrast(half, labels), supervised_contrast(half.float(), labels))


@pytest.mark.parametrize("block_bytes", [1, 1000, 2**20])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_equals_masks_of_all_pairs(temperature: float, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block_bytes)
    embeddings = random_embeddings()
    one_pair, no_pair = torch.arange(16).clamp_min(1), torch.arange(16)  # other embeddings are no anchors
    labels = [*(each.repeat(2) for each in (torch.arange(8), TASK, GROUP)), one_pair, no_pair]
    for actual, each in zip(supervised_contrast(embeddings, labels, temperature), labels, strict=True):
        expected = naive_contrast(embeddings, each, temperature)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradient(actual, embeddings), gradient(expected, embeddings))


@pytest.mark.parametrize("labels", [torch.arange(8).repeat(2), TASK.repeat(2), torch.arange(16) // 9])
def test_equals_pytorch_metric_learning(labels: Tensor) -> None:
    library = pytest.importorskip("pytorch_metric_learning.losses", reason="comes with the extra `dev`")
    embeddings = random_embeddings()
    expected = library.SupConLoss(temperature=0.2)(embeddings, labels)
    actual = supervised_contrast(embeddings, [labels], 0.2)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient(actual, embeddings), gradient(expected, embeddings))


def test_image_level_equals_monai() -> None:
    first, second = random_embeddings(8), random_embeddings(8, seed=1)
    terms = hierarchical_contrast([torch.cat([first, second])] * 3, TASK, GROUP, 0.5)
    torch.testing.assert_close(terms["image"], ContrastiveLoss(temperature=0.5)(first, second))


def make_head() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(5, 6)


def train_one_rank(rank: int, directory: Path, part: tuple[Tensor, Tensor, Tensor]) -> None:
    head = make_head()
    inputs, task, group = part
    embeddings = head(inputs)
    terms = hierarchical_contrast([embeddings, embeddings * 2, embeddings], task, group)
    (terms["image"] + 2 * terms["task"] + 3 * terms["group"]).backward()
    for parameter in head.parameters():  # as DistributedDataParallel does, which can hang when torn down in a test
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= 2
    result = {"terms": {name: term.detach() for name, term in terms.items()}, "weight": head.weight.grad}
    torch.save(result, directory / f"{rank}.pt")


def test_two_processes_give_loss_and_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    inputs = random_embeddings(16, 5, torch.float32).detach()
    views = inputs.view(2, 8, 5)
    parts = [(views[:, part].reshape(8, 5), TASK[part], GROUP[part]) for part in (slice(0, 4), slice(4, 8))]
    in_two_processes(train_one_rank, tmp_path, parts)
    head = make_head()
    terms = hierarchical_contrast([head(inputs)] * 3, TASK, GROUP)
    (terms["image"] + 2 * terms["task"] + 3 * terms["group"]).backward()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result["terms"], {name: term.detach() for name, term in terms.items()})
        torch.testing.assert_close(result["weight"], head.weight.grad)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(device: torch.device) -> None:
    embeddings = torch.randn(16, 8, device=device, requires_grad=True)
    task, group = TASK.to(device), GROUP.to(device)
    for context in (nullcontext(), never_waiting(device)):  # the first sets the device up
        with context:
            sum(hierarchical_contrast([embeddings] * 3, task, group).values()).backward()
    assert embeddings.grad is not None


def test_what_lies_at_one_place_of_a_task_attracts_each_other_and_what_has_no_place_only_itself() -> None:
    embeddings = random_embeddings(16, dtype=torch.float32)
    place = torch.tensor([0.0, 0.1, 0.45, 0.55, 1.0, 0.5, float("nan"), float("nan")])
    # Of 4 parts, then of those shifted by half a part; tasks are 3, 3, 8, 8, 8, 1, −4, −4.
    expected = [
        naive_contrast(embeddings, torch.tensor(labels).repeat(2), 0.2)
        for labels in ([0, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 3, 4, 5])
    ]
    actual = position_contrast(embeddings, TASK, place, 0.2, num_bins=4)
    torch.testing.assert_close(actual, torch.stack(expected).mean())


@pytest.mark.parametrize("num", [8, 15, 4])
def test_rejects_what_are_not_two_views_of_each_item(num: int) -> None:
    with pytest.raises(ValueError, match=f"must hold two or more views of each of the 8 items, got {num}"):
        hierarchical_contrast([torch.rand(num, 4)] * 3, TASK, GROUP)


# ---- dense contrast ----------------------------------------------------------------------------------------------

both_dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def naive_dense(features: Tensor, placement: Placement, temperature: float) -> Tensor:
    """One cell at a time, its positive sought among all cells."""
    pairs, cells = len(features) // 2, tuple(features.shape[2:])
    axes = [(2 * torch.arange(length) + 1) / length - 1 for length in cells]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    entropies = []
    for index in range(2 * pairs):
        other = (index + pairs) % (2 * pairs)
        here = places @ placement.matrix[index].T + placement.center[index]
        there = torch.linalg.solve(placement.matrix[other], (here - placement.center[other]).T).T
        anchors, candidates = (F.normalize(features[each].flatten(1).T, dim=1) for each in (index, other))
        for anchor, place in zip(anchors, there, strict=True):
            distance = ((places - place) * torch.tensor(cells) / 2).norm(dim=1)
            if distance.min() <= 0.5 * math.sqrt(len(cells)):
                logits = candidates @ anchor / temperature
                entropies.append(logits.logsumexp(0) - logits[distance.argmin()])
    return torch.stack(entropies).mean() if entropies else torch.zeros(())


@both_dims
@pytest.mark.parametrize("rotation", [0.0, 30.0])
def test_equals_the_naive_loss(spatial_dims: int, rotation: float) -> None:
    generator = torch.Generator().manual_seed(1)
    augment = BatchAugment(spatial_dims, crop_scale=(0.2, 0.9), flip_prob=0.5, rotation=rotation)
    placement = augment.placed(torch.rand(6, 1, *[8] * spatial_dims, generator=generator), generator).placement
    features = torch.randn(6, 5, *(4, 3, 2)[:spatial_dims], generator=generator)
    expected = naive_dense(features, placement, 0.2)
    assert expected > 0
    torch.testing.assert_close(dense_contrast(features, placement, 0.2), expected)


@both_dims
def test_of_a_large_map_as_many_cells_are_compared_as_the_bound_says(
    spatial_dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "MAX_CELLS", 9)
    features = torch.randn(4, 5, *(6, 5, 2)[:spatial_dims], generator=torch.Generator().manual_seed(0))
    same = Placement(torch.eye(spatial_dims).expand(4, -1, -1), torch.zeros(4, spatial_dims))
    cells = features.flatten(2)
    chosen = F.normalize(cells[..., np.linspace(0, cells.shape[2] - 1, 9).astype(int)], dim=1)
    logits = chosen[:2].transpose(1, 2) @ chosen[2:] / 0.2  # of the same places in both views
    own = torch.arange(9).expand(2, -1)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.transpose(1, 2), own)) / 2
    torch.testing.assert_close(dense_contrast(features, same, 0.2), expected)
    one_cell = same._replace(matrix=same.matrix * torch.tensor([1.0, 1.0, 0.01, 0.01])[:, None, None])
    found = dense_contrast(features, one_cell, 0.2)  # whose cells are all nearest to a few of the first views
    assert 0 < found < math.log(9) + 2 / 0.2


def test_views_that_do_not_overlap_have_no_loss_and_no_gradient() -> None:
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    quarter = Placement(0.2 * torch.eye(2).expand(2, -1, -1), torch.tensor([[-0.7, 0.0], [0.7, 0.0]]))
    loss = dense_contrast(features, quarter)
    loss.backward()
    assert loss == 0
    assert features.grad is not None
    assert (features.grad == 0).all()
