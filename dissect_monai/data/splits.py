"""Splits by whole subject: fractions, folds, what is held out and what is scored."""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
from monai.utils import ensure_tuple

from dissect_monai.common import InputError, Item, shorten
from dissect_monai.data.datalists import Datalist, labelled
from dissect_monai.data.identity import datalist_digest, trained_subjects

Subject = TypeVar("Subject", bound=Hashable)
logger = logging.getLogger(__name__)


def shuffled(subjects: Iterable[Subject], seed: int) -> list[Subject]:
    """Each subject once, in an order that follows from the seed and the order of their first appearance."""
    unique = list(dict.fromkeys(subjects))
    return [unique[index] for index in np.random.default_rng(seed).permutation(len(unique))]


def draw_subjects(subjects: Iterable[Subject], fraction: float, seed: int) -> set[Subject]:
    """A fraction in (0, 1] of the subjects, at least one; for one seed, a smaller one is part of every larger one."""
    if not 0 < fraction <= 1:
        raise InputError(f"`fraction` must be in (0, 1], got {fraction}.")
    order = shuffled(subjects, seed)
    return {*order[: max(1, round(fraction * len(order)))]}


def select_fraction(
    items: Sequence[Item], fraction: float = 1.0, seed: int = 0, label_names: Sequence[str] | None = None
) -> list[Item]:
    """Draw a fraction of the subjects, at least one; all items of a drawn subject stay, in their order.

    For one seed, a smaller fraction is a subset of every larger one. An item without "subject" is a subject of its own.
    The number of subjects is logged, and so are findings that lose their last positive, as no classifier can learn
    them; they are called by `label_names`, or else finding_0, finding_1, ...
    """
    subjects = [item.get("subject", index) for index, item in enumerate(items)]
    drawn = draw_subjects(subjects, fraction, seed)
    selected = [item for item, subject in zip(items, subjects, strict=True) if subject in drawn]
    if subjects:
        logger.info("Using %d of %d subjects with labels.", len(drawn), len({*subjects}))
    lost = [
        label_names[index] if label_names else f"finding_{index}"
        for index in sorted(_positives(items) - _positives(selected))
    ]
    if lost:
        logger.warning("A fraction of %g (seed %d) leaves no positive of: %s.", fraction, seed, ", ".join(lost))
    return selected


def with_fraction(datalist: Datalist, fraction: float = 1.0, seed: int = 0) -> Datalist:
    """A data list with a fraction in (0, 1] of its training subjects, see `select_fraction`."""
    return datalist._replace(training=select_fraction(datalist.training, fraction, seed, datalist.label_names))


def _positives(items: Sequence[Item]) -> set[int]:
    return {index for item in labelled(items) for index, value in enumerate(item["label"]) if value == 1}


def _parted(items: Sequence[Item], chosen: Collection[Any], *keys: str) -> tuple[list[Item], list[Item]]:
    """The other items, and those whose value of a key, or values of several, is chosen."""
    of = itemgetter(*keys)
    return [item for item in items if of(item) not in chosen], [item for item in items if of(item) in chosen]


def hold_out(datalists: Sequence[Datalist], fraction: float, seed: int) -> list[Datalist]:
    """Move a fraction of the training subjects to a validation split, in folders that have none, task by task.

    Folders of one task may show the same subjects, such as a channel each: a subject of one name goes to one split.
    None are moved where fewer than two would be left.
    """
    subjects: dict[str, set[str]] = {}
    for item in (item for datalist in datalists if not datalist.validation for item in datalist.training):
        subjects.setdefault(item["task"], set()).add(item["subject"])
    drawn: set[tuple[str, str]] = set()
    for task, of_task in subjects.items() if fraction else ():
        chosen = draw_subjects(sorted(of_task), fraction, seed)  # sorted, so that the order of files does not count
        if len(of_task) - len(chosen) > 1:
            drawn |= {(task, subject) for subject in chosen}
    parts = [_parted(datalist.training, drawn, "task", "subject") for datalist in datalists]
    return [
        datalist if datalist.validation else datalist._replace(training=training, validation=validation)
        for datalist, (training, validation) in zip(datalists, parts, strict=True)
    ]


def with_test_split(datalist: Datalist, seed: int = 0) -> Datalist:
    """For tasks without test split: score the validation split, and choose on a fifth of the training subjects instead.

    Nothing is then chosen on what is scored, as pretraining chooses nothing on the validation split.
    """
    for task in datalist.task_names:
        parts = [_parted(split, [task], "task") for split in datalist[:3]]
        (others, training), (other_validation, validation), (other_test, test) = parts
        if test or not validation:
            continue
        logger.warning(
            "Task %s has no test split: its validation split is scored, and what is chosen is chosen on a part of its "
            "training subjects.", task,
        )  # fmt: skip
        drawn = draw_subjects((item["subject"] for item in training), 0.2, seed)
        kept, moved = _parted(training, drawn, "subject")
        datalist = datalist._replace(
            training=others + kept, validation=other_validation + moved, test=other_test + validation
        )
    return datalist


