"""Write results from the tables in results/: what the README claims, the pages in docs/results/, the figures in docs/.

    python scripts/render_results.py [--check]

Titles and the order of tables come from the studies in scripts/experiments/, the README's claims from
results/claims.json. All goes between the markers of a page; what stands around them is written by hand.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import fire
import numpy as np
from run_experiments import Study, read_study
from study_statistics import StudyError

from dissect_monai.visualize.classifier import COLORS
from dissect_monai.writing import read_csv

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin (scripts/render_results.py) -->\n", "<!-- results: end -->"
PAGES = "docs/results"
FILM_SETS = {"cxr_kermany": "paediatric films", "cxr_nih": "NIH", "cxr_nih64": "NIH, 64 px", "cxr_adult": "adult films"}
FILM_RECIPES = {"pixels": "pixels", "random": "random", "NT-Xent without VQ": "without VQ", "VQ with NT-Xent": "VQ"}
VQ, WITHOUT = "VQ with NT-Xent", "NT-Xent without VQ"
KINDS = ("last", "stages")  # of features
FILM_KEYS = ("set", "question", "fraction", "features", "recipe", "less")
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
    for row in read_csv(ROOT / "results" / "results.csv"):
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
    scored = {name for name in variants if any(metric.startswith(f"{name}/") for _, metric in rows)}
    sizes = {name: size for study in studies for name, size in sizes_of(study).items() if name in scored}
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
    lines = [f"## `{block.bundle}` on {block.dataset}", ""]
    for figure in FIGURES:
        if panels(figure, [block]):
            path = os.path.relpath(figure.path, PAGES)
            lines += [f"![{figure.name} of {block.bundle} on {block.dataset}]({path})", ""]
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
    for row in read_csv(table):
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
    """Write a figure: a panel per data set and metric."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(1 + 4 * len(panels), 3.8), layout="constrained")
    axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    axes[0].set_ylabel(figure.ylabel)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        draw_lines(ax, lines, figure)
        ax.set_title(fill(title, 36))
    path.parent.mkdir(exist_ok=True)
    canvas.savefig(path, dpi=150, metadata={"Software": None})


def draw_lines(ax: Any, lines: Lines, figure: Figure) -> None:
    """Draw a line for each recipe with its bars, one beside the other."""
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
    ax.set_xlabel(figure.xlabel)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def effect(row: Row, sign: float = 1) -> tuple[float, float, float]:
    """A difference and the ends of its interval, of a row of either kind of table; with sign -1 the other way round."""
    mean, ends = (row["mean"], row["std"].split("..")) if "mean" in row else (row["auroc"], [row["low"], row["high"]])
    low, high = sorted(sign * float(end) for end in ends)
    return sign * float(mean), low, high


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the README's claims, each with the one difference in results/ that answers it.

    Raises:
        SystemExit: if the row of a claim is not there, or not the only one.
    """
    lines = ["| does pretraining help? | against | effect | 95 % interval | |", "|---|---|---|---|---|"]
    for claim in claims:
        found = [row for row in read_csv(ROOT / "results" / claim["table"]) if claim["row"].items() <= row.items()]
        # results.csv is only appended to, and the latest row counts.
        if len(found) != 1 and not (found and claim["table"] == "results.csv"):
            raise SystemExit(f"error: {len(found)} rows of results/{claim['table']} are {claim['row']}: one must be.")
        value, low, high = effect(found[-1], claim.get("sign", 1))
        answer = "yes" if low > 0 else "no, it costs" if high < 0 else "not shown"
        shown = f"{value:+.3f} {claim['unit']} | {low:+.3f} to {high:+.3f} | **{answer}**"
        lines.append(f"| {claim['question']} | {claim['against']} | {shown} |")
    return "\n".join(lines)


def film_table(table: Path) -> str:
    """Markdown of a table of judge_encoders.py: by question and share of the labels, last stage / all stages."""
    rows = {tuple(row[name] for name in FILM_KEYS): row for row in read_csv(table)}
    titles = [*FILM_RECIPES.values(), "VQ - random", "VQ - without VQ"]
    lines = [f"| set, question | labels | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name, question, share in dict.fromkeys(key[:3] for key in rows):
        if question in ("viral_pneumonia", "bacterial_pneumonia"):
            continue  # what tells the two from each other tells each from the rest
        cells = [[rows.get((name, question, share, kind, recipe, "")) for kind in KINDS] for recipe in FILM_RECIPES]
        shown = [" / ".join(f"{float(row['auroc']):.3f}" for row in cell if row) for cell in cells]
        for recipe, less, sign in ((VQ, "random", 1), (WITHOUT, VQ, -1)):
            found = [rows.get((name, question, share, kind, recipe, less)) for kind in KINDS]
            parts = [effect(row, sign) for row in found if row]
            shown.append(" / ".join(f"{value:+.3f} ({low:+.3f} to {high:+.3f})" for value, low, high in parts))
        title = f"{FILM_SETS.get(name, name)}, {question}"
        lines.append(f"| {title} | {float(share):.0%} | {' | '.join(shown)} |")
    return "\n".join(lines)


def contents(blocks: Sequence[Block]) -> dict[str, str]:
    """By the path of a page, what stands between its markers."""
    claims = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))
    found = {"README.md": claims_table(claims)}
    if (table := ROOT / "results" / "cxr_films.csv").exists():
        found[f"{PAGES}/films.md"] = film_table(table)
    for bundle in dict.fromkeys(each.bundle for each in blocks):
        found[f"{PAGES}/{bundle}.md"] = "\n\n".join(render(each) for each in blocks if each.bundle == bundle)
    return found


def main(check: bool = False) -> None:
    """Rewrite what is between the markers of README.md and of the pages in docs/results/, and the figures.

    Args:
        check: change nothing, and fail if a page is out of date.
    """
    try:
        blocks = read_blocks()
    except StudyError as error:
        raise SystemExit(f"error: {error}") from error
    for name, content in contents(blocks).items():
        page = ROOT / name
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        if BEGIN not in text or END not in text:
            raise SystemExit(f"error: {name} must hold the lines {BEGIN.strip()} and {END}.")
        new = f"{text.partition(BEGIN)[0]}{BEGIN}{content}\n{END}{text.partition(END)[2]}"
        if check and new != text:
            raise SystemExit(f"error: {name} does not show the tables of results/: run `make results`.")
        if not check:
            page.write_text(new, encoding="utf-8")
    if check:
        return
    for figure in FIGURES:
        if shown := panels(figure, blocks):
            draw(figure, shown, ROOT / figure.path)
    if (table := ROOT / "results" / "cxr_films.csv").exists():
        draw(FILMS, film_panels(table), ROOT / FILMS.path)


if __name__ == "__main__":
    fire.Fire(main)
