"""Every page that is made, in a real browser: `make browser`, which needs Chromium and builds the site first."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from helpers import ROOT, Recipes

from dissect_monai.common import Interval
from dissect_monai.visualize.classifier import curves_figure, named_curve, panels_as_svg
from dissect_monai.visualize.page import Case, write_report

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("_in_root")]
SITE = ROOT / "docs" / "_build"
LOOKS = [(width, dark) for width in (360, 1200) for dark in (False, True)]
TAB, ENTER = ("Tab", 9), ("Enter", 13)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module", params=["cxr_classify", "seg_finetune_btcv"])
def report(request: pytest.FixtureRequest, recipe_of: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an evaluation."""
    folder, recipe = tmp_path_factory.mktemp(request.param), recipe_of(request.param)
    recipe.run("evaluate", folder, num_samples=20)
    return folder / "eval" / "report.html"


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_report_is_whole_readable_and_no_wider_than_a_phone(
    browser: Browser, report: Path, width: int, dark: bool
) -> None:
    assert browser.open(report, width, dark=dark) == []
    assert browser.audit() == []
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") == dark
    page = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", page))) < 80) == dark


@pytest.mark.parametrize("dark", [False, True])
def test_figures_can_be_read_on_a_phone_and_are_not_white_in_the_dark(
    browser: Browser, report: Path, dark: bool
) -> None:
    browser.open(report, 390, dark=dark)
    drawn = "[...document.querySelectorAll('.figures svg')]"
    widths = browser.run(f"{drawn}.map(each => each.getBoundingClientRect().width)")
    assert len(widths) == (2 if browser.run("document.title").endswith("classifier") else 0)
    assert all(width > 300 for width in widths)
    inks = browser.run(f"{drawn}.map(each => getComputedStyle(each.querySelector('text')).fill)")
    assert all((min(map(int, re.findall(r"\d+", ink))) > 180) == dark for ink in inks)
    corner = (
        "(() => { const canvas = document.createElement('canvas'), image = document.querySelector('.pictures img');"
    )
    corner += "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
    corner += "return [...context.getImageData(2, 2, 1, 1).data]; })()"
    assert browser.run("document.title").endswith("classifier") or browser.run(corner) == [0, 0, 0, 255]


LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis_and_more"
NAMES = [
    "a < b & c",
    "Größe_<b>fett</b>",
    "_hidden",
    "$x^2$ and $\\frac{1}{0$",
    LONG,
    "a long name of several words " * 4,
]


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_odd_and_long_names_leave_room_for_the_numbers(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    names = [*NAMES, *(f"finding {index}" for index in range(24))]
    rng = np.random.default_rng(0)
    labels, score = rng.integers(0, 2, (40, len(names))).astype(float), Interval(0.5, 0.25, 0.75)
    figures = dict(zip("ab", panels_as_svg(curves_figure(labels, rng.random(labels.shape), names)), strict=True))
    rows = [("macro", score, score), *((named_curve(name, index), score, score) for index, name in enumerate(names))]
    cases = [Case(f"{name}, missed: 3f2a", {name: "none"}, {"probability": 0.1}) for name in names]
    path = tmp_path / "Bericht <ä> #1.html"
    write_report(path, "<Röntgen> & Co", {"data": LONG * 3}, ["Finding", "AUROC", "AP"], rows, figures, cases, "Worst")
    assert browser.open(path, width, dark=dark) == []
    assert browser.audit() == []
    cells = browser.run("[...document.querySelectorAll('tbody')[1].rows].map(row => row.cells[0].textContent)")
    assert [each.strip() for each in cells] == [name.strip() for name in names]
    seen = "[...document.querySelectorAll('td:nth-child(2)')].map(cell => cell.getBoundingClientRect().right)"
    assert max(browser.run(seen)) <= width


def column(browser: Browser, index: int) -> list[str]:
    cells = f"[...document.querySelectorAll('tbody')[1].rows].map(row => row.cells[{index}].firstChild.data)"
    return browser.run(cells)


def test_a_table_is_sorted_by_the_keyboard_and_says_so(browser: Browser, report: Path) -> None:
    browser.open(report)
    mean = browser.run("document.querySelector('tbody').textContent")
    reached: list[Any] = []
    while not reached or reached[-1] not in ("Dice", "AUROC"):
        browser.press(*TAB)
        reached.append(browser.run("document.activeElement.textContent"))
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert len(reached) < 20
    index = browser.run("[...document.querySelectorAll('th button')].indexOf(document.activeElement)")
    given = [float(value) for value in column(browser, index) if value != "–"]
    for direction, sign in (("ascending", 1), ("descending", -1)):
        browser.press(*ENTER)
        found = column(browser, index)
        known = [float(value) for value in found if value != "–"]
        assert known == sorted(given, key=lambda value: sign * value)
        assert found[len(known) :] == ["–"] * (len(found) - len(known))  # what is unknown comes last
        said = browser.run("[...document.querySelectorAll('th')].map(heading => heading.getAttribute('aria-sort'))")
        assert said == ["none"] * index + [direction] + ["none"] * (len(said) - index - 1)
    assert browser.run("document.querySelector('tbody').textContent") == mean


def site_pages() -> list[Path]:
    """All but the search, which the theme makes."""
    return sorted(path for path in SITE.rglob("*.html") if path.name != "search.html")


def test_the_site_is_whole_readable_and_no_wider_than_a_phone(browser: Browser) -> None:
    assert site_pages(), "make docs"
    problems = []
    for page in site_pages():
        for width, dark in LOOKS:
            complaints = [*browser.open(page, width, dark=dark), *browser.audit()]
            problems += [f"{page.relative_to(SITE)}, {width} px, dark {dark}: {each}" for each in complaints]
    assert not problems, "\n".join(problems)


def test_long_tables_of_the_site_are_sorted_by_the_keyboard(browser: Browser) -> None:
    browser.open(SITE / "knobs" / "cxr_classify.html")
    first = "[...document.querySelector('tbody').rows].map(row => row.cells[0].textContent.trim())"
    browser.run("document.querySelector('th button').focus()")
    given = browser.run(first)
    for sign in (1, -1):
        browser.press(*ENTER)
        assert browser.run(first) == sorted(given)[::sign] != given


def test_no_link_of_the_site_leads_nowhere(browser: Browser) -> None:
    missing = []
    for page in site_pages():
        browser.open(page)
        for link in browser.run("[...document.querySelectorAll('a[href^=\"file:\"], a[href]')].map(link => link.href)"):
            path, _, anchor = link.removeprefix("file://").partition("#")
            if not link.startswith("file://"):
                continue
            if not Path(path).is_file() or (anchor and f'id="{anchor}"' not in Path(path).read_text(encoding="utf-8")):
                missing.append(f"{page.relative_to(SITE)}: {link}")
    assert not missing, "\n".join(missing)
