"""A one-page report of an evaluation: one HTML file that needs nothing else, for a browser or A4 paper."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

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
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main class="{layout}">
<h1>{title}</h1>
{body}
<footer>{footer}</footer>
</main>
</body>
</html>
"""
_STYLE = """
@page { size: A4; margin: 12mm; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #111827; font: 14px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px; }
h1 { margin: 0 0 14px; font-size: 26px; letter-spacing: -0.01em; }
h2 { margin: 28px 0 12px; padding-bottom: 4px; font-size: 17px; border-bottom: 2px solid #0072b2; break-after: avoid; }
dl, dd, figure { margin: 0; }
dt, small, footer { color: #6b7280; font-size: 12px; }
small { display: block; font-size: 11px; font-weight: 400; white-space: nowrap; }
img { display: block; width: 100%; height: auto; }
.facts, .figures, .cases { display: flex; flex-wrap: wrap; gap: 16px; }
.facts { gap: 10px 28px; padding: 12px 16px; background: #f3f4f6; border-radius: 6px; }
.facts dd { font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
.results { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; vertical-align: top; border-bottom: 1px solid #e5e7eb; }
th { color: #6b7280; font-size: 12px; border-bottom-color: #9ca3af; }
th:first-child, .text { text-align: left; }
tr, figure, .case { break-inside: avoid; }
figure { flex: 1 1 320px; max-width: 620px; }
figcaption, .notes { color: #374151; font-size: 13px; }
figcaption { padding: 4px 8px 0; }
.notes { margin: 10px 0 0; padding-left: 20px; }
.case { width: calc((100% - 32px) / 3); min-width: 300px; border: 1px solid #e5e7eb; border-radius: 6px; }
.pictures { display: flex; align-items: center; gap: 2px; background: #000; overflow: hidden;
  border-radius: 5px 5px 0 0; }
.pictures div { flex: 1 1 0; color: #d1d5db; font-size: 13px; text-align: center; }
.case dl { padding: 8px 10px; font-size: 13px; }
.case dl div { display: flex; align-items: baseline; gap: 8px; }
.case dt { flex: 0 0 72px; }
.case dd { min-width: 0; overflow-wrap: anywhere; }
.wide .case { width: 100%; }
.wide .pictures { background: none; }
.wide .case dl { display: flex; flex-wrap: wrap; gap: 2px 24px; }
td i { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 6px; border-radius: 2px; }
footer { margin-top: 28px; padding-top: 8px; border-top: 1px solid #e5e7eb; }
footer p { margin: 2px 0; }
@media print {
  body { font-size: 10px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h1 { font-size: 18px; } h2 { margin: 14px 0 8px; font-size: 13px; }
  th, td { padding: 2px 4px; white-space: nowrap; } .text { white-space: normal; }
  small { display: inline; margin-left: 4px; } th, dt, small, footer { font-size: 8.5px; }
  figcaption, .notes { font-size: 9px; }
  .facts { padding: 8px 12px; } .facts dd { font-size: 11px; }
  figure { flex-basis: 40%; } .case { min-width: 0; } .case dl { font-size: 9px; } .case dt { flex-basis: 48px; }
  .sheet { display: flex; flex-direction: column; height: 272mm; line-height: 1.25; }
  .sheet h1 { margin-bottom: 6px; } .sheet h2 { margin: 8px 0 6px; }
  .sheet footer { margin-top: 8px; padding-top: 4px; }
  .sheet .facts { gap: 4px 20px; padding: 5px 8px; } .sheet .facts dd { font-size: 10px; }
  .sheet .results { overflow: visible; } .sheet .notes { margin-top: 3px; } .sheet :is(th, td) { padding: 1px 4px; }
  .sheet > * { flex: none; }
  .sheet .cases { flex: 1 1 0; min-height: 60mm; flex-direction: column; flex-wrap: nowrap; gap: 1.5mm; }
  .sheet .case { display: flex; flex: 1; min-height: 0; max-height: 85mm; }
  .sheet .pictures { flex: 0 0 68%; align-items: stretch; } .sheet .pictures div { position: relative; }
  .sheet img { position: absolute; height: 100%; object-fit: contain; object-position: 0 0; }
  .sheet .case dl { flex-direction: column; flex-wrap: nowrap; }
}
"""


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
    """Write an evaluation as one HTML file: headline facts, table with notes, figures, worst cases, limits.

    Rows and cases may be `NamedTuple`s of any fields: a field's name is its heading, its value a text, a number, an
    `Interval`, a `Swatch` or, in a case, a PNG; a text in a case's field `..._png` stands in the picture's place. NaN
    and None are shown as a dash. All text is escaped, and the file loads nothing.

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
    body = [
        f'<dl class="facts">{_facts(summary)}</dl>',
        _section("Results", "results", [_table(metrics_rows), _notes(notes)]),
        _section("Figures", "figures", map(_figure, figures)),
        _section(escape(cases_heading), "cases", map(_case, cases)),
    ]
    footer = "".join(f"<p>{escape(limit)}</p>" for limit in limits)
    layout = ("wide sheet" if len(metrics_rows) <= _SHEET_ROWS else "wide") if wide_cases else ""
    page = _PAGE.format(title=escape(title), style=_STYLE, layout=layout, body="\n".join(body), footer=footer)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names need not be valid text.
    path.write_text(page, encoding="utf-8", errors="replace")


def _section(heading: str, css_class: str, parts: Iterable[str]) -> str:
    content = "\n".join(parts)
    return f'<h2>{heading}</h2>\n<div class="{css_class}">\n{content}\n</div>' if content else ""


def _facts(values: Mapping[str, Any]) -> str:
    return "".join(
        f"<div><dt>{_heading(name)}</dt><dd>{_value(value, name)}</dd></div>" for name, value in values.items()
    )


def _table(rows: Sequence[NamedTuple]) -> str:
    head = "".join(f'<th scope="col">{_heading(field)}</th>' for field in rows[0]._fields)
    body = "\n".join(f"<tr>{''.join(map(_cell, row, row._fields))}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""


def _cell(value: Any, name: str) -> str:
    css_class = ' class="text"' if isinstance(value, str | Swatch) else ""
    return f"<td{css_class}>{_value(value, name)}</td>"


def _figure(figure: Picture) -> str:
    caption = escape(figure.caption)
    return f"<figure>{_image(figure.png, caption)}<figcaption>{caption}</figcaption></figure>"


def _case(case: NamedTuple) -> str:
    fields = case._asdict()
    images = {
        name: fields.pop(name) for name in case._fields if isinstance(fields[name], bytes) or name.endswith("_png")
    }
    pictures = "".join(f"<div>{_picture(name.removesuffix('_png'), value)}</div>" for name, value in images.items())
    return f'<div class="case"><div class="pictures">{pictures}</div><dl>{_facts(fields)}</dl></div>'


def _picture(name: str, value: bytes | str) -> str:
    return _image(value, _heading(name)) if isinstance(value, bytes) else escape(value)


def _image(png: bytes, alt: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{alt}">'


def _heading(name: str) -> str:
    return escape(HEADINGS.get(name) or name[:1].upper() + name[1:].replace("_", " "))


def _value(value: Any, name: str) -> str:
    """The value of a fact or field as escaped HTML."""
    decimals = DECIMALS.get(name, 3)
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Swatch):
        return f'<i style="background: {escape(value.color)}"></i>{escape(value.text)}'
    if isinstance(value, Interval):
        low, middle, high = (f"{each:.{decimals}f}" for each in (value.low, value.value, value.high))
        ends = "no interval" if math.isnan(value.low) else f"{low}–{high}"
        return "–" if math.isnan(value.value) else f"{middle}<small>{ends}</small>"
    if value is None or math.isnan(value):
        return "–"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.{decimals}f}"
