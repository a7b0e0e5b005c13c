"""A trained classifier judged once on the test split: tables, predictions and a report to look at."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from numpy.typing import NDArray
from torch import Tensor

from dissect_monai.common import Item
from dissect_monai.handlers.calibration import Calibration, fingerprint, write_calibration
from dissect_monai.handlers.finding_table import (
    finding_rows,
    left_out_rows,
    metrics_by_name,
    table_notes,
    write_findings,
)
from dissect_monai.handlers.validation import OutputCollector, Outputs
from dissect_monai.metrics.classification import expected_calibration_error, fit_temperature, youden_threshold
from dissect_monai.transforms.views import prepare_images
from dissect_monai.visualize.classifier import NUM_BINS, figure_to_png, reliability_plot, roc_plot
from dissect_monai.visualize.page import Case, FindingRow, Picture, write_report
from dissect_monai.visualize.saliency import overlay_png, saliency_maps
from dissect_monai.writing import write_csv

Array = NDArray[np.floating[Any]]
logger = logging.getLogger(__name__)
NO_SALIENCY = "No saliency: nothing raised the output."
CAPTIONS = {
    roc_plot: "ROC curves on the test split: as the threshold falls, the share of positives that are found against the "
    "share of negatives that are called positive. The dotted diagonal is guessing; the legend names the best first.",
    reliability_plot: "Reliability on the test split: how often a finding is there among the labels that were given "
    f"about the same probability, in {NUM_BINS} bins; on the dotted diagonal, probabilities are frequencies. Black: "
    "the labels of all findings pooled, with 95 % Wilson intervals that take labels for independent. Below: how many "
    "labels were given which probability.",
}


class ClassifierEvaluation:
    """Scores the test split that an evaluator (`decollate=False`) has seen, with 95 % intervals by subject.

    Thresholds (Youden) and temperature are fitted on validation alone. Written are findings.csv, predictions.csv,
    calibration.json (temperature and thresholds, for predictions), scores.npz (laid out as that of `ProbeHandler`) and
    report.html; the metrics `auroc`, `ap`, `sensitivity`, `specificity` and `ece` (means over the findings, and
    `<metric>_<finding>`; with `_low` and `_high`) stay with the evaluator for MONAI's `MetricsSaver`. Findings without
    positives or negatives in the test split are named, but have counts alone; those without in validation have no
    threshold, and so no sensitivity and specificity.

    Args:
        validation: loader of the labelled validation images.
        label_names: names of the C findings.
        output_dir: folder for all files.
        mode: name of the scores in scores.npz, such as "finetune".
        temperature_scaling: whether to divide the logits by the temperature that fits validation best.
        num_samples: bootstrap resamples.
        num_worst: cases in the report, at most: those furthest on the wrong side of the threshold.
        facts: headline facts of the report by name, such as the data and the weights.
        seed: seed of the resamples.
    """

    def __init__(
        self,
        validation: Iterable[Mapping[str, Any]],
        label_names: Sequence[str],
        output_dir: str | Path,
        mode: str = "finetune",
        temperature_scaling: bool = False,
        num_samples: int = 1000,
        num_worst: int = 6,
        facts: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.validation = validation
        self.label_names = list(label_names)
        self.output_dir = Path(output_dir)
        self.mode = mode
        self.temperature_scaling = temperature_scaling
        self.num_samples, self.seed = num_samples, seed
        self.num_worst = num_worst
        self.facts = dict(facts or {})
        self.collector = OutputCollector()

    def attach(self, engine: Engine) -> None:
        """Run when `engine` has seen the test split, on the network and data set of `engine`."""
        self.collector.attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Fit on validation, score the test split, write the files and leave the metrics."""
        validation, test = self._validate(engine), self.collector.outputs()
        dataset = engine.data_loader.dataset
        temperature = fit_temperature(*validation) if self.temperature_scaling else 1.0
        probabilities = test.probabilities(temperature)
        pairs = zip(validation.labels.T, validation.probabilities(temperature).T, strict=True)
        thresholds = [youden_threshold(*pair) for pair in pairs]
        subjects = [str(item.get("subject", item["image"])) for item in dataset.data]
        draws = subjects, self.num_samples, self.seed
        rows = finding_rows(self.label_names, test.labels, probabilities, thresholds, *draws)
        missing = left_out_rows(rows)
        if missing:
            names = ", ".join(row.finding for row in missing)
            logger.warning("Left out, for lack of positives or negatives in the test split: %s.", names)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_findings(self.output_dir / "findings.csv", rows)
        fitted = Calibration(temperature, dict(zip(self.label_names, thresholds, strict=True)))
        write_calibration(self.output_dir / "calibration.json", fitted, engine.network)
        self._write_predictions(dataset.data, subjects, test.labels, probabilities)
        engine.state.metrics |= {"temperature": temperature, **metrics_by_name(rows)}
        if len(missing) < len(self.label_names):
            facts = {
                "test images": len(subjects),
                "test subjects": len(set(subjects)),
                "validation images": len(validation.labels),
                "temperature": temperature,
                **(self._scaling_facts(validation, temperature) if self.temperature_scaling else {}),
                "weights' SHA-256": fingerprint(engine.network)[:12],
            }
            cases = self._worst_cases(engine, test.labels, probabilities, thresholds)
            self._write_report(rows, cases, test.labels, probabilities, facts)

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

    def _scaling_facts(self, validation: Outputs, temperature: float) -> dict[str, str]:
        """What the temperature did to the mean calibration error on validation."""
        errors = []
        for each in (1.0, temperature):
            pairs = zip(validation.labels.T, validation.probabilities(each).T, strict=True)
            errors.append(float(np.nanmean([expected_calibration_error(*pair) for pair in pairs])))
        if errors[1] > errors[0]:
            logger.warning("The temperature raises the mean ECE on validation, from %.3f to %.3f.", *errors)
        return {"mean ECE on validation": "{:.3f}, unscaled {:.3f}".format(*reversed(errors))}

    def _write_predictions(
        self, items: Sequence[Item], subjects: Sequence[str], labels: Array, probabilities: Array
    ) -> None:
        columns = [f"{name} {what}" for name in self.label_names for what in ("probability", "label")]
        lines = [
            [item["image"], subject, *(text for pair in zip(*row, strict=True) for text in _texts(*pair))]
            for item, subject, *row in zip(items, subjects, probabilities, labels, strict=True)
        ]
        write_csv(self.output_dir / "predictions.csv", ["image", "subject", *columns], lines)
        arrays = {"labels/findings": labels, f"scores/classifier/-/{self.mode}/findings": probabilities}
        np.savez_compressed(self.output_dir / "scores.npz", subjects=np.array(subjects), **arrays)  # type: ignore[arg-type]

    def _worst_cases(self, engine: Any, labels: Array, probabilities: Array, thresholds: Sequence[float]) -> list[Case]:
        """The worst false alarms and the worst misses, as many of each, with their saliency."""
        dataset = engine.data_loader.dataset
        excess = np.where(labels == 1, -1, 1) * (_logit(probabilities) - _logit(np.asarray(thresholds)))
        cases = []
        for row, column in _largest(excess, labels, -(-self.num_worst // 2)):
            (image,), _ = prepare_images({"image": dataset[row]["image"][None]}, engine.state.device)
            image = image.as_subclass(Tensor)
            saliency = saliency_maps(engine.network, image[None], column)[0]
            cases.append(
                Case(
                    image_png=overlay_png(image, torch.zeros_like(image)),
                    overlay_png=overlay_png(image, saliency) if saliency.any() else NO_SALIENCY,
                    name=Path(dataset.data[row]["image"]).name,
                    finding=self.label_names[column],
                    truth=labels[row, column],
                    probability=probabilities[row, column],
                )
            )
        return cases

    def _write_report(
        self,
        rows: Sequence[FindingRow],
        cases: Sequence[Case],
        labels: Array,
        probabilities: Array,
        facts: Mapping[str, Any],
    ) -> None:
        figures = [
            Picture(figure_to_png(plot(labels, probabilities, self.label_names)), caption)
            for plot, caption in CAPTIONS.items()
        ]
        summary = {
            **self.facts,
            "mode": self.mode,
            **facts,
            "thresholds": "Youden's index on validation",
            "bootstrap resamples": self.num_samples,
            "date": date.today().isoformat(),
            "software": f"dissect_monai {_version()}",
        }
        title, notes = "Evaluation of the classifier", table_notes(rows)
        write_report(self.output_dir / "report.html", title, summary, rows, figures, cases, notes)


def _version() -> str:
    try:
        return version("dissect-monai")
    except PackageNotFoundError:  # run from its folder
        return "not installed"


def _texts(probability: float, label: float) -> tuple[str, str]:
    """Both as the table of predictions has them; an unknown label is blank."""
    return f"{probability:.6f}", "" if np.isnan(label) else f"{label:.0f}"


def _logit(probability: Array) -> Array:
    tiny = np.finfo(np.float64).tiny
    return np.log(probability.clip(tiny)) - np.log((1 - probability).clip(tiny))


def _largest(excess: Array, labels: Array, count: int) -> list[tuple[int, int]]:
    """Row and column of the largest positive values, `count` with label 0 and as many with label 1, largest first."""
    places = []
    for truth in (0, 1):
        values = np.where((labels == truth) & (excess > 0), excess, 0)
        order = np.argsort(-values, axis=None)[:count]
        places += [divmod(int(place), labels.shape[1]) for place in order if values.flat[place]]
    return sorted(places, key=lambda place: -excess[place])
