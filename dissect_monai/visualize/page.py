"""A one-page report of an evaluation: one HTML file that needs nothing else, for a browser or A4 paper."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from dissect_monai.common import InputError, Interval

LIMITS = (
    "For research; not a medical device, and not for diagnosis.",
    "Intervals are 95 %, from resampling whole subjects of these data. They say nothing of other hospitals, scanners, "
    "populations or ways of labelling: validate there first.",
    "Saliency shows what moved the output, not where a finding is or why it was made.",
)
HEADINGS = {  # of fields that are not plain words
    "auroc": "AUROC", "ap": "AP", "ece": "ECE", "n": "n", "hd95": "HD95 (mm)", "surface_dice": "Surface Dice",
    "mean_dice": "Mean Dice",
}  # fmt: skip
DECIMALS = {"hd95": 1}  # of fields that have other than 3
_SHEET_ROWS = 21  # with more, cases would be too small to share a page with them


class Swatch(NamedTuple):
    """A text with its colour in the figures, such as the name of an organ."""

    text: str
    color: str  # of CSS


class FindingRow(NamedTuple):
    """One line of a classifier's table."""

    finding: str
    n: int | None  # items whose label is known; None of a mean over findings
    positives: int | None
    auroc: Interval
    ap: Interval
    sensitivity: Interval
    specificity: Interval
    threshold: float
    ece: Interval


class Picture(NamedTuple):
    """A figure of the report, such as ROC curves."""

    png: bytes
    caption: str


class Case(NamedTuple):
    """An item that was judged wrongly, and its pictures."""

    image_png: bytes
    overlay_png: bytes | str  # the same image under its saliency, or why there is none
    name: str  # file name
    finding: str
    truth: float
    probability: float


def write_report(
    path: str | Path,
    title: str,
    summary: Mapping[str, Any],
    metrics_rows: Sequence[NamedTuple],
    figures: Sequence[Picture] = (),
    cases: Sequence[NamedTuple] = (),
    notes: Sequence[str] = (),
    limits: Sequence[str] = LIMITS,
    cases_heading: str = "Worst cases",
    wide_cases: bool = False,
) -> None:
    """Write an evaluation as one HTML file, by the template page.html.j2; all text is escaped, and it loads nothing.

    Rows and cases may be `NamedTuple`s of any fields: a field's name is its heading, its value a text, a number, an
    `Interval`, a `Swatch` or, in a case, a PNG; a text in a case's field `..._png` stands in the picture's place. NaN
    and None are shown as a dash.

    Args:
        path: file to write; its folder is made.
        title: heading of the page.
        summary: headline facts by name: data, n, positives, weights, where the thresholds come from.
        metrics_rows: lines of the table, such as `FindingRow`, all of the same fields.
        figures: pictures, shown two in a row.
        cases: items to look at, such as `Case`, worst first.
        notes: sentences below the table, on how to read it.
        limits: sentences of the footer.
        cases_heading: heading of the cases.
        wide_cases: show one case in a row, as wide as the page; on paper they share what a table of up to 21 rows
            leaves of one page.

    Raises:
        ValueError: if there are no rows, or their fields differ.
    """
    fields = {row._fields for row in metrics_rows}
    if len(fields) != 1:
        raise InputError(f"`metrics_rows` must not be empty and have the same fields, got {sorted(fields)}.")
    source = files("dissect_monai.visualize").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    page = environment.from_string(source).render(
        title=title,
        summary=summary,
        rows=metrics_rows,
        notes=notes,
        figures=figures,
        cases=[_pictures_and_facts(case) for case in cases],
        cases_heading=cases_heading,
        limits=limits,
        layout=("wide sheet" if len(metrics_rows) <= _SHEET_ROWS else "wide") if wide_cases else "",
        heading=_heading,
        text=_text,
        ends=_ends,
        base64=lambda png: b64encode(png).decode(),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names need not be valid text.
    path.write_text(page, encoding="utf-8", errors="replace")


def _pictures_and_facts(case: NamedTuple) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = case._asdict()
    names = [name for name, value in facts.items() if isinstance(value, bytes) or name.endswith("_png")]
    return {name.removesuffix("_png"): facts.pop(name) for name in names}, facts


def _heading(name: str) -> str:
    return HEADINGS.get(name) or name[:1].upper() + name[1:].replace("_", " ")


def _text(value: Any, name: str) -> str:
    """The value of a fact or field."""
    if isinstance(value, str):
        return value
    if isinstance(value, Swatch):
        return value.text
    number = value.value if isinstance(value, Interval) else value
    if number is None or isnan(number):
        return "–"
    if float(number).is_integer() and not isinstance(value, Interval):
        return f"{int(number):,}"
    return f"{number:.{DECIMALS.get(name, 3)}f}"


def _ends(value: Any, name: str) -> str:
    """The ends of an interval, if it is one of something."""
    if not isinstance(value, Interval) or isnan(value.value):
        return ""
    decimals = DECIMALS.get(name, 3)
    return "no interval" if isnan(value.low) else f"{value.low:.{decimals}f}–{value.high:.{decimals}f}"
