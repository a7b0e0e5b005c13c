"""Frozen features scored once on the test split, by k-NN and linear probe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import ensure_tuple
from torch import nn
from torch.utils.data import DataLoader

from dissect_monai.common import Array, InputError, Interval, Item, shorten
from dissect_monai.data.datalists import SPLITS, Datalist, data_folders, label_matrix
from dissect_monai.data.datasets import items_of
from dissect_monai.data.identity import pseudonyms
from dissect_monai.handlers.ending import NOT_SCORED, Result, with_interval
from dissect_monai.metrics.classification import auroc, average_precision, both_classes
from dissect_monai.metrics.intervals import Resampled, mean_resampled, percentile_interval, resample
from dissect_monai.metrics.probes import (
    extract_features,
    grouped_cross_val_scores,
    intensity_histograms,
    knn_scores,
    linear_probe,
    pixel_pca,
)
from dissect_monai.metrics.representation import task_labels
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.transforms.views import prepare_images
from dissect_monai.writing import columns, metric_name, metrics_by_name, write_csv

Features = tuple[str, str, list[Array]]  # their source, their kind, and (N, D) of training, validation and test
logger = logging.getLogger(__name__)
MACRO = "macro"
TABLES = ("findings.csv", "differences.csv")
DIFFERENCES = ("task", "features", "probe", "baseline", "difference", "low", "high")
_UNNAMED = ("findings", "shortcut")  # questions whose metrics are called by the column alone
_NOTHING_TO_ASK = (
    "there is nothing to ask of the features: give label maps (`label`) and the names of their values (`labels`) in "
    "dataset.json, or labels of whole volumes, or volumes of another task"
)


class Question(NamedTuple):
    """What is asked of frozen features: columns of binary labels."""

    name: str
    columns: list[str]
    labels: list[Array]  # one (N, C) per split: training, validation, test; 1, 0 or NaN
    # Columns of one key share a C and the training items that one of them is known of, so that what tells those apart
    # from all others plays no part; None is all columns and all items.
    keys: list[str] | None = None


class ProbeScores(NamedTuple):
    """The scores of one probe on one kind of features for one question."""

    question: Question
    source: str  # name of an encoder or of the baseline
    features: str  # "last", "stages" (all stages side by side) or that of the baseline
    probe: str  # "knn" or "linear"
    scores: Array  # (N, C)
    auroc: dict[str, Resampled]  # of the columns that have one
    ap: dict[str, Resampled]


class Row(NamedTuple):
    """One line of findings.csv: a column of a question, or `macro`, the mean over its columns."""

    source: str
    features: str
    probe: str
    question: str
    finding: str
    auroc: Interval
    ap: Interval
    n: int  # items of which a column is known
    positives: int  # items of which one is 1


@dataclass(eq=False)
class ProbeHandler:
    """Asks how well findings can be read off frozen encoders and a baseline, with 95 % intervals by subject.

    The questions are `findings` and `shortcut`; the baseline is the principal components of the pixels, for images
    alone. C of the linear probe is chosen on validation; the test split is scored once. With `num_folds` the probe is
    cross-validated over all labelled items instead, folds grouped by subject, for small test splits.

    It writes findings.csv, differences.csv (macro AUROC of the first encoder less that of all others, paired bootstrap)
    and scores.npz (all scores, so that runs can be compared pairwise later), and leaves every AUROC in the engine's
    metrics. A metric is called after source, features, probe, "auroc", the question (unless it is `findings` or
    `shortcut`) and the column, as in `pretrained_last_linear_auroc_structures_macro`. Columns without both classes are
    left out and named in the log.

    Raises:
        ValueError: if a finding is unknown, the shortcut has not two values, or there are more folds than subjects.
    """

    encoders: Mapping[str, nn.Module | None]  # by name; the first is compared with all others; None is left out
    loaders: Mapping[str, DataLoader[Any]]  # of training, validation and test, whose data sets have a data list
    label_names: Sequence[str]  # of the values of a label
    output_dir: str | Path
    findings: str | Sequence[str] | None = None  # of `label_names`, or "No finding" (all labels 0); None is all of them
    shortcut: str | None = None  # key of an attribute with two values, such as `view`; None asks for none
    pixels: bool = True  # whether to judge the baseline
    num_folds: int = 0  # 0 for the given splits
    num_samples: int = 1000  # bootstrap resamples
    seed: int = 0  # of folds and resamples

    def __post_init__(self) -> None:
        self.networks = {name: encoder for name, encoder in self.encoders.items() if encoder is not None}
        splits = [items_of(self.loaders[split].dataset) for split in SPLITS]
        self.questions = self._questions(splits)
        self.scored = [*chain.from_iterable(splits if self.num_folds else splits[2:])]
        self.subjects = [str(item.get("subject", item["image"])) for item in self.scored]
        count = len(set(self.subjects))
        if self.num_folds > count:
            raise InputError(f"`num_folds` must be at most the {count} subjects, got {self.num_folds}.")

    def attach(self, engine: Engine) -> None:
        """Run when `engine` has seen the test split."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Extract features, probe them, write the tables and leave the metrics."""
        results = [
            self._scored(question, source, kind, probe, scores)
            for source, kind, features in self._features(engine.state.device)
            for question in self.questions
            for probe, scores in self._scores(question, features).items()
        ]
        left_out = [name for each in results for name in each.question.columns if name not in each.auroc]
        if left_out:
            logger.warning("Left out, for lack of positives or negatives: %s.", ", ".join(dict.fromkeys(left_out)))
        groups, folder = [list(self._rows(result)) for result in results], Path(self.output_dir)
        write_csv(folder / "findings.csv", columns(Row), chain.from_iterable(groups), nan="nan")
        write_csv(folder / "differences.csv", DIFFERENCES, self._differences(results), nan="nan")
        arrays = {f"labels/{question.name}": self._truth(question) for question in self.questions}
        arrays |= {f"scores/{r.source}/{r.features}/{r.probe}/{r.question.name}": r.scores for r in results}
        np.savez_compressed(folder / "scores.npz", subjects=np.array(pseudonyms(self.scored)), **arrays)  # type: ignore[arg-type]
        engine.state.result = Result(self._told([group[0] for group in groups if group]), TABLES)
        for group in groups:
            for row in group:
                column = row.finding if row.question in _UNNAMED else f"{row.question}_{row.finding}"
                name = metric_name(f"{row.source}_{row.features}_{row.probe}_auroc", column)
                engine.state.metrics |= metrics_by_name({name: row.auroc})
                if row is group[0]:  # the mean, or the only column
                    logger.info("%-10s %-9s %-6s %-12s AUROC %.3f (%.3f–%.3f)", *row[:3], column, *row.auroc)

    def _questions(self, splits: Sequence[list[Item]]) -> list[Question]:
        names = list(ensure_tuple(self.findings) if self.findings else self.label_names)
        asked = [Question("findings", names, [label_matrix(items, self.label_names, names) for items in splits])]
        return asked if self.shortcut is None else [*asked, _shortcut(splits, self.shortcut)]

    def _baseline(self, loaders: Sequence[DataLoader[Any]]) -> Iterator[Features]:
        images = [torch.cat([torch.as_tensor(batch["image"]).float() for batch in loader]) for loader in loaders]
        if images[0].ndim == 4:
            yield "pixels", "pca", list(pixel_pca(*images))

    def _features(self, device: torch.device) -> Iterator[Features]:
        loaders = [self.loaders[split] for split in SPLITS]
        for source, encoder in self.networks.items():
            splits = [extract_features(encoder, loader, device, feature_maps) for loader in loaders]
            yield source, "last", [split.last for split in splits]
            yield source, "stages", [split.stages for split in splits]
        if self.pixels:
            yield from self._baseline(loaders)

    def _scores(self, question: Question, x: list[Array]) -> dict[str, Array]:
        """Scores of all columns by probe, NaN where there was nothing to learn from."""
        y = question.labels
        if self.num_folds:
            x_all, y_all = np.concatenate(x), np.concatenate(y)
            return {"linear": grouped_cross_val_scores(x_all, y_all, self.subjects, self.num_folds, self.seed)}
        scores = {probe: np.full(y[2].shape, np.nan) for probe in ("linear", "knn")}
        keys = question.keys or [""] * len(question.columns)
        for key in dict.fromkeys(keys):
            part = [index for index, other in enumerate(keys) if other == key]
            train, val = y[0][:, part], y[1][:, part]
            known = ~np.isnan(train).all(1) if question.keys else np.ones(len(train), dtype=bool)
            if known.any():
                scores["linear"][:, part] = linear_probe(x[0][known], train[known], x[1], val, x[2])
                scores["knn"][:, part] = knn_scores(x[0][known], train[known], x[2])
        return scores

    def _scored(self, question: Question, source: str, kind: str, probe: str, scores: Array) -> ProbeScores:
        draws = self.subjects, self.num_samples, self.seed
        pairs = dict(zip(question.columns, zip(self._truth(question).T, scores.T, strict=True), strict=True))
        usable = {name: pair for name, pair in pairs.items() if not np.isnan(auroc(*pair))}
        aurocs = {name: resample(partial(auroc, *pair), *draws) for name, pair in usable.items()}
        aps = {name: resample(partial(average_precision, *pair), *draws) for name, pair in usable.items()}
        return ProbeScores(question, source, kind, probe, scores, aurocs, aps)

    def _truth(self, question: Question) -> Array:
        return np.concatenate(question.labels) if self.num_folds else question.labels[2]

    def _rows(self, result: ProbeScores) -> Iterator[Row]:
        names = list(result.auroc)
        groups = {MACRO: names} if len(names) > 1 else {}
        for finding, group in (groups | {name: [name] for name in names}).items():
            truth = self._truth(result.question)[:, [result.question.columns.index(name) for name in group]]
            means = [mean_resampled([each[name] for name in group]) for each in (result.auroc, result.ap)]
            area, precision = map(percentile_interval, means)
            n, positives = int((~np.isnan(truth)).any(1).sum()), int((truth == 1).any(1).sum())
            place = result.source, result.features, result.probe, result.question.name
            yield Row(*place, finding, area, precision, n, positives)

    def _told(self, rows: Sequence[Row]) -> str:
        """The first question, by a linear probe on all stages, beside the baselines."""
        asked = [row for row in rows if (row.question, row.probe) == (rows[0].question, "linear")]
        asked = [row for row in asked if row.features == "stages" or row.source not in self.networks]
        texts = [with_interval(f"AUROC of {row.question}, linear probe on all stages,", row.auroc) for row in asked[:1]]
        return "; ".join(texts + [f"{row.source} {row.auroc.value:.3f}" for row in asked[1:]]) or NOT_SCORED

    def _differences(self, results: Sequence[ProbeScores]) -> Iterator[tuple[Any, ...]]:
        main = next(iter(self.networks))
        for ours, theirs in product(results, repeat=2):
            same = theirs.question is ours.question and theirs.probe == ours.probe
            comparable = theirs.features == ours.features or theirs.source not in self.networks
            shared = [name for name in ours.auroc if name in theirs.auroc]
            if ours.source == main != theirs.source and same and comparable and shared:
                one, other = (mean_resampled([each.auroc[name] for name in shared]) for each in (ours, theirs))
                paired = Resampled(one.value - other.value, one.resamples - other.resamples)
                yield ours.question.name, ours.features, ours.probe, theirs.source, percentile_interval(paired)


