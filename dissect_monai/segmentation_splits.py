"""Which volumes a segmentation trains on, validates and scores, and which it refuses."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dissect_monai.data import Item, few, select_fraction
from dissect_monai.domain_splits import datalist_digest
from dissect_monai.segmentation_data import SegmentationDatalist

logger = logging.getLogger(__name__)


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
        raise ValueError(f"`split` must be auto, validation, test or all, got {split!r}.")
    name = ("test" if datalist.test else "validation") if split == "auto" else split
    items: list[Item] = datalist.training + datalist.validation + datalist.test
    items = items if name == "all" else getattr(datalist, name)
    if not items:
        raise ValueError(
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
        raise ValueError(
            f"`{name}` must hold no subject that the weights were trained on, got {len(trained_on)}: "
            f"{few(trained_on)}. Give the --fold, --split_seed and --validation_fraction of training, or the "
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
            raise ValueError(
                f"volumes must have the {in_channels} channel(s) that the weights were trained on, got "
                f"{', '.join(modalities)} for {item['image']}: correct `modality`, or take other weights."
            )


def subject_digest(item: Item) -> str:
    """A short text by which a subject of a task is recognised, and which does not name it."""
    return hashlib.sha256(f"{item['task']}\t{item['subject']}".encode()).hexdigest()[:12]


def share_of_process(items: list[Item], rank: int, world_size: int) -> list[Item]:
    """The items that one process validates: every one is some process's, and each process has one, if there is any."""
    return items[rank::world_size] or items[:1]


def refuse_untrainable(training: Sequence[Item], validation: Sequence[Item] | None, select: str) -> None:
    """Refuse to train without training volumes, or to choose the best weights without validation volumes.

    Raises:
        ValueError: saying what to do.
    """
    if not training:
        raise ValueError(
            "`training` must list volumes with label maps, got none: list some there in dataset.json, or give "
            "studies a final label in MONAI Label."
        )
    if select == "best" and not validation:
        raise ValueError(
            "`--select best` chooses the weights on a validation split, and there is none: list some subjects there, "
            "give --validation_fraction or --fold, or take the last weights by --select last."
        )
