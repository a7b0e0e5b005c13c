import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_two_processes, never_waiting
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.networks import quantizers
from dissect_monai.networks.quantizers import EMACodebook, MultiScaleQuantizer

every_metric = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


def plain_codebook(num_embeddings: int = 16, embedding_dim: int = 8) -> EMACodebook:
    """Without seeding and revival, that is, what MONAI has."""
    return EMACodebook(num_embeddings, embedding_dim, data_init=False, revive_fraction=0)


def batches(steps: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def as_rows(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).flatten(0, -2)


def test_every_position_gets_its_nearest_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantizers.CHUNK_BYTES, "cpu", 7 * 16 * 4)  # seven rows a chunk: the last one is shorter
    codebook = plain_codebook().eval()
    [inputs] = batches(1, 2, 8, 5, 5)
    output = codebook(inputs)
    nearest = torch.cdist(as_rows(inputs), codebook.embedding.weight).argmin(1)
    assert torch.equal(output.indices.flatten(), nearest)
    assert torch.equal(as_rows(output.features), codebook.embedding.weight[nearest])
    torch.testing.assert_close(output.commitment, 0.25 * F.mse_loss(output.features, inputs))


def test_channels_last_input_is_not_copied() -> None:
    inputs = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    output = plain_codebook()(inputs)
    assert output.projected.data_ptr() == inputs.data_ptr()
    assert output.features.is_contiguous(memory_format=torch.channels_last)


def test_first_training_batch_seeds_the_codes() -> None:
    codebook = EMACodebook(16, 8, decay=0.0, revive_fraction=0)
    [inputs] = batches(1, 2, 8, 4, 4)
    output = codebook(inputs)
    seeds = as_rows(inputs)[::2]
    assert torch.equal(as_rows(output.features)[::2], seeds)
    assert len(output.indices.unique()) == 16
    sizes = codebook.ema_cluster_size + 1e-5
    smoothed = sizes / sizes.sum() * codebook.ema_cluster_size.sum()
    torch.testing.assert_close(codebook.embedding.weight, codebook.ema_w / smoothed.unsqueeze(1))


def test_only_a_codebook_that_never_trained_is_seeded() -> None:
    first, second = batches(2, 2, 8, 4, 4)
    trained, fresh = EMACodebook(16, 8), EMACodebook(16, 8)
    fresh_state = copy.deepcopy(fresh.state_dict())
    trained(first)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(trained(second).features, fresh(second).features)
    trained.load_state_dict(fresh_state)
    assert torch.isin(as_rows(trained(second).features), as_rows(second)).all()


@every_metric
def test_a_resumed_run_repeats_an_uninterrupted_one(metric: str) -> None:
    codebook, resumed = (EMACodebook(16, 8, metric=metric, decay=0.5, revive_fraction=0.5) for _ in range(2))
    for step, inputs in enumerate(batches(8, 2, 8, 4, 4)):
        if step == 4:
            resumed.load_state_dict(codebook.state_dict())
        codebook(inputs)
        if step >= 4:
            resumed(inputs)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in codebook.state_dict().items())


def test_dead_codes_become_current_features_and_the_others_stay() -> None:
    revived, kept = plain_codebook(), plain_codebook()
    for codebook in (revived, kept):
        codebook.embedding.weight.copy_(torch.eye(16, 8))
        codebook.embedding.weight[10:] = 100.0
        codebook.ema_cluster_size.fill_(1)
        codebook.ema_cluster_size[10:] = 0.01
        codebook.ema_w.copy_(codebook.ema_cluster_size.unsqueeze(1) * codebook.embedding.weight)
    revived.revive_fraction = 0.1
    [inputs] = batches(1, 2, 8, 5, 5)
    revived(inputs)
    kept(inputs)
    codes = revived.embedding.weight
    offered = torch.cdist(codes[10:], as_rows(inputs))
    torch.testing.assert_close(offered.amin(1), torch.zeros(6), atol=2e-3, rtol=0)
    assert len(offered.argmin(1).unique()) == 6
    assert torch.equal(revived.ema_w[:10], kept.ema_w[:10])
    torch.testing.assert_close(revived.ema_cluster_size[10:], 0.2 * kept.ema_cluster_size.mean().expand(6))


