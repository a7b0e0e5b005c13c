from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dissect_monai.data.splits import select_fraction
from dissect_monai.handlers.segmentation_report import CaseScores, summarize, write_tables
from dissect_monai.metrics.intervals import bootstrap
from dissect_monai.metrics.segmentation import StructureScore

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
run_experiments = importlib.import_module("run_experiments")
study_statistics = importlib.import_module("study_statistics")
render_results = importlib.import_module("render_results")

EXPERIMENTS = ROOT / "scripts" / "experiments"
SEGMENTATION = [EXPERIMENTS / f"segmentation_{name}.json" for name in ("btcv", "chaos", "hippocampus")]
METRICS = ("dice", "hd95", "surface_dice")
FIELDS = ["case", "subject", "structure", "values", *METRICS, "label_ml", "pred_ml", "outcome"]
CASES = {"a.nii.gz": "A", "b.nii.gz": "B", "c1.nii.gz": "C", "c2.nii.gz": "C", "d.nii.gz": "D"}
Line = dict[str, str]
STUDY = {
    "bundle": "hssl_multidomain",  # any that there is
    "dataset": "ct",
    "hardware": "none",
    "seeds": [0, 1, 2],
    "training": {"dataset_dir": "{data}/ct"},
    "recipes": {"scratch": {}, "HSSL": {"mask_size": 8}, "VQ-SSL": {"mask_size": 4}},
    "compare": [["HSSL", "scratch"], ["HSSL", "VQ-SSL"]],
    "variants_change": "training",
    "variants": {"1 subject": {"label_fraction": 0.25}, "4 subjects": {"label_fraction": 1.0}},
    "training_subjects": 4,
    "evaluation": {"pretrained": "{folder}/models/model.pt"},
    "columns": {"dice": "Dice", "hd95": "HD95 (mm)", "surface_dice": "surface Dice, 2 mm", "missed": "missed"},
}
TRAIN_ONLY = {**STUDY, "variants_change": "evaluation", "variants": {}, "evaluation": {}, "training_subjects": None}


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


