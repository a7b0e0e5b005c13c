from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import Page
from PIL import Image

from dissect_monai.common import Interval
from dissect_monai.visualize.page import Case, FindingRow, Picture, Swatch, write_report

NAN = Interval(float("nan"), float("nan"), float("nan"))
EFFUSION = FindingRow(
    "Effusion",
    n=1428,
    positives=103,
    auroc=Interval(0.7954, 0.7561, 0.8379),
    ap=Interval(1.0, 0.5, 1.0),
    sensitivity=Interval(0.573, 0.480, 0.688),
    specificity=Interval(0.830, 0.812, 0.850),
    threshold=0.0263,
    ece=Interval(0.049, 0.039, 0.062),
)
HERNIA = EFFUSION._replace(finding="Hernia", positives=0, auroc=NAN, threshold=float("nan"))
ATTACK = '<script>alert("x")</script> & {{ title }} \' onerror=1'


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, **changes: Any) -> Page:
    arguments: dict[str, Any] = {
        "title": "Chest X-rays: test split",
        "summary": {"Data": "phantoms", "Images": 1500, "Macro AUROC": EFFUSION.auroc},
        "metrics_rows": [EFFUSION, HERNIA],
        "figures": [Picture(png(0), "ROC")],
        "cases": [Case(png(1), png(2), "a/b.png", "Effusion", 1.0, 0.031)],
    }
    write_report(path / "new" / "report.html", **arguments | changes)
    return Page(path / "new" / "report.html")


def test_the_page_has_its_parts_in_order(tmp_path: Path) -> None:
    page = write(tmp_path, notes=["n counts labels.", "a < b"])
    assert page.of("h1") == page.of("title") == ["Chest X-rays: test split"]
    assert page.of("h2") == ["Results", "Figures", "Worst cases"]
    assert page.of("figcaption") == ["ROC"]
    assert page.of("p")[0] == "For research; not a medical device, and not for diagnosis."
    assert page.of("li") == ["n counts labels.", "a < b"]
    assert page.tags.index("table") < page.tags.index("li") < page.tags.index("figure")
    bare = write(tmp_path, figures=(), cases=())
    assert bare.of("h2") == ["Results"]
    assert "ul" not in bare.tags


def test_the_table_shows_values_with_their_intervals(tmp_path: Path) -> None:
    page = write(tmp_path)
    headings = ["Finding", "n", "Positives", "AUROC", "AP", "Sensitivity", "Specificity", "Threshold", "ECE"]
    assert page.of("th") == headings
    assert page.of("td")[:9] == ["Effusion", "1,428", "103", "0.795", "1.000", "0.573", "0.830", "0.026", "0.049"]
    assert page.of("small")[1:3] == ["0.756–0.838", "0.500–1.000"]
    assert page.of("td")[9:] == ["Hernia", "1,428", "0", "–", "1.000", "0.573", "0.830", "–", "0.049"]


def test_a_value_without_an_interval_says_so_and_counts_may_be_dashes(tmp_path: Path) -> None:
    row = EFFUSION._replace(n=None, positives=None, ap=Interval(1.0, float("nan"), float("nan")))
    page = write(tmp_path, metrics_rows=[row], summary={})
    assert page.of("td")[1:5] == ["–", "–", "0.795", "1.000"]
    assert page.of("small")[1] == "no interval"


