import csv
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import render_results
import run_experiments
from helpers import write
from PIL import Image

Study = dict[str, Any]
FIGURES = {"trained": "docs/label_efficiency.png", "segmented": "docs/dice_versus_subjects.png"}


def rendered(folder: Path, bundle: str = "seg_finetune_btcv") -> str:
    render_results.main()
    return page(folder, bundle).read_text(encoding="utf-8")


def page(folder: Path, bundle: str = "pretrain_vq_ssl") -> Path:
    return folder / "docs" / "results" / f"{bundle}.md"


def append(*rows: dict[str, Any]) -> None:
    with open(run_experiments.TABLE, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, run_experiments.FIELDS).writerows(rows)


def panels(figure: str) -> dict[str, Any]:
    (found,) = (each for each in render_results.FIGURES if each.path == FIGURES[figure])
    return render_results.panels(found, render_results.read_blocks())


def test_label_efficiency_is_a_column_per_fraction_and_a_figure(stand: Any, trained: Study, tmp_path: Path) -> None:
    rows = stand.run(trained)
    text = rendered(tmp_path, "pretrain_vq_ssl")
    mean, std = next((float(row["mean"]), float(row["std"])) for row in rows if row["recipe"] == "ours")
    assert text.startswith("above\n")
    assert text.endswith("<!-- results: end -->\nbelow\n")
    assert "**AUROC**\n\n| | 100 % | 10 % |\n|---|---|---|\n" in text
    assert f"| ours | {mean:.3f} ± {std:.3f} |" in text
    assert "![Label efficiency of pretrain_vq_ssl on phantoms](../label_efficiency.png)" in text
    assert (tmp_path / FIGURES["trained"]).read_bytes().startswith(b"\x89PNG")
    ((title, lines),) = panels("trained").items()
    assert title == "AUROC, phantoms"
    sizes = {recipe: [size for size, *_ in points] for recipe, points in lines.items()}
    assert sizes == {"ours": [0.1, 1.0], "theirs": [0.1, 1.0]}
    assert lines["ours"][1][1] == float(rows[0]["mean"])


def test_numbers_of_subjects_are_a_table_per_metric_and_a_figure(stand: Any, segmented: Study, tmp_path: Path) -> None:
    rows = {(row["recipe"], row["metric"]): row for row in stand.run(segmented)}
    text = rendered(tmp_path)
    for title in ("Dice", "HD95 (mm)", "surface Dice, 2 mm", "missed"):
        assert f"**{title}**\n\n| | 1 subject | 4 subjects |\n|---|---|---|\n| scratch | " in text
    row = rows["HSSL", "1 subject/dice"]
    assert f"| HSSL | {float(row['mean']):.3f} ± {float(row['std']):.3f} |" in text
    row = rows["HSSL", "1 subject/hd95"]
    assert f"| HSSL | {float(row['mean']):.1f} ± {float(row['std']):.1f} |" in text
    row = rows["HSSL - VQ-SSL", "1 subject/dice"]
    low, high = map(float, row["std"].split(".."))
    assert f"| HSSL - VQ-SSL | {float(row['mean']):+.3f} ({low:+.3f} to {high:+.3f}) |" in text
    name = "![Dice by the number of training subjects of seg_finetune_btcv on ct](../dice_versus_subjects.png)"
    assert name in text
    assert [path.name for path in (tmp_path / "docs").glob("*.*")] == ["dice_versus_subjects.png"]
    ((title, lines),) = panels("segmented").items()
    assert title == "Dice, ct"
    assert [*lines] == [*segmented["recipes"]]
    for (size, mean, low, high), variant, expected in zip(lines["HSSL"], segmented["variants"], (1, 4), strict=True):
        assert size == expected
        assert (high - mean, mean - low) == pytest.approx([float(rows["HSSL", f"{variant}/dice"]["std"])] * 2)


def test_each_data_set_of_several_sizes_is_a_panel(stand: Any, segmented: Study, tmp_path: Path) -> None:
    stand.run(segmented)
    stand.run({**segmented, "dataset": "mr"}, "other")
    assert "## `seg_finetune_btcv` on mr\n\n![Dice by" in rendered(tmp_path)
    with Image.open(tmp_path / FIGURES["segmented"]) as image:
        assert image.width == 2 * 4 * 150 + 150