class VolumeProbeHandler(ProbeHandler):
    """The `ProbeHandler` of patches of volumes: do features tell structures apart, and do they tell data sets apart?

    The questions, of which those that the data cannot answer are left out:

    - `structures`: whether a patch shows a structure, a column `task/structure` each, among the patches of the task.
      Its probes see no others, so that nothing is gained by knowing the data set.
    - `findings`: what is labelled of the whole volume, of each of its patches.
    - `domains`, the shortcut probe: whether a patch is of a task, a column each.
    - `domains_in_group`: the same for tasks that share a group, among its patches: which scanner, where the region is
      no help.

    The baseline is histograms of the intensities. The loaders are of data sets as `patch_dataset` gives them.

    Raises:
        ValueError: if there is nothing to ask.
    """

    def _questions(self, splits: Sequence[list[Item]]) -> list[Question]:
        findings = super()._questions(splits) if self.label_names else []
        asked = [_structures(splits), *findings, *_domains(splits)]
        questions = [question for question in map(_scorable, asked) if question.columns]
        if not questions:
            raise InputError(f"{_NOTHING_TO_ASK}.")
        return questions

    def _baseline(self, loaders: Sequence[DataLoader[Any]]) -> Iterator[Features]:
        splits = [[intensity_histograms(prepare_images(batch, "cpu")[0]) for batch in loader] for loader in loaders]
        yield "intensity", "histogram", [torch.cat(histograms).numpy() for histograms in splits]


