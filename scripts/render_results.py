"""Write the README's results from results/results.csv: tables, and the label-efficiency figure in docs/.

    python scripts/render_results.py [--check]

Titles and the order of tables come from the studies in scripts/experiments/. Tables go between the README's markers;
a pair of markers that names a bundle takes the tables of this bundle, the pair without a name all others.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import fire
from PIL import Image
from run_experiments import Study, StudyError, read_study

from dissect_monai.plots import COLORS

ROOT = Path(__file__).resolve().parent.parent
MARKERS = re.compile(
    r"(<!-- results: begin (?:(\w+) )?\(scripts/render_results\.py\) -->\n).*?(<!-- results: end -->)", re.DOTALL
)
FIGURE = "docs/label_efficiency.png"
DIGEST = "Digest of the rows"  # the key of the figure's text that says which results it shows
Row = dict[str, str]


class Block(NamedTuple):
    """What is known of one data set by one bundle, and how to show it."""

    bundle: str
    dataset: str
    rows: dict[tuple[str, str], Row]  # by recipe and metric, the latest of each
    variants: dict[str, str]  # name → title
    columns: dict[str, str]  # metric, without the variant → title
    fractions: dict[str, float]  # share of the labels that a variant trains with, if that is what the variants change

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
    fractions = {
        name: float(knobs["label_fraction"])
        for study in studies
        for name, knobs in study.variants.items()
        if study.variants_change == "training" and "label_fraction" in knobs
    }
    shown = {f"{variant}/{metric}" for variant in variants for metric in columns}
    rows = {key: row for key, row in rows.items() if key[1] in shown}
    return Block(bundle, dataset, rows, variants, columns, fractions)


def cell(row: Row | None) -> str:
    """Mean ± std over seeds, or a difference with its interval."""
    if row is None:
        return "–"
    mean = float(row["mean"])
    if ".." in row["std"]:
        low, high = (float(end) for end in row["std"].split(".."))
        return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"{mean:.3f} ± {float(row['std']):.3f}"


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
    """Markdown lines of one block: a table per variant, or per metric where the variants are label fractions."""
    lines = []
    if block.fractions:
        lines += [f"![Label efficiency of {block.bundle} on {block.dataset}]({FIGURE})", ""]
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


def curves(block: Block, metric: str) -> Iterator[tuple[str, list[float], list[float], list[float]]]:
    """Recipe, label fractions, means and standard deviations of each line of a panel."""
    for recipe in block.recipes:
        found = [(share, block.rows.get((recipe, f"{name}/{metric}"))) for name, share in block.fractions.items()]
        points = sorted(
            (share, float(row["mean"]), float(row["std"])) for share, row in found if row and ".." not in row["std"]
        )
        if points:
            shares, means, stds = (list(each) for each in zip(*points, strict=True))
            yield recipe, shares, means, stds


def digest(panels: Sequence[tuple[Block, str]]) -> str:
    """A short text that changes with anything that the figure shows."""
    shown = [(block.columns[metric], block.dataset, list(curves(block, metric))) for block, metric in panels]
    return sha256(json.dumps(shown).encode()).hexdigest()


def drawn_digest(path: Path) -> str | None:
    """The digest of what a figure shows; None if there is no figure or it does not say."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(DIGEST)


def draw(panels: Sequence[tuple[Block, str]], path: Path) -> None:
    """Write the label-efficiency figure: a panel per block and AUROC, a line per recipe, std over seeds shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    axes[0].set_ylabel("macro AUROC, mean ± std over seeds")
    for ax, (block, metric) in zip(axes, panels, strict=True):
        for colour, (recipe, shares, means, stds) in zip(cycle(COLORS), curves(block, metric), strict=False):
            ax.plot(shares, means, "o-", color=colour, markersize=4, label=recipe)
            ends = [[mean + sign * std for mean, std in zip(means, stds, strict=True)] for sign in (-1, 1)]
            ax.fill_between(shares, *ends, color=colour, alpha=0.15, linewidth=0)
        ticks = sorted(set(block.fractions.values()))
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel="share of the training labels", title=f"{block.columns[metric]}, {block.dataset}")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None, DIGEST: digest(panels)})


def main(check: bool = False) -> None:
    """Rewrite what is between the markers of README.md, and the figure.

    Args:
        check: change nothing, and fail if the README or the figure is out of date.
    """
    readme, figure = ROOT / "README.md", ROOT / FIGURE
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
    panels = [
        (each, metric)
        for each in blocks
        for metric in each.columns
        if each.fractions and metric.endswith("/auroc") and any(curves(each, metric))
    ]
    if check:
        if new != text or (panels and drawn_digest(figure) != digest(panels)):
            raise SystemExit(f"error: README.md or {FIGURE} does not show results/results.csv: run `make results`.")
        return
    readme.write_text(new, encoding="utf-8")
    if panels:
        draw(panels, figure)


if __name__ == "__main__":
    fire.Fire(main)
