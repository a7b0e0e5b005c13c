"""Splits by whole subject: fractions, folds, what is held out and what is scored."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dissect_monai.common import InputError, Item, shorten
from dissect_monai.data.datalists import SPLITS, Datalist, DomainDatalist, SegmentationDatalist, _name, _positives


def select_fraction(
    items: list[Item], fraction: float, seed: int, label_names: Sequence[str] | None = None
) -> list[Item]:
    """Draw a fraction of the subjects, at least one; all items of a drawn subject stay, in their order.

    For one seed, a smaller fraction is a subset of every larger one. Findings that lose their last positive are
    logged as a warning, as no classifier can learn them.

    Args:
        items: items of a data list; one without "subject" is a subject of its own.
        fraction: share of the subjects in (0, 1].
        seed: draws other subjects.
        label_names: names for the warning; finding_0, finding_1, ... if missing.

    Raises:
        ValueError: if `fraction` is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"`fraction` must be in (0, 1], got {fraction}.")
    subjects = [item.get("subject", index) for index, item in enumerate(items)]
    unique = list(dict.fromkeys(subjects))
    order = np.random.default_rng(seed).permutation(len(unique))
    drawn = {unique[index] for index in order[: max(1, round(fraction * len(unique)))]}
    selected = [item for item, subject in zip(items, subjects, strict=True) if subject in drawn]
    lost = [_name(label_names, index) for index in sorted(_positives(items) - _positives(selected))]
    if lost:
        logger.warning("A fraction of %g (seed %d) leaves no positive of: %s.", fraction, seed, ", ".join(lost))
    return selected


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
        raise InputError(f"`fraction` must be in (0, 1), got {fraction}.")
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


BTCV_VALIDATION = range(35, 41)  # of the literature; the other 24 of the 30 are 1 to 10 and 21 to 34


def _split(datalist: Datalist, fold: int | None, num_folds: int, fraction: float, seed: int) -> Datalist:
    items = datalist.training + datalist.validation
    subjects = sorted({str(item["subject"]) for item in items})
    if fold is None and (datalist.validation or fraction == 0 or len(subjects) < 2):
        return datalist
    if fold is not None:
        if len(subjects) < num_folds:
            raise InputError(f"`num_folds` must be at most the {len(subjects)} subjects, got {num_folds}.")
        order = np.random.default_rng(seed).permutation(len(subjects))
        chosen = {subjects[index] for index in order[fold::num_folds]}
    elif (numbers := _btcv_numbers(items)) is not None:
        chosen = {subject for subject, number in numbers.items() if number in BTCV_VALIDATION}
        logger.info("The subjects are those of BTCV: 0035 to 0040 are for validation, as in the literature.")
    else:
        fraction = min(fraction, 1 - 1 / len(subjects))  # rounding must leave one to train on
        drawn = select_fraction(sorted(items, key=lambda item: str(item["subject"])), fraction, seed)
        chosen = {str(item["subject"]) for item in drawn}
        logger.info("%d of %d training subjects are held out for validation.", len(chosen), len(subjects))
    return datalist._replace(
        training=[item for item in items if str(item["subject"]) not in chosen],
        validation=[item for item in items if str(item["subject"]) in chosen],
    )


def _btcv_numbers(items: list[Item]) -> dict[str, int] | None:
    """Number of each subject, if the files have the names of BTCV's 30 training cases."""
    matches = {str(item["subject"]): re.match(r"img(\d{4})\.", Path(item["image"]).name) for item in items}
    numbers = {subject: int(match[1]) for subject, match in matches.items() if match is not None}
    standard = {*range(1, 11), *range(21, 41)}
    return numbers if len(numbers) == len(matches) and {*numbers.values()} == standard else None


def labelled_subjects(datalist: SegmentationDatalist, label_fraction: float = 1.0, seed: int = 0) -> list[Item]:
    """The volumes to train on: those of a fraction of the training subjects, at least one.

    For one seed, a smaller fraction is a subset of every larger one. The number is logged.

    Args:
        datalist: as `read_segmentation` gives it.
        label_fraction: share of the training subjects in (0, 1].
        seed: draws other subjects.
    """
    items = select_fraction(datalist.training, label_fraction, seed)
    subjects = [len({item["subject"] for item in each}) for each in (items, datalist.training)]
    logger.info("Training on %d of %d subjects with labels.", *subjects)
    return items


