"""Frozen features of patches of volumes: whether they tell structures apart, and whether they tell data sets apart."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from dissect_monai.common import InputError, Item
from dissect_monai.data.datalists import SPLITS, DomainDatalist, data_folders, finding_matrix
from dissect_monai.data.datasets import items_of
from dissect_monai.handlers.probes import Baseline, FrozenProbes, Question
from dissect_monai.metrics.probes import intensity_histograms
from dissect_monai.transforms.views import prepare_images

Array = NDArray[np.floating[Any]]
logger = logging.getLogger(__name__)
_NOTHING_TO_ASK = (
    "there is nothing to ask of the features: give label maps (`label`) and the names of their values (`labels`) in "
    "dataset.json, or labels of whole volumes, or volumes of another task"
)


class VolumeProbeHandler(FrozenProbes):
    """Judges frozen encoders and the intensities of patches by linear probe and k-NN, with 95 % intervals by subject.

    C of the linear probe is chosen on validation; the test split is scored once. The questions, of which those that the
    data cannot answer are left out:

    - `structures`: whether a patch shows a structure, a column `task/structure` each, among the patches of the task.
      Its probes see no others, so that nothing is gained by knowing the data set.
    - `findings`: what is labelled of the whole volume, of each of its patches.
    - `domains`, the shortcut probe: whether a patch is of a task, a column each.
    - `domains_in_group`: the same for tasks that share a group, among its patches: which scanner, where the region is
      no help.

    What it writes and leaves in the engine's metrics is described with `FrozenProbes`.

    Args:
        encoders: encoders by name; the first is compared with all others.
        loaders: loaders of the splits `training`, `validation` and `test`, of data sets as `patch_dataset` gives them.
        output_dir: folder for the tables.
        label_names: names of the values of a label.
        intensity: whether to judge histograms of the intensities, too, the baseline that needs no network.
        num_samples: bootstrap resamples.
        seed: seed of the resamples.

    Reference:
        Frozen encoder in eval mode, standardised features, logistic regression; see README, "Evaluation".
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        loaders: Mapping[str, DataLoader[Any]],
        output_dir: str | Path,
        label_names: Sequence[str] = (),
        intensity: bool = True,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> None:
        splits = [items_of(loaders[split].dataset) for split in SPLITS]
        findings = [finding_matrix(items, label_names, label_names) for items in splits] if label_names else []
        asked = [
            _structures(splits),
            Question("findings", list(label_names), findings),
            *_domains(splits),
        ]
        questions = [question for question in map(_scorable, asked) if question.columns]
        if not questions:
            logger.warning("No probe: %s.", _NOTHING_TO_ASK)
        super().__init__(encoders, loaders, questions, output_dir, num_samples=num_samples, seed=seed)
        self.intensity = intensity

    def baseline(self) -> Baseline | None:
        """Histograms of the intensities of every patch."""
        if not self.intensity:
            return None
        splits = [
            [intensity_histograms(prepare_images(batch, "cpu")[0]).numpy() for batch in loader]
            for loader in self.loaders
        ]
        return Baseline("intensity", "histogram", [np.concatenate(histograms) for histograms in splits])


def check_probe_data(
    datalist: DomainDatalist, dataset_dirs: str | Path | Sequence[str | Path], reconstructs: bool = False
) -> None:
    """Refuse data that cannot be evaluated, before they are read: an empty split, or nothing to measure.

    Args:
        datalist: as `aggregate` gives it.
        dataset_dirs: the folders that it was given.
        reconstructs: whether there is a reconstruction to measure, so that there need be nothing to ask.

    Raises:
        ValueError: naming the folders.
    """
    folders = ", ".join(map(str, data_folders(dataset_dirs)))
    empty = [split for split in SPLITS if not getattr(datalist, split)]
    if empty:
        remedy = f"Add the list `{empty[-1]}` of other subjects to the dataset.json of one of them"
        raise InputError(
            "volumes are needed in training, validation and test, to fit the probes, to choose their penalty and to "
            f"score them; {', '.join(empty)} has none in {folders}. {remedy}."
        )
    mapped = [any(_is_mapped(item) for item in getattr(datalist, split)) for split in ("training", "test")]
    if not reconstructs and not all(mapped) and not datalist.label_names and len(datalist.task_names) < 2:
        raise InputError(f"{_NOTHING_TO_ASK}; got neither in {folders}.")


def _is_mapped(item: Item) -> bool:
    return isinstance(item.get("label"), str) and bool(item.get("labels"))


def _structures(splits: Sequence[list[Item]]) -> Question:
    names: dict[str, dict[str, None]] = {}
    for items in splits:
        for item in items:
            names.setdefault(item["task"], {}).update(dict.fromkeys(item.get("structures", {})))
    pairs = [(task, name) for task in sorted(names) for name in names[task]]

    def label(item: Item, task: str, name: str) -> float:
        return item.get("structures", {}).get(name, np.nan) if item["task"] == task else np.nan

    labels = [_matrix([[label(item, *pair) for pair in pairs] for item in items], len(pairs)) for items in splits]
    return Question(
        "structures", [f"{task}/{name}" for task, name in pairs], labels, _parts([task for task, _ in pairs])
    )


def _domains(splits: Sequence[list[Item]]) -> list[Question]:
    """Which task, among all and among those of a group."""
    group_of = {item["task"]: item["group"] for items in splits for item in items}
    tasks = sorted(group_of) if len(group_of) > 1 else []
    groups = list(group_of.values())
    sharing = [task for task in tasks if groups.count(group_of[task]) > 1]

    def label(item: Item, task: str) -> float:
        return float(item["task"] == task) if item["group"] == group_of[task] else np.nan

    everywhere = [_matrix([[item["task"] == task for task in tasks] for item in items], len(tasks)) for items in splits]
    within = [_matrix([[label(item, task) for task in sharing] for item in items], len(sharing)) for items in splits]
    parts = _parts([group_of[task] for task in sharing])
    return [Question("domains", tasks, everywhere), Question("domains_in_group", sharing, within, parts)]


def _scorable(question: Question) -> Question:
    """The columns that have both classes in training and in test; the others are named."""
    kept = [
        index
        for index in range(len(question.columns))
        if all((question.labels[split][:, index] == value).any() for split in (0, 2) for value in (0, 1))
    ]
    left_out = [name for index, name in enumerate(question.columns) if index not in kept]
    if left_out:
        logger.warning(
            "Left out of %s, for lack of patches with it or without it in training or in test: %s.",
            question.name, ", ".join(left_out),
        )  # fmt: skip
    parts = question.parts and [[kept.index(index) for index in part if index in kept] for part in question.parts]
    return Question(
        question.name,
        [question.columns[index] for index in kept],
        [labels[:, kept] for labels in question.labels],
        parts and [part for part in parts if part],
    )


def _parts(keys: Sequence[str]) -> list[list[int]]:
    """Places of equal keys."""
    return [[index for index, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)]


def _matrix(rows: list[list[Any]], num_columns: int) -> Array:
    return np.array(rows, dtype=float).reshape(len(rows), num_columns)