def test_tasks_with_results_stand_side_by_side(stand: Any, evaluated: Study, segmented: Study, tmp_path: Path) -> None:
    tasks = {"structures": "0.8", "domains": "0.9"}
    columns = {f"{task}/linear/last/auroc": f"{task}, last" for task in (*tasks, "views")}
    study = {**evaluated, "columns": columns, "titles": {"labels_100": "all labels"}}
    write(tmp_path / "scripts" / "experiments" / "study.json", study)
    write(tmp_path / "scripts" / "experiments" / "planned.json", segmented)
    shared = {"bundle": study["bundle"], "dataset": study["dataset"], "std": "0.01"}
    for recipe, (task, mean) in product(("five sets", "one set"), tasks.items()):
        append({**shared, "recipe": recipe, "metric": f"labels_100/{task}/linear/last/auroc", "mean": mean})
    table = "**all labels**\n\n| | structures, last | domains, last |\n|---|---|---|\n"
    text = rendered(tmp_path, "pretrain_vq_ssl")
    assert f"{table}| five sets | 0.800 ± 0.010 | 0.900 ± 0.010 |\n" in text
    assert "subject**" not in text
    assert ".png" not in text
    assert not [*(tmp_path / "docs").glob("*.png")]


def test_the_latest_row_wins_and_check_fails_on_a_stale_page(stand: Any, trained: Study, tmp_path: Path) -> None:
    rows = stand.run(trained)
    before = page(tmp_path).read_bytes()
    render_results.main()
    assert page(tmp_path).read_bytes() != before
    append({**rows[0], "mean": "0.1234"})
    stale = page(tmp_path).read_bytes()
    with pytest.raises(
        SystemExit, match=r"^error: docs/results/pretrain_vq_ssl.md does not show .*: run `make results`"
    ):
        render_results.main(check=True)
    assert page(tmp_path).read_bytes() == stale
    assert f"| {rows[0]['recipe']} | 0.123 ±" in rendered(tmp_path, "pretrain_vq_ssl")
    render_results.main(check=True)


@pytest.mark.parametrize("broken", ["README.md", "docs/results/pretrain_vq_ssl.md"])
def test_rendering_needs_markers(stand: Any, trained: Study, tmp_path: Path, broken: str) -> None:
    stand.run(trained)
    (tmp_path / broken).write_text("nothing here", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"{broken} must hold the lines"):
        render_results.main()


@pytest.mark.parametrize(
    ("ends", "sign", "line"),
    [
        ("0.01..0.03", 1, "| +0.020 AUROC | +0.010 to +0.030 | **yes** |"),
        ("-0.01..0.05", 1, "| +0.020 AUROC | -0.010 to +0.050 | **not shown** |"),
        ("0.01..0.03", -1, "| -0.020 AUROC | -0.030 to -0.010 | **no, it costs** |"),
    ],
)
def test_a_claim_is_answered_by_the_interval_of_its_row(
    stand: Any, tmp_path: Path, ends: str, sign: int, line: str
) -> None:
    named = {"bundle": "pretrain_vq_ssl", "recipe": "ours - theirs", "dataset": "phantoms", "metric": "x/auroc"}
    append({**named, "mean": "0.5", "std": "0.4..0.6"}, {**named, "mean": "0.02", "std": ends})  # the latest counts
    claim = {"question": "Q", "against": "A", "table": "results.csv", "row": named, "unit": "AUROC", "sign": sign}
    write(tmp_path / "results" / "claims.json", [claim])
    render_results.main()
    assert f"| Q | A {line}\n" in (tmp_path / "README.md").read_text(encoding="utf-8")
    write(tmp_path / "results" / "claims.json", [{**claim, "row": {**named, "recipe": "other"}}])
    with pytest.raises(SystemExit, match=r"^error: 0 rows of results/results.csv are .*other.*: one must be"):
        render_results.main()


def test_the_pages_show_the_results() -> None:
    render_results.main(check=True)


def test_judged_encoders_are_a_line_each_with_its_interval(tmp_path: Path) -> None:
    table = tmp_path / "films.csv"
    vq, viral = "VQ with NT-Xent", "viral against bacterial"
    rows = ["set,question,fraction,features,recipe,less,auroc,low,high"]
    rows += [f"a,{viral},{share},{kind},{vq},,0.8,0.7,0.85" for share in (0.05, 1) for kind in ("last", "stages")]
    rows += [f"a,{viral},1,last,{vq},random,0.1,0.0,0.2", f"a,{viral},1,last,NT-Xent without VQ,{vq},0.1,0.0,0.2"]
    rows += [f"a,findings,1,last,{vq},,0.6,0.5,0.7"]
    table.write_text("\n".join(rows), encoding="utf-8")
    lines = {vq: [(0.05, 0.8, 0.7, 0.85), (1, 0.8, 0.7, 0.85)]}
    assert render_results.film_panels(table) == {"last stage": lines, "all stages": lines}
    shown = " |  |  |  | 0.800 / 0.800 | +0.100 (+0.000 to +0.200) | -0.100 (-0.200 to -0.000) |"
    assert f"| a, {viral} | 100%{shown}" in render_results.film_table(table)
