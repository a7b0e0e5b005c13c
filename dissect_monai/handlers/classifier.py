"""A trained classifier judged once on the test split: tables, predictions and a report to look at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from numpy.typing import ArrayLike
from scipy.special import logit
from torch import Tensor

from dissect_monai.common import Array, Interval, Item
from dissect_monai.data.identity import pseudonyms
from dissect_monai.handlers.calibration import Calibration, provenance, write_calibration
from dissect_monai.handlers.ending import NOT_SCORED, Result, with_interval
from dissect_monai.handlers.probes import MACRO
from dissect_monai.handlers.validation import OutputCollector, Outputs
from dissect_monai.metrics.classification import (
    auroc,
    average_precision,
    expected_calibration_error,
    fit_temperature,
    sensitivity,
    specificity,
    usable_findings,
    youden_threshold,
)
from dissect_monai.metrics.intervals import (
    Resampled,
    mean_resampled,
    percentile_interval,
    resample,
    wilson_interval,
)
from dissect_monai.transforms.views import prepare_images
from dissect_monai.visualize.classifier import (
    curves_figure,
    has_saliency,
    named_curve,
    overlay,
    panels_as_svg,
    saliency_maps,
    whole_image,
)
from dissect_monai.visualize.page import LIMITS, Case, item_name, write_report
from dissect_monai.writing import columns, metric_name, metrics_by_name, write_csv

logger = logging.getLogger(__name__)
HEADINGS = ("Finding", "AUROC", "AP", "Sensitivity", "Specificity", "ECE", "Threshold", "n", "Positives")
NOTES = (
    f"n counts the images whose label is known. Findings without positives or negatives in the test split have no "
    f"metrics and are not drawn; {MACRO} is the mean over those that have the metric.",
    "ECE is the calibration error in 15 bins. Intervals are percentiles of resamples of the subjects. ECE has none: "
    "chance raises it, the more so in resamples. Where no resample differs, as at 0 and 1, Wilson's interval over "
    "subjects stands in, or none.",
)
SALIENCY = "Saliency shows what moved the output, not where a finding is or why it was made."
NO_SALIENCY = "No saliency: nothing raised the output."
NO_STAGES = "No saliency: the stages of this network are not known."
CAPTIONS = (
    "ROC on the test split, lines as in the table: as the threshold falls, the share of positives that are found "
    "against the share of negatives that are called positive; the dotted diagonal is guessing.",
    "Reliability: how often a finding is there among the labels that were given about the same probability; on the "
    "diagonal, probabilities are frequencies.",
)


class FindingRow(NamedTuple):
    """One line of findings.csv: a finding, or the mean over them."""

    finding: str
    auroc: Interval
    ap: Interval
    sensitivity: Interval
    specificity: Interval
    ece: Interval
    threshold: float
    n: int | None  # items whose label is known; None of the mean
    positives: int | None


METRICS = FindingRow._fields[1:6]
TABLES = ("report.html", "findings.csv", "cases.csv")


@dataclass(eq=False)
class ClassifierEvaluation:
    """Scores the test split that an evaluator (`decollate=False`) has seen, with 95 % intervals by subject.

    Thresholds (Youden) and temperature are fitted on validation alone. Written are findings.csv, cases.csv,
    calibration.json (temperature and thresholds, for predictions), scores.npz (laid out as that of `ProbeHandler`) and
    report.html; the metrics `auroc`, `ap`, `sensitivity`, `specificity` and `ece` (means over the findings, and
    `<metric>_<finding>`; with `_low` and `_high`) stay with the evaluator. Findings that lack a class in the test split
    have counts alone; those that lack one in validation have no threshold, and so no sensitivity and specificity.
    """

    validation: Iterable[Mapping[str, Any]]  # loader of the labelled validation images
    label_names: Sequence[str]  # of the C findings
    output_dir: str | Path
    mode: str = "finetune"  # names the scores in scores.npz
    temperature_scaling: bool = False  # whether to divide the logits by the temperature that fits validation best
    num_samples: int = 1000  # bootstrap resamples
    num_worst: int = 6  # cases in the report, at most: those furthest on the wrong side of the threshold
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the report by name, such as the data and the weights
    seed: int = 0  # of the resamples
    collector: OutputCollector = field(default_factory=OutputCollector, init=False)

    def attach(self, engine: Engine) -> None:
        """Run when `engine` has seen the test split, on the network and data set of `engine`."""
        self.collector.attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Fit on validation, score the test split, write the files and leave the metrics."""
        validation, test = self._validate(engine), self.collector.outputs()
        dataset, folder = engine.data_loader.dataset, Path(self.output_dir)
        temperature = fit_temperature(*validation) if self.temperature_scaling else 1.0
        probabilities = test.probabilities(temperature)
        pairs = zip(validation.labels.T, validation.probabilities(temperature).T, strict=True)
        thresholds = [youden_threshold(*pair) for pair in pairs]
        subjects = [str(item.get("subject", item["image"])) for item in dataset.data]
        names = pseudonyms(dataset.data)  # to be written; resamples follow from the order of the subjects themselves
        draws = subjects, self.num_samples, self.seed
        rows = finding_rows(self.label_names, test.labels, probabilities, thresholds, *draws)
        missing = [row.finding for row in rows[1:] if isnan(row.auroc.value)]
        if missing:
            logger.warning("Left out, for lack of positives or negatives in the test split: %s.", ", ".join(missing))
        write_findings(folder / "findings.csv", rows)
        fitted = Calibration(temperature, dict(zip(self.label_names, thresholds, strict=True)))
        write_calibration(folder / "calibration.json", fitted, engine.network)
        self._write_cases(dataset.data, names, test.labels, probabilities)
        engine.state.metrics |= {"temperature": temperature, **finding_metrics(rows)}
        if len(missing) == len(self.label_names):
            engine.state.result = Result(NOT_SCORED, TABLES[1:])
            Path(folder, TABLES[0]).unlink(missing_ok=True)  # of an earlier evaluation
            return
        text = f"{with_interval('AUROC', rows[0].auroc)} on the test split, a mean over findings (guessing: 0.5)"
        engine.state.result = Result(text, TABLES)
        facts = {
            "mean AUROC": rows[0].auroc,
            "test images": len(subjects),
            "test subjects": len(set(subjects)),
            "validation images": len(validation.labels),
            **self.facts,
            "mode": self.mode,
            "temperature": temperature,
            "thresholds": "Youden's index on validation",
        }
        curves = curves_figure(test.labels, probabilities, self.label_names)
        figures = dict(zip(CAPTIONS, panels_as_svg(curves), strict=True))
        for index in usable_findings(test.labels, probabilities):
            rows[1 + index] = rows[1 + index]._replace(finding=named_curve(self.label_names[index], index))
        cases = self._worst_cases(engine, names, test.labels, probabilities, thresholds)
        path, title, limits = folder / "report.html", "Evaluation of the classifier", (*LIMITS, SALIENCY)
        facts = provenance(facts, engine.network, self.num_samples)
        write_report(path, title, facts, HEADINGS, rows, figures, cases, "Worst cases", NOTES, limits)

    def _validate(self, engine: Any) -> Outputs:
        """The network's outputs on validation, run as the test split is."""
        collector = OutputCollector()
        SupervisedEvaluator(
            device=engine.state.device,
            val_data_loader=self.validation,
            network=engine.network,
            inferer=engine.inferer,
            prepare_batch=engine.prepare_batch,
            val_handlers=[collector],
            decollate=False,
        ).run()
        return collector.outputs()

    def _write_cases(self, items: Sequence[Item], subjects: Sequence[str], labels: Array, probabilities: Array) -> None:
        names = [f"{name} {what}" for name in self.label_names for what in ("probability", "label")]
        lines = []
        for item, subject, *row in zip(items, subjects, probabilities, labels, strict=True):
            cells = ((f"{value:.6f}", "" if isnan(label) else int(label)) for value, label in zip(*row, strict=True))
            lines.append([item["image"], subject, *chain.from_iterable(cells)])
        write_csv(Path(self.output_dir, "cases.csv"), ["image", "subject", *names], lines)
        arrays = {"labels/findings": labels, f"scores/classifier/-/{self.mode}/findings": probabilities}
        scores = Path(self.output_dir, "scores.npz")
        np.savez_compressed(scores, subjects=np.array(subjects), **arrays)  # type: ignore[arg-type]

    def _worst_cases(
        self, engine: Any, subjects: Sequence[str], labels: Array, probabilities: Array, thresholds: Sequence[float]
    ) -> list[Case]:
        """The worst false alarms and the worst misses, as many of each, with their saliency."""
        dataset = engine.data_loader.dataset
        reached, needed = (logit(np.clip(each, 1e-12, 1 - 1e-12)) for each in (probabilities, thresholds))
        excess = np.where(labels == 1, -1, 1) * (reached - needed)
        cases, has_stages = [], has_saliency(engine.network)
        for row, column in _largest(excess, labels, -(-self.num_worst // 2)):
            (image,), _ = prepare_images({"image": dataset[row]["image"][None]}, engine.state.device)
            image = image.as_subclass(Tensor)[None]
            saliency = saliency_maps(engine.network, image, column)[0] if has_stages else torch.zeros(1, 1, 1)
            unseen = NO_SALIENCY if has_stages else NO_STAGES
            whole, finding = whole_image(dataset.data[row]["image"]), self.label_names[column]
            caption = f"{finding}: probability {probabilities[row, column]:.3g}, threshold {thresholds[column]:.3g}"
            pictures: dict[str, bytes | str] = {
                "Image": overlay(whole, torch.zeros_like(whole), kind="JPEG"),
                f"{caption}.": overlay(whole, saliency, caption, "JPEG") if saliency.any() else unseen,
            }
            facts = {
                "line of cases.csv": row + 2,  # which has the image; the page may leave the house
                "probability": probabilities[row, column],
                "threshold": thresholds[column],
            }
            title = f"{finding}, {'missed' if labels[row, column] == 1 else 'false alarm'}: {item_name(row, subjects)}"
            cases.append(Case(title, pictures, facts))
        return cases


def _largest(excess: Array, labels: Array, count: int) -> list[tuple[int, int]]:
    """Row and column of the largest positive values, `count` with label 0 and as many with label 1, largest first."""
    places = []
    for truth in (0, 1):
        values = np.where((labels == truth) & (excess > 0), excess, 0)
        order = np.argsort(-values, axis=None)[:count]
        places += [divmod(int(place), labels.shape[1]) for place in order if values.flat[place]]
    return sorted(places, key=lambda place: -excess[place])


def finding_rows(
    label_names: Sequence[str],
    labels: Array,
    probabilities: Array,
    thresholds: Sequence[float],
    subjects: Sequence[str],
    num_samples: int = 1000,
    seed: int = 0,
) -> list[FindingRow]:
    """A line for the mean over the `usable_findings`, then one for every finding, of which others have counts alone.

    Intervals are 95 % percentiles of resamples of the subjects; ECE has none. Where no resample differs, as where all
    positives are found, AUROC, sensitivity and specificity have Wilson's interval over the subjects that they count
    (AUROC: those of the rarer class), their means the means of such ends, others none. A threshold of NaN leaves a
    finding without sensitivity and specificity. Labels, 1, 0 or NaN (unknown), and probabilities are (N, C).
    """
    found = {
        index: _resampled(labels[:, index], probabilities[:, index], thresholds[index], subjects, num_samples, seed)
        for index in usable_findings(labels, probabilities)
    }
    rows = []
    for index, (name, label) in enumerate(zip(label_names, labels.T, strict=True)):
        intervals = {metric: _interval(metric, [found.get(index, {})]) for metric in METRICS}
        positives, negatives = (len(np.unique(np.asarray(subjects)[label == truth])) for truth in (1, 0))
        counts = {"auroc": min(positives, negatives), "sensitivity": positives, "specificity": negatives}
        for metric, count in counts.items():
            value = intervals[metric].value
            if isnan(intervals[metric].low) and not isnan(value):
                intervals[metric] = Interval(value, *map(float, wilson_interval(value, count)))
        n, num_positives = int((~np.isnan(label)).sum()), int(np.nansum(label))
        rows.append(FindingRow(name, threshold=thresholds[index], n=n, positives=num_positives, **intervals))
    means = {metric: _interval(metric, list(found.values())) for metric in METRICS}
    for metric, mean in means.items():
        if isnan(mean.low) and not isnan(mean.value):  # as if all erred on the same side together, which is careful
            known = [getattr(row, metric) for row in rows if not isnan(getattr(row, metric).value)]
            means[metric] = Interval(mean.value, *np.mean([interval[1:] for interval in known], axis=0).tolist())
    return [FindingRow(MACRO, threshold=nan, n=None, positives=None, **means), *rows]


def finding_metrics(rows: Sequence[FindingRow]) -> dict[str, float]:
    """`auroc`, `auroc_low`, `auroc_high`, `auroc_<finding>`, ... of the lines that have metrics."""
    found = {}
    for row, metric in product((row for row in rows if not isnan(row.auroc.value)), METRICS):
        name = metric if row.finding == MACRO else metric_name(metric, row.finding)
        found[name] = getattr(row, metric)
    return metrics_by_name(found)


def write_findings(path: Path, rows: Sequence[FindingRow]) -> None:
    """Write the table as CSV, its thresholds with six digits; what is unknown is blank."""
    lines = []
    for row in rows:
        threshold = "" if isnan(row.threshold) else f"{row.threshold:.6g}"
        lines.append([row.finding, *(getattr(row, metric) for metric in METRICS), threshold, row.n, row.positives])
    write_csv(path, columns(FindingRow), lines)


def _resampled(
    label: Array, probability: Array, threshold: float, subjects: ArrayLike, num_samples: int, seed: int
) -> dict[str, Resampled]:
    """The metrics of one finding that are defined."""
    statistics: dict[str, Callable[[Array], Array]] = {
        "auroc": partial(auroc, label, probability),
        "ap": partial(average_precision, label, probability),
        "ece": partial(expected_calibration_error, label, probability),
    }
    if not isnan(threshold):
        statistics["sensitivity"] = partial(sensitivity, label, probability, threshold)
        statistics["specificity"] = partial(specificity, label, probability, threshold)
    return {name: resample(statistic, subjects, num_samples, seed) for name, statistic in statistics.items()}


def _interval(metric: str, findings: Sequence[Mapping[str, Resampled]]) -> Interval:
    """A metric's mean over the findings that have it; without ends where no resample differs."""
    having = [each for each in findings if metric in each]
    if not having:
        return Interval(nan, nan, nan)
    mean = mean_resampled([each[metric] for each in having])
    if metric == "ece":  # chance raises it, and resampling raises it again
        return Interval(mean.value, nan, nan)
    interval = percentile_interval(mean)
    differs = interval.high - interval.low > 1e-9  # rounding
    return interval if differs else Interval(interval.value, nan, nan)
