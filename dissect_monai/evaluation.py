"""Frozen features judged once on the test split, by k-NN and linear probe."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import ensure_tuple
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from dissect_monai.data import SPLITS, Datalist, Item, finding_matrix
from dissect_monai.datasets import items_of
from dissect_monai.metrics import auroc, average_precision, bootstrap, mean_statistic, paired_bootstrap
from dissect_monai.networks import feature_maps
from dissect_monai.probes import extract_features, grouped_cross_val_scores, knn_scores, linear_probe, pixel_pca

Array = NDArray[np.floating[Any]]
Metric = Callable[..., Array]
logger = logging.getLogger(__name__)
MACRO = "macro"


class Task(NamedTuple):
    """A set of binary questions to frozen features."""

    name: str
    columns: list[str]
    labels: list[Array]  # one (N, C) per split: training, validation, test; 1, 0 or NaN


class Judged(NamedTuple):
    """The scores of one probe on one kind of features for one task."""

    task: Task
    source: str  # name of an encoder, or "pixels"
    features: str  # "last", "stages" (all stages side by side) or "pca"
    probe: str  # "knn" or "linear"
    scores: Array  # (N, C)


class Row(NamedTuple):
    """One line of findings.csv: a question, or `macro`, the mean over the questions of a task."""

    source: str
    features: str
    probe: str
    finding: str
    auroc: float
    auroc_low: float
    auroc_high: float
    ap: float
    ap_low: float
    ap_high: float
    n: int
    positives: int


class Difference(NamedTuple):
    """One line of differences.csv: macro AUROC of the pretrained encoder less that of a baseline."""

    task: str
    features: str
    probe: str
    baseline: str
    difference: float
    low: float
    high: float


class ProbeHandler:
    """Judges frozen encoders and the pixel baseline by linear probe and k-NN, with 95 % intervals by subject.

    C of the linear probe is chosen on validation; the test split is scored once. With `num_folds` the probe is
    cross-validated over all labelled images instead, folds grouped by subject, for small test splits. It writes
    findings.csv, differences.csv (paired bootstrap) and scores.npz (all scores), and leaves every AUROC in the
    engine's metrics, which MONAI's `MetricsSaver` writes to metrics.csv.

    Args:
        encoders: encoders by name; the first is compared with all others.
        loaders: loaders of the splits `training`, `validation` and `test`, of data sets with a data list `data`.
        label_names: names of the values of a label.
        output_dir: folder for the tables.
        findings: findings to score, of `label_names` or "No finding" (all labels 0); None is all of them.
        shortcut: key of an attribute with two values, such as `view`, asked of the same features; None for none.
        num_folds: 0 for the given splits, else the number of folds.
        pixels: whether to judge the principal components of the pixels, too; of volumes there are none.
        num_samples: bootstrap resamples.
        seed: seed of folds and resamples.

    Raises:
        ValueError: if a finding is unknown or the shortcut has not two values.

    Reference:
        Frozen encoder in eval mode, standardised features, logistic regression; see README, "Evaluation".
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        loaders: Mapping[str, DataLoader[Any]],
        label_names: Sequence[str],
        output_dir: str | Path,
        findings: str | Sequence[str] | None = None,
        shortcut: str | None = None,
        num_folds: int = 0,
        pixels: bool = True,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.encoders = encoders
        self.loaders = [loaders[split] for split in SPLITS]
        self.output_dir = Path(output_dir)
        self.num_folds, self.pixels, self.num_samples, self.seed = num_folds, pixels, num_samples, seed
        splits = [items_of(loader.dataset) for loader in self.loaders]
        names = list(ensure_tuple(findings) if findings else label_names)
        self.tasks = [Task("findings", names, [finding_matrix(items, label_names, names) for items in splits])]
        if shortcut is not None:
            self.tasks.append(_shortcut_task(splits, shortcut))
        scored = [item for items in (splits if num_folds else splits[2:]) for item in items]
        self.subjects = [str(item.get("subject", item["image"])) for item in scored]

        if num_folds > len(set(self.subjects)):
            raise ValueError(f"`--num_folds` must be at most the {len(set(self.subjects))} subjects, got {num_folds}.")

    def attach(self, engine: Engine) -> None:
        """Run when `engine` has seen the test split."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Extract features, probe them, write the tables and leave the metrics."""
        judged = [
            result
            for source, kind, features in self._features(engine.state.device)
            for task in self.tasks
            for result in self._probe(task, source, kind, features)
        ]
        rows = [row for result in judged for row in self._rows(result)]
        self._name_left_out(judged)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_csv(self.output_dir / "findings.csv", Row._fields, rows)
        write_csv(self.output_dir / "differences.csv", Difference._fields, self._differences(judged))
        self._save_scores(judged)
        for row in rows:
            name = f"{row.source}_{row.features}_{row.probe}_auroc_{row.finding.replace(' ', '_')}"
            engine.state.metrics |= {name: row.auroc, f"{name}_low": row.auroc_low, f"{name}_high": row.auroc_high}
            if row.finding == MACRO or row.finding in self.tasks[-1].columns:
                logger.info("%-10s %-6s %-6s %-12s AUROC %.3f (%.3f–%.3f)", *row[:7])

    def _save_scores(self, judged: Sequence[Judged]) -> None:
        """Every score and label in scores.npz, so that runs can be compared pairwise later."""
        arrays = {f"labels/{task.name}": self._truth(task) for task in self.tasks}
        arrays |= {f"scores/{r.source}/{r.features}/{r.probe}/{r.task.name}": r.scores for r in judged}
        np.savez_compressed(self.output_dir / "scores.npz", subjects=np.array(self.subjects), **arrays)  # type: ignore[arg-type]

    def _features(self, device: torch.device) -> Iterator[tuple[str, str, list[Array]]]:
        for source, encoder in self.encoders.items():
            splits = [extract_features(encoder, loader, device, feature_maps) for loader in self.loaders]
            yield source, "last", [split.last for split in splits]
            yield source, "stages", [split.stages for split in splits]
        if not self.pixels:
            return
        images = [torch.cat([torch.as_tensor(batch["image"]).float() for batch in loader]) for loader in self.loaders]
        if images[0].ndim == 4:
            yield "pixels", "pca", list(pixel_pca(*images))

    def _probe(self, task: Task, source: str, kind: str, x: list[Array]) -> Iterator[Judged]:
        y = task.labels
        if self.num_folds:
            pooled = grouped_cross_val_scores(
                np.concatenate(x), np.concatenate(y), self.subjects, self.num_folds, self.seed
            )
            yield Judged(task, source, kind, "linear", pooled)
            return
        yield Judged(task, source, kind, "linear", linear_probe(x[0], y[0], x[1], y[1], x[2]).scores)
        yield Judged(task, source, kind, "knn", knn_scores(x[0], y[0], x[2]))

    def _truth(self, task: Task) -> Array:
        return np.concatenate(task.labels) if self.num_folds else task.labels[2]

    def _usable(self, result: Judged) -> list[int]:
        columns = zip(self._truth(result.task).T, result.scores.T, strict=True)
        return [index for index, (label, score) in enumerate(columns) if not np.isnan(auroc(label, score))]

    def _name_left_out(self, judged: Sequence[Judged]) -> None:
        left_out = {
            name: None for each in judged for i, name in enumerate(each.task.columns) if i not in self._usable(each)
        }
        if left_out:
            logger.warning("Left out, for lack of positives or negatives: %s.", ", ".join(left_out))

    def _statistic(self, result: Judged, metric: Metric, columns: Sequence[int]) -> Callable[[Array], Array]:
        truth = self._truth(result.task)
        return mean_statistic([partial(metric, truth[:, i], result.scores[:, i]) for i in columns])

    def _rows(self, result: Judged) -> Iterator[Row]:
        truth, usable = self._truth(result.task), self._usable(result)
        groups = {result.task.columns[index]: [index] for index in usable}
        if len(groups) > 1:
            groups = {MACRO: usable, **groups}
        for name, columns in groups.items():
            intervals = [
                bootstrap(self._statistic(result, metric, columns), self.subjects, self.num_samples, self.seed)
                for metric in (auroc, average_precision)
            ]
            n = int((~np.isnan(truth[:, columns])).any(1).sum())
            positives = int(np.nansum(truth[:, columns]))
            yield Row(result.source, result.features, result.probe, name, *intervals[0], *intervals[1], n, positives)

    def _differences(self, judged: Sequence[Judged]) -> Iterator[Difference]:
        main = next(iter(self.encoders))
        for result in judged:
            for other in judged:
                same = other.task is result.task and other.probe == result.probe
                comparable = other.features in (result.features, "pca")
                if result.source != main or other.source == main or not same or not comparable:
                    continue
                columns = [index for index in self._usable(result) if index in self._usable(other)]
                if not columns:
                    continue
                ours, baseline = (self._statistic(each, auroc, columns) for each in (result, other))
                interval = paired_bootstrap(ours, baseline, self.subjects, self.num_samples, self.seed)
                yield Difference(result.task.name, result.features, result.probe, other.source, *interval)


