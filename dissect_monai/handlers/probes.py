"""Frozen features scored once on the test split, by k-NN and linear probe: what all such evaluations share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from dissect_monai.common import InputError
from dissect_monai.data.datalists import SPLITS
from dissect_monai.data.datasets import items_of
from dissect_monai.metrics.classification import auroc, average_precision
from dissect_monai.metrics.intervals import Resampled, mean_resampled, percentile_interval, resample
from dissect_monai.metrics.probes import extract_features, grouped_cross_val_scores, knn_scores, linear_probe
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.writing import metric_name, write_csv

Array = NDArray[np.floating[Any]]
logger = logging.getLogger(__name__)
MACRO = "macro"
_UNNAMED = ("findings", "shortcut")  # questions whose metrics are called by the column alone


class Question(NamedTuple):
    """What is asked of frozen features: columns of binary labels."""

    name: str
    columns: list[str]
    labels: list[Array]  # one (N, C) per split: training, validation, test; 1, 0 or NaN
    # Columns that have probes and a C of their own, and only the training items that one of them is known of, so that
    # what tells those apart from all others plays no part; None is all columns and all items.
    parts: list[list[int]] | None = None


class Baseline(NamedTuple):
    """Features that no encoder gives."""

    source: str
    kind: str
    splits: list[Array]  # (N, D) each


class ProbeScores(NamedTuple):
    """The scores of one probe on one kind of features for one question."""

    question: Question
    source: str  # name of an encoder or of the baseline
    features: str  # "last", "stages" (all stages side by side) or that of the baseline
    probe: str  # "knn" or "linear"
    scores: Array  # (N, C)
    auroc: dict[int, Resampled]  # of the columns that have one
    ap: dict[int, Resampled]


class Row(NamedTuple):
    """One line of findings.csv: a column of a question, or `macro`, the mean over its columns."""

    source: str
    features: str
    probe: str
    question: str
    finding: str
    auroc: float
    auroc_low: float
    auroc_high: float
    ap: float
    ap_low: float
    ap_high: float
    n: int  # items of which a column is known
    positives: int  # items of which one is 1


class Difference(NamedTuple):
    """One line of differences.csv: macro AUROC of the first encoder less that of another, or of the baseline."""

    task: str  # the question
    features: str
    probe: str
    baseline: str
    difference: float
    low: float
    high: float


class FrozenProbes:
    """Asks questions of frozen encoders and of a baseline by linear probe and k-NN, with 95 % intervals by subject.

    It writes findings.csv, differences.csv (paired bootstrap) and scores.npz (all scores), and leaves every AUROC in
    the engine's metrics, which MONAI's `MetricsSaver` writes to metrics.csv. A metric is called after source, features,
    probe, "auroc", the question (unless it is `findings` or `shortcut`) and the column, as in
    `pretrained_last_linear_auroc_structures_macro`. Columns without both classes are left out and named in the log.

    Args:
        encoders: encoders by name; the first is compared with all others.
        loaders: loaders of the splits `training`, `validation` and `test`, of data sets with a data list `data`.
        questions: with labels of the items of the three splits.
        output_dir: folder for the tables.
        num_folds: 0 for the given splits, else the number of folds, see `ProbeHandler`.
        num_samples: bootstrap resamples.
        seed: seed of folds and resamples.

    Raises:
        ValueError: if there are more folds than subjects.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        loaders: Mapping[str, DataLoader[Any]],
        questions: Sequence[Question],
        output_dir: str | Path,
        num_folds: int = 0,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.encoders = encoders
        self.loaders = [loaders[split] for split in SPLITS]
        self.questions = questions
        self.output_dir = Path(output_dir)
        self.num_folds, self.num_samples, self.seed = num_folds, num_samples, seed
        scored = self.loaders if num_folds else self.loaders[2:]
        items = [item for loader in scored for item in items_of(loader.dataset)]
        self.subjects = [str(item.get("subject", item["image"])) for item in items]
        if num_folds > len(set(self.subjects)):
            raise InputError(f"`--num_folds` must be at most the {len(set(self.subjects))} subjects, got {num_folds}.")

    def attach(self, engine: Engine) -> None:
        """Run when `engine` has seen the test split."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def baseline(self) -> Baseline | None:
        """Features to compare the encoders with, if any; for a subclass to give."""
        return None

    def __call__(self, engine: Engine) -> None:
        """Extract features, probe them, write the tables and leave the metrics."""
        scored = [
            self._scored(question, source, kind, probe, scores)
            for source, kind, features in self._features(engine.state.device)
            for question in self.questions
            for probe, scores in self._scores(question, features).items()
        ]
        rows = [row for result in scored for row in self._rows(result)]
        _name_left_out(scored)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_csv(self.output_dir / "findings.csv", Row._fields, rows, nan="nan")
        write_csv(self.output_dir / "differences.csv", Difference._fields, self._differences(scored), nan="nan")
        self._save_scores(scored)
        for row in rows:
            column = row.finding if row.question in _UNNAMED else f"{row.question}_{row.finding}"
            name = metric_name(f"{row.source}_{row.features}_{row.probe}_auroc", column)
            engine.state.metrics |= {name: row.auroc, f"{name}_low": row.auroc_low, f"{name}_high": row.auroc_high}
            if row.finding == MACRO or row.finding in self._logged():
                interval = (row.auroc, row.auroc_low, row.auroc_high)
                logger.info("%-10s %-9s %-6s %-12s AUROC %.3f (%.3f–%.3f)", *row[:3], column, *interval)

    def _logged(self) -> list[str]:
        """Columns whose AUROC is worth a line of the log: few, or that of a question by itself."""
        if len(self.questions) == 1:
            return self.questions[0].columns
        return [question.columns[0] for question in self.questions if len(question.columns) == 1]

    def _save_scores(self, scored: Sequence[ProbeScores]) -> None:
        """Every score and label in scores.npz, so that runs can be compared pairwise later."""
        arrays = {f"labels/{question.name}": self._truth(question) for question in self.questions}
        arrays |= {f"scores/{r.source}/{r.features}/{r.probe}/{r.question.name}": r.scores for r in scored}
        np.savez_compressed(self.output_dir / "scores.npz", subjects=np.array(self.subjects), **arrays)  # type: ignore[arg-type]

    def _features(self, device: torch.device) -> Iterator[tuple[str, str, list[Array]]]:
        for source, encoder in self.encoders.items():
            splits = [extract_features(encoder, loader, device, feature_maps) for loader in self.loaders]
            yield source, "last", [split.last for split in splits]
            yield source, "stages", [split.stages for split in splits]
        baseline = self.baseline()
        if baseline is not None:
            yield baseline

    def _scores(self, question: Question, x: list[Array]) -> dict[str, Array]:
        """Scores of all columns by probe, NaN where there was nothing to learn from."""
        y = question.labels
        if self.num_folds:
            x_all, y_all = np.concatenate(x), np.concatenate(y)
            return {"linear": grouped_cross_val_scores(x_all, y_all, self.subjects, self.num_folds, self.seed)}
        scores = {probe: np.full(y[2].shape, np.nan) for probe in ("linear", "knn")}
        for part in question.parts or [list(range(len(question.columns)))]:
            train, val = y[0][:, part], y[1][:, part]
            known = ~np.isnan(train).all(1) if question.parts else np.ones(len(train), dtype=bool)
            if known.any():
                fitted = linear_probe(x[0][known], train[known], x[1], val, x[2])
                scores["linear"][:, part] = fitted.scores
                scores["knn"][:, part] = knn_scores(x[0][known], train[known], x[2])
        return scores

    def _scored(self, question: Question, source: str, kind: str, probe: str, scores: Array) -> ProbeScores:
        aurocs, aps = {}, {}
        for index, columns in enumerate(zip(self._truth(question).T, scores.T, strict=True)):
            if not np.isnan(auroc(*columns)):
                draws = self.subjects, self.num_samples, self.seed
                aurocs[index] = resample(partial(auroc, *columns), *draws)
                aps[index] = resample(partial(average_precision, *columns), *draws)
        return ProbeScores(question, source, kind, probe, scores, aurocs, aps)

    def _truth(self, question: Question) -> Array:
        return np.concatenate(question.labels) if self.num_folds else question.labels[2]

    def _rows(self, result: ProbeScores) -> Iterator[Row]:
        truth = self._truth(result.question)
        groups = {result.question.columns[index]: [index] for index in result.auroc}
        if len(groups) > 1:
            groups = {MACRO: list(result.auroc), **groups}
        for name, columns in groups.items():
            intervals = [
                percentile_interval(mean_resampled([each[index] for index in columns]))
                for each in (result.auroc, result.ap)
            ]
            n = int((~np.isnan(truth[:, columns])).any(1).sum())
            positives = int((truth[:, columns] == 1).any(1).sum())
            place = (result.source, result.features, result.probe, result.question.name)
            yield Row(*place, name, *intervals[0], *intervals[1], n, positives)

    def _differences(self, scored: Sequence[ProbeScores]) -> Iterator[Difference]:
        main = next(iter(self.encoders))
        for result in scored:
            for other in scored:
                same = other.question is result.question and other.probe == result.probe
                comparable = other.features == result.features or other.source not in self.encoders
                if result.source != main or other.source == main or not same or not comparable:
                    continue
                columns = [index for index in result.auroc if index in other.auroc]
                if not columns:
                    continue
                ours, theirs = (mean_resampled([each.auroc[index] for index in columns]) for each in (result, other))
                paired = Resampled(ours.value - theirs.value, ours.resamples - theirs.resamples)
                place = (result.question.name, result.features, result.probe, other.source)
                yield Difference(*place, *percentile_interval(paired))


def _name_left_out(scored: Sequence[ProbeScores]) -> None:
    left_out = {
        name: None for each in scored for index, name in enumerate(each.question.columns) if index not in each.auroc
    }
    if left_out:
        logger.warning("Left out, for lack of positives or negatives: %s.", ", ".join(left_out))
