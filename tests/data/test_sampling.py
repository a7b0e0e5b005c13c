from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import as_process
from monai.data import CacheDataset, DataLoader, Dataset
from monai.transforms import Compose, EnsureTyped, RandScaleIntensityd, RandSpatialCropd
from torch.utils.data import DistributedSampler

from dissect_monai.data.sampling import DomainSampler, ImageSampler, SeededDataset, part_of_tasks

COUNTS = {"large": 60, "medium": 15, "small": 4}
DATA = [{"task": task} for task, count in COUNTS.items() for _ in range(count)]


def task_of(index: int) -> str:
    return DATA[index]["task"]


def pairs(epoch: int = 0, **arguments: Any) -> list[tuple[int, int]]:
    """Indices with their seeds."""
    sampler = DomainSampler(DATA, **arguments)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def drawn(**arguments: Any) -> list[int]:
    return [index for index, _ in pairs(**arguments)]


@pytest.mark.parametrize("temperature", [0, 0.5, 1])
def test_tasks_come_in_proportion_to_a_power_of_their_size(temperature: float) -> None:
    found = Counter(map(task_of, drawn(temperature=temperature, num_samples=20_000)))
    weights = {task: count**temperature for task, count in COUNTS.items()}
    for task, weight in weights.items():
        assert found[task] / 20_000 == pytest.approx(weight / sum(weights.values()), abs=0.02)


def test_all_items_of_a_task_come_before_one_comes_again() -> None:
    for task, count in COUNTS.items():
        indices = [index for index in drawn(num_samples=2000) if task_of(index) == task]
        rounds = [indices[start : start + count] for start in range(0, len(indices) - count, count)]
        assert len(rounds) > 5
        assert all(len(set(each)) == count for each in rounds)
        assert len({tuple(each) for each in rounds}) > 1  # in another order


@pytest.mark.parametrize("items_per_draw", [1, 2, 3])
def test_draws_are_different_items_of_one_task(items_per_draw: int) -> None:
    indices = drawn(num_samples=1200, items_per_draw=items_per_draw)
    for start in range(0, len(indices), items_per_draw):
        draw = indices[start : start + items_per_draw]
        assert len({task_of(index) for index in draw}) == 1
        assert len(set(draw)) == items_per_draw
    # A task with fewer items than a draw repeats them.
    few = DomainSampler(DATA[-2:], num_samples=4, items_per_draw=4)
    assert Counter(index for index, _ in few) == {0: 2, 1: 2}


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_processes_share_the_draws_of_one(num_replicas: int) -> None:
    shared = []
    for rank in range(num_replicas):
        with as_process(rank, num_replicas):
            shared.append(pairs(num_samples=60, temperature=1))
            assert len(DomainSampler(DATA)) == 2 * (79 // (2 * num_replicas))  # the rest is dropped
    assert {len(part) for part in shared} == {60 // num_replicas}
    draws = [[part[start : start + 2] for start in range(0, len(part), 2)] for part in shared]
    assert [pair for step in zip(*draws, strict=True) for draw in step for pair in draw] == pairs(
        num_samples=60, temperature=1
    )


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    first = pairs(seed=1, epoch=3)
    assert pairs(seed=1, epoch=3) == first
    assert drawn(seed=1, epoch=4) != drawn(seed=1, epoch=3) != drawn(seed=2, epoch=3)
    sampler = DomainSampler(DATA, seed=1)
    for epoch in (1, 2, 3):
        sampler.set_epoch(epoch)
        found = list(sampler)
    assert found == first  # whatever was drawn before
    both = [*pairs(num_samples=500), *pairs(num_samples=500, epoch=1)]
    assert len({seed for _, seed in both}) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 1}, r"must give 1 process\(es\) a draw of 2 items each, got 1"),
        ({"data": []}, "got None for 0 items"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DomainSampler(**{"data": DATA, **arguments})


@pytest.mark.parametrize("shard", [False, True])
def test_images_are_shuffled_and_shared_as_torch_does_it(shard: bool) -> None:
    orders = []
    for rank in range(2):
        with as_process(rank), patch("dissect_monai.data.sampling.of_all_processes", lambda count: [count, 9]):
            sampler = ImageSampler(range(11), 4, seed=3, shard=shard)
        own = (range(9), 1, 0, True, 3 + 100003 * rank) if shard else (range(11), 2, rank, True, 3)
        expected = DistributedSampler(*own, drop_last=True)
        for each in (sampler, expected):
            each.set_epoch(2)
        assert list(sampler) == list(expected)
        orders.append(list(sampler))
    assert shard or not {*orders[0]} & {*orders[1]}


@pytest.mark.parametrize(
    ("count", "batch_size", "message"),
    [
        (7, 4, r"holds 7 images, fewer than one batch of 4 on 2 process\(es\): lower"),
        (7, 1, "`batch_size` must be at least 2 for batch normalisation, got 1"),
        (0, 4, "`training` holds no images: list some there"),
    ],
)
def test_less_than_a_batch_per_process_is_refused(count: int, batch_size: int, message: str) -> None:
    with as_process(0):
        ImageSampler(range(8), 4)
        with pytest.raises(ValueError, match=message):
            ImageSampler(range(count), batch_size)


def noise(count: int = 6) -> SeededDataset:
    volumes = np.random.default_rng(0).random((count, 1, 9, 9, 9), dtype=np.float32)
    transform = Compose([
        EnsureTyped("image", track_meta=False),
        RandSpatialCropd("image", roi_size=[3, 3, 3], random_size=False),
        RandScaleIntensityd("image", factors=0.5, prob=1),
    ])  # fmt: skip
    data = [{"image": volume, "task": "a"} for volume in volumes]
    return SeededDataset(CacheDataset(data, transform, progress=False))


def patches(start: int = 0, num_workers: int = 0, batch_size: int = 4) -> torch.Tensor:
    """Those of two epochs, or of the second alone."""
    dataset = noise()
    sampler = DomainSampler(dataset.data, num_samples=12)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers)
    found = []
    for epoch in range(start, 2):
        sampler.set_epoch(epoch)
        found += [batch["image"] for batch in loader]
    return torch.cat(found)


def test_random_transforms_follow_from_the_index() -> None:
    dataset = noise()
    torch.testing.assert_close(dataset[2]["image"], dataset[2]["image"], rtol=0, atol=0)
    torch.testing.assert_close(dataset[2, 77]["image"], noise()[2, 77]["image"], rtol=0, atol=0)
    assert not torch.equal(dataset[2, 77]["image"], dataset[2, 78]["image"])
    assert len(dataset) == len(dataset.data) == 6


def test_volumes_that_come_twice_are_cropped_twice() -> None:
    assert len(patches().flatten(1).unique(dim=0)) == 24


def test_draws_depend_on_neither_batches_worker_processes_nor_earlier_epochs() -> None:
    expected = patches()
    assert torch.equal(patches(start=1), expected[12:])
    assert torch.equal(patches(batch_size=6), expected)
    assert torch.equal(patches(num_workers=2), expected)


def test_a_part_of_every_task_is_evenly_spaced() -> None:
    dataset = Dataset([{"task": "a"}] * 9 + [{"task": "b"}] * 2)
    assert list(part_of_tasks(dataset, 3).indices) == [0, 4, 8, 9, 10]
    assert len(part_of_tasks(dataset)) == 11
