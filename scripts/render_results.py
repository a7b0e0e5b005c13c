"""Write the README's results from results/results.csv: tables, and the figures in docs/.

    python scripts/render_results.py [--check]

Titles and the order of tables come from the studies in scripts/experiments/. Tables go between the README's markers;
a pair of markers that names a bundle takes the tables of this bundle, the pair without a name all others.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import fire
from PIL import Image
from run_experiments import Study, read_study
from study_statistics import StudyError

from dissect_monai.visualize.classifier import COLORS
from dissect_monai.visualize.classifier import MARKERS as SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
MARKERS = re.compile(
    r"(<!-- results: begin (?:(\w+) )?\(scripts/render_results\.py\) -->\n).*?(<!-- results: end -->)", re.DOTALL
)
DIGITS = {"hd95": 1, "missed": 1}  # after the point, of metrics that are not in [0, 1]
DIGEST = "Digest of the rows"  # the key of a figure's text that says which results it shows
Row = dict[str, str]


class Figure(NamedTuple):
    """What is drawn over how much a variant trains with, and where."""

    path: str  # from the repository's root
    name: str
    metric: re.Pattern[str]  # of the metrics that have a panel, without the variant
    xlabel: str
    ylabel: str
    sizes: Literal["fractions", "subjects"]  # of the training split
    shaded: bool  # std as a band; else as bars beside each other, which more than a few lines need


LABEL_EFFICIENCY = Figure(
    "docs/label_efficiency.png",
    "Label efficiency",
    re.compile(r".*/auroc"),
    "share of the training labels",
    "macro AUROC, mean ± std over seeds",
    sizes="fractions",
    shaded=True,
)
DICE = Figure(
    "docs/dice_versus_subjects.png",
    "Dice by the number of training subjects",
    re.compile("dice"),
    "training subjects",
    "Dice, mean ± std over seeds",
    sizes="subjects",
    shaded=False,
)
FIGURES = (LABEL_EFFICIENCY, DICE)


class Line(NamedTuple):
    """A recipe at each size."""

    recipe: str
    sizes: list[float]
    means: list[float]
    stds: list[float]


class Panel(NamedTuple):
    """A metric of one data set."""

    title: str
    dataset: str
    lines: list[Line]


class Block(NamedTuple):
    """What is known of one data set by one bundle, and how to show it."""

    bundle: str
    dataset: str
    rows: dict[tuple[str, str], Row]  # by recipe and metric, the latest of each
    variants: dict[str, str]  # name → title
    columns: dict[str, str]  # metric, without the variant → title
    sizes: Mapping[
        str, Mapping[str, float]
    ]  # what a variant trains with, in the words of `Figure.sizes`, if a study says so

    @property
    def recipes(self) -> list[str]:
        """Recipes, baselines and differences, in the order of the file."""
        return list(dict.fromkeys(recipe for recipe, _ in self.rows))


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
    shown = {f"{variant}/{metric}" for variant in variants for metric in columns}
    rows = {key: row for key, row in rows.items() if key[1] in shown}
    trained = [study for study in studies if study.variants_change == "training"]
    fractions = {
        name: float(knobs["label_fraction"])
        for study in trained
        for name, knobs in study.variants.items()
        if "label_fraction" in knobs
    }
    subjects = {name: number for study in trained for name, number in study.subjects.items()}
    return Block(bundle, dataset, rows, variants, columns, {"fractions": fractions, "subjects": subjects})


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
    """Markdown of one block: a table per variant, or per metric where the variants are several fractions."""
    lines = []
    for figure in FIGURES:
        if panels(figure, [block]):
            lines += [f"![{figure.name} of {block.bundle} on {block.dataset}]({figure.path})", ""]
    if len(block.sizes["fractions"]) > 1:
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


def curves(block: Block, metric: str, sizes: Mapping[str, float]) -> Iterator[Line]:
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
        if len({*(sizes := block.sizes[figure.sizes]).values()}) > 1
        for metric, title in block.columns.items()
        if figure.metric.fullmatch(metric) and (lines := list(curves(block, metric, sizes)))
    ]


def digest(panels: Sequence[Panel]) -> str:
    """A short text that changes with anything that the figure shows."""
    return sha256(json.dumps(panels).encode()).hexdigest()


def drawn_digest(path: Path) -> str | None:
    """The digest of what a figure shows; None if there is no figure or it does not say."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(DIGEST)


def draw(figure: Figure, panels: Sequence[Panel], path: Path) -> None:
    """Write a figure: a panel per data set and metric, a line per recipe."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(1 + 4 * len(panels), 3.8), layout="constrained")
    axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    axes[0].set_ylabel(figure.ylabel)
    for ax, panel in zip(axes, panels, strict=True):
        draw_lines(ax, panel.lines, figure.shaded)
        ticks = sorted({size for line in panel.lines for size in line.sizes})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{100 * tick:g} %" if figure.sizes == "fractions" else f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=figure.xlabel, title=f"{panel.title}, {panel.dataset}")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    canvas.savefig(path, dpi=150, metadata={"Software": None, DIGEST: digest(panels)})


def draw_lines(ax: Axes, lines: Sequence[Line], shaded: bool) -> None:
    """Draw lines with their std as bands or as bars, which stand a little to the right of those of the line before."""
    every = [size for line in lines for size in line.sizes]
    step = (max(every) / min(every)) ** 0.012  # the axis is logarithmic
    for index, (color, marker, line) in enumerate(zip(cycle(COLORS), cycle(SYMBOLS), lines, strict=False)):
        if shaded:
            ax.plot(line.sizes, line.means, "o-", color=color, markersize=4, label=line.recipe)
            low, high = ([m + sign * std for m, std in zip(line.means, line.stds, strict=True)] for sign in (-1, 1))
            ax.fill_between(line.sizes, low, high, color=color, alpha=0.15, linewidth=0)
        else:
            sizes = [size * step ** (index - (len(lines) - 1) / 2) for size in line.sizes]
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "capsize": 2, "elinewidth": 1}
            ax.errorbar(sizes, line.means, line.stds, label=line.recipe, **style)


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
        headings = [f"### `{each.bundle}` on {each.dataset}\n\n" if len(own) > 1 else "" for each in own]
        shown = "\n\n".join(heading + render(each) for heading, each in zip(headings, own, strict=True))
        return f"{match[1]}{shown}\n{match[3]}"

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