def refuse_unlabelled(
    datalist: Datalist, findings: str | Sequence[str] | None = None, splits: Sequence[str] = SPLITS
) -> None:
    """Refuse images without labels in one of `splits`, or whose `findings` leave nothing to learn or to score."""
    empty = [split for split in splits if not getattr(datalist, split)]
    if empty:
        raise InputError(
            f"labelled images are needed in {', '.join(splits)}; {', '.join(empty)} has none. "
            "The dataset.json in `dataset_dir` must have these lists, with a `label` per item."
        )
    names = list(ensure_tuple(findings) if findings else datalist.label_names)
    judged = [split for split in splits if split != "validation"]
    labels = [label_matrix(getattr(datalist, split), datalist.label_names, names) for split in judged]
    if not both_classes(*labels).any():
        raise InputError(
            f"no finding ({', '.join(names)}) has both a 1 and a 0 in {' and in '.join(judged)}: nothing can be learnt "
            "or scored. Correct the labels, or raise `label_fraction`."
        )


def check_probe_data(datalist: Datalist, dataset_dirs: str | Path | Sequence[str | Path]) -> None:
    """Refuse volumes that cannot be evaluated, before they are read: an empty split, or nothing to ask."""
    folders = ", ".join(map(str, data_folders(dataset_dirs)))
    empty = [split for split in SPLITS if not getattr(datalist, split)]
    if empty:
        raise InputError(
            f"volumes are needed in training, validation and test; {', '.join(empty)} has none in {folders}. Add the "
            f"list `{empty[-1]}` of other subjects to the dataset.json of one of them."
        )
    mapped = all(
        any(isinstance(item.get("label"), str) and item.get("labels") for item in items)
        for items in (datalist.training, datalist.test)
    )
    if not mapped and not datalist.label_names and len(datalist.task_names) < 2:
        raise InputError(f"{_NOTHING_TO_ASK}; got neither in {folders}.")


