"""Pretrain with several recipes and seeds at one budget, judge the frozen features, append to results/results.csv.

    python scripts/compare_pretraining.py scripts/cxr_study.json --data DIR [--output_dir runs/cxr_study]

The study file names the folders below DIR, the knobs that all recipes share and those of each recipe. Everything runs
through `monai.bundle run`, so each line of the table is a command that anybody can repeat. Finished runs are kept and
not repeated.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import fire
import numpy as np

from dissect_monai.metrics import auroc, paired_bootstrap

Statistic = Callable[[Any], Any]  # weights of the items → values, as metrics.bootstrap takes it
ROOT = Path(__file__).resolve().parent.parent
BUNDLE = "pretrain_vq_ssl"
CONFIGS = ROOT / "bundles" / BUNDLE / "configs"
FIELDS = ("bundle", "recipe", "dataset", "metric", "mean", "std", "n", "commit", "hardware", "date", "command")


def run_bundle(config: str, knobs: Mapping[str, Any], log: Path) -> None:
    """Run one config of the bundle with knobs, its output in `log`.

    Raises:
        RuntimeError: if it fails, with the end of the log.
    """
    arguments = [item for name, value in knobs.items() for item in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIGS / config), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")


def pretrain(study: Mapping[str, Any], data: Path, recipe: str, seed: int, folder: Path) -> Path:
    """Pretrain one recipe with one seed, unless its weights are there; return their path."""
    weights = folder / "models" / "model.pt"
    if not (folder / "done").exists():
        knobs = {**study["training"], **study["recipes"][recipe], "seed": seed, "output_dir": folder}
        knobs["dataset_dir"] = json.dumps([str(data / name) for name in study["pretraining_data"]])
        run_bundle("train.json", knobs, folder / "train.log")
        (folder / "done").touch()
    return weights


def evaluate(study: Mapping[str, Any], data: Path, weights: Path, recipe: str, seed: int, protocol: str) -> None:
    """Judge one encoder by one protocol, unless its table is there; baselines are the same beside every recipe."""
    folder = weights.parent.parent / protocol
    if (folder / "eval" / "scores.npz").exists():
        return
    knobs = {**study["evaluation"], **study["protocols"][protocol], "seed": seed, "output_dir": folder}
    knobs |= {"dataset_dir": data / study["evaluation_data"], "pretrained": weights}
    knobs["baselines"] = recipe == next(iter(study["recipes"]))
    run_bundle("evaluate.json", knobs, folder / "evaluate.log")


def read_scores(folder: Path, source: str) -> dict[tuple[str, str, str], Any]:
    """Scores of one source by task, features and probe."""
    with np.load(folder / "eval" / "scores.npz") as file:
        keys = [key.split("/") for key in file.files if key.startswith(f"scores/{source}/")]
        return {(task, kind, probe): file[f"scores/{source}/{kind}/{probe}/{task}"] for _, _, kind, probe, task in keys}


def truth_of(folder: Path) -> tuple[dict[str, Any], Any]:
    """Labels by task, and the subjects, of the scored images."""
    with np.load(folder / "eval" / "scores.npz") as file:
        labels = {key.split("/")[1]: file[key] for key in file.files if key.startswith("labels/")}
        return labels, file["subjects"]


def macro(labels: Any, scores: Any) -> Statistic:
    """Weights → macro AUROC over the columns that have one."""
    usable = [i for i in range(labels.shape[1]) if not np.isnan(auroc(labels[:, i], scores[:, i]))]
    return lambda weight: np.nanmean([auroc(labels[:, i], scores[:, i], weight) for i in usable], axis=0)


def summarise(study: Mapping[str, Any], runs: Path) -> Iterator[dict[str, Any]]:
    """One row per protocol, task, features, probe and recipe; then the paired differences of the first recipe."""
    recipes = list(study["recipes"])
    for protocol in study["protocols"]:
        folders = {name: [runs / name / f"seed{seed}" / protocol for seed in study["seeds"]] for name in recipes}
        labels, subjects = truth_of(folders[recipes[0]][0])
        scores = {name: [read_scores(folder, "pretrained") for folder in folders[name]] for name in recipes}
        for baseline in ("random", "pixels"):
            scores[baseline] = [read_scores(folder, baseline) for folder in folders[recipes[0]]]
        for name, by_seed in scores.items():
            for task, kind, probe in by_seed[0]:
                once = np.ones((1, len(subjects)))
                values = [float(macro(labels[task], each[task, kind, probe])(once)[0]) for each in by_seed]
                metric = f"{protocol}/{task}/{probe}/{kind}/auroc"
                mean, std = np.mean(values), np.std(values, ddof=1)
                yield {"recipe": name, "metric": metric, "mean": mean, "std": std, "n": len(values)}
        yield from differences(recipes[0], scores, labels, subjects, protocol)


def differences(
    first: str, scores: Mapping[str, list[Any]], labels: Mapping[str, Any], subjects: Any, protocol: str
) -> Iterator[dict[str, Any]]:
    """Paired difference of the seed-averaged macro AUROC with its 95 % interval, as `mean` and `low..high` in `std`."""
    for other in list(scores)[1:]:
        for task, kind, probe in scores[first][0]:
            key = (task, "pca" if other == "pixels" else kind, probe)
            ours = mean_over_seeds([macro(labels[task], each[task, kind, probe]) for each in scores[first]])
            theirs = mean_over_seeds([macro(labels[task], each[key]) for each in scores[other]])
            interval = paired_bootstrap(ours, theirs, subjects)
            yield {
                "recipe": f"{first} - {other}",
                "metric": f"{protocol}/{task}/{probe}/{kind}/auroc",
                "mean": interval.value,
                "std": f"{interval.low:.4f}..{interval.high:.4f}",
                "n": len(scores[first]),
            }


def mean_over_seeds(statistics: Sequence[Statistic]) -> Statistic:
    """Weights → mean of several statistics."""
    return lambda weight: np.mean([statistic(weight) for statistic in statistics], axis=0)


def main(study_file: str, data: str, output_dir: str = "runs/cxr_study") -> None:
    """Run what is missing of a study and append its table to results/results.csv.

    Args:
        study_file: JSON with `name`, `seeds`, `recipes`, `training`, `evaluation`, `protocols` and the data folders.
        data: folder that holds the data folders.
        output_dir: where runs are kept; ignored by git.
    """
    study = json.loads(Path(study_file).read_text(encoding="utf-8"))
    runs = Path(output_dir).absolute()
    for seed in study["seeds"]:
        for recipe in study["recipes"]:
            folder = runs / recipe / f"seed{seed}"
            weights = pretrain(study, Path(data).absolute(), recipe, seed, folder)
            for protocol in study["protocols"]:
                evaluate(study, Path(data).absolute(), weights, recipe, seed, protocol)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    shared = {
        "bundle": BUNDLE,
        "dataset": study["name"],
        "commit": commit,
        "hardware": study["hardware"],
        "date": date.today().isoformat(),
        "command": f"python scripts/compare_pretraining.py {study_file} --data DIR",
    }
    table = ROOT / "results" / "results.csv"
    is_new = not table.exists()
    with open(table, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        for row in summarise(study, runs):
            row["mean"] = f"{row['mean']:.4f}"
            row["std"] = row["std"] if isinstance(row["std"], str) else f"{row['std']:.4f}"
            writer.writerow({**shared, **row})


if __name__ == "__main__":
    fire.Fire(main)
