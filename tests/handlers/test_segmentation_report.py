import re
from math import isnan
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from helpers import Page, table
from matplotlib.figure import Figure
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from dissect_monai.handlers import segmentation_report
from dissect_monai.handlers.segmentation_report import (
    PLANES,
    SIDE_BY_SIDE,
    CaseMaps,
    CaseScores,
    case_figure,
    representative_cases,
    summarize,
    summary_metrics,
    write_segmentation_report,
    write_tables,
)
from dissect_monai.metrics.intervals import bootstrap
from dissect_monai.metrics.segmentation import NAN, StructureScore, score_structures
from dissect_monai.visualize.segmentation import ORGAN_COLORS


def found(name: str, dice: float, hd95: float = 4.0, surface_dice: float = 0.9) -> StructureScore:
    return StructureScore(name, (1, 2), dice, hd95, surface_dice, 10.0, 9.0, "scored")


def missed(name: str) -> StructureScore:
    return StructureScore(name, (3,), 0.0, NAN, 0.0, 5.0, 0.0, "missed")


def unlabelled(name: str, pred_ml: float = 0.0) -> StructureScore:
    return StructureScore(name, (4,), NAN, NAN, NAN, 0.0, pred_ml, "false_positive" if pred_ml else "absent")


STUDY = [
    CaseScores("a.nii", "A", [found("liver", 0.9, 2), found("left kidney", 0.7, 6), unlabelled("spleen", 1.5)]),
    CaseScores("b1.nii", "B", [found("liver", 0.8, 3), missed("left kidney"), unlabelled("spleen")]),
    CaseScores("b2.nii", "B", [found("liver", 0.6, 5), found("left kidney", 0.5, 8), unlabelled("spleen", 2.0)]),
    CaseScores("c.nii", "C", [found("liver", 0.4, 9), unlabelled("left kidney"), unlabelled("spleen")]),
]


def test_the_first_line_counts_every_subject_alike_and_others_those_that_have_the_structure() -> None:
    mean, liver, kidney, spleen = summarize(STUDY, num_samples=200, seed=3)
    subjects = np.array([(0.9 + 0.7) / 2, (0.7 + 0.25) / 2, 0.4])
    assert (mean.structure, mean.n) == ("mean", 3)
    np.testing.assert_allclose(
        mean.dice, bootstrap(lambda weight: weight @ subjects / weight.sum(1), ["A", "B", "C"], 200, 3)
    )
    assert mean.dice.low < mean.dice.value < mean.dice.high
    assert mean.dice_std == pytest.approx(np.std(subjects, ddof=1))
    assert mean.hd95.value == pytest.approx(np.mean([4, (4 + 8) / 2, 9]))
    assert (liver.structure, liver.n, kidney.n) == ("liver", 3, 2)
    assert liver.dice.value == pytest.approx(np.mean([0.9, 0.7, 0.4]))
    assert liver.dice_std == pytest.approx(np.std([0.9, 0.7, 0.4], ddof=1))
    assert kidney.dice.value == pytest.approx(np.mean([0.7, 0.25]))  # a missed one is 0
    assert kidney.hd95.value == pytest.approx(np.mean([6, 8]))  # and has no distance
    counts = [(each.missed, each.false_positives) for each in (mean, liver, kidney, spleen)]
    assert counts == [(1, 2), (0, 0), (1, 0), (0, 2)]


def test_a_structure_that_no_label_has_counts_for_nothing() -> None:
    spleen = summarize(STUDY)[3]
    assert spleen.n == 0
    assert all(isnan(value) for value in (*spleen.dice, spleen.dice_std, *spleen.hd95, *spleen.surface_dice))
    without = [case._replace(structures=case.structures[:2]) for case in STUDY]
    assert summarize(without)[0].dice == summarize(STUDY)[0].dice


def test_one_subject_has_no_interval_and_no_spread() -> None:
    mean, liver = summarize([CaseScores("a.nii", "A", [found("liver", 0.9)])])
    assert mean.dice.value == liver.dice.value == 0.9
    assert all(isnan(value) for value in (mean.dice.low, mean.dice.high, mean.dice_std))


def test_structures_may_differ_between_cases() -> None:
    cases = [CaseScores("a", "A", [found("liver", 0.5)]), CaseScores("b", "B", [found("heart", 0.7)])]
    mean, liver, heart = summarize(cases)
    assert (mean.dice.value, liver.dice.value, heart.dice.value) == (0.6, 0.5, 0.7)


