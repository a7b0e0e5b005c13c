"""Data sets that decode each image once, and parts of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from enum import Enum
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, PersistentDataset, list_data_collate
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, RandomizableTrait, Transform, convert_to_contiguous
from monai.utils import ImageMetaKey, convert_to_tensor, enums
from torch import Tensor
from torch.utils import data as torch_data
from torch.utils.data import Subset
from tqdm import tqdm

from dissect_monai.common import NO_MEMORY, InputError, Item, of_all_processes, rank, shorten, world_size
from dissect_monai.data.datalists import labelled
from dissect_monai.data.sampling import SeededDataset
from dissect_monai.data.splits import select_fraction
from dissect_monai.writing import load_whole, remove_halves, save_atomically

logger = logging.getLogger(__name__)
# What PyTorch must know to load an image's metadata with `weights_only`.
_METADATA: list[Any] = [
    np.empty(0).__reduce__()[0], np.ndarray, np.dtype, *{type(np.dtype(code)) for code in np.typecodes["AllFloat"]},
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "SU?"},
    *(each for each in vars(enums).values() if isinstance(each, type) and issubclass(each, Enum)),
]  # fmt: skip
Attempt = tuple[int, Any, "str | None"]  # index of the item, its contents, why it could not be read


def cached_dataset(
    data: list[Item],
    transform: Callable[..., Any],
    cache_dir: str | Path | None = None,
    on_corrupt: str = "raise",
    num_workers: int = 0,
    seeded: bool = False,
    complete: Callable[[list[Item]], list[Item]] | None = None,
    shard: bool = False,
) -> Dataset | SeededDataset:
    """A data set that decodes and preprocesses every image once, now, and so finds all unreadable files.

    Only the MONAI transforms before the first random one (or the first that is no MONAI transform) are cached.

    Args:
        data: items of a data list.
        transform: MONAI transforms, usually a `Compose`.
        cache_dir: folder for the cache, kept between runs; None keeps it in memory. Its files are found again by item
            and by the settings of the transforms, and made again if they are damaged; empty it when images change in
            place.
        on_corrupt: "raise" refuses data with unreadable items; "skip" logs them and leaves them out.
        num_workers: threads that fill the cache; at least one.
        seeded: whether the random transforms draw what follows from the index, see `SeededDataset`.
        complete: adds what items lack that a caller lists itself, see `Datalist.complete`.
        shard: whether each process takes a part of the items, at least one if there is any.

    Returns:
        A data set whose `.data` lists the items that could be read. Contents in memory are not copied: do not change
        them in place.

    Raises:
        ValueError: if items cannot be read (and `on_corrupt` is "raise", or all of them), naming up to five.
    """
    steps, num_deterministic = flattened(transform)
    deterministic = steps.transforms[:num_deterministic]
    data = data if complete is None else complete(data)
    if shard:
        data = data[rank() :: world_size()] or data[:1]
    dataset: Dataset
    if not data:
        return Dataset(data, steps)  # the validation split of unlabelled images, say
    if cache_dir is None:
        preprocessed = Dataset(data, Compose([*deterministic, convert_to_contiguous]))
        contents, good = read_all(preprocessed, on_corrupt, num_workers, progress=rank() == 0)
        dataset = CacheDataset(good, steps, copy_cache=False, runtime_cache=contents)
    else:
        stored = _StoredDataset(data, Compose(deterministic), cache_dir, check=True)
        remove_halves(cache_dir)
        _, good = read_all(stored, on_corrupt, num_workers, progress=rank() == 0, keep=False)
        dataset = _StoredDataset(good, steps, cache_dir)
    return SeededDataset(dataset) if seeded else dataset


def readable_items(
    data: list[Item], transform: Callable[..., Any], on_corrupt: str = "raise", num_workers: int = 0
) -> list[Item]:
    """The items that can be read, found by reading each once, now, and keeping nothing; see `cached_dataset`.

    Each process of a run reads a part; all get what is left.
    """
    steps, num_deterministic = flattened(transform)
    part = Dataset(data[rank() :: world_size()], Compose(steps.transforms[:num_deterministic]))
    good = read_all(part, on_corrupt, num_workers, progress=rank() == 0, keep=False)[1] if len(part) else []
    images = {item["image"] for each in of_all_processes(good) for item in each}
    return [item for item in data if item["image"] in images]


class _StoredDataset(PersistentDataset):
    """With the metadata of images that have them, and of no other tensor, as in memory.

    A file of the cache that cannot be read is made again. With `check` it must also have the checksums that it had.
    """

    def __init__(
        self, data: list[Item], transform: Callable[..., Any], cache_dir: str | Path, check: bool = False
    ) -> None:
        self.check = check
        with _writing_to(cache_dir):
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        super().__init__(data, transform, cache_dir, hash_transform=pickle_hashing, track_meta=True)

    def _cachecheck(self, item_transformed: Item) -> Item:
        torch.serialization.add_safe_globals(_METADATA)  # here, as a process that loads may not have made the data set
        folder = Path(str(self.cache_dir))
        path = folder / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
        stored: Item | None = None
        if path.is_file():
            try:
                stored = load_whole(path, self.check)
            except InputError as error:
                logger.warning("%s: it is made again.", error)
        if not isinstance(stored, dict):
            made = self._pre_transform(deepcopy(item_transformed))
            with _writing_to(folder):
                save_atomically(convert_to_tensor(made, convert_numeric=False, track_meta=True), path)
            stored = dict(made)
        for key, value in stored.items():
            if isinstance(value, MetaTensor) and ImageMetaKey.FILENAME_OR_OBJ not in value.meta:
                stored[key] = value.as_tensor()
        return stored


@contextmanager
def _writing_to(cache_dir: str | Path) -> Iterator[None]:
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise InputError(f"`cache_dir` must be a folder that can be written, got {cache_dir}: {error}") from error


def labelled_part(
    dataset: Dataset, fraction: float = 1.0, seed: int = 0, label_names: Sequence[str] | None = None
) -> Subset[Any]:
    """The labelled images of a data set, or of a fraction of their subjects (see `select_fraction`), not read again."""
    drawn = {id(item) for item in select_fraction(labelled(dataset.data), fraction, seed, label_names)}
    return Subset(dataset, [index for index, item in enumerate(dataset.data) if id(item) in drawn])


def items_of(dataset: Any) -> list[Item]:
    """The data list of a data set or of a part of one, in its order."""
    if isinstance(dataset, Subset):
        items = items_of(dataset.dataset)
        return [items[index] for index in dataset.indices]
    return list(dataset.data)


class DeviceLoader:
    """Batches of a data set that lies on a device as one tensor: no workers, and nothing to move in an epoch.

    Args:
        dataset: items with an "image" of one shape and dtype; all else of an item is left out.
        batch_size: images of a batch; what does not fill one is left out.
        sampler: indices of the images of an epoch, in their order.
        device: where the images lie and the batches come from.

    Raises:
        ValueError: if the images differ in shape.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, sampler: torch_data.Sampler[int], device: torch.device | str
    ) -> None:
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, sampler
        images = [torch.as_tensor(dataset[index]["image"]) for index in range(len(dataset))]
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) > 1:
            raise InputError(f"`dataset` must have images of one shape to lie on a device, got {shorten(shapes)}.")
        self.images = torch.stack(images).to(device)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.tensor([*self.sampler])[: len(self) * self.batch_size].to(self.images.device)
        for rows in order.split(self.batch_size):
            yield {"image": self.images[rows]}


