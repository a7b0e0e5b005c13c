"""Tables of segmentation scores: a line for every case and structure, for every subject, and for every structure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dissect_monai.common import InputError, Interval
from dissect_monai.metrics.intervals import bootstrap
from dissect_monai.metrics.segmentation import StructureScore
from dissect_monai.writing import metric_name, write_csv

NAN = float("nan")
Array = NDArray[np.floating[Any]]
METRICS = ("dice", "hd95", "surface_dice")
MEAN = "mean"  # what the line of the mean over structures is called


class CaseScores(NamedTuple):
    """The scores of one case."""

    case: str  # path of the image
    subject: str
    structures: list[StructureScore]


class SubjectScores(NamedTuple):
    """Means over the structures of a subject, those left out that have no score."""

    subject: str
    dice: float
    hd95: float  # mm
    surface_dice: float
    missed: int  # structures of its cases
    false_positives: int  # likewise


class StructureSummary(NamedTuple):
    """Mean over subjects of one structure, or of the mean over structures, with its 95 % interval and its spread."""

    structure: str
    n: int  # subjects that have the structure in a label
    dice: Interval
    dice_std: float  # over subjects, as are the others
    hd95: Interval  # mm
    hd95_std: float
    surface_dice: Interval
    surface_dice_std: float
    missed: int  # cases
    false_positives: int  # cases


def subject_scores(cases: Sequence[CaseScores]) -> list[SubjectScores]:
    """The mean over structures of every subject, in their order; of a structure of several cases, their mean.

    Args:
        cases: the scores of one or more cases of every subject.
    """
    by_subject: dict[str, list[CaseScores]] = {}
    for case in cases:
        by_subject.setdefault(case.subject, []).append(case)
    means = {metric: _row_means(_matrix(cases, metric)).tolist() for metric in METRICS}
    return [
        SubjectScores(
            subject,
            dice=means["dice"][row],
            hd95=means["hd95"][row],
            surface_dice=means["surface_dice"][row],
            missed=_count(own, "missed"),
            false_positives=_count(own, "false_positive"),
        )
        for row, (subject, own) in enumerate(by_subject.items())
    ]


def summarize(cases: Sequence[CaseScores], num_samples: int = 1000, seed: int = 0) -> list[StructureSummary]:
    """A line for the mean over structures, then one for every structure.

    Of a structure, the score of a subject is the mean of its cases, and the line holds mean and standard deviation
    (with n − 1) over the subjects that have one. The first line does the same with the mean over the structures of
    each subject, so that every subject counts alike, and not every structure. Intervals are from resampling subjects;
    one subject has none. A structure that no label has, has counts alone, and is left out of the mean.

    Args:
        cases: the scores of all cases; the structures may differ between them.
        num_samples: bootstrap resamples.
        seed: seed of the resamples.

    Raises:
        ValueError: if there are no cases, or `num_samples` is not positive.
    """
    if not cases:
        raise InputError("`cases` must hold the scores of at least one case, got none.")
    matrices = {metric: _matrix(cases, metric) for metric in METRICS}
    columns = {MEAN: {metric: _row_means(matrix) for metric, matrix in matrices.items()}}
    for index, name in enumerate(_names(cases)):
        columns[name] = {metric: matrix[:, index] for metric, matrix in matrices.items()}
    summaries = []
    for row, (name, values) in enumerate(columns.items()):
        fields: dict[str, Any] = {metric: _interval(values[metric], num_samples, seed) for metric in METRICS}
        fields |= {f"{metric}_std": _std(values[metric]) for metric in METRICS}
        counts = [_count(cases, outcome, name if row else None) for outcome in ("missed", "false_positive")]
        num_subjects = int((~np.isnan(values["dice"])).sum())
        summaries.append(StructureSummary(name, num_subjects, missed=counts[0], false_positives=counts[1], **fields))
    return summaries


def metrics_by_name(summaries: Sequence[StructureSummary]) -> dict[str, float]:
    """`dice_mean`, `hd95_mean`, `surface_dice_mean` with `_low` and `_high`, and `dice_<structure>`, where defined.

    Beside them `missed` and `false_positives`, over all structures.
    """
    mean, *structures = summaries
    found: dict[str, float] = {}
    for metric in METRICS:
        interval: Interval = getattr(mean, metric)
        name = metric_name(metric, MEAN)
        found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    found |= {metric_name("dice", each.structure): each.dice.value for each in structures}
    defined = {name: value for name, value in found.items() if not isnan(value)}
    return {**defined, "missed": mean.missed, "false_positives": mean.false_positives}


def write_tables(output_dir: str | Path, cases: Sequence[CaseScores], summaries: Sequence[StructureSummary]) -> None:
    """Write cases.csv, subjects.csv and summary.csv; what is undefined is blank.

    Args:
        output_dir: folder, which is made.
        cases: the scores.
        summaries: what `summarize` makes of them.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [[case.case, case.subject, *_texts(score)] for case in cases for score in case.structures]
    write_csv(folder / "cases.csv", ["case", "subject", *StructureScore._fields], lines)
    write_csv(folder / "subjects.csv", SubjectScores._fields, map(_texts, subject_scores(cases)))
    write_csv(folder / "summary.csv", _summary_fields(), map(_texts, summaries))


def _names(cases: Sequence[CaseScores]) -> list[str]:
    return list(dict.fromkeys(score.structure for case in cases for score in case.structures))


def _matrix(cases: Sequence[CaseScores], metric: str) -> Array:
    """A metric of each subject and structure, the mean of its cases, (S, K); NaN where there is none."""
    subjects = {case.subject: None for case in cases}
    cells: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        for score in case.structures:
            cells.setdefault((case.subject, score.structure), []).append(getattr(score, metric))
    rows = [[cells.get((subject, name), []) for name in _names(cases)] for subject in subjects]
    return np.array([[_nanmean(cell) for cell in row] for row in rows], dtype=float)


def _nanmean(values: Sequence[float] | Array) -> float:
    known = [value for value in values if not isnan(value)]
    return float(np.mean(known)) if known else NAN


def _row_means(matrix: Array) -> Array:
    return np.array([_nanmean(row) for row in matrix])


def _std(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else NAN


def _interval(values: Array, num_samples: int, seed: int) -> Interval:
    """Mean of the known values of subjects, and its interval."""
    known = np.flatnonzero(~np.isnan(values))
    if len(known) < 2:
        return Interval(_nanmean(values), NAN, NAN)
    return bootstrap(partial(_weighted_mean, values[known]), known, num_samples, seed)


def _weighted_mean(values: Array, weight: Array) -> Array:
    return weight @ values / weight.sum(1)


def _count(cases: Sequence[CaseScores], outcome: str, structure: str | None = None) -> int:
    """Cases with an outcome of one structure, or of each of them."""
    scores = [score for case in cases for score in case.structures]
    return sum(score.outcome == outcome and structure in (None, score.structure) for score in scores)


def _summary_fields() -> list[str]:
    fields: list[str] = []
    for name in StructureSummary._fields:
        fields += [name, f"{name}_low", f"{name}_high"] if name in METRICS else [name]
    return fields


def _texts(row: NamedTuple) -> list[Any]:
    """The fields of a row as a table has them: intervals as three numbers, several values with blanks between them."""
    texts: list[Any] = []
    for value in row:
        if isinstance(value, Interval):
            texts += value
        else:
            texts.append(" ".join(map(str, value)) if isinstance(value, tuple) else value)
    return [None if isinstance(value, float) and isnan(value) else value for value in texts]
