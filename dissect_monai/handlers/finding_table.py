"""The table of a classifier's metrics on the test split: the mean over the findings, and a line for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dissect_monai.common import Array, Interval
from dissect_monai.handlers.probes import MACRO
from dissect_monai.metrics.classification import (
    auroc,
    average_precision,
    calibration_noise,
    expected_calibration_error,
    sensitivity,
    specificity,
    usable_findings,
)
from dissect_monai.metrics.intervals import (
    Resampled,
    calibration_interval,
    mean_resampled,
    percentile_interval,
    resample,
    wilson_interval,
)
from dissect_monai.visualize.page import FindingRow
from dissect_monai.writing import metric_name, write_csv

METRICS = ("auroc", "ap", "sensitivity", "specificity", "ece")
NAN = float("nan")
UNKNOWN = Interval(NAN, NAN, NAN)


def finding_rows(
    label_names: Sequence[str],
    labels: Array,
    probabilities: Array,
    thresholds: Sequence[float],
    subjects: Sequence[str],
    num_samples: int = 1000,
    seed: int = 0,
) -> list[FindingRow]:
    """A line for the mean over the findings that have both classes, then one for every finding.

    Intervals are 95 % percentiles of resamples of the subjects, those of ECE by `calibration_interval`. Where no
    resample differs, as where all positives are found, AUROC, sensitivity and specificity have Wilson's interval over
    the subjects that they count (AUROC: those of the rarer class), their means the means of such ends, others none.

    Args:
        label_names: names of the C findings.
        labels: shape (N, C), 1, 0 or NaN (unknown).
        probabilities: shape (N, C), in [0, 1].
        thresholds: C thresholds; NaN leaves a finding without sensitivity and specificity.
        subjects: subject of each of the N items.
        num_samples: bootstrap resamples.
        seed: seed of the resamples.

    Returns:
        1 + C lines. The mean has no counts, because those of the findings differ. The metrics of findings that lack a
        class, and so are left out of the mean, are NaN.
    """
    draws = subjects, num_samples, seed
    found = {
        index: _resampled(labels[:, index], probabilities[:, index], thresholds[index], *draws)
        for index in usable_findings(labels, probabilities)
    }
    rows = []
    for index, (name, label) in enumerate(zip(label_names, labels.T, strict=True)):
        counts = _subject_counts(label, np.asarray(subjects))
        intervals = {
            metric: _interval(metric, [found.get(index, {})], partial(wilson_interval, count=counts.get(metric, NAN)))
            for metric in METRICS
        }
        n, positives = int((~np.isnan(label)).sum()), int(np.nansum(label))
        rows.append(FindingRow(name, n, positives, threshold=thresholds[index], **intervals))
    means = {metric: _interval(metric, list(found.values()), partial(_mean_ends, rows, metric)) for metric in METRICS}
    return [FindingRow(MACRO, None, None, threshold=NAN, **means), *rows]


def left_out_rows(rows: Sequence[FindingRow]) -> list[FindingRow]:
    """Those of the findings that have no positives or no negatives, and so no metrics."""
    return [row for row in rows if row.finding != MACRO and isnan(row.auroc.value)]


def metrics_by_name(rows: Sequence[FindingRow]) -> dict[str, float]:
    """`auroc`, `auroc_low`, `auroc_high`, `auroc_<finding>`, ... of the lines that have metrics."""
    found: dict[str, float] = {}
    for row in rows:
        for metric in METRICS if not isnan(row.auroc.value) else ():
            name = metric if row.finding == MACRO else metric_name(metric, row.finding)
            interval: Interval = getattr(row, metric)
            found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return found


def write_findings(path: Path, rows: Sequence[FindingRow]) -> None:
    """Write the table as CSV: every metric with `_low` and `_high`, then threshold, n, positives; unknown is blank."""
    ends = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    lines = []
    for row in rows:
        values = [None if isnan(value) else value for metric in METRICS for value in getattr(row, metric)]
        threshold = None if isnan(row.threshold) else f"{row.threshold:.6g}"
        lines.append([row.finding, *values, threshold, row.n, row.positives])
    write_csv(path, ["finding", *ends, "threshold", "n", "positives"], lines)


def table_notes(rows: Sequence[FindingRow]) -> list[str]:
    """How to read the table, for the report: what is left out, and what the mean, ECE and the intervals are."""
    missing = ", ".join(f"{row.finding} ({row.positives} positives of {row.n})" for row in left_out_rows(rows))
    why = "for lack of positives or negatives in the test split"
    return [
        *([f"Without metrics, and so left out of the mean and the figures, {why}: {missing}."] if missing else []),
        f"n counts the images whose label is known. {MACRO} is the mean over the findings that have the metric; it has "
        "no n and no positives of its own.",
        f"ECE is the calibration error of a finding in 15 bins, that of {MACRO} their mean. The ECE of all labels "
        "pooled, in the reliability figure, is another number: there, too high and too low probabilities cancel.",
        "Intervals are percentiles of resamples of the subjects. That of ECE allows for what chance adds to it. Where "
        "no resample differs, as at 0 and 1, Wilson's interval over subjects stands in, or none.",
    ]


def _resampled(
    label: Array, probability: Array, threshold: float, subjects: ArrayLike, num_samples: int, seed: int
) -> dict[str, Resampled]:
    """The metrics of one finding that are defined, and the noise of the calibration error."""
    statistics: dict[str, Callable[[Array], Array]] = {
        "auroc": partial(auroc, label, probability),
        "ap": partial(average_precision, label, probability),
        "sensitivity": partial(sensitivity, label, probability, threshold),
        "specificity": partial(specificity, label, probability, threshold),
        "ece": partial(expected_calibration_error, label, probability),
        "noise": partial(calibration_noise, label, probability),
    }
    defined = [name for name in statistics if not isnan(threshold) or name not in ("sensitivity", "specificity")]
    return {name: resample(statistics[name], subjects, num_samples, seed) for name in defined}


def _subject_counts(label: Array, subjects: NDArray[Any]) -> dict[str, int]:
    """How many subjects each proportion counts."""
    positives, negatives = (len(np.unique(subjects[label == truth])) for truth in (1, 0))
    return {"auroc": min(positives, negatives), "sensitivity": positives, "specificity": negatives}


def _interval(metric: str, findings: Sequence[Mapping[str, Resampled]], ends: Callable[[float], ArrayLike]) -> Interval:
    """A metric's mean over the findings that have it; `ends` stands in where no resample differs."""
    having = [each for each in findings if metric in each]
    if not having:
        return UNKNOWN
    mean = mean_resampled([each[metric] for each in having])
    if metric == "ece":
        interval = calibration_interval(mean, mean_resampled([each["noise"] for each in having]))
    else:
        interval = percentile_interval(mean)
    if interval.high - interval.low > 1e-9:  # rounding
        return interval
    return Interval(interval.value, *map(float, np.asarray(ends(interval.value))))


def _mean_ends(rows: Sequence[FindingRow], metric: str, _value: float) -> Array:
    """Means of the ends of the findings' intervals, which is careful: as if all erred on the same side together."""
    intervals = [getattr(row, metric) for row in rows]
    return np.mean([interval[1:] for interval in intervals if not isnan(interval.value)], axis=0)