class ReadableLoader:
    """Batches of the images that can be read, while the network runs.

    A batch has an "index" beside the keys of its items, and may be smaller than `batch_size`; so there is no length.

    Args:
        dataset: items of a data list with preprocessing transforms.
        batch_size: items in a batch.
        num_workers: processes that read.

    Attributes:
        errors: index of each item that could not be read, and the reason; complete when the iteration has ended.
    """

    def __init__(self, dataset: Dataset, batch_size: int = 1, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.errors: dict[int, str] = {}
        self.loader = DataLoader(
            _Attempts(dataset), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate_readable
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.errors.clear()
        for batch, errors in self.loader:
            self.errors |= errors
            if batch is not None:
                yield batch

    def refuse_unreadable(self, path: str | Path) -> None:
        """Raise a `ValueError` at the end of a run, when `path` is written, if images could not be read."""
        if self.errors:
            others = " All others are done." if len(self.errors) < len(self.dataset) else ""
            raise InputError(
                f"{len(self.errors)} of {len(self.dataset)} images could not be read: {path} names them and says why."
                + others
            )


def flattened(transform: Callable[..., Any]) -> tuple[Compose, int]:
    """All transforms in one `Compose`, and how many come before the first that is random or not MONAI's."""
    steps = (transform if isinstance(transform, Compose) else Compose(transform)).flatten()
    first_random = steps.get_index_of_first(
        lambda step: isinstance(step, RandomizableTrait) or not isinstance(step, Transform)
    )
    return steps, len(steps.transforms) if first_random is None else first_random


def read_all(
    dataset: Dataset, on_corrupt: str = "raise", num_workers: int = 0, progress: bool = False, keep: bool = True
) -> tuple[list[Any], list[Item]]:
    """Contents (none if not `keep`) and items that could be read, in their order; see `cached_dataset`."""
    tried = _Attempts(dataset)

    def load(index: int) -> tuple[Any, str | None]:
        _, content, error = tried[index]
        return (content if keep else None), error

    torch_threads = torch.get_num_threads()
    try:
        # One image gains nothing from torch's own threads; beside ours they cost a factor of ten on a busy machine.
        with ThreadPool(max(1, num_workers), torch.set_num_threads, (1,)) as pool:
            results = pool.imap(load, range(len(dataset)))
            attempts = list(tqdm(results, "Reading images", len(dataset), disable=not progress))
    finally:
        torch.set_num_threads(torch_threads)
    good, bad = [], []
    for item, (content, error) in zip(dataset.data, attempts, strict=True):
        if error is None:
            good.append((content, item))
        else:
            image = str(item["image"])
            bad.append(error if image in error else f"{image}: {error}")
    if not good and bad and all(NO_MEMORY.search(error) for error in bad):
        raise MemoryError(bad[0])  # which is no fault of the images
    if bad and (on_corrupt != "skip" or not good):
        raise InputError(
            f"`data` must hold images that can be read, got {len(bad)} of {len(attempts)} that cannot:\n  "
            + "\n  ".join(bad[:5] + ["..."] * (len(bad) > 5))
            + "\nRepair them, remove them from the data list, or leave them out by setting `on_corrupt` to skip."
        )
    for line in bad:
        logger.warning("Skipped: %s", line)
    return [content for content, _ in good], [item for _, item in good]


class _Attempts(torch_data.Dataset[Attempt]):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Attempt:
        try:
            return index, self.dataset[index], None
        except RuntimeError as error:  # in which MONAI wraps anything that a transform raises, and so any decoder
            cause: BaseException = error
            while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, ImportError):
                raise cause from None  # no fault of the image
            return index, None, f"{cause}" or type(cause).__name__


def _collate_readable(attempts: list[Attempt]) -> tuple[dict[str, Any] | None, dict[int, str]]:
    errors = {index: error for index, _, error in attempts if error is not None}
    contents = [{**convert_to_contiguous(item), "index": index} for index, item, error in attempts if error is None]
    return (list_data_collate(contents) if contents else None), errors
