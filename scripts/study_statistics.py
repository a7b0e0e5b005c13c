"""Means over seeds of what the evaluations of a study left, and differences with intervals over subjects and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dissect_monai.metrics.classification import auroc, average_precision, usable_findings
from dissect_monai.writing import read_csv

Array = NDArray[np.floating[Any]]
Measure = Callable[..., Array]  # labels, scores, weights → values, as in dissect_monai.metrics
Folders = Mapping[str, Sequence[Path]]  # recipe → the evaluations of its seeds
Pairs = Sequence[Sequence[str]]  # names of two each that are compared
Line = dict[str, str]  # of a CSV file
NUM_SAMPLES = 1000  # bootstrap resamples
METRICS = ("dice", "hd95", "surface_dice")
SCORED = ("subject", "structure", "values", "label_ml")  # columns of cases.csv that all evaluations share


class StudyError(Exception):
    """What is wrong with a study, its data or one of its runs, in one line."""


class Key(NamedTuple):
    """What scores are of."""

    task: str
    features: str = ""
    probe: str = ""


class Scores(NamedTuple):
    """What an evaluation leaves in eval/scores.npz."""

    truth: dict[str, NDArray[Any]]  # "subjects", (N,), and "labels/<task>", (N, C), 1, 0 or NaN
    sources: dict[str, dict[Key, Array]]  # source → (N, C) each; the first source is the network, the others baselines


def summarise(variant: str, folders: Folders, pairs: Pairs, with_ap: bool) -> Iterator[dict[str, Any]]:
    """Rows of one variant: mean and std over seeds by recipe and metric, then differences and their intervals.

    Args:
        variant: its name, which metrics begin with.
        folders: the evaluations.
        pairs: names of two recipes each, of which the second is subtracted from the first; by default the first with
            all others, baselines included, and with the best baseline.
        with_ap: whether a classifier has rows of its average precision, too.

    Raises:
        StudyError: if the evaluations scored different items, or no finding can be scored.
    """
    first = next(iter(folders.values()))[0]
    if (first / "eval" / "scores.npz").exists():
        measures = {"auroc": auroc, **({"ap": average_precision} if with_ap else {})}
        return classifier_rows(variant, folders, pairs, measures)
    return segmentation_rows(variant, folders, pairs)


def classifier_rows(
    variant: str, folders: Folders, pairs: Pairs, measures: Mapping[str, Measure]
) -> Iterator[dict[str, Any]]:
    """Rows of evaluations that left the scores of a classifier; the means are over findings."""
    truth, scores = collect(variant, folders)
    weights, seed_share = resample(truth.pop("subjects"), len(next(iter(folders.values()))))
    for name, labels in truth.items():
        task = name.removeprefix("labels/")
        of_task = {recipe: {k: s for k, s in each.items() if k.task == task} for recipe, each in scores.items()}
        of_runs = [each for by_key in of_task.values() for of_seeds in by_key.values() for each in of_seeds]
        columns = sorted(set.intersection(*({*usable_findings(labels, each)} for each in of_runs)))
        if not columns:
            raise StudyError(f"no column of {task} in {variant} has positives, negatives and scores of every run.")
        if left_out := sorted(set(range(labels.shape[1])) - set(columns)):
            print(f"{variant}: columns {left_out} of {task} are left out, for lack of a class or of a run's scores")
        for suffix, measure in measures.items():
            values = {
                recipe: {k: macro(measure, labels[:, columns], s[..., columns], weights) for k, s in by_key.items()}
                for recipe, by_key in of_task.items()
            }
            for key, row in rows_of(values, seed_share, pairs):
                yield {**row, "metric": f"{variant}/{task}/{key.probe}/{key.features}/{suffix}"}


def collect(variant: str, folders: Folders) -> tuple[dict[str, NDArray[Any]], dict[str, dict[Key, Array]]]:
    """Subjects and labels of all evaluations, and by recipe or baseline the scores of all seeds, (S, N, C).

    Baselines are those that were scored beside the first recipe.
    """
    evaluations = {recipe: [read_scores(folder) for folder in of_seeds] for recipe, of_seeds in folders.items()}
    first, *_ = evaluations.values()
    network, *baselines = first[0].sources
    scores: dict[str, dict[Key, Array]] = {}
    for recipe, by_seed in evaluations.items():
        if not all(is_equal(each.truth, first[0].truth) for each in by_seed):
            raise StudyError(f"the runs of {variant} scored different images or labels, which can't be compared.")
        # Recipes may name their probe differently (finetune, scratch); the names of the first one are everybody's.
        own = next(iter(by_seed[0].sources))
        names = {key: partner(key, by_seed[0].sources[own]) for key in first[0].sources[network]}
        scores[recipe] = {
            key: np.stack([each.sources[own][name] for each in by_seed]) for key, name in names.items() if name
        }
    for baseline in baselines:
        keys = first[0].sources[baseline]
        scores.setdefault(baseline, {key: np.stack([each.sources[baseline][key] for each in first]) for key in keys})
    return first[0].truth, scores


def read_scores(folder: Path) -> Scores:
    """Read eval/scores.npz of an evaluation."""
    found = Scores({}, {})
    with np.load(folder / "eval" / "scores.npz") as file:
        for name, array in file.items():
            if name.startswith("scores/"):
                _, source, features, probe, task = name.split("/")
                found.sources.setdefault(source, {})[Key(task, features, probe)] = array
            else:
                found.truth[name] = array
    return found


def partner(key: Key, others: Iterable[Key]) -> Key | None:
    """The same key among others, else the only one of its task and probe, else the only one of its task."""
    rivals = [other for other in others if other.task == key.task]
    for candidates in ({key} & {*rivals}, [other for other in rivals if other.probe == key.probe], rivals):
        if len(candidates) == 1:
            return next(iter(candidates))
    return None


def is_equal(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    """Whether both are of the same subjects with the same labels, in one order."""
    return one.keys() == other.keys() and all(
        np.array_equal(each, other[name], equal_nan=each.dtype.kind == "f") for name, each in one.items()
    )


def macro(measure: Measure, labels: Array, scores: Array, weights: Array) -> Array:
    """Mean over columns for each row of weights and each seed, (1 + R, S), without columns that are undefined there."""
    blocks = np.array_split(weights, -(-len(weights) // 100))  # so that memory does not grow with the resamples

    def of_seed(scores: Array) -> Array:
        columns = list(zip(labels.T, scores.T, strict=True))
        values = np.concatenate([[measure(*column, block) for column in columns] for block in blocks], axis=1)
        return known_mean(values, axis=0)

    return np.stack([of_seed(each) for each in scores], axis=1)


def segmentation_rows(variant: str, folders: Folders, pairs: Pairs) -> Iterator[dict[str, Any]]:
    """Rows of evaluations that left the scores of structures.

    `dice`, `hd95` and `surface_dice` are means over subjects of the subject's mean over structures, `missed` counts
    structures, and `dice/<structure>` is the mean over the subjects that have it. What is undefined is left out of a
    mean; a metric without any value in one of the seeds has no row. A missed structure has no HD95, so HD95 and its
    differences are to be read beside `missed`.
    """
    cases = {recipe: [by_first_case(read_cases(folder)) for folder in of_seeds] for recipe, of_seeds in folders.items()}
    first = next(iter(cases.values()))
    scored = [  # wherever the data lie
        [(Path(line["case"]).name, *(line[name] for name in SCORED)) for line in lines]
        for by_seed in cases.values()
        for lines in by_seed
    ]
    if any(each != scored[0] for each in scored):
        raise StudyError(f"the runs of {variant} scored different subjects, structures or labels.")
    weights, seed_share = resample(np.array([*dict.fromkeys(line["subject"] for line in first[0])]), len(first))
    values: dict[str, dict[Key, Array]] = {}
    for recipe, by_seed in cases.items():
        scores = {metric: np.stack([score_matrix(lines, metric) for lines in by_seed]) for metric in METRICS}
        values[recipe] = {Key(metric): subject_means(known_mean(each), weights) for metric, each in scores.items()}
        missed = [sum(line["outcome"] == "missed" for line in lines) for lines in by_seed]
        values[recipe][Key("missed")] = np.array([missed], dtype=float)
        for index, name in enumerate(dict.fromkeys(line["structure"] for line in first[0])):
            values[recipe][Key(f"dice/{name}")] = known_mean(scores["dice"][..., index])[None]
    for key, row in rows_of(values, seed_share, pairs):
        if np.isnan(row["mean"]):
            print(f"{variant}: {row['recipe']} has no row of {key.task}, which is undefined in a seed or more")
        else:
            yield {**row, "metric": f"{variant}/{key.task}"}


def read_cases(folder: Path) -> list[Line]:
    """Read eval/cases.csv of an evaluation: a line for every case and structure."""
    return read_csv(folder / "eval" / "cases.csv")


def by_first_case(lines: Sequence[Line]) -> list[Line]:
    """The lines with subjects called like the file of their first case: pseudonyms of two copies of the data differ."""
    names: dict[str, str] = {}
    return [{**line, "subject": names.setdefault(line["subject"], Path(line["case"]).name)} for line in lines]


def score_matrix(lines: Sequence[Line], metric: str) -> Array:
    """A metric of each subject and structure, the mean of its cases, (N, K); NaN where there is none."""
    cells: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        cells.setdefault((line["subject"], line["structure"]), []).append(float(line[metric] or "nan"))
    subjects, structures = (dict.fromkeys(line[name] for line in lines) for name in ("subject", "structure"))
    return np.array([[known_mean(cells.get((one, name), [np.nan])) for name in structures] for one in subjects])


def subject_means(values: Array, weights: Array) -> Array:
    """Mean over subjects, (1 + R, S), of values (S, N), by how often each subject counts, (1 + R, N)."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return weights @ np.where(known, values, 0).T / (weights @ known.T)