def test_metrics_have_the_names_of_their_structures() -> None:
    metrics = summary_metrics(summarize(STUDY))
    ends = {f"{metric}_mean{end}" for metric in ("dice", "hd95", "surface_dice") for end in ("", "_low", "_high")}
    assert set(metrics) == {*ends, "dice_liver", "dice_left_kidney", "missed", "false_positives"}
    assert metrics["dice_left_kidney"] == pytest.approx(0.475)
    assert (metrics["missed"], metrics["false_positives"]) == (1, 2)


def test_tables_hold_every_case_and_structure(tmp_path: Path) -> None:
    write_tables(tmp_path / "new", STUDY, summarize(STUDY))
    cases, summary = (table(tmp_path / "new" / f"{name}.csv") for name in ("cases", "summary"))
    assert len(cases) == 12
    assert cases[4] == {
        "case": "b1.nii", "subject": "B", "structure": "left kidney", "values": "3", "dice": "0.0000", "hd95": "",
        "surface_dice": "0.0000", "label_ml": "5.0000", "pred_ml": "0.0000", "outcome": "missed",
    }  # fmt: skip
    assert cases[0]["values"] == "1 2"
    assert [row["structure"] for row in summary] == ["mean", "liver", "left kidney", "spleen"]
    assert [summary[2][name] for name in ("n", "dice", "missed")] == ["2", "0.4750", "1"]
    assert float(summary[0]["dice_low"]) < float(summary[0]["dice"]) < float(summary[0]["dice_high"])
    assert summary[3]["dice"] == summary[3]["dice_low"] == summary[3]["dice_std"] == ""