def test_facts_and_cases_are_named(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert page.of("dt") == ["Data", "Images", "Macro AUROC", "Name", "Finding", "Truth", "Probability"]
    assert page.of("dd") == ["phantoms", "1,500", "0.795", "a/b.png", "Effusion", "1", "0.031"]
    assert page.values("alt") == ["ROC", "Image", "Overlay"]


def test_a_text_stands_where_a_picture_is_missing(tmp_path: Path) -> None:
    page = write(tmp_path, cases=[Case(png(1), "None: <nothing>", "a/b.png", "Effusion", 1.0, 0.031)])
    assert page.of("div") == ["None: <nothing>"]
    assert page.values("alt") == ["ROC", "Image"]
    assert page.of("dt")[-4:] == ["Name", "Finding", "Truth", "Probability"]


def test_pictures_are_inside_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = write(tmp_path)
    sources = [source.partition("data:image/png;base64,") for source in page.values("src") if source]
    assert [base64.b64decode(data) for _, _, data in sources] == [png(0), png(1), png(2)]
    assert not {"link", "script", "iframe"} & set(page.tags)
    assert not page.values("href")
    assert "url(" not in "".join(page.of("style"))
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").count("default-src 'none'") == 1


def test_no_text_becomes_an_element_an_attribute_or_part_of_the_template(tmp_path: Path) -> None:
    page = write(
        tmp_path,
        title=ATTACK,
        summary={ATTACK: ATTACK},
        metrics_rows=[EFFUSION._replace(finding=ATTACK)],
        figures=[Picture(png(0), ATTACK)],
        cases=[Case(png(1), ATTACK, ATTACK, ATTACK, 1.0, 0.5)],
        notes=[ATTACK],
        limits=[ATTACK],
        cases_heading=ATTACK,
    )
    assert "script" not in page.tags
    assert not page.values("onerror")
    tags = ("h1", "h2", "dd", "td", "figcaption", "li", "p", "div")
    assert [page.of(tag).count(ATTACK) for tag in tags] == [1, 1, 3, 1, 1, 1, 1, 1]
    assert page.values("alt")[0] == ATTACK


def test_file_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    page = write(tmp_path, cases=[Case(png(1), png(2), "caf\udce9 é.png", "Mass", 0.0, 0.9)])
    assert "caf? é.png" in page.of("dd")


def test_rows_and_cases_may_have_any_fields(tmp_path: Path) -> None:
    class OrganRow(NamedTuple):
        organ: Swatch
        hd95: Interval
        surface_dice: float
        comment: str | None

    class OrganCase(NamedTuple):
        image: bytes
        reference: bytes
        prediction: bytes
        organ: str

    rows = [OrganRow(Swatch("<liver>", '#abc"'), Interval(12.345, 3.21, 20), np.float32(0.5), None)]
    page = write(tmp_path, metrics_rows=rows, cases=[OrganCase(png(1), png(2), png(3), "liver")], figures=())
    assert page.of("th") == ["Organ", "HD95 (mm)", "Surface Dice", "Comment"]
    assert page.of("td") == ["<liver>", "12.3", "0.500", "–"]
    assert "3.2–20.0" in page.of("small")
    assert page.values("style") == ['background: #abc"']
    assert page.values("alt") == ["Image", "Reference", "Prediction"]


def test_cases_may_have_another_heading_and_a_row_of_their_own(tmp_path: Path) -> None:
    assert write(tmp_path).values("class")[0] == ""
    page = write(tmp_path, cases_heading="Best & worst", wide_cases=True)
    assert page.of("h2")[-1] == "Best & worst"
    assert page.values("class")[0] == "wide sheet"
    assert write(tmp_path, metrics_rows=[EFFUSION] * 40, wide_cases=True).values("class")[0] == "wide"


@pytest.mark.parametrize(
    ("value", "text"), [(np.int64(12345), "12,345"), (np.float32(0.25), "0.250"), (float("inf"), "inf"), (True, "1")]
)
def test_numbers_of_any_type_are_shown(tmp_path: Path, value: Any, text: str) -> None:
    assert write(tmp_path, summary={"fact": value}, cases=()).of("dd") == [text]


@pytest.mark.parametrize("rows", [[], [EFFUSION, Case(b"", b"", "a", "b", 0, 0)]])
def test_rejects_rows_that_make_no_table(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="`metrics_rows` must not be empty and have the same fields, got"):
        write(tmp_path, metrics_rows=rows)
    assert not list(tmp_path.iterdir())
