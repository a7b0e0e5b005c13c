from collections.abc import Callable
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_experiments
import study_statistics
from sklearn.metrics import roc_auc_score

from dissect_monai.handlers.segmentation_report import CaseScores, summarize, write_tables
from dissect_monai.metrics.classification import auroc, average_precision
from dissect_monai.metrics.segmentation import StructureScore

Study = dict[str, Any]
Line = dict[str, str]
METRICS = ("dice", "hd95", "surface_dice")


def scores_of(tmp_path: Path, recipe: str, seed: int, variant: str, name: str) -> np.ndarray:
    path = tmp_path / "runs" / "study" / recipe / f"seed{seed}" / variant / "evaluation" / "eval" / "scores.npz"
    return np.load(path)[name]


def macro_auroc(labels: np.ndarray, scores: np.ndarray, weight: np.ndarray) -> float:
    """Mean over the findings that have both classes among what is known and drawn."""
    values = []
    for label, score in zip(labels.T, scores.T, strict=True):
        used = ~np.isnan(label) & (weight > 0)
        if len(set(label[used])) == 2:
            values.append(roc_auc_score(label[used], score[used], sample_weight=weight[used]))
    return float(np.mean(values))


def test_rows_hold_mean_and_spread_over_seeds(stand: Any, trained: Study, tmp_path: Path) -> None:
    rows = stand.run(trained)
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
    stand: Any, evaluated: Study, tmp_path: Path
) -> None:
    rows = stand.run(evaluated)
    name = "scores/pretrained/last/linear/findings"
    labels, subjects = (scores_of(tmp_path, "ours", 0, "labels_100", key) for key in ("labels/findings", "subjects"))
    ours, theirs = ([scores_of(tmp_path, r, s, "labels_100", name) for s in (0, 1)] for r in ("ours", "theirs"))
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(30, np.full(30, 1 / 30), study_statistics.NUM_SAMPLES)
    seeds = rng.multinomial(2, [0.5, 0.5], study_statistics.NUM_SAMPLES)

    def by_seed(weight: np.ndarray) -> list[float]:
        pairs = zip(ours, theirs, strict=True)
        return [macro_auroc(labels, one, weight) - macro_auroc(labels, other, weight) for one, other in pairs]

    values = [np.dot(by_seed(counts[subjects]), times) / 2 for counts, times in zip(drawn, seeds, strict=True)]
    low, high = np.percentile(values, (2.5, 97.5))
    row = next(row for row in rows if row["recipe"] == "ours - theirs" and row["metric"].startswith("labels_100"))
    assert row["std"] == f"{low:.4f}..{high:.4f}"
    assert row["mean"] == f"{np.mean(by_seed(np.ones(60))):.4f}"


def test_the_better_baseline_is_a_row_of_its_own(stand: Any, evaluated: Study) -> None:
    rows = {row["recipe"]: row for row in stand.run(evaluated) if row["metric"].startswith("labels_10/")}
    better = max(("random", "pixels"), key=lambda name: float(rows[name]["mean"]))
    best = rows["ours - best of random, pixels"]
    assert (best["mean"], best["std"]) == (rows[f"ours - {better}"]["mean"], rows[f"ours - {better}"]["std"])


