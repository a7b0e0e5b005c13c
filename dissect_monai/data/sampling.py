"""Samplers of images and of tasks, and random transforms that depend on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
from monai.data import Dataset
from numpy.typing import NDArray
from torch.utils import data as torch_data

from dissect_monai.common import InputError, Item, of_all_processes, rank, world_size


def refuse_small(images: Sized, batch_size: int, processes: int = 1) -> None:
    """Refuse a training set that does not fill one batch per process; the `ValueError` says what to do."""
    if not len(images):
        raise InputError("`training` holds no images: list some there in dataset.json.")
    if batch_size < 2:
        raise InputError(f"`batch_size` must be at least 2 for batch normalisation, got {batch_size}.")
    if len(images) < batch_size * processes:
        raise InputError(
            f"`training` holds {len(images)} images, fewer than one batch of {batch_size} on {processes} "
            "process(es): lower `batch_size`."
        )


class ImageSampler(torch_data.DistributedSampler[Any]):
    """Draws every image once an epoch, in an order that follows from seed and epoch, a part in each process.

    Args:
        dataset: data set of all processes, or of this one alone with `shard`.
        batch_size: images of a batch, which every process must have.
        seed: seed of the order.
        shard: whether each process has images of its own; all of them draw as many as the smallest data set has.

    Raises:
        ValueError: if the images do not fill one batch per process.
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int = 0, shard: bool = False) -> None:
        images, replicas, own_rank = range(len(dataset)), world_size(), rank()
        if shard:
            images, replicas, own_rank = range(min(of_all_processes(len(dataset)))), 1, 0
            seed += 100003 * rank()
        refuse_small(images, batch_size, replicas)
        super().__init__(images, replicas, own_rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]


class DomainSampler(torch_data.Sampler["tuple[int, int]"]):
    """Draws tasks with probability ∝ n^temperature, n being the number of items of a task, and items of that task.

    Items of a task come in random order, and none again until all have come. `items_per_draw` of them follow each
    other, so that batches whose size is a multiple of it hold positives of the task-level contrast. Each comes with the
    seed of its random transforms, for a `SeededDataset`. The sequence depends on seed and epoch alone, and each process
    takes the draws at its own positions in it.

    Args:
        data: items of a data list, in the order of the data set; each with a "task".
        temperature: 1 draws every item equally often, 0 every task.
        num_samples: samples of an epoch over all processes, rounded down to whole draws of each; the number of items
            if None.
        items_per_draw: items of one task that follow each other, different ones if it has so many.
        seed: seed of all draws.

    Raises:
        ValueError: if there is no draw for each process.
    """

    def __init__(
        self,
        data: Sequence[Item],
        temperature: float = 0.5,
        num_samples: int | None = None,
        items_per_draw: int = 2,
        seed: int = 0,
    ) -> None:
        self.items = _by_task(data)
        self.items_per_draw = items_per_draw
        self.rank, self.num_replicas = rank(), world_size()
        self.num_draws = (len(data) if num_samples is None else num_samples) // (items_per_draw * self.num_replicas)
        if self.num_draws < 1:
            raise InputError(
                f"`num_samples` must give {self.num_replicas} process(es) a draw of {items_per_draw} items each, "
                f"got {num_samples} for {len(data)} items: raise it."
            )
        weights = np.array([len(items) for items in self.items], dtype=float) ** temperature
        self.probabilities = weights / weights.sum()
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew for the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Samples of this process in an epoch."""
        return self.num_draws * self.items_per_draw

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        total = self.num_draws * self.num_replicas
        queues: list[list[int]] = [[] for _ in self.items]
        for position, task in enumerate(rng.choice(len(self.items), total, p=self.probabilities)):
            drawn = _take(self.items_per_draw, queues[task], self.items[task], rng)
            seeds = rng.integers(2**32, size=self.items_per_draw)
            if position % self.num_replicas == self.rank:
                yield from zip(drawn, seeds.tolist(), strict=True)


def _take(count: int, queue: list[int], items: NDArray[Any], rng: np.random.Generator) -> list[int]:
    """Take items off the end of the queue; an empty one is refilled, with those just taken at its start."""
    taken: list[int] = []
    while len(taken) < count:
        if not queue:
            order = rng.permutation(items).tolist()
            queue += [item for item in order if item in taken] + [item for item in order if item not in taken]
        taken.append(queue.pop())
    return taken


def part_of_tasks(dataset: Any, num_items: int = 32) -> torch_data.Subset[Any]:
    """At most `num_items` of each task, evenly spaced in the data list: enough to fit a probe, and soon read."""
    chosen: list[int] = []
    for items in _by_task(dataset.data):
        chosen += items[np.linspace(0, len(items) - 1, min(num_items, len(items))).round().astype(int)].tolist()
    return torch_data.Subset(dataset, sorted(chosen))


def _by_task(data: Sequence[Item]) -> list[NDArray[Any]]:
    """Indices of the items of each task."""
    tasks = np.array([item["task"] for item in data])
    return [np.flatnonzero(tasks == task) for task in np.unique(tasks)]


class SeededDataset(torch_data.Dataset[Any]):
    """Seeds the random transforms of a data set for every item, so that what they draw follows from the index.

    With what `DomainSampler` draws they are a function of seed, epoch and position, whatever the number of processes
    and workers; with plain indices, as of a validation loader, they are the same in every epoch.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.data = dataset.data

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, drawn: int | tuple[int, int]) -> Any:
        index, seed = drawn if isinstance(drawn, tuple) else (drawn, drawn)
        self.dataset.transform.set_random_state(seed)
        return self.dataset[index]
