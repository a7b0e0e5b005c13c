"""Draw the training curves of a study, and keep their numbers beside the figure.

    python scripts/plot_curves.py scripts/experiments/NAME.json --tags "['loss/total','knn_auroc']" [--runs runs/NAME]

Writes docs/NAME_curves.png, a panel per tag with a line per recipe, and docs/NAME_curves.csv with the numbers drawn, so
that the curves stay when the event files of the runs are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import fire
import numpy as np
from monai.utils import ensure_tuple
from run_experiments import ROOT, plan, read_study
from study_statistics import StudyError
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    SCALARS,
    EventAccumulator,
)

from dissect_monai.visualize.classifier import COLORS, LINES
from dissect_monai.writing import write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLUMNS = 3  # of panels
NUM_POINTS = 100  # of a curve; longer ones are drawn as this many means of neighbours
MANY = 30  # points of a line that is drawn without markers, if there are more
Curve = dict[int, float]  # step → value


class Point(NamedTuple):
    """A line of the CSV file."""

    recipe: str  # with the variant, where each variant is trained
    seed: int
    tag: str
    step: int
    value: float


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Every scalar in the event files of a folder; of a step logged twice, as by a resumed run, the last value.

    The last is told by its time: files are read by name, which within a second is not the order of writing.

    Raises:
        StudyError: if there are no event files.
    """
    if not any(folder.glob("*tfevents*")):
        raise StudyError(f"{folder} holds no event files: run the study first or give the right --runs.")
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0 keeps all of them
    events.Reload()
    logged = {tag: sorted(events.Scalars(tag), key=attrgetter("wall_time")) for tag in events.Tags()[SCALARS]}
    return {tag: {each.step: each.value for each in values} for tag, values in logged.items()}


def thinned(curve: Curve) -> Iterator[tuple[int, float]]:
    """A curve in step order, at most `NUM_POINTS` long: means of neighbours, each at the last of their steps."""
    for part in np.array_split(np.array(sorted(curve.items())), min(NUM_POINTS, len(curve))):
        yield int(part[-1, 0]), float(part[:, 1].mean())


def read_points(study_file: str, runs: Path, tags: Sequence[str]) -> list[Point]:
    """The curves of all training runs of a study; a recipe may lack a tag.

    Raises:
        StudyError: if a run left no event files, or no run has one of the tags.
    """
    points, known = [], set[str]()
    for training, *_ in plan(read_study(study_file), Path(), runs):
        recipe, seed, *variant = training.folder.relative_to(runs).parts
        scalars = read_scalars(training.folder / "eval")
        known |= set(scalars)
        name, number = ", ".join([recipe, *variant]), int(seed.removeprefix("seed"))
        points += [Point(name, number, tag, *each) for tag in tags if tag in scalars for each in thinned(scalars[tag])]
    unknown = [tag for tag in tags if tag not in known]
    if unknown:
        raise StudyError(f"no run has {', '.join(unknown)}; there are {', '.join(sorted(known)) or 'no scalars'}.")
    return points


def draw(points: Sequence[Point], tags: Sequence[str], path: Path) -> None:
    """Write the figure: a panel per tag, a line per recipe, the mean over seeds with their range shaded."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    recipes = dict.fromkeys(point.recipe for point in points)
    looks = [{"color": colour, "linestyle": line} for line, colour in product(LINES, COLORS)]
    styles: dict[str, dict[str, Any]] = dict(zip(recipes, cycle(looks), strict=False))
    columns = min(len(tags), NUM_COLUMNS)
    rows = -(-len(tags) // columns)
    figure = Figure(figsize=(4 * columns, 0.6 + 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, tag in zip(axes, tags, strict=False):
        for recipe, style in styles.items():
            draw_line(ax, [point for point in points if (point.recipe, point.tag) == (recipe, tag)], style)
        # The bundles log losses, codes/, collapse/ and schedule/ by iteration, and metrics, without a slash, by epoch.
        ax.set(title=tag, xlabel="iteration" if "/" in tag or "loss" in tag else "epoch")
        ax.locator_params(axis="x", integer=True, nbins=6)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(tags) :]:
        ax.remove()
    handles = [Line2D([], [], label=recipe, **style) for recipe, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_line(ax: Axes, points: Sequence[Point], style: Mapping[str, Any]) -> None:
    """Draw one recipe in one panel: at each step the mean and the range of the seeds that have it."""
    values: dict[int, list[float]] = {}
    for point in points:
        values.setdefault(point.step, []).append(point.value)
    steps = sorted(values)
    means, lows, highs = ([of(values[step]) for step in steps] for of in (fmean, min, max))
    marker = "o" if len(steps) <= MANY else None
    ax.plot(steps, means, marker=marker, markersize=3, linewidth=1.5, **style)
    ax.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)


def main(study_file: str, tags: str | Sequence[str], runs: str | None = None) -> None:
    """Draw the training curves of a study.

    Args:
        study_file: a file of scripts/experiments/, whose runs have been made with run_experiments.py.
        tags: scalars to draw, as TensorBoard names them; a recipe that lacks one has no line in its panel.
        runs: folder of the runs, runs/NAME by default.
    """
    name = Path(study_file).stem
    wanted = list(dict.fromkeys(ensure_tuple(tags)))
    try:
        points = read_points(study_file, Path(runs) if runs else ROOT / "runs" / name, wanted)
    except StudyError as error:
        raise SystemExit(f"error: {error}") from error
    figure = ROOT / "docs" / f"{name}_curves.png"
    rows = [(*point[:-1], f"{point.value:.6g}") for point in points]
    write_csv(figure.with_suffix(".csv"), Point._fields, rows)
    draw(points, wanted, figure)
    print(f"{len(points)} points of {figure.with_suffix('.csv')} are drawn in {figure}")


if __name__ == "__main__":
    fire.Fire(main)
