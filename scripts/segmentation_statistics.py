"""Means over seeds of the scores of a segmentation, and paired differences with intervals over subjects and seeds."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_statistics import Array, difference_row, mean_row, resample

from dissect_monai.handlers.segmentation_table import METRICS, CaseScores, subject_scores, summarize
from dissect_monai.metrics.segmentation import StructureScore


def cases_file(folder: Path) -> Path:
    """Where an evaluation of a segmentation leaves its scores."""
    return folder / "eval" / "cases.csv"


def read_cases(folder: Path) -> list[CaseScores]:
    """Read eval/cases.csv of an evaluation, as `write_tables` wrote it."""
    cases: dict[tuple[str, str], list[StructureScore]] = {}
    with open(cases_file(folder), newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            numbers = {name: float(line[name] or "nan") for name in (*METRICS, "label_ml", "pred_ml")}
            values = tuple(int(value) for value in line["values"].split())
            score = StructureScore(line["structure"], values, outcome=line["outcome"], **numbers)
            cases.setdefault((line["case"], line["subject"]), []).append(score)
    return [CaseScores(*name, scores) for name, scores in cases.items()]


def same_cases(one: Sequence[CaseScores], other: Sequence[CaseScores]) -> bool:
    """Whether two evaluations scored the same structures of the same subjects with the same labels, in one order."""
    first, second = (
        [
            (Path(case.case).name, case.subject, s.structure, s.values, s.label_ml)
            for case in each
            for s in case.structures
        ]
        for each in (one, other)
    )
    return first == second


def subject_means(values: Array, weights: Array) -> Array:
    """Mean over subjects for each row of weights and each seed, (1 + R, S), without subjects that have no value.

    Args:
        values: one of each subject and seed, (S, N), NaN where it is undefined.
        weights: how often each subject counts, (1 + R, N).
    """
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return weights @ np.where(known, values, 0).T / (weights @ known.T)


def segmentation_rows(
    cases: Mapping[str, Sequence[Sequence[CaseScores]]], pairs: Iterable[Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """Rows of one variant: mean and std over seeds by recipe and metric, then the differences of pairs of recipes.

    `dice`, `hd95` and `surface_dice` are means over subjects of the subject's mean over structures, `missed` counts
    structures, and `dice/<structure>` is the mean over the subjects that have it. What is undefined is left out of a
    mean; a metric without any value in one of the seeds is NaN, and has no difference. A missed structure has no
    HD95, so HD95 and its differences are to be read beside `missed`.

    Args:
        cases: the cases of each recipe and seed.
        pairs: names of two recipes each, of which the second is subtracted from the first.
    """
    by_subject = {recipe: [subject_scores(each) for each in by_seed] for recipe, by_seed in cases.items()}
    first = next(iter(by_subject.values()))
    weights, seed_share = resample(np.array([score.subject for score in first[0]]), len(first))
    means = {
        recipe: {
            metric: subject_means(np.array([[getattr(score, metric) for score in each] for each in by_seed]), weights)
            for metric in METRICS
        }
        for recipe, by_seed in by_subject.items()
    }
    for recipe, by_metric in means.items():
        once = {metric: values[0] for metric, values in by_metric.items()}
        for metric, values in {**once, **structure_values(cases[recipe])}.items():
            yield {"metric": metric, **mean_row(recipe, values)}
    for ours, theirs in pairs:
        for metric in METRICS:
            sides = means[ours][metric], means[theirs][metric]
            if not np.isnan([side[0] for side in sides]).any():
                yield {"metric": metric, **difference_row(f"{ours} - {theirs}", *sides, seed_share)}


def structure_values(by_seed: Sequence[Sequence[CaseScores]]) -> dict[str, Array]:
    """The number of missed structures, and the mean Dice of each structure, by seed: (S,) each."""
    summaries = [summarize(cases, num_samples=1) for cases in by_seed]
    missed = np.array([mean.missed for mean, *_ in summaries], dtype=float)
    dice = {
        f"dice/{of_seeds[0].structure}": np.array([each.dice.value for each in of_seeds])
        for of_seeds in zip(*(structures for _, *structures in summaries), strict=True)
    }
    return {"missed": missed, **dice}
