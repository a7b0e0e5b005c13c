from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from test_report import Page

from dissect_monai.handlers import segmentation_report
from dissect_monai.handlers.segmentation_report import (
    NO_MAP,
    StoredMap,
    case_figure,
    representative_cases,
    write_segmentation_report,
)
from dissect_monai.handlers.segmentation_table import CaseScores, summarize
from dissect_monai.metrics.segmentation import NAN, StructureScore, score_structures
from dissect_monai.visualize.segmentation import ORGAN_COLORS

LABELS = {"liver": [6], "right_kidney": [2, 3], "spleen": [1]}
SHAPE, SPACING = (14, 12, 10), (1.0, 2.0, 3.0)
AFFINE = np.array([[1.0, 0, 0, -5], [0, 2, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
NUMBERS = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def label_map() -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1:8, 2:8, 2:8], label[9:12, 2:5, 3:6] = 6, 2
    return label


def oriented(array: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """An array in RAS as a file of another orientation has it, and its affine."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    return apply_orientation(array, turn), AFFINE @ inv_ornt_aff(turn, SHAPE)


def write(folder: Path, axes: str = "RAS", image_axes: str | None = None, name: str = "a", **changes: Any) -> Any:
    item = {key: str(folder / f"{name}_{key}.nii.gz") for key in ("image", "label")}
    nib.save(nib.Nifti1Image(*oriented(NUMBERS, image_axes or axes)), item["image"])
    nib.save(nib.Nifti1Image(*oriented(label_map(), axes)), item["label"])
    return {**item, "subject": name, "labels": LABELS, **changes}


def scores(*dice: float) -> list[StructureScore]:
    return [StructureScore(f"organ_{index}", (index + 1,), each, 1, each, 1, 1, "") for index, each in enumerate(dice)]


def case(name: str, *dice: float) -> CaseScores:
    return CaseScores(f"/data/{name}.nii.gz", name, scores(*dice))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `segmentation_overlay` is called with."""
    calls: list[tuple[Any, ...]] = []

    def overlay(*arguments: Any) -> Figure:
        calls.append(arguments)
        return Figure((1, 1))

    monkeypatch.setattr(segmentation_report, "segmentation_overlay", overlay)
    return calls


# --- stored maps


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64"])
def test_a_stored_map_comes_back_as_it_was(dtype: str) -> None:
    label = label_map().astype(dtype)
    for given in (label, label[None], label.transpose(2, 0, 1)[:, ::-1]):
        back = StoredMap(given).array()
        np.testing.assert_array_equal(back, given.reshape(given.shape[-3:]))
        assert back.dtype == dtype
    assert StoredMap(torch.from_numpy(label_map())).array().shape == SHAPE


def test_a_stored_map_is_small() -> None:
    label = label_map().repeat(16, 0).repeat(16, 1).repeat(8, 2)
    assert len(StoredMap(label).compressed) < label.nbytes / 100


@pytest.mark.parametrize("given", [np.zeros((2, 3, 3, 3)), np.zeros((3, 3)), np.full((3, 3, 3), 0.5)])
def test_rejects_what_is_no_label_map(given: np.ndarray) -> None:
    with pytest.raises(ValueError, match="`label_map` must h"):
        StoredMap(given)


# --- figures


@pytest.mark.parametrize(
    ("axes", "image_axes"), [("RAS", "RAS"), ("LPS", "LPS"), ("SLA", "SLA"), ("PIR", "PIR"), ("LPS", "ASR")]
)
def test_all_three_are_drawn_in_ras(tmp_path: Path, drawn: list[Any], axes: str, image_axes: str) -> None:
    item = write(tmp_path, axes, image_axes)
    pred = np.where(label_map() == 6, 0, label_map())
    case_figure(item, oriented(pred, axes)[0], LABELS, (0, 100), "spleen", "Case")
    image, label, drawn_pred, labels, spacing, structure, window, title = drawn[0]
    np.testing.assert_allclose(image, NUMBERS, atol=0 if axes == image_axes else 1e-2)
    np.testing.assert_array_equal(label, label_map())
    np.testing.assert_array_equal(drawn_pred, pred)
    assert (labels, spacing) == (LABELS, pytest.approx(SPACING))
    assert (structure, window, title) == ("spleen", (0, 100), "Case")


def test_an_image_on_another_grid_is_brought_to_that_of_its_label(tmp_path: Path, drawn: list[Any]) -> None:
    item = write(tmp_path)
    nib.save(nib.Nifti1Image(NUMBERS[2:, :, :6], AFFINE @ nib.affines.from_matvec(np.eye(3), [2, 0, 0])), item["image"])
    case_figure(item, label_map()[None], LABELS)
    np.testing.assert_allclose(drawn[0][0][2:, :, :6], NUMBERS[2:, :, :6], atol=1e-2)


@pytest.mark.parametrize(
    ("modality", "windowed"), [("CT", True), (None, True), (["ct", "MR"], True), ("MR", False), (["MR"], False)]
)
def test_the_window_is_for_ct(tmp_path: Path, drawn: list[Any], modality: Any, windowed: bool) -> None:
    case_figure(write(tmp_path, modality=modality), label_map(), LABELS, [-160, 240])
    assert drawn[0][6] == ((-160, 240) if windowed else None)


def test_the_first_channel_is_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    item = write(tmp_path, modality=["MR", "MR"])
    nib.save(nib.Nifti1Image(np.stack([NUMBERS, -NUMBERS], -1), AFFINE), item["image"])
    case_figure(item, label_map(), LABELS)
    np.testing.assert_array_equal(drawn[0][0], NUMBERS)


def test_structures_without_values_keep_their_colour(tmp_path: Path) -> None:
    labels = {"heart": [], **LABELS}
    figure = case_figure(write(tmp_path), label_map(), labels)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["Prediction", "Label", "liver", "right kidney"]
    assert figure.legends[0].get_patches()[2].get_facecolor()[:3] == pytest.approx(
        [int(ORGAN_COLORS[1][index : index + 2], 16) / 255 for index in (1, 3, 5)]
    )


def test_rejects_predictions_on_another_grid(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`pred_map` must lie on the grid of .*a_label.nii.gz, of shape \(14, 12, 10\)"
    ):
        case_figure(write(tmp_path), label_map()[1:], LABELS)


@pytest.mark.parametrize("key", ["image", "label"])
def test_rejects_items_without_files(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"`item` must have the path of its `{key}`, got None"):
        case_figure(write(tmp_path) | {key: None}, label_map(), LABELS)
    with pytest.raises(FileNotFoundError, match=r"lost\.nii\.gz"):
        case_figure(write(tmp_path) | {key: str(tmp_path / "lost.nii.gz")}, label_map(), LABELS)


# --- which cases


def names(cases: list[CaseScores]) -> dict[str, str]:
    return {rank: found.subject for rank, found in representative_cases(cases).items()}


def test_best_median_and_worst_are_by_the_mean_without_nan() -> None:
    cases = [case("a", 0.5, 0.7), case("b", 0.9, NAN), case("c", NAN, NAN), case("d", 0.1, 0.2)]
    assert names(cases) == {"best": "b", "median": "a", "worst": "d"}


def test_the_lower_of_two_medians_is_taken_and_of_equals_the_first_is_better() -> None:
    assert names([case("a", 0.1), case("b", 0.2), case("c", 0.3), case("d", 0.4)])["median"] == "b"
    assert names([case(name, 0.5) for name in "abc"]) == {"best": "a", "median": "b", "worst": "c"}


def test_no_case_comes_twice() -> None:
    assert names([case("a", 0.1), case("b", 0.2)]) == {"best": "b", "worst": "a"}
    assert names([case("a", 0.1), case("b", NAN)]) == {"only case": "a"}
    assert names([case("a", NAN)]) == names([]) == {}


# --- the page


def report(folder: Path, lost: tuple[str, ...] = (), **changes: Any) -> Page:
    """A report of three cases, whose predictions are shifted by 0, 1, 2 voxels; the spleen is in no label."""
    items, maps, cases = {}, {}, []
    for shift, name in enumerate("abc"):
        item = write(folder, "LPS", name=name)
        label = oriented(label_map(), "LPS")[0]
        pred = np.roll(label, shift, 0)
        if shift == 2:
            pred = np.where(pred == 2, 0, pred)
        items[item["image"]] = item
        if name not in lost:
            maps[item["image"]] = StoredMap(pred)
        cases.append(CaseScores(item["image"], name, score_structures(label, pred, LABELS, SPACING)))
    arguments: dict[str, Any] = {"cases": cases, "summaries": summarize(cases, 20), "items": items, "maps": maps}
    arguments |= {"facts": {"split": "test"}, "notes": ["The surface Dice tolerates 2 mm."]} | changes
    write_segmentation_report(folder / "new" / "report.html", **arguments)
    return Page(folder / "new" / "report.html")


def test_the_table_has_a_line_for_the_mean_and_every_structure(tmp_path: Path) -> None:
    page = report(tmp_path)
    headings = ["Structure", "Subjects", "Dice", "HD95 (mm)", "Surface Dice", "Missed", "False positives"]
    assert page.of("th") == headings
    lines = [page.of("td")[start : start + 7] for start in range(0, 28, 7)]
    assert [line[0] for line in lines] == ["Mean of structures", "liver", "right kidney", "spleen"]
    assert [line[-2:] for line in lines] == [["1", "0"], ["0", "0"], ["1", "0"], ["0", "0"]]
    assert page.values("style") == [f"background: {color}" for color in ORGAN_COLORS[:3]]
    assert [line[1] for line in lines] == ["3", "3", "3", "0"]


def test_organs_that_no_label_has_are_shown_as_dashes(tmp_path: Path) -> None:
    assert report(tmp_path).of("td")[-7:] == ["spleen", "0", "–", "–", "–", "0", "0"]


def test_cases_have_a_picture_and_say_what_went_well(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert page.of("dt")[:3] == ["Mean Dice", "Split", "Date"]
    facts = page.of("dd")[3:]
    assert facts[:6] == ["best", "a", "a_image.nii.gz", "1.000", "liver 1.000", "right kidney 1.000"]
    assert facts[6:9] == ["median", "b", "b_image.nii.gz"]
    assert facts[12:15] == ["worst", "c", "c_image.nii.gz"]
    assert facts[-1] == "right kidney missed"
    assert page.of("h2") == ["Results", "Cases by their mean Dice"]
    assert page.of("li") == ["The surface Dice tolerates 2 mm."]
    assert page.values("alt") == ["Overlay"] * 3


def test_the_page_loads_nothing_and_has_the_limits_of_segmentations(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert all(str(source).startswith("data:image/png;base64,") for source in page.values("src"))
    assert not {"link", "script", "iframe"} & set(page.tags)
    limits = " ".join(page.of("p"))
    assert "not a medical device" in limits
    assert "Missed" in limits
    assert "Saliency" not in limits


def test_a_structure_has_one_colour_in_all_pictures(tmp_path: Path, drawn: list[Any]) -> None:
    cases = [case(name, 0.5, NAN) for name in "ab"]
    cases[1] = cases[1]._replace(structures=cases[1].structures[1:] + scores(0.2)[:1])
    items = {each.case: write(tmp_path, name=each.subject) for each in cases}
    maps = {each.case: StoredMap(label_map()) for each in cases}
    report(tmp_path, cases=cases, summaries=summarize(cases, 20), items=items, maps=maps, window=[0, 9])
    assert [list(call[3]) for call in drawn] == [["organ_0", "organ_1"]] * 2
    assert [call[6] for call in drawn] == [(0, 9)] * 2


def test_a_case_of_another_process_has_no_picture(tmp_path: Path) -> None:
    page = report(tmp_path, lost=("b",))
    assert page.of("div") == [NO_MAP]
    assert page.values("alt") == ["Overlay"] * 2
    assert "median" in page.of("dd")


def test_texts_are_escaped(tmp_path: Path) -> None:
    attack = '<script>alert("x")</script>'
    organ = StructureScore(attack, (1,), 0.5, 1, 0.5, 1, 1, "scored")
    cases = [CaseScores("/data/<b>.nii.gz", "<i>", [organ])]
    page = report(
        tmp_path, cases=cases, summaries=summarize(cases, 20), maps={}, facts={attack: attack}, notes=[attack]
    )
    assert not {"script", "b"} & set(page.tags)
    assert page.of("td")[7] == attack
    assert page.of("li") == [attack]
    assert {"only case", "<i>", "<b>.nii.gz", f"{attack} 0.500", "–"} <= set(page.of("dd"))


def test_cases_without_any_score_are_not_drawn(tmp_path: Path) -> None:
    cases = [case("a", NAN)]
    assert report(tmp_path, cases=cases, summaries=summarize(cases, 20)).of("h2") == ["Results"]


@pytest.mark.parametrize("missing", ["cases", "summaries"])
def test_rejects_reports_of_nothing(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match="`cases` and `summaries` must hold the scores of at least one case, got"):
        report(tmp_path, **{missing: []})
    assert not (tmp_path / "new").exists()