CLASSES = ["right_kidney", "liver", "spleen"]
SHAPE, SPACING = (14, 12, 10), (1.0, 2.0, 3.0)
AFFINE = np.array([[1.0, 0, 0, -5], [0, 2, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
NUMBERS = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def label_map() -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1:8, 2:8, 2:8], label[9:12, 2:5, 3:6] = 2, 1
    return label


def oriented(array: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """An array in RAS as a file of another orientation has it, and its affine."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    return apply_orientation(array, turn), AFFINE @ inv_ornt_aff(turn, SHAPE)


def write(folder: Path, axes: str = "RAS", **changes: Any) -> dict[str, Any]:
    item = {"image": str(folder / "image.nii.gz"), **changes}
    nib.save(nib.Nifti1Image(*oriented(NUMBERS, axes)), item["image"])
    return item


def maps_of(pred: np.ndarray, axes: str = "RAS") -> CaseMaps:
    label, affine = oriented(label_map(), axes)
    return CaseMaps(label, oriented(pred, axes)[0], affine, SPACING)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `segmentation_overlay` is called with."""
    calls: list[tuple[Any, ...]] = []

    def overlay(*arguments: Any) -> Figure:
        calls.append(arguments)
        return Figure((1, 1))

    monkeypatch.setattr(segmentation_report, "segmentation_overlay", overlay)
    return calls


@pytest.mark.parametrize(
    ("axes", "image_axes"), [("RAS", "RAS"), ("LPS", "LPS"), ("SLA", "SLA"), ("PIR", "PIR"), ("LPS", "ASR")]
)
def test_all_three_are_drawn_in_ras(tmp_path: Path, drawn: list[Any], axes: str, image_axes: str) -> None:
    pred = np.where(label_map() == 2, 0, label_map())
    case_figure(write(tmp_path, image_axes), maps_of(pred, axes), CLASSES, (0, 100))
    image, label, drawn_pred, class_names, spacing, window = drawn[0]
    np.testing.assert_allclose(image, NUMBERS, atol=0 if axes == image_axes else 1e-2)
    np.testing.assert_array_equal(label, label_map())
    np.testing.assert_array_equal(drawn_pred, pred)
    assert (class_names, spacing, window) == (CLASSES, pytest.approx(SPACING), (0, 100))


@pytest.mark.parametrize(
    ("modality", "windowed"), [("CT", True), (None, True), (["ct", "MR"], True), ("MR", False), (["MR"], False)]
)
def test_ct_has_a_window_and_one_channel_shows(tmp_path: Path, drawn: list[Any], modality: Any, windowed: bool) -> None:
    item = write(tmp_path, modality=modality)
    nib.save(nib.Nifti1Image(np.stack([NUMBERS, -NUMBERS], -1), AFFINE), item["image"])
    case_figure(item, maps_of(label_map()), CLASSES, (-160, 240))
    np.testing.assert_array_equal(drawn[0][0], NUMBERS)
    assert drawn[0][-1] == ((-160, 240) if windowed else None)


def case(name: str, *dice: float) -> CaseScores:
    organs = [StructureScore(f"organ_{index}", (index,), each, 1, each, 1, 1, "") for index, each in enumerate(dice)]
    return CaseScores(f"/data/{name}.nii.gz", name, organs)


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ({"a": (0.5, 0.7), "b": (0.9, NAN), "c": (NAN, NAN), "d": (0.1, 0.2)}, "best b, median a, worst d"),
        ({"a": (0.1,), "b": (0.2,), "c": (0.3,), "d": (0.4,)}, "best d, median b, worst a"),
        ({"a": (0.1,), "b": (0.2,)}, "best b, worst a"),
        ({"a": (0.1,), "b": (NAN,)}, "best a"),
        ({"a": (NAN,)}, ""),
    ],
)
def test_best_median_and_worst_are_by_the_mean_without_nan(dice: dict[str, tuple[float, ...]], expected: str) -> None:
    found = representative_cases([case(name, *each) for name, each in dice.items()])
    assert ", ".join(f"{rank} {each.subject}" for rank, each in found.items()) == expected


def test_the_page_has_a_line_for_every_structure_and_the_cases(tmp_path: Path) -> None:
    preds = [np.roll(label_map(), shift, 0) for shift in range(3)]
    preds[2][preds[2] == 1] = 0
    labels = {"liver": [2], "right_kidney": [1], "spleen": [3]}  # the last is in no label
    scores = [score_structures(label_map(), pred, labels, SPACING) for pred in preds]
    subjects = zip("abc", "ABA", scores, strict=True)
    cases = [CaseScores(f"/data/{name}.nii.gz", subject, each) for name, subject, each in subjects]
    pictures, path, notes = {case.case: b"png" for case in cases}, tmp_path / "new" / "report.html", ["Within 2 mm."]
    given = {"split": "test", "date": "2026-11-28"}
    write_segmentation_report(path, cases, summarize(cases, 20), pictures, CLASSES, given, notes)
    page = Page(path)
    headings = ["Structure", "Subjects", "Dice", "HD95 (mm)", "Surface Dice", "Missed", "False positives"]
    assert page.of("th") == headings
    lines = [page.of("td")[start : start + 7] for start in range(0, 28, 7)]
    assert [(line[0], line[1], *line[-2:]) for line in lines] == [
        ("Mean of structures", "2", "1", "0"), ("liver", "2", "0", "0"), ("right kidney", "2", "1", "0"),
        ("spleen", "0", "0", "0"),
    ]  # fmt: skip
    assert lines[3][2:5] == ["–"] * 3
    assert page.values("style") == [f"background: {ORGAN_COLORS[index]}" for index in (1, 0, 2)]
    assert page.of("dt")[:3] == ["Mean Dice", "Split", "Date"]
    facts = page.of("dd")[3:]
    assert facts[:4] == ["2–4", "A", "1.000", "liver 1.000, right kidney 1.000"]
    assert [facts[4:6], facts[8:10]] == [["5–7", "B"], ["8–10", "A"]]
    assert page.of("h3") == ["Best: A, volume 1 of 2", "Median: B", "Worst: A, volume 2 of 2"]
    write_tables(tmp_path, cases, summarize(cases, 20))
    assert {row["case"] for row in table(tmp_path / "cases.csv")[8 - 2 : 10 - 1]} == {"/data/c.nii.gz"}
    assert facts[-1].endswith("right kidney 0.000")
    assert page.of("h2") == ["Results", "Cases by their mean Dice"]
    assert page.of("li") == notes
    assert page.values("alt") == [f"{title}: {PLANES}" for title in page.of("h3")]
    limits = " ".join(page.of("p"))
    assert "not a medical device" in limits
    assert "Missed" in limits


def test_pictures_have_a_caption_of_their_own(tmp_path: Path) -> None:
    pixels = [found("liver", 0.9)._replace(label_ml=NAN, pred_ml=NAN)]
    cases = [CaseScores(f"{name}.png", name, pixels) for name in "ab"]
    pictures = {case.case: b"png" for case in cases}
    facts = {"volumes": 2}
    write_segmentation_report(tmp_path / "report.html", cases, summarize(cases, 20), pictures, ["liver"], facts)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "volume" not in re.sub("<style.*?</style>", "", page, flags=re.DOTALL).lower()
    assert Page(tmp_path / "report.html").values("alt") == [
        f"{name}: {SIDE_BY_SIDE}" for name in ("Best: a", "Worst: b")
    ]
    assert "planes" not in SIDE_BY_SIDE
