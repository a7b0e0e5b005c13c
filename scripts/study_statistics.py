"""Means over seeds of an experiment, and paired differences with intervals over subjects and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dissect_monai.metrics.intervals import Interval

Array = NDArray[np.floating[Any]]
Measure = Callable[..., Array]  # labels, scores, weights → values, as in dissect_monai.metrics
NUM_SAMPLES = 1000  # bootstrap resamples


class Key(NamedTuple):
    """What scores are of."""

    task: str
    features: str
    probe: str


class Scores(NamedTuple):
    """What an evaluation leaves in eval/scores.npz."""

    subjects: NDArray[Any]
    labels: dict[str, Array]  # task → (N, C), 1, 0 or NaN
    sources: dict[str, dict[Key, Array]]  # source → (N, C) each; the first source is the network, the others baselines


def read_scores(folder: Path) -> Scores:
    """Read eval/scores.npz of an evaluation."""
    with np.load(folder / "eval" / "scores.npz") as file:
        arrays = {tuple(name.split("/")): file[name] for name in file.files}
    sources: dict[str, dict[Key, Array]] = {}
    for name, array in arrays.items():
        if name[0] == "scores":
            _, source, features, probe, task = name
            sources.setdefault(source, {})[Key(task, features, probe)] = array
    labels = {name[1]: array for name, array in arrays.items() if name[0] == "labels"}
    return Scores(arrays["subjects",], labels, sources)


def same_items(one: Scores, other: Scores) -> bool:
    """Whether two evaluations scored the same subjects with the same labels, in one order."""
    return (
        one.subjects.tolist() == other.subjects.tolist()
        and one.labels.keys() == other.labels.keys()
        and all(np.array_equal(labels, other.labels[task], equal_nan=True) for task, labels in one.labels.items())
    )


def partner(key: Key, others: Iterable[Key]) -> Key | None:
    """The same key among others, else the only one of its task and probe, else the only one of its task."""
    rivals = [other for other in others if other.task == key.task]
    for candidates in (
        [other for other in rivals if other == key],
        [other for other in rivals if other.probe == key.probe],
        rivals,
    ):
        if len(candidates) == 1:
            return candidates[0]
    return None


def resample(subjects: NDArray[Any], num_seeds: int) -> tuple[Array, Array]:
    """How often each item counts, (1 + R, N), first once each, and each seed's share in the R resamples, (R, S)."""
    names, item_subject = np.unique(subjects, return_inverse=True)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), NUM_SAMPLES)
    seed_share = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_SAMPLES) / num_seeds
    return np.concatenate([np.ones((1, len(item_subject))), drawn[:, item_subject]]), seed_share


def usable_columns(labels: Array, scores: Iterable[Array]) -> list[int]:
    """Columns with both classes and with scores from every run, so that all means are over the same findings."""
    known = ~np.isnan(labels)
    missing = np.any([(np.isnan(each) & known).any((0, 1)) for each in scores], axis=0)
    return [i for i in range(labels.shape[1]) if not missing[i] and {0, 1} <= set(labels[known[:, i], i])]


def macro(measure: Measure, labels: Array, scores: Array, weights: Array) -> Array:
    """Mean over columns for each row of weights and each seed, (1 + R, S), without columns that are undefined there."""
    blocks = np.array_split(weights, -(-len(weights) // 100))  # so that memory does not grow with the resamples

    def of_seed(scores: Array) -> Array:
        columns = list(zip(labels.T, scores.T, strict=True))
        values = np.concatenate([[measure(*column, block) for column in columns] for block in blocks], axis=1)
        with np.errstate(invalid="ignore"):
            return np.nansum(values, axis=0) / (~np.isnan(values)).sum(0)

    return np.stack([of_seed(each) for each in scores], axis=1)


def difference(ours: Array, theirs: Array, seed_share: Array) -> Interval:
    """Difference of two means over seeds with its 95 % bootstrap interval over subjects and seeds.

    Each resample draws subjects with all of their images, and the seeds, both with replacement and the same for both
    sides: a seed fixes the drawn labels, the order and the first weights, so seeds are paired, too. With three seeds
    the interval is still somewhat too narrow, as the bootstrap of so few always is.

    Args:
        ours: values of all items (first row) and of R resamples of subjects, per seed, shape (1 + R, S).
        theirs: the same of the other side.
        seed_share: share of each seed in each resample, shape (R, S).
    """
    by_seed = ours - theirs
    low, high = np.nanpercentile((by_seed[1:] * seed_share).sum(1), (2.5, 97.5))
    return Interval(float(by_seed[0].mean()), float(low), float(high))


def mean_row(recipe: str, once: Array) -> dict[str, Any]:
    """Row of a mean and a standard deviation over seeds, (S,)."""
    return {"recipe": recipe, "mean": once.mean(), "std": f"{once.std(ddof=1):.4f}", "n": len(once)}


def difference_row(name: str, ours: Array, theirs: Array, seed_share: Array) -> dict[str, Any]:
    """Row of a difference and its interval, from what `difference` takes."""
    value, low, high = difference(ours, theirs, seed_share)
    return {"recipe": name, "mean": value, "std": f"{low:.4f}..{high:.4f}", "n": seed_share.shape[1]}


def rows_of(
    values: Mapping[str, Mapping[Key, Array]], seed_share: Array, pairs: Iterable[Sequence[str]] = ()
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Rows of one variant, task and measure from values of shape (1 + R, S) by recipe or baseline.

    Args:
        values: of recipes and baselines.
        seed_share: share of each seed in each resample, (R, S).
        pairs: names of two each that are compared; by default the first with all others, and with the best baseline.
    """
    for name, by_key in values.items():
        for key, (once, *_) in by_key.items():
            yield key, mean_row(name, once)
    for side, rival, names in comparisons(list(values), pairs):
        for key, ours in values[side].items():
            found = [values[name][other] for name in names if (other := partner(key, values[name])) is not None]
            if len(found) == len(names):
                theirs = max(found, key=lambda each: float(each[0].mean()))
                yield key, difference_row(f"{side} - {rival}", ours, theirs, seed_share)


def comparisons(names: Sequence[str], pairs: Iterable[Sequence[str]]) -> list[tuple[str, str, list[str]]]:
    """What is compared: one side, what the other is called, and of whom the better one it is."""
    if pairs := list(pairs):
        return [(ours, theirs, [theirs]) for ours, theirs in pairs]
    first, *others = names
    found = [(first, other, [other]) for other in others]
    if {"random", "pixels"} <= set(others):
        found.append((first, "best of random, pixels", ["random", "pixels"]))
    return found