class Stand:
    """Stands in for `monai.bundle run`: a training leaves weights, an evaluation cases.csv."""

    def __init__(self) -> None:
        self.commands: list[dict[str, str]] = []
        self.change: Callable[[str, int, str, list[Line]], list[Line]] = lambda recipe, seed, variant, lines: lines

    def __call__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> int:
        knobs = dict(each.removeprefix("--").split("=", 1) for each in command if each.startswith("--"))
        self.commands.append(knobs)
        folder = Path(knobs["output_dir"])
        if "train.json" in knobs["config_file"]:
            (folder / "models").mkdir()
            (folder / "models" / "model.pt").touch()
            return 0
        assert Path(knobs["pretrained"]).exists()
        recipe, seed, variant = folder.parts[-4], int(folder.parts[-3].removeprefix("seed")), folder.parts[-2]
        (folder / "eval").mkdir()
        with open(folder / "eval" / "cases.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.change(recipe, seed, variant, lines_of(recipe, seed, variant)))
        return 0


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stand:
    stand = Stand()
    write_data(tmp_path / "data" / "ct", 4)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(run_experiments, "call", stand)
    monkeypatch.setattr(run_experiments, "code_state", lambda: ("c0ffee00", False))
    monkeypatch.setattr(run_experiments, "TABLE", tmp_path / "results" / "results.csv")
    return stand


def write_data(folder: Path, num_subjects: int) -> None:
    """A data list of labelled volumes for training, two of each subject, and one without label."""
    names = [f"{subject}_{index}.nii.gz" for subject in range(num_subjects) for index in range(2)]
    items = [{"image": name, "label": name, "subject": name.split("_")[0]} for name in names]
    unlabelled = {"image": "unlabelled.nii.gz", "subject": "unlabelled"}
    folder.mkdir(parents=True)
    for item in (*items, unlabelled):
        (folder / item["image"]).touch()
    (folder / "dataset.json").write_text(json.dumps({"training": [*items, unlabelled]}), encoding="utf-8")


def run(tmp_path: Path, study: Mapping[str, Any], name: str = "study") -> dict[tuple[str, str], Line]:
    """Run a study and return its rows of the table by recipe and metric."""
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(study), encoding="utf-8")
    run_experiments.main(str(path), str(tmp_path / "data"), str(tmp_path / "runs" / name))
    with open(tmp_path / "results" / "results.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == study["dataset"]]
    found = {(row["recipe"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def known_mean(values: list[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return sum(known) / len(known) if known else nan


def naive_subjects(lines: list[Line], metric: str) -> dict[str, float]:
    """The mean over structures of each subject, of a structure that of its cases."""
    cells: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        cell = cells.setdefault(line["subject"], {}).setdefault(line["structure"], [])
        cell.append(float(line[metric] or "nan"))
    return {subject: known_mean([known_mean(cell) for cell in own.values()]) for subject, own in cells.items()}


def cases_of(lines: list[Line]) -> list[CaseScores]:
    cases: dict[str, CaseScores] = {}
    for line in lines:
        numbers = [float(line[name] or "nan") for name in (*METRICS, "label_ml", "pred_ml")]
        score = StructureScore(line["structure"], tuple(map(int, line["values"].split())), *numbers, line["outcome"])
        cases.setdefault(line["case"], CaseScores(line["case"], line["subject"], [])).structures.append(score)
    return list(cases.values())


def test_rows_hold_mean_and_spread_over_seeds_of_the_mean_over_subjects(stand: Stand, tmp_path: Path) -> None:
    rows = run(tmp_path, STUDY)
    for recipe in ("scratch", "HSSL", "VQ-SSL"):
        by_seed = [lines_of(recipe, seed, "1 subject") for seed in (0, 1, 2)]
        for metric in METRICS:
            values = [known_mean(list(naive_subjects(lines, metric).values())) for lines in by_seed]
            row = rows[recipe, f"1 subject/{metric}"]
            assert (row["mean"], row["std"]) == (f"{np.mean(values):.4f}", f"{np.std(values, ddof=1):.4f}")
    assert (row["n"], row["commit"], row["dataset"]) == ("3", "c0ffee0", "ct")


def test_rows_hold_the_missed_and_the_dice_of_each_structure_that_a_label_has(stand: Stand, tmp_path: Path) -> None:
    rows = run(tmp_path, STUDY)
    by_seed = [lines_of("HSSL", seed, "4 subjects") for seed in (0, 1, 2)]
    missed = [sum(line["outcome"] == "missed" for line in lines) for lines in by_seed]
    assert sum(missed)
    row = rows["HSSL", "4 subjects/missed"]
    assert (row["mean"], row["std"]) == (f"{np.mean(missed):.4f}", f"{np.std(missed, ddof=1):.4f}")
    for structure in ("liver", "left kidney"):
        own = [[line for line in lines if line["structure"] == structure] for lines in by_seed]
        values = [known_mean(list(naive_subjects(lines, "dice").values())) for lines in own]
        assert rows["HSSL", f"4 subjects/dice/{structure}"]["mean"] == f"{np.mean(values):.4f}"
    assert not any("colon" in metric for _, metric in rows)


def test_means_are_those_of_the_evaluation(stand: Stand, tmp_path: Path) -> None:
    rows = run(tmp_path, STUDY)
    by_seed = [summarize(cases_of(lines_of("HSSL", seed, "1 subject"))) for seed in (0, 1, 2)]
    for metric in METRICS:
        expected = np.mean([getattr(mean, metric).value for mean, *_ in by_seed])
        assert rows["HSSL", f"1 subject/{metric}"]["mean"] == f"{expected:.4f}"


def test_differences_agree_with_a_naive_bootstrap_of_subjects_and_seeds(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_statistics, "NUM_SAMPLES", 300)
    rows = run(tmp_path, STUDY)
    rng = np.random.default_rng(0)
    drawn, seeds = rng.multinomial(4, [0.25] * 4, 300), rng.multinomial(3, [1 / 3] * 3, 300)
    for metric in METRICS:
        ours, theirs = (
            [list(naive_subjects(lines_of(recipe, seed, "1 subject"), metric).values()) for seed in (0, 1, 2)]
            for recipe in ("HSSL", "VQ-SSL")
        )

        def of_drawn(values: list[float], counts: Any) -> float:
            return known_mean([value for value, times in zip(values, counts, strict=True) for _ in range(times)])

        def by_seed(counts: Any, ours: Any = ours, theirs: Any = theirs) -> list[float]:
            return [of_drawn(x, counts) - of_drawn(y, counts) for x, y in zip(ours, theirs, strict=True)]

        values = [np.dot(by_seed(counts), times) / 3 for counts, times in zip(drawn, seeds, strict=True)]
        low, high = np.nanpercentile(values, (2.5, 97.5))
        row = rows["HSSL - VQ-SSL", f"1 subject/{metric}"]
        assert (row["mean"], row["std"]) == (f"{np.mean(by_seed([1] * 4)):.4f}", f"{low:.4f}..{high:.4f}")


def test_with_one_seed_a_difference_is_the_paired_bootstrap_without_what_is_undefined() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.uniform(0, 9, (2, 12))
    one[[2, 5]], two[[5, 7]] = nan, nan
    subjects = np.array([f"s{index}" for index in range(12)])
    weights, seed_share = study_statistics.resample(subjects, 1)
    sides = [study_statistics.subject_means(each[None], weights) for each in (one, two)]

    def statistic(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        known = ~np.isnan(values)
        return lambda weight: weight[:, known] @ values[known] / weight[:, known].sum(1)

    expected = bootstrap(lambda weight: statistic(one)(weight) - statistic(two)(weight), subjects)
    assert study_statistics.difference(*sides, seed_share) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        (STUDY["compare"], ["HSSL - scratch", "HSSL - VQ-SSL"]),
        ([], ["scratch - HSSL", "scratch - VQ-SSL"]),
    ],
)
def test_the_pairs_that_a_study_names_are_compared_else_the_first_with_all_others(
    stand: Stand, tmp_path: Path, compare: Any, expected: list[str]
) -> None:
    rows = run(tmp_path, {**STUDY, "compare": compare})
    found = [(recipe, metric.split("/")[1]) for recipe, metric in rows if " - " in recipe and metric.startswith("4")]
    assert found == [(pair, metric) for pair in expected for metric in METRICS]


def test_what_is_undefined_in_a_seed_is_no_row_and_is_named(
    stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything_missed = {"dice": "0.0000", "hd95": "", "surface_dice": "0.0000", "outcome": "missed"}

    def change(recipe: str, seed: int, variant: str, lines: list[Line]) -> list[Line]:
        if (recipe, seed, variant) != ("scratch", 1, "1 subject"):
            return lines
        return [line | everything_missed if float(line["label_ml"]) else line for line in lines]

    stand.change = change
    rows = run(tmp_path, STUDY)
    assert not {("scratch", "1 subject/hd95"), ("HSSL - scratch", "1 subject/hd95")} & set(rows)
    assert {("scratch", "1 subject/dice"), ("HSSL - scratch", "1 subject/dice"), ("HSSL", "1 subject/hd95")} <= set(
        rows
    )
    assert ("scratch", "4 subjects/hd95") in rows
    assert "1 subject: scratch has no row of hd95, which is undefined in a seed or more" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [line for line in lines if line["subject"] != "D"],
        lambda lines: [{**line, "subject": line["subject"].replace("D", "E")} for line in lines],
        lambda lines: [{**line, "structure": line["structure"].replace("left", "right")} for line in lines],
        lambda lines: [{**line, "label_ml": "1.0000"} for line in lines],
        lambda lines: lines[::-1],
    ],
    ids=["a structure less", "a subject less", "another subject", "another structure", "other labels", "other order"],
)
def test_refuses_runs_that_scored_something_else(
    stand: Stand, tmp_path: Path, change: Callable[[list[Line]], list[Line]]
) -> None:
    stand.change = lambda recipe, seed, variant, lines: change(lines) if (recipe, seed) == ("VQ-SSL", 2) else lines
    with pytest.raises(SystemExit, match="the runs of 1 subject scored different subjects, structures or labels"):
        run(tmp_path, STUDY)
    assert not (tmp_path / "results" / "results.csv").exists()


def test_data_that_lies_elsewhere_is_the_same(stand: Stand, tmp_path: Path) -> None:
    stand.change = lambda recipe, seed, variant, lines: [
        {**line, "case": line["case"].replace("/data", f"/{recipe}")} for line in lines
    ]
    assert ("HSSL - scratch", "1 subject/dice") in run(tmp_path, STUDY)


def test_reads_what_an_evaluation_writes(tmp_path: Path) -> None:
    lines = lines_of("HSSL", 0, "1 subject")
    cases = cases_of(lines)
    write_tables(tmp_path / "eval", cases, summarize(cases))
    assert study_statistics.read_cases(tmp_path) == lines


def test_a_study_without_variants_trains_each_recipe_and_seed_for_others(
    stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results" / "results.csv").write_text("untouched", encoding="utf-8")
    assert run(tmp_path, TRAIN_ONLY, "pretraining") == {}
    folders = [Path(knobs["output_dir"]).relative_to(tmp_path / "runs" / "pretraining") for knobs in stand.commands]
    assert [str(folder) for folder in folders] == [
        f"{recipe}/seed{seed}" for seed in (0, 1, 2) for recipe in STUDY["recipes"]
    ]
    assert (tmp_path / "results" / "results.csv").read_text(encoding="utf-8") == "untouched"
    message = "9 runs are trained, of commit c0ffee0; no row is written, as the study has no variants"
    assert message in capsys.readouterr().out
    (tmp_path / "results" / "results.csv").unlink()
    stand.commands.clear()
    weights = "{runs}/../pretraining/HSSL/seed{seed}/models/model.pt"
    run(tmp_path, {**STUDY, "recipes": {**STUDY["recipes"], "HSSL": {"pretrained": weights}}})  # type: ignore[dict-item]
    used = [knobs["pretrained"] for knobs in stand.commands if "HSSL/seed2/4 subjects" in knobs["output_dir"]]
    assert Path(used[0]).resolve() == tmp_path / "runs" / "pretraining" / "HSSL" / "seed2" / "models" / "model.pt"


def test_refuses_weights_of_a_study_that_has_not_been_run(stand: Stand, tmp_path: Path) -> None:
    weights = "{runs}/../pretraining/HSSL, five sets/seed{seed}/models/model.pt"
    with pytest.raises(SystemExit, match=r"`pretrained` of \S+HSSL/seed0/1 subject is .*run the study that makes it"):
        run(tmp_path, {**STUDY, "recipes": {"scratch": {}, "HSSL": {"pretrained": weights}}, "compare": []})
    assert not stand.commands


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {}, "training_subjects": None}, "`variants` must name what is trained, or change evaluation"),
        ({"compare": ["HSSL"]}, "`compare` must hold pairs of two different recipes, got HSSL in"),
        ({"compare": [["HSSL", "HSSL"]]}, r"`compare` must hold pairs of two different recipes, got \['HSSL', 'HSSL'"),
        ({"compare": [["HSSL", "random"]]}, "`compare` must hold pairs of two different recipes, got"),
        (
            {"training_subjects": 0},
            "`training_subjects` must be a positive number where variants change training, got 0",
        ),
        ({"training_subjects": 4, "variants_change": "evaluation"}, "`training_subjects` must be a positive number"),
        ({"training_subjects": 5}, r"`training_subjects` is 5, but \S+/ct has 4 with labels to train on: correct it"),
    ],
)
def test_refuses_a_bad_study_before_anything_runs(
    stand: Stand, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(tmp_path, {**STUDY, **change})
    assert not stand.commands


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.77, 1])
def test_the_number_of_subjects_is_what_a_fraction_draws(fraction: float) -> None:
    study = run_experiments.Study(
        **{**STUDY, "variants": {"some": {"label_fraction": fraction}}, "training_subjects": 9}
    )
    assert study.subjects["some"] == len(select_fraction([{"subject": str(index)} for index in range(9)], fraction, 0))


