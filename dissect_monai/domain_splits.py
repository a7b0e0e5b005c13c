"""Splits of several data sets by whole subject: what is held out, and what is scored without a test split."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dissect_monai.data import SPLITS, Datalist, Item, select_fraction

if TYPE_CHECKING:
    from dissect_monai.domains import DomainDatalist

logger = logging.getLogger(__name__)


def hold_out(datalists: Sequence[Datalist], fraction: float, seed: int) -> list[Datalist]:
    """Move a fraction of the training subjects to a validation split, in folders that have none, task by task.

    Folders of one task may show the same subjects, such as a channel each: a subject of one name goes to one split.

    Args:
        datalists: one a folder, each item with a "task" and a "subject".
        fraction: share in [0, 1) of the subjects of a task, at least one; none where fewer than two would be left.
        seed: draws other subjects.
    """
    drawn: dict[str, set[str]] = {}
    without = [datalist for datalist in datalists if not datalist.validation]
    for task in sorted({item["task"] for datalist in without for item in datalist.training} if fraction else ()):
        # Sorted, so that the order of folders and files does not count.
        items = [item for datalist in without for item in datalist.training if item["task"] == task]
        items.sort(key=lambda item: str(item["subject"]))
        subjects = {item["subject"] for item in select_fraction(items, fraction, seed)}
        if len({item["subject"] for item in items} - subjects) > 1:
            drawn[task] = subjects

    def is_drawn(item: Item) -> bool:
        return item["subject"] in drawn.get(item["task"], ())

    return [
        datalist._replace(
            training=[item for item in datalist.training if not is_drawn(item)],
            validation=[item for item in datalist.training if is_drawn(item)],
        )
        if not datalist.validation
        else datalist
        for datalist in datalists
    ]


def warn_of_shared_subjects(datalists: Sequence[Datalist]) -> None:
    """Say which names of subjects the folders of one task have in different splits: they may be the same people."""
    places: dict[tuple[str, str], dict[str, str]] = {}
    for datalist in datalists:
        for split in SPLITS:
            for item in getattr(datalist, split):
                places.setdefault((item["task"], item["subject"]), {})[split] = item["image"]
    shared = {name: found for name, found in places.items() if len(found) > 1}
    if shared:
        (task, subject), found = next(iter(shared.items()))
        logger.warning(
            "Folders of task %s have %d subjects of one name in different splits, such as %s (%s): if they are the "
            "same people, move each to one split of dataset.json.",
            task, len(shared), subject, " and ".join(f"{split}: {image}" for split, image in found.items()),
        )  # fmt: skip


def with_test_split(datalist: DomainDatalist, fraction: float = 0.2, seed: int = 0) -> DomainDatalist:
    """Of tasks without test split, score the validation split, and choose on a part of the training subjects instead.

    Nothing is thereby chosen on what is scored, as long as nothing was chosen on the validation split in training,
    which pretraining for a given number of epochs does not.

    Args:
        datalist: as `aggregate` gives it.
        fraction: share in (0, 1) of such a task's training subjects that becomes its validation split, at least one.
        seed: draws other subjects.

    Returns:
        The same data list if every task has a test split.

    Raises:
        ValueError: if `fraction` is outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be in (0, 1), got {fraction}.")
    for task in datalist.task_names:
        splits = {split: [item for item in getattr(datalist, split) if item["task"] == task] for split in SPLITS}
        if splits["test"] or not splits["validation"]:
            continue
        logger.warning(
            "Task %s has no test split: its validation split is scored, and what is chosen is chosen on a part of its "
            "training subjects.", task,
        )  # fmt: skip
        drawn = {item["subject"] for item in select_fraction(splits["training"], fraction, seed)}
        moved = {
            "training": [item for item in splits["training"] if item["subject"] not in drawn],
            "validation": [item for item in splits["training"] if item["subject"] in drawn],
            "test": splits["validation"],
        }
        changed = {
            split: [item for item in getattr(datalist, split) if item["task"] != task] + moved[split]
            for split in SPLITS
        }
        datalist = datalist._replace(
            training=changed["training"], validation=changed["validation"], test=changed["test"]
        )
    return datalist


def datalist_digest(items: Sequence[Item]) -> str:
    """A short text that changes with the volumes of a data list, their tasks and modalities, but not with their place.

    Args:
        items: items of `aggregate`.
    """
    facts = ((item["task"], item["modality"], item["subject"], Path(item["image"]).name) for item in items)
    known = sorted("\t".join(map(str, each)) for each in facts)
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
