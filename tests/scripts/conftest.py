"""What tests of studies share: one of X-rays, one of segmentation, and what stands in for their runs."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import render_results
import run_experiments
import study_statistics
from helpers import make_list, write

METRICS = ("dice", "hd95", "surface_dice")
FIELDS = ["case", "subject", "structure", "values", *METRICS, "label_ml", "pred_ml", "outcome"]
CASES = {"a.nii.gz": "A", "b.nii.gz": "B", "c1.nii.gz": "C", "c2.nii.gz": "C", "d.nii.gz": "D"}
Line = dict[str, str]


def lines_of(recipe: str, seed: int, variant: str) -> list[Line]:
    """Made-up lines of cases.csv: of every subject the liver, of most the spleen, of none the colon."""
    rng = np.random.default_rng([ord(letter) for letter in f"{recipe}{seed}{variant}"])
    lines = []
    for case, subject in CASES.items():
        for structure, values in (("liver", "6"), ("left kidney", "2 3"), ("colon", "9")):
            line = {"case": f"/data/{case}", "subject": subject, "structure": structure, "values": values}
            scores = dict(zip(METRICS, (f"{value:.4f}" for value in rng.uniform(0, 1, 3)), strict=True))
            line |= {**scores, "label_ml": "10.0000", "pred_ml": "9.0000", "outcome": "scored"}
            if structure == "colon" or (structure == "left kidney" and subject == "B"):
                line |= {**dict.fromkeys(METRICS, ""), "label_ml": "0.0000", "outcome": "false_positive"}
            elif rng.uniform() < 0.25:
                line |= {"dice": "0.0000", "hd95": "", "surface_dice": "0.0000", "outcome": "missed"}
            lines.append(line)
    return lines


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class Stand:
    """Stands in for `monai.bundle run`: keeps the knobs of each call and writes what the real one would leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.fails: Callable[[dict[str, str]], bool] = lambda knobs: False
        self.images = 60
        self.label_seed = 0
        self.lines_of = lines_of
        self.change: Callable[[str, int, str, list[Line]], list[Line]] = lambda recipe, seed, variant, lines: lines

    @property
    def calls(self) -> list[dict[str, str]]:
        """The knobs of each command."""
        return [knobs_of(command) for command in self.commands]

    @property
    def trainings(self) -> list[dict[str, str]]:
        return [each for each in self.calls if "train.json" in each["config_file"]]

    def __call__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> int:
        knobs = knobs_of(command)
        self.commands.append(command)
        self.environments.append(environment)
        if self.fails(knobs):
            log.write_text(
                "starting\nRuntimeError: loss is nan\n\nRuntimeError: Failed to evaluate ConfigExpression: \nbye\n"
            )
            return 1
        folder = Path(knobs["output_dir"])
        if "train.json" in knobs["config_file"]:
            write(folder / "models" / "model.pt", knobs)
            return 0
        assert Path(knobs["pretrained"]).exists()
        (folder / "eval").mkdir()
        if "seg_finetune" in knobs["config_file"]:
            recipe, seed, variant = folder.parts[-4], int(folder.parts[-3].removeprefix("seed")), folder.parts[-2]
            with open(folder / "eval" / "cases.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(self.change(recipe, seed, variant, lines_of(recipe, seed, variant)))
        else:
            np.savez(folder / "eval" / "scores.npz", **self.scores(folder, knobs))
            (folder / "eval" / "cases.csv").write_text("image,subject\n", encoding="utf-8")  # a classifier's own
        return 0

    def scores(self, folder: Path, knobs: dict[str, str]) -> dict[str, Any]:
        labels = np.random.default_rng(self.label_seed).integers(0, 2, (self.images, 2)).astype(float)
        labels[:3, 0] = np.nan
        rng = np.random.default_rng([ord(letter) for letter in "/".join(folder.parts[-4:])])
        if "baselines" in knobs:
            names = ["pretrained/last/linear", "random/last/linear", "pixels/pca/linear"]
        else:  # the recipes name their probe differently
            names = ["classifier/-/finetune" if "ours" in folder.parts else "classifier/-/scratch"]
        names = names[: None if knobs.get("baselines") != "False" else 1]
        scores = {f"scores/{name}/findings": np.nan_to_num(labels) + rng.normal(0, 1, labels.shape) for name in names}
        return {"subjects": np.arange(self.images) // 2, "labels/findings": labels, **scores}

    def run(self, study: Mapping[str, Any], name: str = "study", **options: Any) -> list[dict[str, str]]:
        """Run a study and return its rows of the table."""
        path = write(self.folder / "scripts" / "experiments" / f"{name}.json", study)
        runs = self.folder / "runs" / name
        run_experiments.main(str(path), str(self.folder / "data"), str(runs), **options)
        with open(run_experiments.TABLE, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row["dataset"] == study["dataset"]]


def knobs_of(command: list[str]) -> dict[str, str]:
    return dict(each.removeprefix("--").split("=", 1) for each in command if each.startswith("--"))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs make_datalist.py, which must refuse what it is given, and write nothing; returns its message."""

    def refused(match: str, *arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match=match) as caught:
            make_list(*arguments)
        assert str(caught.value).startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return str(caught.value)

    return refused


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stand:
    """A repository of its own, with data for the studies, and pages without results."""
    stand = Stand(tmp_path)
    for name in ("images", "ct"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.json").write_text("[]", encoding="utf-8")
    for page in ("README.md", *(f"docs/results/{name}.md" for name in ("pretrain_vq_ssl", "seg_finetune_btcv"))):
        write_text(tmp_path / page, f"above\n{render_results.BEGIN}{render_results.END}\nbelow\n")
    monkeypatch.setattr(render_results, "ROOT", tmp_path)
    monkeypatch.setattr(run_experiments, "call", stand)
    monkeypatch.setattr(run_experiments, "code_state", lambda: ("c0ffee00", False))
    monkeypatch.setattr(study_statistics, "NUM_SAMPLES", 50)
    monkeypatch.setattr(run_experiments, "TABLE", tmp_path / "results" / "results.csv")
    run_experiments.TABLE.write_text(",".join(run_experiments.FIELDS) + "\n", encoding="utf-8")
    return stand


@pytest.fixture
def evaluated() -> dict[str, Any]:
    """A study of X-rays whose variants change the evaluation."""
    return {
        "bundle": "pretrain_vq_ssl",
        "dataset": "phantoms",
        "hardware": "none",
        "seeds": [0, 1],
        "training": {"dataset_dir": ["{data}/images"], "max_epochs": 1},
        "recipes": {"ours": {"discrete_weight": 1}, "theirs": {"discrete_weight": 0}},
        "variants_change": "evaluation",
        "variants": {"labels_100": {}, "labels_10": {"label_fraction": 0.1}},
        "evaluation": {"pretrained": "{folder}/models/model.pt", "baselines": "{is_first}"},
    }


@pytest.fixture
def trained(evaluated: dict[str, Any]) -> dict[str, Any]:
    """A study of X-rays whose variants change the training."""
    return {
        **evaluated,
        "variants_change": "training",
        "variants": {"labels_100": {"label_fraction": 1.0}, "labels_10": {"label_fraction": 0.1}},
        "evaluation": {"pretrained": "{folder}/models/model.pt"},
        "titles": {"labels_100": "100 %", "labels_10": "10 %"},
        "columns": {"findings/finetune/-/auroc": "AUROC", "findings/finetune/-/ap": "AP"},
    }


@pytest.fixture
def segmented(evaluated: dict[str, Any]) -> dict[str, Any]:
    """A study of segmentation."""
    return {
        **evaluated,
        "bundle": "seg_finetune_btcv",
        "dataset": "ct",
        "seeds": [0, 1, 2],
        "training": {"dataset_dir": "{data}/ct"},
        "recipes": {"scratch": {}, "HSSL": {"init_filters": 8}, "VQ-SSL": {"init_filters": 4}},
        "compare": [["HSSL", "scratch"], ["HSSL", "VQ-SSL"]],
        "variants_change": "training",
        "variants": {"1 subject": {"label_fraction": 0.25}, "4 subjects": {"label_fraction": 1.0}},
        "training_subjects": 4,
        "evaluation": {"pretrained": "{folder}/models/model.pt"},
        "columns": {"dice": "Dice", "hd95": "HD95 (mm)", "surface_dice": "surface Dice, 2 mm", "missed": "missed"},
    }