def _shortcut(splits: Sequence[list[Item]], key: str) -> Question:
    values = sorted({str(item[key]) for items in splits for item in items if key in item})
    if len(values) != 2:
        got = f"{key!r} with {shorten(values)}" if values else f"{key!r}, which none has"
        raise InputError(f"`shortcut` must name a key of the items in dataset.json with two values, got {got}.")
    truth = {value: float(value == values[0]) for value in values}
    labels = [np.array([[truth[str(item[key])] if key in item else np.nan] for item in items]) for items in splits]
    return Question("shortcut", [f"{key}={values[0]}"], labels)


def _structures(splits: Sequence[list[Item]]) -> Question:
    found = ((item["task"], name) for item in chain.from_iterable(splits) for name in item.get("structures", {}))
    pairs = sorted(dict.fromkeys(found), key=itemgetter(0))

    def label(item: Item, task: str, name: str) -> float:
        return item.get("structures", {}).get(name, np.nan) if item["task"] == task else np.nan

    rows = [[[label(item, *pair) for pair in pairs] for item in items] for items in splits]
    labels: list[Array] = [np.array(each, dtype=float).reshape(len(each), len(pairs)) for each in rows]
    return Question("structures", ["/".join(pair) for pair in pairs], labels, [task for task, _ in pairs])


def _domains(splits: Sequence[list[Item]]) -> list[Question]:
    """Which task, among all and among those of a group."""
    group_of = dict(sorted((item["task"], item["group"]) for items in splits for item in items))
    tasks = group_of if len(group_of) > 1 else {}
    groups = list(group_of.values())
    sharing = {task: group for task, group in tasks.items() if groups.count(group) > 1}
    origins = [([item["task"] for item in items], [item["group"] for item in items]) for items in splits]
    everywhere = [task_labels(*origin, tasks) for origin in origins]
    within = [task_labels(*origin, sharing, within_group=True) for origin in origins]
    return [
        Question("domains", list(tasks), everywhere),
        Question("domains_in_group", list(sharing), within, list(sharing.values())),
    ]


def _scorable(question: Question) -> Question:
    """The columns that have both classes in training and in test; the others are named."""
    kept = np.flatnonzero(both_classes(question.labels[0], question.labels[2])).tolist()
    left_out = [name for index, name in enumerate(question.columns) if index not in kept]
    if left_out:
        logger.warning(
            "Left out of %s, for lack of patches with it or without it in training or in test: %s.",
            question.name, ", ".join(left_out),
        )  # fmt: skip
    names, keys = [question.columns[index] for index in kept], question.keys and [question.keys[i] for i in kept]
    return question._replace(columns=names, labels=[labels[:, kept] for labels in question.labels], keys=keys)