def test_findings_known_in_one_data_set_each_count_alike() -> None:
    rng = np.random.default_rng(0)
    data_set = np.arange(90) % 3
    labels = np.where(data_set[:, None] == [0, 1, 2, 2], rng.integers(0, 2, (90, 4)), np.nan)
    labels[data_set == 2, 2] = np.arange(30) == 0  # one positive, which is missing in many a resample
    scores = rng.normal(0, 1, (2, 90, 4)) + np.nan_to_num(labels)
    weights = study_statistics.resample(np.arange(90) // 3, 2)[0][:50]
    found = study_statistics.macro(auroc, labels[:, :3], scores[..., :3], weights)
    expected = [[macro_auroc(labels[:, :3], each, weight) for each in scores[..., :3]] for weight in weights]
    assert found == pytest.approx(np.array(expected))


@pytest.mark.parametrize("change", [{"images": 40}, {"label_seed": 1}], ids=["other images", "other labels"])
def test_refuses_other_images_or_labels(stand: Any, evaluated: Study, tmp_path: Path, change: dict[str, int]) -> None:
    stand.run(evaluated)
    (tmp_path / "runs" / "study" / "theirs" / "seed1" / "labels_10" / "evaluation" / "done.json").unlink()
    vars(stand).update(change)
    with pytest.raises(SystemExit, match="the runs of labels_10 scored different images or labels"):
        stand.run(evaluated)


def by_key(rows: list[Line]) -> dict[tuple[str, str], Line]:
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


def test_rows_hold_mean_and_spread_of_what_evaluations_report(stand: Any, segmented: Study) -> None:
    rows = by_key(stand.run(segmented))
    for recipe in segmented["recipes"]:
        by_seed = [summarize(cases_of(stand.lines_of(recipe, seed, "1 subject"))) for seed in (0, 1, 2)]
        for metric in METRICS:
            values = [getattr(mean, metric).value for mean, *_ in by_seed]
            row = rows[recipe, f"1 subject/{metric}"]
            assert (row["mean"], row["std"]) == (f"{np.mean(values):.4f}", f"{np.std(values, ddof=1):.4f}")
    assert (row["n"], row["commit"], row["dataset"]) == ("3", "c0ffee0", "ct")


def test_rows_hold_the_missed_and_the_dice_of_each_structure_that_a_label_has(stand: Any, segmented: Study) -> None:
    rows = by_key(stand.run(segmented))
    by_seed = [stand.lines_of("HSSL", seed, "4 subjects") for seed in (0, 1, 2)]
    missed = [sum(line["outcome"] == "missed" for line in lines) for lines in by_seed]
    assert sum(missed)
    row = rows["HSSL", "4 subjects/missed"]
    assert (row["mean"], row["std"]) == (f"{np.mean(missed):.4f}", f"{np.std(missed, ddof=1):.4f}")
    for structure in ("liver", "left kidney"):
        own = [[line for line in lines if line["structure"] == structure] for lines in by_seed]
        values = [known_mean(list(naive_subjects(lines, "dice").values())) for lines in own]
        assert rows["HSSL", f"4 subjects/dice/{structure}"]["mean"] == f"{np.mean(values):.4f}"
    assert not any("colon" in metric for _, metric in rows)


def test_differences_of_structures_agree_likewise(stand: Any, segmented: Study) -> None:
    rows = by_key(stand.run(segmented))
    rng = np.random.default_rng(0)
    num_samples = study_statistics.NUM_SAMPLES
    drawn, seeds = rng.multinomial(4, [0.25] * 4, num_samples), rng.multinomial(3, [1 / 3] * 3, num_samples)
    for metric in METRICS:
        ours, theirs = (
            [list(naive_subjects(stand.lines_of(recipe, seed, "1 subject"), metric).values()) for seed in (0, 1, 2)]
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


def test_what_is_undefined_in_a_seed_is_named(stand: Any, segmented: Study, capsys: pytest.CaptureFixture[str]) -> None:
    everything_missed = {"dice": "0.0000", "hd95": "", "surface_dice": "0.0000", "outcome": "missed"}

    def change(recipe: str, seed: int, variant: str, lines: list[Line]) -> list[Line]:
        if (recipe, seed, variant) != ("scratch", 1, "1 subject"):
            return lines
        return [line | everything_missed if float(line["label_ml"]) else line for line in lines]

    stand.change = change
    rows = by_key(stand.run(segmented))
    assert not {("scratch", "1 subject/hd95"), ("HSSL - scratch", "1 subject/hd95")} & set(rows)
    assert {("HSSL - scratch", "1 subject/dice"), ("HSSL", "1 subject/hd95"), ("scratch", "4 subjects/hd95")} <= {*rows}
    assert "1 subject: scratch has no row of hd95, which is undefined in a seed or more" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [{**line, "subject": line["subject"].replace("D", "C")} for line in lines],
        lambda lines: [{**line, "label_ml": "1.0000"} for line in lines],
        lambda lines: lines[::-1],
    ],
    ids=["a structure less", "two subjects as one", "other labels", "other order"],
)
def test_refuses_other_subjects(stand: Any, segmented: Study, change: Callable[[list[Line]], list[Line]]) -> None:
    stand.change = lambda recipe, seed, variant, lines: change(lines) if (recipe, seed) == ("VQ-SSL", 2) else lines
    with pytest.raises(SystemExit, match="the runs of 1 subject scored different subjects, structures or labels"):
        by_key(stand.run(segmented))
    assert len(run_experiments.TABLE.read_text().splitlines()) == 1


def test_runs_on_copies_of_the_data_with_other_pseudonyms_are_paired(stand: Any, segmented: Study) -> None:
    rows = stand.run(segmented)
    stand.change = lambda recipe, seed, variant, lines: [
        {**line, "subject": f"{seed}{line['subject']}", "case": f"/copy{seed}{line['case']}"} for line in lines
    ]
    again = stand.run(segmented, "again")[len(rows) :]
    keys = ("recipe", "metric", "mean", "std")
    assert [[row[key] for key in keys] for row in again] == [[row[key] for key in keys] for row in rows]


def test_reads_what_an_evaluation_writes(stand: Any, tmp_path: Path) -> None:
    lines = stand.lines_of("HSSL", 0, "1 subject")
    cases = cases_of(lines)
    write_tables(tmp_path / "eval", cases, summarize(cases))
    assert study_statistics.read_cases(tmp_path) == lines
