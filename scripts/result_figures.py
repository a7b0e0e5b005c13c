"""Figures of results over how much a variant trains with; each file says which results it shows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import Image

from dissect_monai.visualize.classifier import COLORS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIGEST = "Digest of the rows"  # the key of the figure's text that says which results it shows


class Figure(NamedTuple):
    """What is drawn over which sizes, and where."""

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
        (draw_bands if figure.shaded else draw_bars)(ax, panel.lines)
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


def draw_bands(ax: Axes, lines: Sequence[Line]) -> None:
    """Draw lines with their std as bands."""
    for colour, line in zip(cycle(COLORS), lines, strict=False):
        ax.plot(line.sizes, line.means, "o-", color=colour, markersize=4, label=line.recipe)
        low, high = ([mean + sign * std for mean, std in zip(line.means, line.stds, strict=True)] for sign in (-1, 1))
        ax.fill_between(line.sizes, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_bars(ax: Axes, lines: Sequence[Line]) -> None:
    """Draw lines with their std as bars, each line a little to the right of the one before."""
    every = [size for line in lines for size in line.sizes]
    step = (max(every) / min(every)) ** 0.012  # the axis is logarithmic
    for index, (colour, marker, line) in enumerate(zip(cycle(COLORS), cycle(MARKERS), lines, strict=False)):
        sizes = [size * step ** (index - (len(lines) - 1) / 2) for size in line.sizes]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "elinewidth": 1}
        ax.errorbar(sizes, line.means, line.stds, label=line.recipe, **style)