@pytest.mark.parametrize("path", SEGMENTATION, ids=lambda path: path.stem)
def test_the_variants_of_a_study_are_named_for_their_number_of_subjects(path: Path) -> None:
    study = run_experiments.read_study(path)
    assert study.subjects == {name: int(name.split()[0]) for name in study.variants}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.json")), ids=lambda path: path.stem)
def test_weights_of_other_studies_are_of_recipes_and_seeds_that_they_train(path: Path) -> None:
    study = run_experiments.read_study(path)
    for knobs in study.recipes.values():
        if "pretrained" in knobs:
            found = re.fullmatch(r"{runs}/\.\./(\w+)/(.+)/seed{seed}/models/model\.pt", knobs["pretrained"])
            assert found is not None
            other = run_experiments.read_study(EXPERIMENTS / f"{found[1]}.json")
            assert found[2] in other.recipes
            assert other.variants_change == "evaluation"  # else every variant has weights of its own
            assert set(study.seeds) <= set(other.seeds)


@pytest.mark.parametrize("path", SEGMENTATION, ids=lambda path: path.stem)
def test_every_pretraining_is_compared_with_scratch_and_several_sets_with_each_other_pretraining(path: Path) -> None:
    study = run_experiments.read_study(path)
    pretrained = [name for name in study.recipes if name != "scratch"]
    expected = [[name, "scratch"] for name in pretrained]
    expected += [["HSSL, five sets", name] for name in pretrained if name != "HSSL, five sets"]
    assert study.compare == expected


