"""Write the README's results from results/results.csv: tables, and the figures in docs/.

    python scripts/render_results.py [--check]

Titles and the order of tables come from the studies in scripts/experiments/; tables go between the README's markers.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
from run_experiments import Study, read_study
from study_statistics import StudyError

from dissect_monai.visualize.classifier import COLORS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin (scripts/render_results.py) -->\n", "<!-- results: end -->"
DIGITS = {"hd95": 1, "missed": 1}  # after the point, of metrics that are not in [0, 1]
Row = dict[str, str]
Lines = dict[str, list[tuple[float, float, float, float]]]  # recipe → size, value and ends of the bar of its points


class Figure(NamedTuple):
    """What is drawn over how much a variant trains with, and where."""

    path: str  # from the repository's root
    name: str
    metric: str  # pattern of the metrics that have a panel, without the variant
    xlabel: str
    ylabel: str
    tick: str  # format of a size


FILMS = Figure(
    "docs/films_label_efficiency.png", "Viral against bacterial pneumonia", "",
    "share of the training labels", "AUROC of a linear probe, 95 % interval", "{:.0%}",
)  # fmt: skip
FIGURES = (
    Figure(
        "docs/label_efficiency.png", "Label efficiency", r".*/auroc",
        "share of the training labels", "macro AUROC, mean ± std over seeds", "{:.0%}",
    ),
    Figure(
        "docs/dice_versus_subjects.png", "Dice by the number of training subjects", "dice",
        "training subjects", "Dice, mean ± std over seeds", "{:g}",
    ),
)  # fmt: skip


class Block(NamedTuple):
    """What is known of one data set by one bundle, and how to show it."""

    bundle: str
    dataset: str
    rows: dict[tuple[str, str], Row]  # by recipe and metric, the latest of each
    variants: dict[str, str]  # name → title
    columns: dict[str, str]  # metric, without the variant → title
    sizes: dict[str, float]  # variant → its training subjects, or their share, if variants are trained with a part
    recipes: list[str]  # with baselines and differences, in the order of the file


def read_blocks() -> list[Block]:
    """The blocks of results/results.csv, in its order; the file is only appended to, and the latest row counts."""
    studies = [read_study(path) for path in sorted((ROOT / "scripts" / "experiments").glob("*.json"))]
    found: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    with open(ROOT / "results" / "results.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # Pixels and intensities have one kind of features, shown in the columns of the last stage.
            metric = row["metric"].replace("/pca/", "/last/").replace("/histogram/", "/last/")
            found.setdefault((row["bundle"], row["dataset"]), {})[row["recipe"], metric] = row
    return [
        block(*name, rows, [study for study in studies if (study.bundle, study.dataset) == name])
        for name, rows in found.items()
    ]


def block(bundle: str, dataset: str, rows: dict[tuple[str, str], Row], studies: Sequence[Study]) -> Block:
    """Rows as their studies show them."""
    variants = {name: study.titles.get(name, name) for study in studies for name in study.variants}
    columns = {metric: title for study in studies for metric, title in study.columns.items()}
    shown = {f"{variant}/{metric}" for variant in variants for metric in columns}
    rows = {key: row for key, row in rows.items() if key[1] in shown}
    sizes = {name: size for study in studies for name, size in sizes_of(study).items()}
    return Block(bundle, dataset, rows, variants, columns, sizes, list(dict.fromkeys(recipe for recipe, _ in rows)))


def sizes_of(study: Study) -> dict[str, float]:
    """By variant, the share of the labels that it trains with or, where the study says it, the number of subjects."""
    if study.variants_change != "training":
        return {}
    shares = {name: knobs["label_fraction"] for name, knobs in study.variants.items() if "label_fraction" in knobs}
    number = study.training_subjects
    return {name: max(1, round(share * number)) if number else share for name, share in shares.items()}


def cell(row: Row | None) -> str:
    """Mean ± std over seeds, or a difference with its interval."""
    if row is None:
        return "–"
    mean, digits = float(row["mean"]), DIGITS.get(row["metric"].rsplit("/", 1)[-1], 3)
    if ".." in row["std"]:
        low, high = (float(end) for end in row["std"].split(".."))
        return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"{mean:.{digits}f} ± {float(row['std']):.{digits}f}"


def table(block: Block, title: str, columns: dict[str, str]) -> list[str]:
    """Markdown lines of the columns {metric: title} that have results; none if no column has."""
    present = {metric: name for metric, name in columns.items() if any(key[1] == metric for key in block.rows)}
    if not present:
        return []
    lines = [f"**{title}**", "", f"| | {' | '.join(present.values())} |", "|---" * (len(present) + 1) + "|"]
    for recipe in block.recipes:
        found = [block.rows.get((recipe, metric)) for metric in present]
        if any(found):
            lines.append(f"| {recipe} | {' | '.join(cell(row) for row in found)} |")
    return [*lines, ""]


def render(block: Block) -> str:
    """Markdown of one block: a table per variant, or per metric where the variants are several sizes."""
    lines = [f"### `{block.bundle}` on {block.dataset}", ""]
    for figure in FIGURES:
        if panels(figure, [block]):
            lines += [f"![{figure.name} of {block.bundle} on {block.dataset}]({figure.path})", ""]
    if len(block.sizes) > 1:
        for metric, title in block.columns.items():
            lines += table(block, title, {f"{name}/{metric}": each for name, each in block.variants.items()})
    else:
        for name, title in block.variants.items():
            lines += table(block, title, {f"{name}/{metric}": each for metric, each in block.columns.items()})
    latest = {row["command"]: row for row in block.rows.values()}
    sources = [
        f"{row['n']} seeds, commit {row['commit']}, {row['date']}, {row['hardware']}: `{command}`"
        for command, row in latest.items()
    ]
    return "\n".join([*lines, "\n\n".join(sources)])


def panels(figure: Figure, blocks: Sequence[Block]) -> dict[str, Lines]:
    """What a figure shows, by title: the lines of each data set and metric over several sizes."""
    return {
        f"{title}, {block.dataset}": lines
        for block in blocks
        if len({*block.sizes.values()}) > 1
        for metric, title in block.columns.items()
        if re.fullmatch(figure.metric, metric) and (lines := dict(curves(block, metric)))
    }


def film_panels(table: Path) -> dict[str, Lines]:
    """What a probe tells at each share of the labels, by the features that it sees, of a table of judge_encoders.py."""
    found: dict[str, Lines] = {"last stage": {}, "all stages": {}}
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["question"] == "viral against bacterial" and not row["less"]:
                lines = found["last stage" if row["features"] == "last" else "all stages"]
                size, value, low, high = (float(row[name]) for name in ("fraction", "auroc", "low", "high"))
                lines.setdefault(row["recipe"], []).append((size, value, low, high))
    return found


def curves(block: Block, metric: str) -> Iterator[tuple[str, list[tuple[float, float, float, float]]]]:
    """The line of each recipe, from the smallest size on; differences have none."""
    for recipe in block.recipes:
        found = [(size, block.rows.get((recipe, f"{name}/{metric}"))) for name, size in block.sizes.items()]
        points = [(size, row["mean"], row["std"]) for size, row in found if row and ".." not in row["std"]]
        if points:
            yield recipe, sorted((x, float(y), float(y) - float(std), float(y) + float(std)) for x, y, std in points)


def draw(figure: Figure, panels: Mapping[str, Lines], path: Path) -> None:
    """Write a figure: a panel per data set and metric, a line per recipe with its bars, one beside the other."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(1 + 4 * len(panels), 3.8), layout="constrained")
    axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    axes[0].set_ylabel(figure.ylabel)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        ticks = sorted({size for points in lines.values() for size, *_ in points})
        step = (ticks[-1] / ticks[0]) ** 0.012  # the axis is logarithmic
        for index, (color, marker, recipe) in enumerate(zip(cycle(COLORS), cycle("o^sD"), lines, strict=False)):
            sizes, values, lows, highs = np.transpose(lines[recipe])
            moved = [size * step ** (index - (len(lines) - 1) / 2) for size in sizes]
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "capsize": 2, "elinewidth": 1}
            ax.errorbar(moved, values, [values - lows, highs - values], label=recipe, **style)
        ax.set_xscale("log")
        ax.set_xticks(ticks, [figure.tick.format(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=figure.xlabel, title=title)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    canvas.savefig(path, dpi=150, metadata={"Software": None})


def main(check: bool = False) -> None:
    """Rewrite what is between the markers of README.md, and the figures.

    Args:
        check: change nothing, and fail if the README is out of date.
    """
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: README.md must hold the lines {BEGIN.strip()} and {END}.")
    try:
        blocks = read_blocks()
    except StudyError as error:
        raise SystemExit(f"error: {error}") from error
    above, below = text.partition(BEGIN)[0], text.partition(END)[2]
    new = f"{above}{BEGIN}" + "\n\n".join(map(render, blocks)) + f"\n{END}{below}"
    if check:
        if new != text:
            raise SystemExit("error: README.md does not show results/results.csv: run `make results`.")
        return
    readme.write_text(new, encoding="utf-8")
    for figure in FIGURES:
        if shown := panels(figure, blocks):
            draw(figure, shown, ROOT / figure.path)
    if (table := ROOT / "results" / "cxr_films.csv").exists():
        draw(FILMS, film_panels(table), ROOT / FILMS.path)


if __name__ == "__main__":
    fire.Fire(main)