def refuse_unlabelled(
    datalist: Datalist, findings: str | Sequence[str] | None = None, splits: Sequence[str] = SPLITS
) -> None:
    """Refuse data without labels, or whose labels leave nothing to learn or to score.

    Args:
        datalist: the labelled items of the three splits.
        findings: the findings to learn and to score; None is all of them.
        splits: the splits that are needed.

    Raises:
        ValueError: naming the splits without labelled items, or those without both classes of any finding.
    """
    empty = [split for split in splits if not getattr(datalist, split)]
    if empty:
        raise ValueError(
            f"labelled images are needed in {', '.join(splits)}; {', '.join(empty)} has none. "
            "Give --dataset_dir a folder whose dataset.json has these lists with a `label` per item."
        )
    names = list(ensure_tuple(findings) if findings else datalist.label_names)
    judged = [split for split in splits if split != "validation"]
    usable = np.ones(len(names), dtype=bool)
    for split in judged:
        labels = finding_matrix(getattr(datalist, split), datalist.label_names, names)
        usable &= (labels == 1).any(0) & (labels == 0).any(0)
    if not usable.any():
        raise ValueError(
            f"no finding ({', '.join(names)}) has both a 1 and a 0 in {' and in '.join(judged)}: nothing can be learnt "
            "or scored. Correct the labels, or raise --label_fraction."
        )


def _shortcut_task(splits: Sequence[list[Item]], key: str) -> Task:
    values = sorted({str(item[key]) for items in splits for item in items if key in item})
    if len(values) != 2:
        raise ValueError(f"`shortcut` must name a key of the items with two values, got {key!r} with {values}.")
    truth = {value: float(value == values[0]) for value in values}
    labels = [np.array([[truth[str(item[key])] if key in item else np.nan] for item in items]) for items in splits]
    return Task("shortcut", [f"{key}={values[0]}"], labels)


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, floats with four decimals.

    Args:
        path: file to write.
        fields: names of the columns.
        rows: values in the order of `fields`.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for row in rows:
            writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in row])