def test_the_pretrainings_of_two_studies_differ_in_their_recipes_alone() -> None:
    one, other = (run_experiments.read_study(EXPERIMENTS / f"{n}_pretraining.json") for n in ("volume", "segmentation"))
    assert (one.training, one.seeds, one.bundle) == (other.training, other.seeds, other.bundle)


@pytest.fixture
def page(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README over a repository of its own."""
    (tmp_path / "scripts" / "experiments").mkdir(parents=True)
    monkeypatch.setattr(render_results, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: begin (scripts/render_results.py) -->\n<!-- results: end -->\n", encoding="utf-8")
    return readme


def show(page: Path, study: Mapping[str, Any], name: str = "study") -> dict[tuple[str, str], Line]:
    (page.parent / "scripts" / "experiments" / f"{name}.json").write_text(json.dumps(study), encoding="utf-8")
    return run(page.parent, study, name)


def figure_of(page: Path) -> Path:
    return page.parent / "docs" / "dice_versus_subjects.png"


def test_several_numbers_of_subjects_are_a_table_per_metric_and_a_figure(page: Path) -> None:
    rows = show(page, STUDY)
    render_results.main()
    text = page.read_text(encoding="utf-8")
    for title in ("Dice", "HD95 (mm)", "surface Dice, 2 mm", "missed"):
        assert f"**{title}**\n\n| | 1 subject | 4 subjects |\n|---|---|---|\n| scratch | " in text
    row = rows["HSSL", "1 subject/dice"]
    assert f"| HSSL | {float(row['mean']):.3f} ± {float(row['std']):.3f} |" in text
    row = rows["HSSL", "1 subject/hd95"]
    assert f"| HSSL | {float(row['mean']):.1f} ± {float(row['std']):.1f} |" in text
    row = rows["HSSL - VQ-SSL", "1 subject/dice"]
    low, high = map(float, row["std"].split(".."))
    assert f"| HSSL - VQ-SSL | {float(row['mean']):+.3f} ({low:+.3f} to {high:+.3f}) |" in text
    assert "![Dice by the number of training subjects of hssl_multidomain on ct](docs/dice_versus_subjects.png)" in text
    assert "label_efficiency" not in text
    assert figure_of(page).read_bytes().startswith(b"\x89PNG")
    assert not (page.parent / "docs" / "label_efficiency.png").exists()


def test_a_single_number_of_subjects_is_one_table_without_figure(page: Path) -> None:
    show(page, {**STUDY, "variants": {"2 subjects (50 %)": {"label_fraction": 0.5}}})
    render_results.main()
    text = page.read_text(encoding="utf-8")
    assert "**2 subjects (50 %)**\n\n| | Dice | HD95 (mm) | surface Dice, 2 mm | missed |\n" in text
    assert ".png" not in text
    assert not figure_of(page).exists()
    render_results.main(check=True)


def test_a_study_without_rows_shows_nothing(page: Path) -> None:
    show(page, {**STUDY, "variants_change": "evaluation", "variants": {"full": {}}, "training_subjects": None})
    for name, study in (("planned", {**STUDY, "dataset": "mr"}), ("pretraining", TRAIN_ONLY)):
        path = page.parent / "scripts" / "experiments" / f"{name}.json"
        path.write_text(json.dumps(study), encoding="utf-8")
    render_results.main()
    assert "**full**" in page.read_text(encoding="utf-8")
    assert "subject**" not in page.read_text(encoding="utf-8")
    assert not figure_of(page).exists()


def test_the_lines_run_over_the_numbers_of_subjects_without_the_differences(page: Path) -> None:
    rows = show(page, STUDY)
    (panel,) = render_results.panels(render_results.DICE, render_results.read_blocks())
    assert (panel.title, panel.dataset) == ("Dice", "ct")
    assert [(line.recipe, line.sizes) for line in panel.lines] == [(name, [1, 4]) for name in STUDY["recipes"]]
    expected = [float(rows["HSSL", f"{variant}/dice"]["std"]) for variant in STUDY["variants"]]
    assert panel.lines[1].stds == expected


def test_a_data_set_with_several_numbers_of_subjects_is_a_panel(page: Path) -> None:
    show(page, STUDY)
    write_data(page.parent / "data" / "mr", 4)
    show(page, {**STUDY, "dataset": "mr", "training": {"dataset_dir": "{data}/mr"}}, "other")
    render_results.main()
    assert "### `hssl_multidomain` on mr\n\n![Dice by" in page.read_text(encoding="utf-8")
    with Image.open(figure_of(page)) as image:
        assert image.width == 2 * 4 * 150 + 150


def test_check_fails_on_a_missing_or_stale_figure(page: Path) -> None:
    rows = show(page, STUDY)
    render_results.main()
    render_results.main(check=True)
    stale = figure_of(page).read_bytes()
    with open(page.parent / "results" / "results.csv", "a", newline="", encoding="utf-8") as file:
        changed = {**rows["HSSL", "4 subjects/dice"], "mean": "0.1234"}
        csv.DictWriter(file, run_experiments.FIELDS).writerow(changed)
    render_results.main()
    render_results.main(check=True)
    figure_of(page).write_bytes(stale)
    with pytest.raises(SystemExit, match=r"^error: docs/dice_versus_subjects.png does not show .*run `make results`"):
        render_results.main(check=True)
    figure_of(page).unlink()
    with pytest.raises(SystemExit, match=r"^error: docs/dice_versus_subjects.png does not show .*run `make results`"):
        render_results.main(check=True)
