"""Judge frozen encoders of one study on labelled X-rays: linear probes at fractions of the labels, over many draws.

    python scripts/judge_encoders.py runs/STUDY --data DIR [--table results/STUDY.csv] [--select]

runs/STUDY is what `run_experiments.py` has trained: RECIPE/seedN/models/model.pt. Beside the recipes stand three random
encoders and the principal components of the pixels, fitted on all films of a set that is cross-validated. Features are
kept as float16 beside the weights.

Paediatric films (cxr_kermany) are scored on their test split; C is chosen on validation. NIH films are cross-validated
by subject: of five folds one is scored, the next chooses C, and a fraction of the subjects of the others trains. An
AUROC is a mean over draws (of subjects, of folds) and seeds; its interval, and that of a difference, is a bootstrap of
the scored subjects, the same for all recipes.

With --select, to choose defaults by, no film of a test split is read: the training and validation films of all
three sets are cross-validated, with all labels of the training folds.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
from fire.decorators import SetParseFn
from monai.bundle import ConfigParser
from monai.data import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from dissect_monai import cached_dataset, load_weights, read_datalist, read_settings
from dissect_monai.data.datalists import label_matrix
from dissect_monai.data.splits import draw_subjects
from dissect_monai.metrics.classification import auroc
from dissect_monai.metrics.intervals import Resampled, percentile_interval, resample
from dissect_monai.metrics.probes import extract_features, linear_probe, pixel_pca
from dissect_monai.writing import written_atomically

ROOT = Path(__file__).resolve().parent.parent
EVALUATE = ROOT / "bundles" / "pretrain_vq_ssl" / "configs" / "evaluate.json"
RANDOM, PIXELS = "random", "pixels"
FRACTIONS = (0.01, 0.05, 0.2, 1.0)
NIH_FINDINGS = ("Pneumonia", "Infiltration", "Atelectasis", "Edema", "Effusion", "No finding")
MIN_POSITIVES = 30  # of a finding that is scored
NUM_DRAWS, NUM_FOLDS, NUM_SAMPLES, NUM_SOURCE_FILMS = 10, 5, 1000, 3000
PAEDIATRIC = "cxr_kermany"
CLASSES = ["normal", "bacterial_pneumonia", "viral_pneumonia"]
LABELLED = (PAEDIATRIC, "cxr_nih", "cxr_nih64")
FIELDS = ("set", "question", "fraction", "features", "recipe", "less", "auroc", "low", "high", "seeds", "draws")

Array = NDArray[np.floating[Any]]
Items = list[dict[str, Any]]


class Arm(NamedTuple):
    """One encoder, or the baseline of pixels."""

    name: str
    seed: int
    encoder: str
    image_size: int
    folder: Path  # keeps the features
    weights: Path | None = None


class Films(NamedTuple):
    """One labelled set."""

    name: str
    splits: dict[str, Items]  # one, which is cross-validated, or training, validation and test
    questions: dict[str, list[Array]]  # name → labels (N, C) of each split

    @property
    def scored(self) -> Items:
        """The items that are scored."""
        return list(self.splits.values())[-1]


def films(data: Path, select: bool) -> Iterator[Films]:
    """The sets, and what is asked of each."""
    for name in LABELLED:
        datalist = read_datalist(str(data / name)).labelled()
        splits = {"training": datalist.training, "validation": datalist.validation, "test": datalist.test}
        if select:
            del splits["test"]
        if select or name != PAEDIATRIC:
            splits = {"all": [item for items in splits.values() for item in items]}
        if name == PAEDIATRIC:
            labels = [np.array([item["label"] for item in items], dtype=float) for items in splits.values()]
            if datalist.label_names != CLASSES:
                raise SystemExit(f"error: {name} must have the labels {CLASSES}, got {datalist.label_names}.")
            questions = {each: [label[:, [column]] for label in labels] for column, each in enumerate(CLASSES)}
            viral = [np.where(label[:, [0]] == 1, np.nan, label[:, [2]]) for label in labels]
            questions = {"viral against bacterial": viral, **questions}
        else:
            names = datalist.label_names
            found = [f for f in NIH_FINDINGS if (label_matrix(splits["all"], names, [f]) == 1).sum() >= MIN_POSITIVES]
            view = np.array([[float(item["view"] == "AP")] for item in splits["all"]])
            questions = {"findings": [label_matrix(splits["all"], names, found)], "AP or PA": [view]}
        yield Films(name, splits, questions)
    if not select:
        items = read_datalist(str(data / "cxr_adult")).training
        items = [items[row] for row in np.random.default_rng(0).permutation(len(items))[:NUM_SOURCE_FILMS]]
        sources = sorted({item["source"] for item in items})
        labels = [np.array([[float(item["source"] == each) for each in sources] for item in items])]
        yield Films("cxr_adult", {"all": items}, {"source": labels})


def features_of(
    arm: Arm, of: Films, device: str = "cpu", read: Callable[..., Dataset] = cached_dataset
) -> dict[str, list[Array]]:
    """Features (N, D) of each split by kind, computed once: found again wherever the folder of the set lies."""
    named = {
        split: [{**item, "image": Path(item["image"]).name, "origin": None} for item in items]
        for split, items in of.splits.items()
    }
    digest = hashlib.sha256(repr([arm.encoder, arm.image_size, named]).encode()).hexdigest()[:8]
    path = arm.folder / f"features_{of.name}_{digest}.npz"
    if not path.is_file():
        parser = ConfigParser()
        parser.read_config(EVALUATE)
        parser["bundle_root"] = str(EVALUATE.parent.parent)
        parser["pretrained"], parser["encoder"], parser["image_size"] = arm.weights, arm.encoder, arm.image_size
        torch.manual_seed(arm.seed)
        network = load_weights(parser.get_parsed_content("network_def"), arm.weights).to(device)
        transform = parser.get_parsed_content("preprocessing")
        loaders = [DataLoader(read(each, transform), batch_size=128) for each in of.splits.values()]
        if arm.name == PIXELS:
            kinds = {"pca": pixel_pca(*(torch.cat([batch["image"] for batch in loader]) for loader in loaders))}
        else:
            splits = [extract_features(network, loader, device) for loader in loaders]
            kinds = {"last": [each.last for each in splits], "stages": [each.stages for each in splits]}
        arrays = {f"{kind}/{i}": x.astype(np.float16) for kind, xs in kinds.items() for i, x in enumerate(xs)}
        with written_atomically(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    features: dict[str, list[Array]] = {}
    with np.load(path) as kept:
        for name in sorted(kept.files):
            features.setdefault(name.split("/")[0], []).append(kept[name].astype(np.float32))
    return features


def scores(of: Films, x: list[Array], y: list[Array], fraction: float, draw: int) -> Array:
    """Scores (N, C) of the scored items, by a probe that is trained with a fraction of the subjects."""
    if len(x) == 3:
        chosen = chosen_rows(of.splits["training"], fraction, draw)
        return linear_probe(x[0][chosen], y[0][chosen], x[1], y[1], x[2])
    subjects = np.array([item["subject"] for item in of.scored])
    names, index = np.unique(subjects, return_inverse=True)
    fold = (np.random.default_rng(draw).permutation(len(names)) % NUM_FOLDS)[index]
    found = np.full(y[0].shape, np.nan)
    for test in range(NUM_FOLDS):
        is_test, is_val = fold == test, fold == (test + 1) % NUM_FOLDS
        train = np.flatnonzero(~is_test & ~is_val)
        train = train[chosen_rows([of.scored[i] for i in train], fraction, draw)]
        found[is_test] = linear_probe(x[0][train], y[0][train], x[0][is_val], y[0][is_val], x[0][is_test])
    return found


def chosen_rows(items: Items, fraction: float, seed: int) -> list[int]:
    """Rows of a fraction of the subjects."""
    chosen = draw_subjects(sorted({item["subject"] for item in items}), fraction, seed)
    return [row for row, item in enumerate(items) if item["subject"] in chosen]


def area(labels: Array, draws: Sequence[Array], weights: Array) -> Array:
    """Mean AUROC over draws and columns, for each resample; a column that a draw could not score counts for nothing."""
    areas = [auroc(labels[:, c], each[:, c], weights) for each in draws for c in range(labels.shape[1])]
    return np.nanmean(np.stack(areas), axis=0)


def rows(arms: Mapping[str, list[Arm]], of: Films, select: bool) -> Iterator[tuple[Any, ...]]:
    """Lines of the table."""
    subjects = [item["subject"] for item in of.scored]
    features = {name: [features_of(arm, of) for arm in seeds] for name, seeds in arms.items()}
    fractions = FRACTIONS[-1:] if select else FRACTIONS if len(of.splits) == 3 else FRACTIONS[-2:]
    for question, fraction in product(of.questions, fractions):
        labels = of.questions[question]
        draws = 1 if select or (len(of.splits) == 3 and fraction == 1) else NUM_DRAWS
        for kind in ("last", "stages"):
            found: dict[str, Resampled] = {}
            for name, seeds in features.items():
                xs = [each.get(kind) or each["pca"] for each in seeds]
                scored = [scores(of, x, labels, fraction, draw) for x in xs for draw in range(draws)]
                found[name] = resample(partial(area, labels[-1], scored), subjects, NUM_SAMPLES)
            place = of.name, question, f"{fraction:g}", kind
            for name, each in found.items():
                yield (*place, name, "", *percentile_interval(each), len(arms[name]), draws)
            for one, other in combinations(found, 2):  # the baselines are the last two
                if one not in (RANDOM, PIXELS):
                    paired = Resampled(
                        found[one].value - found[other].value, found[one].resamples - found[other].resamples
                    )
                    yield (*place, one, other, *percentile_interval(paired), len(arms[one]), draws)


def main(runs: str, data: str, table: str | None = None, select: bool = False) -> None:
    """Write the table of a study, and show it as it grows.

    Args:
        runs: folder of the trained recipes.
        data: folder of cxr_kermany, cxr_nih, cxr_nih64 and cxr_adult.
        table: the CSV; RUNS/frozen_features.csv by default.
        select: whether recipes are compared to choose one, without the test splits.
    """
    if not isinstance(select, bool):
        raise SystemExit(f"error: --select takes no value, got {select}.")
    arms: dict[str, list[Arm]] = {}
    shapes: set[tuple[str, int]] = set()
    for said in sorted(Path(runs).glob("*/seed*/models/model.json")):  # without weights, features must be there
        weights, folder = said.with_suffix(".pt"), said.parents[1]
        seed = int(folder.name.removeprefix("seed"))
        settings = read_settings(weights)
        encoder, size = settings["encoder"], settings["image_size"]
        shapes.add((encoder, size))
        arms.setdefault(folder.parent.name, []).append(Arm(folder.parent.name, seed, encoder, size, folder, weights))
    if not arms:
        raise SystemExit(f"error: there is no RECIPE/seedN/models/model.pt in {runs}: train the study first.")
    if len(shapes) > 1:
        raise SystemExit(f"error: all recipes must have one encoder and image size, got {sorted(shapes)}.")
    encoder, size = next(iter(shapes))
    arms[RANDOM] = [Arm(RANDOM, seed, encoder, size, Path(runs, RANDOM, f"seed{seed}")) for seed in range(3)]
    arms[PIXELS] = [Arm(PIXELS, 0, encoder, size, Path(runs, PIXELS, "seed0"))]
    with open(table or Path(runs, "frozen_features.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for of in films(Path(data), select):
            for row in rows(arms, of, select):
                line = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row]
                writer.writerow(line)
                print(*line, sep=",", flush=True)


if __name__ == "__main__":
    fire.Fire(SetParseFn(str, "runs", "data", "table")(main))  # as they are typed
