"""A one-page report of an evaluation: one HTML file that needs nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dissect_monai.common import Interval
from dissect_monai.writing import written_atomically

LIMITS = (
    "For research; not a medical device, and not for diagnosis.",
    "Intervals are 95 %, from resampling whole subjects of these data. They say nothing of other hospitals, scanners, "
    "populations or ways of labelling: validate there first.",
)


class Case(NamedTuple):
    """What a report shows of one item; a single picture is as wide as the page."""

    title: str
    pictures: Mapping[str, bytes | str]  # by caption: a PNG, JPEG or SVG, or why there is none
    facts: Mapping[str, Any]


def write_report(
    path: str | Path,
    title: str,
    facts: Mapping[str, Any],
    headings: Sequence[str],
    rows: Sequence[Sequence[Any]],
    figures: Mapping[str, bytes],
    cases: Sequence[Case],
    cases_heading: str,
    notes: Sequence[str] = (),
    limits: Sequence[str] = LIMITS,
) -> None:
    """Write an evaluation as one HTML file, by the template page.html.j2; all text is escaped, and it loads nothing.

    It has headline `facts` by name, a table of `headings` and `rows` with `notes` on how to read it, `figures` (by
    caption), `cases` to look at, and a footer of `limits`. Values are texts, numbers or an `Interval`; those headed
    "(mm)" have one decimal, others three. NaN and None are a dash. The first row, a mean, stays first when sorted.
    """
    source = files("dissect_monai.visualize").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    page = environment.from_string(source).render(
        title=title, facts=facts, headings=headings, rows=rows, figures=figures, cases=cases,
        cases_heading=cases_heading, notes=notes, limits=limits, show=_shown, picture=_picture,
        digest=lambda script: b64encode(sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    with written_atomically(path) as file:
        file.write(page.encode(errors="replace"))  # file names need not be valid text


def colored(text: str, color: str) -> Markup:
    """A text with its colour in the figures, such as the name of an organ."""
    return Markup('<i style="background: {}"></i>{}').format(color, text)


def item_name(index: int, subjects: Sequence[str], what: str = "image") -> str:
    """A name that no other item has: its subject, and if that has several, which of them: "3f2a, image 1 of 2"."""
    subject, count = subjects[index], subjects.count(subjects[index])
    return subject if count == 1 else f"{subject}, {what} {subjects[: index + 1].count(subject)} of {count}"


def _picture(name: str, content: bytes | str) -> str:
    if isinstance(content, str):
        return content
    if content.startswith(b"<svg"):
        return Markup('<svg role="img" aria-label="{}"').format(name) + Markup(content[4:].decode())
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return Markup('<img src="data:image/{};base64,{}" alt="{}">').format(kind, b64encode(content).decode(), name)


def _shown(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    decimals = 1 if name.endswith("(mm)") else 3
    number = value.value if isinstance(value, Interval) else value
    if number is None or isnan(number):
        return "–"
    if isinstance(value, Interval):
        ends = "no interval" if isnan(value.low) else f"{value.low:.{decimals}f}–{value.high:.{decimals}f}"
        return Markup("{}<small>{}</small>").format(f"{number:.{decimals}f}", ends)
    return f"{int(number):,}" if float(number).is_integer() else f"{number:.{decimals}f}"