def split_training(datalist: Datalist, fold: int | None, num_folds: int, fraction: float, seed: int) -> Datalist:
    """Make a validation split from training subjects, as `read_segmentation` describes it."""
    items = datalist.training + datalist.validation
    subjects = sorted({item["subject"] for item in items})
    if fold is None and (datalist.validation or fraction == 0 or len(subjects) < 2):
        return datalist
    if fold is not None:
        if len(subjects) < num_folds:
            raise InputError(f"`num_folds` must be at most the {len(subjects)} subjects, got {num_folds}.")
        chosen = {*shuffled(subjects, seed)[fold::num_folds]}
    else:
        chosen = draw_subjects(subjects, min(fraction, 1 - 1 / len(subjects)), seed)  # one is left to train on
        logger.info("%d of %d training subjects are held out for validation.", len(chosen), len(subjects))
    training, validation = _parted(items, chosen, "subject")
    return datalist._replace(training=training, validation=validation)


class Scored(NamedTuple):
    """The volumes that an evaluation scores, and what its report says of them."""

    items: list[Item]
    facts: dict[str, str | int]
    notes: list[str]


def scored_subjects(datalist: Datalist, split: str, settings: Mapping[str, Any]) -> Scored:
    """The volumes to score.

    Args:
        datalist: as `read_segmentation` gives it.
        split: "test", "validation", "auto" for the first that there is, or "all" for a set that is new to the weights.
        settings: of the weights, which say on which subjects they were trained and chosen.

    Raises:
        ValueError: if `split` has no labelled volumes, a subject that the weights were trained on, volumes of other
            channels, or none of the structures.
    """
    name = ("test" if datalist.test else "validation") if split == "auto" else split
    items: list[Item] = datalist.items() if name == "all" else getattr(datalist, name)
    if not items:
        raise InputError(
            f"`{name}` must hold volumes with label maps to be scored, got none: list some in dataset.json, hold "
            "some out by `validation_fraction` or `fold`, or set `split` to all to score all of a new set."
        )
    channels, modality, dims = (settings.get(name) for name in ("in_channels", "modality", "spatial_dims"))
    refuse_other_channels(items, channels or 1, modality, dims or 3)
    notes = []
    if settings.get("select") == "best" and settings.get("validation_data") == datalist_digest(items, "modality"):
        notes.append(
            "The weights were chosen on these very subjects, so that the scores are optimistic: score a test split, or "
            "train for the last weights instead of the best."
        )
        logger.warning(notes[0])
    refuse_trained(items, name, settings)
    known = settings.get("class_names", ())
    for item in items if known else ():
        if item["labels"].keys().isdisjoint(known):
            raise InputError(
                f"`dataset_dir` must hold label maps with a structure of the weights ({', '.join(known)}), got "
                f"{shorten([*item['labels']])} in {item['label']}: give other images, or other weights by "
                "`pretrained`."
            )
    subjects = len({item["subject"] for item in items})
    logger.info("Scoring %d subjects (%s).", subjects, name)
    return Scored(items, {"split": name, "subjects": subjects, "volumes": len(items)}, notes)


def refuse_trained(items: Sequence[Item], split: str, settings: Mapping[str, Any]) -> None:
    """Refuse to score subjects that the weights were trained on, as their settings say; the `ValueError` names some."""
    if settings and "trained_on" not in settings:
        logger.warning("The weights do not say which subjects they were trained on: make sure that none is scored.")
    trained = trained_subjects(items, settings)
    if trained:
        raise InputError(
            f"`{split}` must hold no subject that the weights were trained on, got {len(trained)}: {shorten(trained)}. "
            "Take the dataset.json of training, and its `fold`, `split_seed` and `validation_fraction` where there "
            "are such, or leave these subjects out."
        )


def refuse_other_channels(
    items: Sequence[Item],
    in_channels: int,
    modality: str | Sequence[str] | None = None,
    spatial_dims: int = 3,
) -> None:
    """Refuse volumes with more or fewer modalities than channels; the `ValueError` names the first.

    A network for 2-D images of one `modality`, or several in turn (None), may have 3 channels, for colours.
    """
    in_colour = in_channels == 3 and spatial_dims == 2 and (modality is None or isinstance(modality, str))
    for item in items:
        modalities = ensure_tuple(item["modality"])
        if len(modalities) != (1 if in_colour else in_channels):
            is_slice = spatial_dims == 2 and len(modalities) == 1
            remedy = (
                "set `in_channels` to 1 or 3" if is_slice else "correct `modality`, make a data folder of each channel"
            )
            raise InputError(
                f"every volume must have {in_channels} channel(s), got {', '.join(modalities)} for {item['image']}: "
                f"{remedy}, or take weights for these channels."
            )


def refuse_untrainable(training: Sequence[Item], validation: Sequence[Item] | None, select: str) -> None:
    """Refuse to train without training volumes, or to choose the best weights without validation volumes."""
    if not training:
        raise InputError(
            "`training` must list volumes with label maps, got none: list some there in dataset.json, or give "
            "studies a final label in MONAI Label."
        )
    if select == "best" and not validation:
        raise InputError(
            "`select` best chooses the weights on a validation split, and there is none: list some subjects there, "
            "set `validation_fraction` or `fold`, or take the last weights with `select` last."
        )