class Scored(NamedTuple):
    """The volumes that an evaluation scores, and what its report says of them."""

    items: list[Item]
    facts: dict[str, str | int]
    notes: list[str]


def scored_subjects(datalist: SegmentationDatalist, split: str, settings: Mapping[str, Any]) -> Scored:
    """The volumes to score: the test split, or the validation split if there is none; it is logged which.

    Args:
        datalist: as `read_segmentation` gives it.
        split: "test", "validation", "auto" for the first that there is, or "all", for a set that is new to the weights.
        settings: of the weights, which say on which validation volumes they were chosen.

    Raises:
        ValueError: if `split` is unknown, has no labelled volumes, or has a subject that the weights were trained on,
            or as `refuse_other_channels` says.
    """
    if split not in ("auto", "validation", "test", "all"):
        raise InputError(f"`split` must be auto, validation, test or all, got {split!r}.")
    name = ("test" if datalist.test else "validation") if split == "auto" else split
    items: list[Item] = datalist.training + datalist.validation + datalist.test
    items = items if name == "all" else getattr(datalist, name)
    if not items:
        raise InputError(
            f"`{name}` must hold volumes with label maps to be scored, got none: list some in dataset.json, hold "
            "some out by --validation_fraction or --fold, or score all of a new set by --split all."
        )
    refuse_other_channels(items, settings.get("in_channels", 1))
    notes = []
    if settings.get("select") == "best" and settings.get("validation_data") == datalist_digest(items):
        notes.append(
            "The weights were chosen on these very subjects, so that the scores are optimistic: score a test split, or "
            "train with --select last."
        )
    known = {*settings.get("trained_on", ())}
    trained_on = sorted({str(item["subject"]) for item in items if subject_digest(item) in known})
    if trained_on:
        raise InputError(
            f"`{name}` must hold no subject that the weights were trained on, got {len(trained_on)}: "
            f"{shorten(trained_on)}. Give the --fold, --split_seed and --validation_fraction of training, or the "
            "dataset.json as it was then."
        )
    for note in notes:
        logger.warning(note)
    subjects = len({str(item["subject"]) for item in items})
    logger.info("Scoring %d subjects (%s).", subjects, name)
    return Scored(items, {"split": name, "subjects": subjects, "volumes": len(items)}, notes)


def refuse_other_channels(items: Sequence[Item], in_channels: int) -> None:
    """Refuse volumes whose modalities are more or fewer than the channels that a network takes.

    Raises:
        ValueError: naming the first.
    """
    for item in items:
        modalities = [item["modality"]] if isinstance(item["modality"], str) else item["modality"]
        if len(modalities) != in_channels:
            raise InputError(
                f"volumes must have the {in_channels} channel(s) that the weights were trained on, got "
                f"{', '.join(modalities)} for {item['image']}: correct `modality`, or take other weights."
            )


def subject_digest(item: Item) -> str:
    """A short text by which a subject of a task is recognised, and which does not name it."""
    return hashlib.sha256(f"{item['task']}\t{item['subject']}".encode()).hexdigest()[:12]


def shard(items: list[Item], rank: int, world_size: int) -> list[Item]:
    """The items that one process validates: every one is some process's, and each process has one, if there is any."""
    return items[rank::world_size] or items[:1]


def refuse_untrainable(training: Sequence[Item], validation: Sequence[Item] | None, select: str) -> None:
    """Refuse to train without training volumes, or to choose the best weights without validation volumes.

    Raises:
        ValueError: saying what to do.
    """
    if not training:
        raise InputError(
            "`training` must list volumes with label maps, got none: list some there in dataset.json, or give "
            "studies a final label in MONAI Label."
        )
    if select == "best" and not validation:
        raise InputError(
            "`--select best` chooses the weights on a validation split, and there is none: list some subjects there, "
            "give --validation_fraction or --fold, or take the last weights by --select last."
        )
