from __future__ import annotations

import csv
import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import fire
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dissect_monai.metrics.classification import auroc, average_precision
from dissect_monai.metrics.intervals import bootstrap

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
run_experiments = importlib.import_module("run_experiments")
study_statistics = importlib.import_module("study_statistics")
render_results = importlib.import_module("render_results")

STUDIES = sorted((ROOT / "scripts" / "experiments").glob("*.json"))
EVALUATED = {
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
TRAINED = {
    **EVALUATED,
    "variants_change": "training",
    "variants": {"labels_100": {"label_fraction": 1.0}, "labels_10": {"label_fraction": 0.1}},
    "evaluation": {"pretrained": "{folder}/models/model.pt"},
    "titles": {"labels_100": "100 %", "labels_10": "10 %"},
    "columns": {"findings/finetune/-/auroc": "AUROC", "findings/finetune/-/ap": "AP"},
}


def knobs_of(command: Sequence[str]) -> dict[str, str]:
    return dict(each.removeprefix("--").split("=", 1) for each in command if each.startswith("--"))


class Stand:
    """Stands in for `monai.bundle run`: keeps the commands and writes what the real one would leave."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.fails: Callable[[dict[str, str]], bool] = lambda knobs: False
        self.images = 60
        self.label_seed = 0

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
            (folder / "models").mkdir()
            (folder / "models" / "model.pt").write_text(str(knobs), encoding="utf-8")
        else:
            assert Path(knobs["pretrained"]).exists()
            (folder / "eval").mkdir()
            np.savez(folder / "eval" / "scores.npz", **self.scores(folder, knobs))
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


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stand:
    stand = Stand()
    (tmp_path / "data" / "images").mkdir(parents=True)
    monkeypatch.setattr(run_experiments, "call", stand)
    monkeypatch.setattr(run_experiments, "code_state", lambda: ("c0ffee00", False))
    monkeypatch.setattr(run_experiments, "TABLE", tmp_path / "results.csv")
    return stand


def run(tmp_path: Path, study: Mapping[str, Any], **options: Any) -> list[dict[str, str]]:
    """Run a study and return the rows of the table."""
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study), encoding="utf-8")
    run_experiments.main(str(path), str(tmp_path / "data"), str(tmp_path / "runs"), **options)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores_of(tmp_path: Path, recipe: str, seed: int, variant: str, name: str) -> np.ndarray:
    path = tmp_path / "runs" / recipe / f"seed{seed}" / variant / "evaluation" / "eval" / "scores.npz"
    return np.load(path)[name]


def macro_auroc(labels: np.ndarray, scores: np.ndarray, weight: np.ndarray) -> float:
    known = ~np.isnan(labels)
    return float(
        np.mean(
            [
                roc_auc_score(y[k], s[k], sample_weight=weight[k])
                for y, s, k in zip(labels.T, scores.T, known.T, strict=True)
            ]
        )
    )


def test_every_recipe_and_seed_is_trained_once_and_evaluated_in_each_variant(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    calls = [knobs_of(each) for each in stand.commands]
    trained = [each for each in calls if each["config_file"].endswith("train.json")]
    assert [(each["discrete_weight"], each["seed"]) for each in trained] == [
        ("1", "0"),
        ("0", "0"),
        ("1", "1"),
        ("0", "1"),
    ]
    assert len(calls) == 4 + 4 * 2
    assert [each["baselines"] for each in calls if "baselines" in each] == (["True"] * 2 + ["False"] * 2) * 2


def test_variants_that_change_training_are_trained_each(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, TRAINED)
    calls = [knobs_of(each) for each in stand.commands]
    trained = [each for each in calls if each["config_file"].endswith("train.json")]
    assert len(trained) == len(calls) / 2 == 8
    assert [each["label_fraction"] for each in trained[:2]] == ["1.0", "0.1"]
    assert len({each["output_dir"] for each in calls}) == 16


def test_templates_are_filled_in_lists_too(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    train, evaluate = (knobs_of(each) for each in stand.commands[:2])
    assert train["dataset_dir"] == json.dumps([str(tmp_path / "data" / "images")])
    assert evaluate["pretrained"] == str(tmp_path / "runs" / "ours" / "seed0" / "models" / "model.pt")


def test_a_run_records_the_command_that_repeats_it(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    done = json.loads((tmp_path / "runs" / "ours" / "seed0" / "done.json").read_text(encoding="utf-8"))
    assert shlex.split(done["command"]) == stand.commands[0]
    assert stand.commands[0][:4] == ["python", "-m", "monai.bundle", "run"]
    assert (done["commit"], done["dirty"]) == ("c0ffee00", False)
    assert done["seconds"] >= 0


def test_finished_runs_are_kept_and_all_others_start_in_an_empty_folder(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    folder = tmp_path / "runs" / "theirs" / "seed1" / "labels_10" / "evaluation"
    (folder / "done.json").unlink()
    (folder / "left_over").touch()
    stand.commands.clear()
    run(tmp_path, EVALUATED)
    assert [knobs_of(each)["output_dir"] for each in stand.commands] == [str(folder)]
    assert not (folder / "left_over").exists()


def test_training_anew_evaluates_anew(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    (tmp_path / "runs" / "ours" / "seed0" / "done.json").unlink()
    stand.commands.clear()
    run(tmp_path, EVALUATED)
    assert len(stand.commands) == 3


def test_side_by_side_runs_take_one_thread_each_and_give_the_same_rows(stand: Stand, tmp_path: Path) -> None:
    one = run(tmp_path, EVALUATED)
    (tmp_path / "runs").rename(tmp_path / "before")
    stand.environments.clear()
    two = run(tmp_path, EVALUATED, jobs=2)
    assert two == one + one
    assert {each["OMP_NUM_THREADS"] for each in stand.environments} == {"1"}


def test_rows_hold_mean_and_spread_over_seeds(stand: Stand, tmp_path: Path) -> None:
    rows = run(tmp_path, TRAINED)
    labels = scores_of(tmp_path, "ours", 0, "labels_10", "labels/findings")
    found = {(row["recipe"], row["metric"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 2 * 3
    for suffix, measure in (("auroc", auroc), ("ap", average_precision)):
        scores = [scores_of(tmp_path, "theirs", s, "labels_10", "scores/classifier/-/scratch/findings") for s in (0, 1)]
        values = [np.mean([measure(labels[:, i], each[:, i]) for i in range(2)]) for each in scores]
        row = found["theirs", f"labels_10/findings/finetune/-/{suffix}"]
        assert row["mean"] == f"{np.mean(values):.4f}"
        assert row["std"] == f"{np.std(values, ddof=1):.4f}"
    assert (row["n"], row["commit"], row["dataset"]) == ("2", "c0ffee0", "phantoms")


def test_differences_agree_with_a_naive_bootstrap_of_subjects_and_seeds(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_statistics, "NUM_SAMPLES", 200)
    rows = run(tmp_path, EVALUATED)
    name = "scores/pretrained/last/linear/findings"
    labels, subjects = (scores_of(tmp_path, "ours", 0, "labels_100", key) for key in ("labels/findings", "subjects"))
    ours, theirs = ([scores_of(tmp_path, r, s, "labels_100", name) for s in (0, 1)] for r in ("ours", "theirs"))
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(30, np.full(30, 1 / 30), 200)
    seeds = rng.multinomial(2, [0.5, 0.5], 200)
    values = [
        sum(
            times
            / 2
            * (macro_auroc(labels, ours[s], counts[subjects]) - macro_auroc(labels, theirs[s], counts[subjects]))
            for s, times in enumerate(seed_counts)
        )
        for counts, seed_counts in zip(drawn, seeds, strict=True)
    ]
    low, high = np.percentile(values, (2.5, 97.5))
    row = next(row for row in rows if row["recipe"] == "ours - theirs" and row["metric"].startswith("labels_100"))
    assert row["std"] == f"{low:.4f}..{high:.4f}"
    each = [
        macro_auroc(labels, x, np.ones(60)) - macro_auroc(labels, y, np.ones(60))
        for x, y in zip(ours, theirs, strict=True)
    ]
    assert row["mean"] == f"{np.mean(each):.4f}"


def test_with_one_seed_a_difference_is_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    label, subjects = rng.integers(0, 2, 80), np.arange(80) // 2
    one, two = label + rng.normal(0, 1, 80), label + rng.normal(0, 2, 80)
    weights, seed_share = study_statistics.resample(subjects, 1)
    sides = [study_statistics.macro(auroc, label[:, None], each[None, :, None], weights) for each in (one, two)]
    expected = bootstrap(lambda w: auroc(label, one, w) - auroc(label, two, w), subjects)
    assert study_statistics.difference(*sides, seed_share) == pytest.approx(expected)


def test_seeds_that_disagree_widen_the_interval() -> None:
    _, seed_share = study_statistics.resample(np.arange(10), 3)
    agree, disagree = (np.tile(each, (1 + len(seed_share), 1)) for each in ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]))
    narrow, wide = (study_statistics.difference(each, np.zeros_like(each), seed_share) for each in (agree, disagree))
    assert narrow == pytest.approx((0.5, 0.5, 0.5))
    assert wide == pytest.approx((0.5, 0.4, 0.6))


def test_the_better_baseline_is_a_row_of_its_own(stand: Stand, tmp_path: Path) -> None:
    rows = {row["recipe"]: row for row in run(tmp_path, EVALUATED) if row["metric"].startswith("labels_10/")}
    better = max(("random", "pixels"), key=lambda name: float(rows[name]["mean"]))
    best = rows["ours - best of random, pixels"]
    assert (best["mean"], best["std"]) == (rows[f"ours - {better}"]["mean"], rows[f"ours - {better}"]["std"])


def test_a_study_may_name_the_recipes_that_are_compared(stand: Stand, tmp_path: Path) -> None:
    rows = run(tmp_path, {**EVALUATED, "compare": [["theirs", "ours"]]})
    (tmp_path / "results.csv").unlink()
    usual = run(tmp_path, EVALUATED)
    assert {row["recipe"] for row in rows if " - " in row["recipe"]} == {"theirs - ours"}
    means = [float(row["mean"]) for row in rows if row["recipe"] == "theirs - ours"]
    assert means == [-float(row["mean"]) for row in usual if row["recipe"] == "ours - theirs"]
    assert [row for row in rows if " - " not in row["recipe"]] == [row for row in usual if " - " not in row["recipe"]]


def test_findings_without_scores_from_every_run_are_left_out() -> None:
    labels = np.array([[0, 1, 0, 0], [1, 1, 1, 1], [np.nan, 0, 0, 1]])
    labels[1:, 3] = 0
    scores = np.zeros((2, 3, 4))
    scores[1, 0, 2] = np.nan
    scores[0, 2, 0] = np.nan  # of an unknown label
    assert study_statistics.usable_columns(labels, [scores]) == [0, 1]


def test_findings_known_in_one_data_set_each_count_alike() -> None:
    rng = np.random.default_rng(0)
    data_set = np.arange(90) % 3
    labels = np.where(data_set[:, None] == [0, 1, 2, 2], rng.integers(0, 2, (90, 4)), np.nan)
    labels[data_set == 2, 2] = np.arange(30) == 0  # one positive, which is missing in many a resample
    labels[:, 3] *= 0
    scores = rng.normal(0, 1, (2, 90, 4)) + np.nan_to_num(labels)
    weights = study_statistics.resample(np.arange(90) // 3, 2)[0][:150]
    columns = study_statistics.usable_columns(labels, [scores])
    found = study_statistics.macro(auroc, labels[:, columns], scores[..., columns], weights)

    def naive(scores: np.ndarray, weight: np.ndarray) -> float:
        known = [~np.isnan(label) & (weight > 0) for label in labels.T]
        return np.mean(
            [
                roc_auc_score(y[k], s[k], sample_weight=weight[k])
                for y, s, k in zip(labels.T, scores.T, known, strict=True)
                if len(set(y[k])) == 2
            ]
        )

    assert columns == [0, 1, 2]
    assert found == pytest.approx(np.array([[naive(each, weight) for each in scores] for weight in weights]))


@pytest.mark.parametrize("states", [[("a1", False), ("b2", False)], [("a1", True)]])
def test_refuses_rows_of_several_commits_or_of_changed_code(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: list[tuple[str, bool]]
) -> None:
    queue = cycle(states)
    monkeypatch.setattr(run_experiments, "code_state", lambda: next(queue))
    with pytest.raises(SystemExit, match=r"no row is written.*ours/seed0.*--allow_mixed true"):
        run(tmp_path, EVALUATED)
    assert not (tmp_path / "results.csv").exists()
    assert {row["commit"] for row in run(tmp_path, EVALUATED, allow_mixed="true")} == {"mixed"}


def test_a_failed_run_is_one_line_and_the_others_are_kept(stand: Stand, tmp_path: Path) -> None:
    stand.fails = lambda knobs: knobs["seed"] == "1" and "train.json" in knobs["config_file"]
    with pytest.raises(
        SystemExit, match=r"^error: \S+ours/seed1 failed with status 1, see \S+/train.log: RuntimeError: loss is nan$"
    ):
        run(tmp_path, EVALUATED)
    assert len(list(tmp_path.glob("runs/*/seed0/done.json"))) == 2
    assert not list(tmp_path.glob("runs/*/seed1/done.json"))
    assert not (tmp_path / "results.csv").exists()


def test_the_log_begins_with_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_experiments.call(["python", "-c", "raise ValueError('no\\nway')"], log, {}) == 1
    assert log.read_text(encoding="utf-8").startswith("$ python -c ")
    assert run_experiments.last_error(log) == "ValueError: no"


def test_refuses_finished_runs_with_other_knobs(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    with pytest.raises(SystemExit, match="was run with other knobs or configs than the study has now"):
        run(tmp_path, {**EVALUATED, "training": {**EVALUATED["training"], "max_epochs": 2}})  # type: ignore[dict-item]


TWO_CONFIGS = [f"bundles/pretrain_vq_ssl/configs/{name}" for name in ("train.json", "multi_gpu_train.json")]


def test_a_recipe_may_train_with_configs_of_its_own(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, {**EVALUATED, "bundle": "cxr_classify", "configs": {"theirs": TWO_CONFIGS}})
    used: dict[str, set[str]] = {}
    for command in stand.commands:
        folder = Path(knobs_of(command)["output_dir"]).relative_to(tmp_path / "runs")
        used.setdefault(f"{folder.parts[0]} {folder.name}", set()).add(knobs_of(command)["config_file"])
    configs = "bundles/cxr_classify/configs"
    assert used["ours seed0"] == used["ours seed1"] == {f"{configs}/train.json"}
    assert used["theirs seed0"] == used["theirs seed1"] == {json.dumps(TWO_CONFIGS)}
    assert used["ours evaluation"] == used["theirs evaluation"] == {f"{configs}/evaluate.json"}


def test_the_command_line_takes_a_list_of_configs_for_a_list() -> None:
    study = run_experiments.Study(**{**EVALUATED, "configs": {"theirs": TWO_CONFIGS}})
    (training, *_), *_ = (chain for chain in run_experiments.plan(study, ROOT, ROOT) if "theirs" in str(chain[0]))
    assert fire.Fire(lambda config_file: config_file, command=[training.config_file]) == TWO_CONFIGS


def test_the_first_config_names_the_log(stand: Stand, tmp_path: Path) -> None:
    stand.fails = lambda knobs: "multi_gpu_train" in knobs["config_file"]
    with pytest.raises(SystemExit, match=r"theirs/seed0 failed with status 1, see \S+theirs/seed0/train.log: "):
        run(tmp_path, {**EVALUATED, "configs": {"theirs": TWO_CONFIGS}})


@pytest.mark.parametrize("now", [{}, {"theirs": TWO_CONFIGS[:1]}, {"theirs": TWO_CONFIGS[::-1]}])
def test_finished_runs_are_kept_with_the_same_configs_alone(
    stand: Stand, tmp_path: Path, now: Mapping[str, list[str]]
) -> None:
    study = {**EVALUATED, "configs": {"theirs": TWO_CONFIGS}}
    run(tmp_path, study)
    stand.commands.clear()
    run(tmp_path, study)
    assert not stand.commands
    with pytest.raises(SystemExit, match="theirs/seed0 was run with other knobs or configs than the study has now"):
        run(tmp_path, {**study, "configs": now})


def test_a_knob_that_is_null_is_not_passed(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, {**EVALUATED, "recipes": {"ours": {"max_epochs": None}, "theirs": {"discrete_weight": None}}})
    trained = [each for each in map(knobs_of, stand.commands) if each["config_file"].endswith("train.json")]
    assert [each.get("max_epochs") for each in trained] == [None, "1"] * 2
    assert not any("discrete_weight" in each for each in trained)


def test_refuses_runs_that_scored_different_images(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    (tmp_path / "runs" / "theirs" / "seed1" / "labels_10" / "evaluation" / "done.json").unlink()
    stand.images = 40
    with pytest.raises(SystemExit, match="the runs of labels_10 scored different images"):
        run(tmp_path, EVALUATED)


def test_refuses_runs_with_other_labels_of_the_same_images(stand: Stand, tmp_path: Path) -> None:
    run(tmp_path, EVALUATED)
    (tmp_path / "runs" / "theirs" / "seed1" / "labels_10" / "evaluation" / "done.json").unlink()
    stand.label_seed = 1
    with pytest.raises(SystemExit, match="the runs of labels_10 scored different images or labels"):
        run(tmp_path, EVALUATED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipies": {}}, "unknown keys: recipies; missing keys: none. A study file holds bundle, dataset"),
        ({"seeds": [0]}, r"`seeds` must hold two different numbers or more, got \[0\]"),
        ({"seeds": [0, 1, 1]}, r"`seeds` must hold two different numbers or more, got \[0, 1, 1\]"),
        ({"variants_change": "labels"}, "`variants_change` must be training or evaluation, got labels"),
        ({"recipes": {"a/b": {}}}, "names without a slash"),
        ({"bundle": "pretrain"}, "`bundle` must name a folder of bundles/"),
        ({"configs": {"mine": ["a.json"]}}, "`configs` must give recipes the list of their files, got mine"),
        ({"configs": {"ours": "a.json"}}, "`configs` must give recipes the list of their files, got ours: a.json"),
        ({"configs": {"ours": []}}, r"`configs` must give recipes the list of their files, got ours: \[\]"),
        ({"configs": {"ours": ["bundles/a.json"]}}, "bundles/a.json is not there: .*`configs` files by their paths"),
        (
            {"training": {"dataset_dir": "{dta}/x"}},
            r"'{dta}/x' holds {dta}: the templates are data, runs, seed, folder",
        ),
        ({"training": {"dataset_dir": ["{data}/x"]}}, r"`dataset_dir` of \S+ is \S+/data/x, .*give the right --data"),
        ({"training": {"pretrained": "{runs}/../x/model.pt"}}, "run the study that makes it first"),
    ],
)
def test_refuses_a_bad_study_in_one_line_before_anything_runs(
    stand: Stand, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(tmp_path, {**EVALUATED, **change})
    assert not stand.commands


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_refuses_a_file_that_is_no_study(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "study.json"
    if text:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"error: \S+study.json is not a study file"):
        run_experiments.main(str(path), str(tmp_path))


@pytest.mark.parametrize("jobs", [0, "two"])
def test_refuses_bad_jobs(stand: Stand, tmp_path: Path, jobs: Any) -> None:
    with pytest.raises(SystemExit, match="`--jobs` must be at least 1"):
        run(tmp_path, EVALUATED, jobs=jobs)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_names_knobs_that_its_bundle_has(path: Path) -> None:
    study = run_experiments.read_study(path)
    for chain in run_experiments.plan(study, Path("data"), Path("runs")):
        for each in chain:
            configs = [json.loads((ROOT / config).read_text(encoding="utf-8")) for config in each.configs]
            assert set(each.knobs) <= set().union(*configs)
            each.command()


@pytest.fixture
def page(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README over a repository of its own, with the rows of a label-efficiency study."""
    for name in ("scripts/experiments", "results"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(render_results, "ROOT", tmp_path)
    monkeypatch.setattr(run_experiments, "TABLE", tmp_path / "results" / "results.csv")
    (tmp_path / "results.csv").symlink_to(tmp_path / "results" / "results.csv")
    readme = tmp_path / "README.md"
    readme.write_text(
        "above\n<!-- results: begin (scripts/render_results.py) -->\n<!-- results: end -->\nbelow\n", encoding="utf-8"
    )
    return readme


def show(page: Path, study: Mapping[str, Any]) -> list[dict[str, str]]:
    (page.parent / "scripts" / "experiments" / "study.json").write_text(json.dumps(study), encoding="utf-8")
    return run(page.parent, study)


def test_label_efficiency_is_a_table_with_a_column_per_fraction_and_a_figure(page: Path) -> None:
    rows = show(page, TRAINED)
    render_results.main()
    text = page.read_text(encoding="utf-8")
    mean, std = next((float(row["mean"]), float(row["std"])) for row in rows if row["recipe"] == "ours")
    assert text.startswith("above\n")
    assert text.endswith("<!-- results: end -->\nbelow\n")
    assert "**AUROC**\n\n| | 100 % | 10 % |\n|---|---|---|\n" in text
    assert f"| ours | {mean:.3f} ± {std:.3f} |" in text
    assert "![Label efficiency of pretrain_vq_ssl on phantoms](docs/label_efficiency.png)" in text
    assert (page.parent / "docs" / "label_efficiency.png").read_bytes().startswith(b"\x89PNG")


def test_curves_run_over_the_fractions_without_the_differences(page: Path) -> None:
    rows = show(page, TRAINED)
    (block,) = render_results.read_blocks()
    curves = list(render_results.curves(block, "findings/finetune/-/auroc", block.sizes["fractions"]))
    assert [(line.recipe, line.sizes) for line in curves] == [("ours", [0.1, 1.0]), ("theirs", [0.1, 1.0])]
    assert curves[0].means[1] == float(rows[0]["mean"])


def test_other_studies_are_a_table_per_variant_without_figure(page: Path) -> None:
    show(page, EVALUATED)
    render_results.main()
    assert "**labels_10**\n\n| | findings/linear/last/auroc |\n" in page.read_text(encoding="utf-8")
    assert "| pixels |" in page.read_text(encoding="utf-8")
    assert not (page.parent / "docs").exists()


def test_tasks_stand_side_by_side_under_their_titles_if_they_have_results(page: Path) -> None:
    tasks = {"structures": "0.8", "domains": "0.9"}
    columns = {f"{task}/linear/last/auroc": f"{task}, last" for task in (*tasks, "views")}
    recipes = ("ours, five sets", "ours, one set")
    study = {**EVALUATED, "dataset": "five sets", "recipes": {name: {} for name in recipes}, "columns": columns}
    study["titles"] = {"labels_100": "all labels"}
    (page.parent / "scripts" / "experiments" / "study.json").write_text(json.dumps(study), encoding="utf-8")
    shared = {"bundle": study["bundle"], "dataset": study["dataset"], "std": "0.01"}
    with open(page.parent / "results" / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, run_experiments.FIELDS)
        writer.writeheader()
        for recipe, (task, mean) in product(recipes, tasks.items()):
            metric = f"labels_100/{task}/linear/last/auroc"
            writer.writerow({**shared, "recipe": recipe, "metric": metric, "mean": mean})
    render_results.main()
    table = "**all labels**\n\n| | structures, last | domains, last |\n|---|---|---|\n"
    assert f"{table}| ours, five sets | 0.800 ± 0.010 | 0.900 ± 0.010 |\n" in page.read_text(encoding="utf-8")


def test_the_latest_row_wins(page: Path) -> None:
    rows = show(page, TRAINED)
    with open(page.parent / "results" / "results.csv", "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, run_experiments.FIELDS).writerow({**rows[0], "mean": "0.1234"})
    render_results.main()
    assert "| ours | 0.123 ±" in page.read_text(encoding="utf-8")


def test_markers_with_a_name_take_the_tables_of_their_bundle(page: Path) -> None:
    show(page, TRAINED)
    begin, end = "<!-- results: begin{} (scripts/render_results.py) -->\n", "<!-- results: end -->\n"
    page.write_text(begin.format("") + end + "between\n" + begin.format(" pretrain_vq_ssl") + end)
    render_results.main()
    general, named = page.read_text(encoding="utf-8").split("between")
    assert "**AUROC**" not in general
    assert "**AUROC**" in named


def test_check_fails_on_a_stale_page_or_a_missing_figure_and_writes_nothing(page: Path) -> None:
    show(page, TRAINED)
    before = page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="run `make results`"):
        render_results.main(check=True)
    assert page.read_text(encoding="utf-8") == before
    render_results.main()
    render_results.main(check=True)
    (page.parent / "docs" / "label_efficiency.png").unlink()
    with pytest.raises(SystemExit, match="run `make results`"):
        render_results.main(check=True)


def test_check_fails_on_a_figure_of_other_results(page: Path) -> None:
    rows = show(page, TRAINED)
    figure = page.parent / "docs" / "label_efficiency.png"
    render_results.main()
    stale = figure.read_bytes()
    with open(page.parent / "results" / "results.csv", "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, run_experiments.FIELDS).writerow({**rows[0], "mean": "0.1234"})
    render_results.main()
    render_results.main(check=True)
    figure.write_bytes(stale)
    with pytest.raises(SystemExit, match="run `make results`"):
        render_results.main(check=True)


def test_rendering_needs_markers(page: Path) -> None:
    show(page, TRAINED)
    page.write_text("nothing here", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README.md must hold the lines .* for pretrain_vq_ssl"):
        render_results.main()


def test_the_readme_shows_the_results() -> None:
    render_results.main(check=True)


@pytest.mark.parametrize("script", ["run_experiments", "render_results", "plot_curves"])
def test_every_script_explains_itself(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "SYNOPSIS" in done.stdout + done.stderr
