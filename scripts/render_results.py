"""Write the README's results from results/results.csv: tables, and the figures in docs/.

    python scripts/render_results.py [--check]

Titles and the order of tables come from the studies in scripts/experiments/. Tables go between the README's markers;
a pair of markers that names a bundle takes the tables of this bundle, the pair without a name all others.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import fire
from result_figures import FIGURES, Figure, Line, Panel, digest, draw, drawn_digest
from run_experiments import Study, StudyError, read_study

ROOT = Path(__file__).resolve().parent.parent
MARKERS = re.compile(
    r"(<!-- results: begin (?:(\w+) )?\(scripts/render_results\.py\) -->\n).*?(<!-- results: end -->)", re.DOTALL
)
DIGITS = {"hd95": 1, "missed": 1}  # after the point, of metrics that are not in [0, 1]
Row = dict[str, str]


class Block(NamedTuple):
    """What is known of one data set by one bundle, and how to show it."""

    bundle: str
    dataset: str
    rows: dict[tuple[str, str], Row]  # by recipe and metric, the latest of each
    variants: dict[str, str]  # name → title
    columns: dict[str, str]  # metric, without the variant → title
    fractions: dict[str, float]  # share of the labels that a variant trains with, if that is what the variants change
    subjects: dict[str, int]  # number of subjects that a variant trains with, if its study says so

    @property
    def recipes(self) -> list[str]:
        """Recipes, baselines and differences, in the order of the file."""
        return list(dict.fromkeys(recipe for recipe, _ in self.rows))

    def sizes(self, figure: Figure) -> dict[str, float]:
        """Where the variants stand in a figure; nowhere if they are no several sizes."""
        found: dict[str, float] = {**(self.subjects if figure.sizes == "subjects" else self.fractions)}
        return found if len(set(found.values())) > 1 else {}


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
    """Rows as their studies show them; without studies, or without their `columns`, everything by its own name."""
    split = [metric.split("/", 1) for _, metric in rows]
    variants = {name: study.titles.get(name, name) for study in studies for name in study.variants}
    columns = {metric: title for study in studies for metric, title in study.columns.items()}
    variants = variants or {name: name for name, _ in split}
    columns = columns or {metric: metric for _, metric in split}
    fractions = {
        name: float(knobs["label_fraction"])
        for study in studies
        for name, knobs in study.variants.items()
        if study.variants_change == "training" and "label_fraction" in knobs
    }
    shown = {f"{variant}/{metric}" for variant in variants for metric in columns}
    rows = {key: row for key, row in rows.items() if key[1] in shown}
    subjects = {name: number for study in studies for name, number in study.subjects.items()}
    return Block(bundle, dataset, rows, variants, columns, fractions, subjects)


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


def render(block: Block) -> list[str]:
    """Markdown lines of one block: a table per variant, or per metric where the variants are several fractions."""
    lines = []
    for figure in FIGURES:
        if panels(figure, [block]):
            lines += [f"![{figure.name} of {block.bundle} on {block.dataset}]({figure.path})", ""]
    if len(block.fractions) > 1:
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
    return [*lines, "\n\n".join(sources)]


def render_all(blocks: Sequence[Block]) -> str:
    """Markdown of several blocks, with headings if they are more than one."""
    texts = []
    for each in blocks:
        heading = [f"### `{each.bundle}` on {each.dataset}", ""] if len(blocks) > 1 else []
        texts.append("\n".join([*heading, *render(each)]))
    return "\n\n".join(texts)


def curves(block: Block, metric: str, sizes: dict[str, float]) -> Iterator[Line]:
    """The line of each recipe that has one, from the smallest size on."""
    for recipe in block.recipes:
        found = [(size, block.rows.get((recipe, f"{name}/{metric}"))) for name, size in sizes.items()]
        points = sorted(
            (size, float(row["mean"]), float(row["std"])) for size, row in found if row and ".." not in row["std"]
        )
        if points:
            yield Line(recipe, *(list(each) for each in zip(*points, strict=True)))


def panels(figure: Figure, blocks: Sequence[Block]) -> list[Panel]:
    """What a figure shows: a panel per block and metric with lines over several sizes."""
    return [
        Panel(title, block.dataset, lines)
        for block in blocks
        for metric, title in block.columns.items()
        if figure.metric.fullmatch(metric) and (lines := list(curves(block, metric, block.sizes(figure))))
    ]


def main(check: bool = False) -> None:
    """Rewrite what is between the markers of README.md, and the figures.

    Args:
        check: change nothing, and fail if the README or a figure is out of date.
    """
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    try:
        blocks = read_blocks()
    except StudyError as error:
        raise SystemExit(f"error: {error}") from error
    named = {match[2] for match in MARKERS.finditer(text)}
    unplaced = [each.bundle for each in blocks if each.bundle not in named and None not in named]
    if unplaced:
        begin, end = "<!-- results: begin (scripts/render_results.py) -->", "<!-- results: end -->"
        raise SystemExit(f"error: README.md must hold the lines {begin} and {end} for {', '.join(unplaced)}.")

    def between(match: re.Match[str]) -> str:
        own = [each for each in blocks if (each.bundle == match[2] if match[2] else each.bundle not in named)]
        return f"{match[1]}{render_all(own)}\n{match[3]}"

    new = MARKERS.sub(between, text)
    figures = {each: shown for each in FIGURES if (shown := panels(each, blocks))}
    if check:
        stale = [each.path for each, shown in figures.items() if drawn_digest(ROOT / each.path) != digest(shown)]
        stale += ["README.md"] * (new != text)
        if stale:
            raise SystemExit(f"error: {', '.join(stale)} does not show results/results.csv: run `make results`.")
        return
    readme.write_text(new, encoding="utf-8")
    for each, shown in figures.items():
        draw(each, shown, ROOT / each.path)


if __name__ == "__main__":
    fire.Fire(main)