def known_mean(values: ArrayLike, axis: int = -1) -> Array:
    """Mean without what is NaN; NaN where nothing is known."""
    values = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=axis) / (~np.isnan(values)).sum(axis)


def resample(subjects: NDArray[Any], num_seeds: int) -> tuple[Array, Array]:
    """How often each item counts, (1 + R, N), first once each, and each seed's share in the R resamples, (R, S)."""
    names = {name: index for index, name in enumerate(dict.fromkeys(subjects.tolist()))}  # pseudonyms have no order
    item_subject = np.array([names[subject] for subject in subjects.tolist()])
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), NUM_SAMPLES)
    seed_share = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_SAMPLES) / num_seeds
    return np.concatenate([np.ones((1, len(item_subject))), drawn[:, item_subject]]), seed_share


def rows_of(
    values: Mapping[str, Mapping[Key, Array]], seed_share: Array, pairs: Pairs
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Rows of means, then of differences, each with what it is of.

    Args:
        values: by recipe or baseline, of shape (1 + R, S): of all items, then of R resamples of subjects, per seed.
            What has no resamples has no differences.
        seed_share: share of each seed in each resample, (R, S).
        pairs: as `summarise` takes them.
    """
    for name, by_key in values.items():
        for key, (once, *_) in by_key.items():
            yield key, {"recipe": name, "mean": once.mean(), "std": f"{once.std(ddof=1):.4f}", "n": len(once)}
    for side, rival, names in comparisons(list(values), pairs):
        for key, ours in values[side].items():
            found = [values[name][other] for name in names if (other := partner(key, values[name])) is not None]
            if len(found) < len(names) or len(ours) == 1 or np.isnan([ours[0], *(each[0] for each in found)]).any():
                continue
            theirs = max(found, key=lambda each: float(each[0].mean()))
            value, low, high = difference(ours, theirs, seed_share)
            std, num_seeds = f"{low:.4f}..{high:.4f}", seed_share.shape[1]
            yield key, {"recipe": f"{side} - {rival}", "mean": value, "std": std, "n": num_seeds}


def comparisons(names: Sequence[str], pairs: Pairs) -> list[tuple[str, str, list[str]]]:
    """What is compared: one side, what the other is called, and of whom the better one it is."""
    found = [(ours, theirs, [theirs]) for ours, theirs in pairs or [(names[0], other) for other in names[1:]]]
    if not pairs and {"random", "pixels"} <= set(names[1:]):
        found.append((names[0], "best of random, pixels", ["random", "pixels"]))
    return found


def difference(ours: Array, theirs: Array, seed_share: Array) -> tuple[float, float, float]:
    """Difference of two means over seeds, and its 95 % bootstrap interval over subjects and seeds.

    Each resample draws subjects with all of their images, and the seeds, both with replacement and the same for both
    sides: a seed fixes the drawn labels, the order and the first weights, so seeds are paired, too. With three seeds
    the interval is still somewhat too narrow, as the bootstrap of so few always is.
    """
    by_seed = ours - theirs
    low, high = np.nanpercentile((by_seed[1:] * seed_share).sum(1), (2.5, 97.5))
    return float(by_seed[0].mean()), float(low), float(high)