@pytest.mark.parametrize("spatial", [(5, 5), (3, 4, 5)])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_equals_the_quantizer_of_monai(spatial: tuple[int, ...], memory_format: str) -> None:
    reference, codebook = EMAQuantizer(len(spatial), 16, 8), plain_codebook()
    codebook.load_state_dict(reference.state_dict(), strict=True)
    for inputs in batches(6, 2, 8, *spatial):
        expected_input, actual_input = inputs.clone().requires_grad_(), inputs.clone()
        if memory_format == "channels_last":
            actual_input = actual_input.movedim(1, -1).contiguous().movedim(-1, 1)
        actual_input.requires_grad_()
        features, commitment, indices = reference(expected_input)
        output = codebook(actual_input)
        weight = torch.randn_like(features)
        ((features * weight).sum() + 10 * commitment).backward()
        ((output.features * weight).sum() + 10 * output.commitment).backward()
        assert torch.equal(output.indices, indices)
        torch.testing.assert_close(output.features, features)
        torch.testing.assert_close(output.commitment, commitment)
        torch.testing.assert_close(actual_input.grad, expected_input.grad)
        torch.testing.assert_close(dict(codebook.state_dict()), dict(reference.state_dict()))
    reference.load_state_dict(codebook.state_dict(), strict=True)


def test_cosine_equals_a_naive_version() -> None:
    codebook = EMACodebook(16, 8, metric="cosine", decay=0.9, data_init=False, revive_fraction=0)
    codes, sums = codebook.embedding.weight.clone(), codebook.ema_w.clone()
    for inputs in batches(5, 2, 8, 4, 4):
        rows = F.normalize(as_rows(inputs))
        indices = (rows @ codes.T).argmax(1)
        output = codebook(7 * inputs)
        assert torch.equal(output.indices.flatten(), indices)
        torch.testing.assert_close(as_rows(output.features), codes[indices])
        torch.testing.assert_close(as_rows(output.projected), rows)
        torch.testing.assert_close(output.commitment, 0.25 * F.mse_loss(codes[indices], rows))
        sums = 0.9 * sums + 0.1 * F.one_hot(indices, 16).float().T @ rows
        codes = F.normalize(sums)
        torch.testing.assert_close(codebook.embedding.weight, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    codebook = plain_codebook()
    inputs = torch.randn(2, 8, 4, 4).to(dtype).requires_grad_()
    expected = copy.deepcopy(codebook)(inputs.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = codebook(inputs)
    output.features.sum().backward()
    assert output.features.dtype == output.commitment.dtype == codebook.ema_w.dtype == torch.float32
    assert torch.equal(output.features, expected.features)
    assert inputs.grad is not None
    assert inputs.grad.dtype == dtype


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(device: torch.device) -> None:
    codebook = EMACodebook(16, 8).to(device)
    inputs = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    codebook(inputs)
    with never_waiting(device):
        codebook(inputs).commitment.backward()
    assert inputs.grad is not None


def train_one_rank(rank: int, directory: Path, part: list[Tensor]) -> None:
    codebook = EMACodebook(16, 8, decay=0.5, revive_fraction=0.5)
    codebook.load_state_dict(torch.load(directory / "start.pt"))
    for inputs in part:
        codebook(inputs)
    torch.save(codebook.state_dict(), directory / f"{rank}.pt")


def test_two_processes_learn_what_one_learns_from_the_whole_batch(tmp_path: Path) -> None:
    codebook = EMACodebook(16, 8, decay=0.5, revive_fraction=0.5)
    torch.save(codebook.state_dict(), tmp_path / "start.pt")
    whole = batches(5, 5, 8, 4, 4)
    parts = [[inputs[:2] for inputs in whole], [inputs[2:] for inputs in whole]]
    in_two_processes(train_one_rank, tmp_path, parts)
    for inputs in whole:
        codebook(inputs)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first, dict(codebook.state_dict()))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
        ({"metric": "dot"}, "`metric` must be 'euclidean' or 'cosine', got 'dot'"),
        ({"revive_fraction": 1.0}, r"`revive_fraction` must be in \[0, 1\), got 1.0"),
        ({"num_embeddings": [16]}, r"`num_embeddings` must be one number or 2, one per stage, got \[16\]"),
    ],
)
def test_rejects_bad_arguments(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(2, [4, 6], **{"num_embeddings": 16, "embedding_dim": 8, **argument})


def test_rejects_maps_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"`inputs` must be \(B, 8, \*spatial\), got \(1, 4, 2, 2\)"):
        plain_codebook()(torch.randn(1, 4, 2, 2))
