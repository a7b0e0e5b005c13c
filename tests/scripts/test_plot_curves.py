from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import demo_table
import numpy as np
import plot_curves
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

STUDY = {
    "bundle": "pretrain_vq_ssl",
    "dataset": "phantoms",
    "hardware": "none",
    "seeds": [0, 1],
    "training": {},
    "recipes": {"ours, both": {}, "theirs": {}},
    "variants_change": "evaluation",
    "variants": {"labels_100": {}},
    "evaluation": {},
}
TAGS = ["loss/task", "accuracy"]


def log(folder: Path, curves: Mapping[str, list[float]], first: int = 1) -> None:
    with SummaryWriter(folder / "eval") as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values, first):
                writer.add_scalar(tag, value, step)
        writer.add_image("views", np.zeros((1, 4, 4)), 1)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two recipes, of which the second has no task."""
    monkeypatch.setattr(plot_curves, "ROOT", tmp_path)
    for seed in (0, 1):
        log(tmp_path / "runs" / "ours, both" / f"seed{seed}", {"loss/task": [3, 2, 1 + seed], "accuracy": [0.5, 0.75]})
        log(tmp_path / "runs" / "theirs" / f"seed{seed}", {"accuracy": [0.25, 0.5]})
    return tmp_path / "runs"


def plot(runs: Path, tags: Any = TAGS, study: Mapping[str, Any] = STUDY) -> list[dict[str, str]]:
    """Plot and return the lines of the CSV file."""
    path = runs.parent / "study.json"
    path.write_text(json.dumps(study), encoding="utf-8")
    plot_curves.main(str(path), tags, str(runs))
    with open(runs.parent / "docs" / "study_curves.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curve(rows: list[dict[str, str]], recipe: str, seed: int, tag: str) -> list[tuple[int, float]]:
    wanted = (recipe, str(seed), tag)
    return [(int(r["step"]), float(r["value"])) for r in rows if (r["recipe"], r["seed"], r["tag"]) == wanted]


def test_keeps_the_curve_of_every_recipe_seed_and_tag(runs: Path) -> None:
    rows = plot(runs)
    assert curve(rows, "ours, both", 1, "loss/task") == [(1, 3), (2, 2), (3, 2)]
    assert curve(rows, "theirs", 0, "accuracy") == [(1, 0.25), (2, 0.5)]
    assert not curve(rows, "theirs", 0, "loss/task")
    assert len(rows) == 2 * (3 + 2) + 2 * 2


def test_draws_a_panel_per_tag_and_a_line_per_recipe_that_has_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw_line = plot_curves.draw_line

    def watched(ax: Any, points: Any, style: Any) -> None:
        draw_line(ax, points, style)
        drawn.append((ax, points, style))

    monkeypatch.setattr(plot_curves, "draw_line", watched)
    plot(runs)
    task, accuracy = dict.fromkeys(ax for ax, _, _ in drawn)
    assert [(ax.get_title(), ax.get_xlabel()) for ax in (task, accuracy)] == [
        ("loss/task", "iteration"),
        ("accuracy", "epoch"),
    ]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[0.5, 0.75], [0.25, 0.5]]
    (line,) = (line for line in task.lines if len(line.get_ydata()))
    assert list(line.get_ydata()) == [3, 2, 1.5]
    assert task.collections[0].get_datalim(task.transData).height == 3 - 1  # from seed to seed
    colours = {points[0].recipe: style["color"] for _, points, style in drawn if points}
    assert len(set(colours.values())) == 2


def test_writes_the_same_figure_again(runs: Path) -> None:
    plot(runs)
    figure = runs.parent / "docs" / "study_curves.png"
    first = figure.read_bytes()
    plot(runs)
    assert figure.read_bytes() == first
    with Image.open(figure) as image:
        assert image.size == (2 * 4 * 100, 3.4 * 100)


def test_more_recipes_than_colours_differ_by_the_kind_of_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = set()
    monkeypatch.setattr(plot_curves, "draw_line", lambda ax, points, style: looks.add(tuple(style.values())))
    points = [plot_curves.Point(f"recipe{i}", 0, "accuracy", 1, 0.5) for i in range(12)]
    plot_curves.draw(points, ["accuracy"], runs.parent / "curves.png")
    assert len(looks) == 12


def test_trained_variants_are_lines_of_their_own(runs: Path) -> None:
    for name in ("ours, both/seed0", "ours, both/seed1", "theirs/seed0", "theirs/seed1"):
        for variant in ("all", "few"):
            log(runs / name / variant, {"accuracy": [0.5]})
    study = {**STUDY, "variants_change": "training", "variants": {"all": {}, "few": {}}}
    rows = plot(runs, "accuracy", study)
    assert {row["recipe"] for row in rows} == {"ours, both, all", "ours, both, few", "theirs, all", "theirs, few"}


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_resumed_run_counts_with_its_last_values_wherever_its_file_is_sorted(runs: Path, place: str) -> None:
    log(runs / "theirs" / "seed0", {"accuracy": [0.625, 0.75]}, first=2)
    *_, later = sorted((runs / "theirs" / "seed0" / "eval").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    later.rename(later.with_name(f"events.out.tfevents.{'0' if place == 'first' else '9' * 12}"))
    rows = plot(runs)
    assert curve(rows, "theirs", 0, "accuracy") == [(1, 0.25), (2, 0.625), (3, 0.75)]


def test_long_curves_are_means_of_neighbours(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_curves, "NUM_POINTS", 2)
    rows = plot(runs)
    assert curve(rows, "ours, both", 0, "loss/task") == [(2, 2.5), (3, 1)]
    assert curve(rows, "ours, both", 0, "accuracy") == [(1, 0.5), (2, 0.75)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tags": ["accuracy", "lss"]}, "no run has lss; there are accuracy, loss/task"),
        ({"study": {**STUDY, "seeds": [0, 2]}}, r"ours, both/seed2/eval holds no event files: .*give the right --runs"),
        ({"study": {}}, "is not a study file: .*'bundle'"),
    ],
)
def test_refuses_in_one_line_and_writes_nothing(runs: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        plot(runs, **arguments)
    assert not (runs.parent / "docs").exists()


def test_the_demo_ends_with_first_and_last_values_and_scores_on_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in demo_table.STEPS:
        log(tmp_path / step.bundle, {tag: [0.25, 0.5, 0.75] for tag in step.measures})
        scores = "".join(f"{name},0.625\n" for name in step.tested)
        (tmp_path / step.bundle / "eval" / "metrics.csv").write_text(scores)
    demo_table.chain(str(tmp_path))
    head, *lines = (re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert head == ["bundle", "weights of", "measure", "first", "last", "pictures"]
    assert lines[1] == [
        "cxr_classify",
        "pretrain_vq_ssl",
        "AUROC, validation",
        "0.250",
        "0.750",
        f"{tmp_path}/cxr_classify/eval/report.html",
    ]
    assert lines[-1] == ["", "Dice of the liver, test", "0.625"]


def test_the_demo_ends_with_what_pretraining_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(tmp_path, {"knn_auroc_stages": [0.5, 0.625, 0.75]})
    head = "source,features,probe,question,finding,auroc"
    lines = [
        f"{source},stages,linear,findings,macro,0.{digits}" for source, digits in (("pretrained", 8), ("random", 7))
    ]
    (tmp_path / "eval" / "findings.csv").write_text("\n".join([head, *lines]))
    demo_table.gain(str(tmp_path))
    _, knn, linear = (re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert knn[1:] == ["0.500", "0.750"]
    assert linear[1:] == ["0.700", "0.800"]
