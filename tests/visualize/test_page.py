import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from helpers import Page
from PIL import Image

from dissect_monai.common import Interval
from dissect_monai.visualize.page import Case, colored, item_name, write_report

NAN = float("nan")
HEADINGS = ["Finding", "n", "AUROC", "AP", "HD95 (mm)", "Threshold"]
EFFUSION = ("Effusion", 1428, Interval(0.7954, 0.7561, 0.8379), Interval(1.0, NAN, NAN), Interval(12.345, 3.21, 20), 1)
HERNIA = ("Hernia", None, Interval(NAN, NAN, NAN), 0.5, np.float32(0.25), NAN)
FACTS = {"name": "a/b.png", "truth": 1.0, "probability": 0.031}
ATTACK = '<script>alert("x")</script> & {{ title }} \' onerror=1'


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, **changes: Any) -> Page:
    arguments: dict[str, Any] = {
        "title": "Chest X-rays: test split",
        "facts": {"data": "phantoms", "images": 1500, "macro AUROC": EFFUSION[2]},
        "headings": HEADINGS,
        "rows": [EFFUSION, HERNIA],
        "figures": {"ROC": png(0)},
        "cases": [Case("Worst: s", {"Image": png(1), "Overlay": png(2)}, FACTS)],
        "cases_heading": "Worst cases",
    }
    write_report(path / "new" / "report.html", **arguments | changes)
    return Page(path / "new" / "report.html")


def test_the_page_has_its_parts_in_order(tmp_path: Path) -> None:
    page = write(tmp_path, notes=["n counts labels.", "a < b"])
    assert page.of("h1") == page.of("title") == ["Chest X-rays: test split"]
    assert page.of("h2") == ["Results", "Worst cases"]
    assert page.of("h3") == ["Worst: s"]
    assert page.of("figcaption") == ["ROC", "Image", "Overlay"]
    assert page.of("p")[0] == "For research; not a medical device, and not for diagnosis."
    assert page.of("li") == ["n counts labels.", "a < b"]
    assert page.tags.index("table") < page.tags.index("li") < page.tags.index("figure")
    assert page.of("dt") == ["Data", "Images", "Macro AUROC", "Name", "Truth", "Probability"]
    assert page.of("dd") == ["phantoms", "1,500", "0.795", "a/b.png", "1", "0.031"]
    bare = write(tmp_path, figures={}, cases=())
    assert bare.of("h2") == ["Results"]


def test_the_table_shows_values_with_their_intervals_and_what_is_unknown_as_a_dash(tmp_path: Path) -> None:
    page = write(tmp_path, facts={})
    assert page.of("th") == HEADINGS
    effusion, hernia = ["Effusion", "1,428", "0.795", "1.000", "12.3", "1"], ["Hernia", "–", "–", "0.500", "0.2", "–"]
    assert page.of("td") == effusion + hernia
    assert page.of("small") == ["0.756–0.838", "no interval", "3.2–20.0"]


def test_a_text_may_have_a_colour_and_a_picture_be_missing(tmp_path: Path) -> None:
    cases = [Case("a", {"Image": png(1), "Overlay": "None: <nothing>"}, {}), Case("b", {"Planes": png(2)}, {})]
    page = write(tmp_path, headings=["Organ"], rows=[(colored("<liver>", '#abc"'),)], figures={}, cases=cases)
    assert page.of("td") == ["<liver>"]
    assert page.values("style") == ['background: #abc"']
    assert page.of("figure") == ["None: <nothing>"]
    assert page.values("alt") == ["a: Image", "b: Planes"]
    assert [name for name in page.values("class") if name and name.startswith("pictures")] == [
        "pictures",
        "pictures wide",
    ]


def test_pictures_are_inside_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = write(tmp_path)
    sources = [source.partition("data:image/png;base64,") for source in page.values("src") if source]
    assert [base64.b64decode(data) for _, _, data in sources] == [png(0), png(1), png(2)]
    assert not {"link", "iframe"} & set(page.tags)
    (script,) = page.of("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert not page.values("href")
    assert "url(" not in "".join(page.of("style"))
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").count("default-src 'none'") == 1


def test_no_text_becomes_an_element_an_attribute_or_part_of_the_template(tmp_path: Path) -> None:
    texts = {"title": ATTACK, "facts": {ATTACK: ATTACK}, "headings": [ATTACK], "cases_heading": ATTACK}
    rows, cases = (
        [(ATTACK,), (colored(ATTACK, ATTACK),)],
        [Case(ATTACK, {ATTACK: png(1), "none": ATTACK}, {"name": ATTACK})],
    )
    page = write(tmp_path, **texts, rows=rows, cases=cases, figures={ATTACK: png(0)}, notes=[ATTACK], limits=[ATTACK])
    assert page.tags.count("script") == 1
    assert ATTACK not in page.of("script")[0]
    assert not page.values("onerror")
    tags = ("h1", "h2", "h3", "dt", "dd", "th", "td", "figcaption", "li", "p", "figure")
    assert [page.of(tag).count(ATTACK) for tag in tags] == [1, 1, 1, 1, 2, 1, 2, 2, 1, 1, 1]
    assert page.values("alt") == [ATTACK, f"{ATTACK}: {ATTACK}"]


def test_file_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    page = write(tmp_path, cases=[Case("", {}, {"name": "caf\udce9 é.png"})])
    assert "caf? é.png" in page.of("dd")


def test_numbers_of_any_type_are_shown(tmp_path: Path) -> None:
    facts = {"a": np.int64(12345), "b": np.float32(0.25), "c": float("inf"), "d": True}
    assert write(tmp_path, facts=facts, cases=()).of("dd") == ["12,345", "0.250", "inf", "1"]


def test_images_of_one_subject_have_names_of_their_own() -> None:
    names = [item_name(index, ["s", "t", "s"], "film") for index in range(3)]
    assert names == ["s, film 1 of 2", "t", "s, film 2 of 2"]


def test_a_jpeg_is_called_one(tmp_path: Path) -> None:
    page = write(tmp_path, cases=[Case("", {"Film": b"\xff\xd8\xff"}, {})])
    assert [source[:16] for source in page.values("src") if source] == ["data:image/png;b", "data:image/jpeg;"]
