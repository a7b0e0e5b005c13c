from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import Oracle, Page, Writer, table
from helpers import evaluated as run
from ignite.engine import Events
from matplotlib.figure import Figure
from monai.data import DataLoader, Dataset, MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, LoadImaged, Orientationd, SelectItemsd, Spacingd, SpatialPadd
from torch import Tensor

from dissect_monai.data.identity import pseudonyms
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.handlers import segmentation as module
from dissect_monai.handlers.segmentation import SegmentationEvaluation, read_maps, score_case

LABELS = {"liver": [6], "kidneys": [2, 3], "spleen": [1]}
CLASSES = ["spleen", "liver", "kidneys"]
SHAPE, SPACING = (20, 16, 14), (1.2, 1.5, 2.0)


def label_map() -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[2:11, 3:12, 2:11] = 6
    label[13:18, 2:6, 3:7], label[13:18, 9:13, 3:7] = 2, 3
    label[4:9, 12:15, 5:12] = 1
    return label


def write(folder: Path, name: str, label: np.ndarray, flipped: bool = False) -> dict[str, Any]:
    """An image whose values are the classes of `CLASSES`, and its label map, in another orientation if `flipped`."""
    affine = np.diag([*SPACING, 1.0])
    if flipped:
        label = label.transpose(2, 0, 1)[:, ::-1]
        affine = np.eye(4)[[1, 2, 0, 3]] * [SPACING[2], -SPACING[0], SPACING[1], 1]
    classes = np.zeros(label.shape, dtype=np.float32)
    for index, each in enumerate(CLASSES, 1):
        classes[np.isin(label, LABELS[each])] = index
    item = {key: str(folder / f"{name}_{key}.nii.gz") for key in ("image", "label")}
    nib.save(nib.Nifti1Image(classes, affine), item["image"])
    nib.save(nib.Nifti1Image(label, affine), item["label"])
    return {**item, "subject": name, "labels": LABELS}


def evaluated(
    items: list[dict[str, Any]],
    handler: Any,
    lost: tuple[int, ...] = (),
    pixdim: Any = SPACING,
    others: Sequence[Any] = (),
    **knobs: Any,
) -> dict[str, float]:
    """Metrics of an evaluator that resamples, pads and slides a window, as a bundle's does."""
    steps = [
        LoadImaged("image", reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim, mode="nearest"),
        SpatialPadd("image", (24, 24, 24)),
        SelectItemsd("image"),
    ]
    loader = DataLoader(Dataset(items, Compose(steps)), batch_size=1)
    inferer = SlidingWindowInferer((16, 16, 16), overlap=0.5)
    return run(Oracle(4, lost), loader, handler, *others, inferer=inferer, **knobs).state.metrics


@pytest.mark.parametrize("decollate", [True, False])
def test_a_perfect_network_is_perfect_on_the_grid_of_the_files(tmp_path: Path, decollate: bool) -> None:
    items = [write(tmp_path, "a", label_map()), write(tmp_path, "b", label_map(), flipped=True)]
    handler = SegmentationEvaluation(CLASSES, tmp_path / "eval", num_samples=20)
    metrics = evaluated(items, handler, decollate=decollate)
    names = ["dice_mean", "surface_dice_mean", "dice_liver", "dice_kidneys", "dice_spleen"]
    assert [metrics[name] for name in names] == [1] * 5
    assert (metrics["hd95_mean"], metrics["missed"], metrics["false_positives"]) == (0, 0, 0)
    cases, (name, _) = table(tmp_path / "eval" / "cases.csv"), pseudonyms(items)
    assert [(row["subject"], row["structure"], row["values"]) for row in cases[:3]] == [
        (name, "liver", "6"), (name, "kidneys", "2 3"), (name, "spleen", "1"),
    ]  # fmt: skip
    liver = (label_map() == 6).sum() * np.prod(SPACING) / 1000
    assert [float(row["label_ml"]) for row in cases[::3]] == pytest.approx([liver, liver], abs=1e-4)


def test_what_is_missed_and_what_was_never_there_is_told_apart(tmp_path: Path) -> None:
    without = np.where(label_map() == 1, 0, label_map())
    items = [write(tmp_path, "a", label_map()), write(tmp_path, "b", without)]
    handler = SegmentationEvaluation(CLASSES, tmp_path, num_samples=20)
    metrics = evaluated(items, handler, lost=(1,))
    assert (metrics["dice_spleen"], metrics["missed"]) == (0, 1)
    assert metrics["dice_mean"] == pytest.approx((2 / 3 + 1) / 2)
    spleens = [row for row in table(tmp_path / "cases.csv") if row["structure"] == "spleen"]
    assert [(row["subject"], row["outcome"]) for row in spleens] == [
        *zip(pseudonyms(items), ("missed", "absent"), strict=True)
    ]


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    items = [write(tmp_path, "a", label_map()), write(tmp_path, "b", label_map())]
    handler = SegmentationEvaluation(CLASSES, tmp_path, num_samples=20)
    evaluated(items, handler, lost=(2,))
    assert evaluated(items[1:], handler)["dice_mean"] == 1
    assert {row["subject"] for row in table(tmp_path / "cases.csv")} == {pseudonyms(items)[1]}


@pytest.mark.parametrize(
    ("names", "empty", "said"),
    [
        ("ab", False, "mean Dice 1.000 (95 % interval 1.000 to 1.000) of 3 structures in 2 subjects"),
        ("a", False, "mean Dice 1.000 of 3 structures in 1 subject, too few for an interval"),
        ("ab", True, "nothing could be scored, since no label map has a structure"),
    ],
)
def test_the_result_has_an_interval_or_says_why_not(tmp_path: Path, names: str, empty: bool, said: str) -> None:
    items = [write(tmp_path, name, label_map() * (not empty)) for name in names]
    handler = SegmentationEvaluation(CLASSES, tmp_path, num_samples=20, facts={})
    for each in (handler, SegmentationEvaluation(CLASSES, num_samples=20)):
        results: list[Any] = []
        seen = SimpleNamespace(
            attach=lambda engine, results=results: engine.add_event_handler(
                Events.COMPLETED, lambda: results.append(engine.state.result.text)
            )
        )
        evaluated(items, each, others=[seen])
        assert results == [said if empty or each is handler else f"{said}, on validation, epoch 1"]
    page = Page(tmp_path / "report.html")
    assert page.of("h3")[:1] == ([] if empty else [f"Best: {pseudonyms(items)[0]}"])


def test_structures_that_cannot_be_scored_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = write(tmp_path, "a", np.where(label_map() == 1, 200, label_map()))
    item["labels"] = {**LABELS, "heart": [9]}
    metrics = evaluated([item], SegmentationEvaluation(CLASSES, num_samples=20))
    assert "Not scored, since the network has no class for them: heart." in caplog.text
    assert "Not scored, since no label map has them: spleen." in caplog.text
    assert "has the values 200, which `labels` does not name: they count as background" in caplog.text
    assert "dice_spleen" not in metrics
    assert metrics["dice_mean"] == 1


def test_a_prediction_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    forgets = {"postprocessing": lambda item: {**item, "pred": item["pred"].as_subclass(Tensor)}}
    with pytest.raises(ValueError, match=r"`pred` must know the file of its image.*keep `track_meta`"):
        evaluated([write(tmp_path, "a", label_map())], SegmentationEvaluation(CLASSES), **forgets)


def test_pictures_show_the_prediction_on_the_grid_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "case_figure", lambda *arguments: drawn.append(arguments) or Figure())
    said: list[str] = []
    monkeypatch.setattr(
        module, "figure_to_tensor", lambda figure: said.append(figure.get_suptitle()) or torch.zeros(3, 1, 1)
    )
    monkeypatch.setattr(module, "figure_to_png", lambda figure: b"")
    item = write(tmp_path, "a", label_map(), flipped=True)
    writer: Any = Writer()
    handler = SegmentationEvaluation(
        CLASSES, tmp_path, num_samples=20, writer=writer, window=(-100.0, 300.0), facts={"weights": "model.pt"}
    )
    evaluated([item, item], handler, lost=(1,))
    assert list(writer.images) == [f"overlays/1_{pseudonyms([item])[0]}"]
    assert said == [f"Subject {pseudonyms([item])[0]}, epoch 1"] * 2
    page = Page(tmp_path / "report.html")
    names = page.of("dt")[: len(page.of("dt")) - 4]  # without those of the case
    assert names == [
        "Mean Dice",
        "Weights",
        "Tolerance of surface Dice",
        "Largest part only",
        "Weights' SHA-256",
        "Bootstrap resamples",
        "Date",
        "Software",
    ]
    assert "HD95 the distance" in " ".join(page.of("li"))
    label = np.asarray(nib.load(item["image"]).dataobj)
    assert len(drawn) == 3  # twice in TensorBoard, and in the report from what was stored
    for given, maps, class_names, window in drawn:
        assert given["image"] == item["image"]
        np.testing.assert_array_equal(maps.label, label)
        np.testing.assert_array_equal(maps.pred, np.where(label == 1, 0, label))
        assert (class_names, window) == (CLASSES, (-100.0, 300.0))


def test_processes_have_the_metrics_of_all_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = np.where(label_map() == 1, 0, label_map())
    maps = {"a": label_map(), "b": without, "c": label_map(), "d": np.roll(label_map(), 1, 0)}
    items = [write(tmp_path, name, label) for name, label in maps.items()]
    whole = evaluated(items, SegmentationEvaluation(CLASSES, tmp_path / "whole", num_samples=50), lost=(3,))
    other = SegmentationEvaluation(CLASSES, num_samples=50)
    evaluated([items[3], items[0]], other, lost=(3,))
    # Both have scored `a`, as where items do not divide by processes.
    monkeypatch.setattr(module, "of_all_processes", lambda own: [own, other.cases])
    shared = SegmentationEvaluation(CLASSES, tmp_path / "shared", num_samples=50)
    assert evaluated(items[:3], shared, lost=(3,)) == whole
    for name in ("cases.csv", "summary.csv"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def scores(item: dict[str, Any], values: np.ndarray, largest_only: Sequence[str] = ()) -> list[float]:
    """Dice of a prediction with the values of the file."""
    classes = np.zeros(values.shape, dtype=np.uint8)
    for index, each in enumerate(CLASSES, 1):
        classes[np.isin(values, LABELS[each])] = index
    pred = MetaTensor(torch.as_tensor(classes[None]), affine=nib.load(item["image"]).affine)
    case = score_case(item, read_maps(item, pred, CLASSES, largest_only), CLASSES)
    assert (case.case, case.subject) == (item["image"], "a")
    return [each.dice for each in case.structures]


def test_only_the_largest_parts_of_the_named_structures_count(tmp_path: Path) -> None:
    item = write(tmp_path, "a", label_map())
    spilled = label_map()
    spilled[19, 15, 13], spilled[0, 15, 13] = 6, 1
    assert [value == 1 for value in scores(item, spilled)] == [False, True, False]
    assert [value == 1 for value in scores(item, spilled, ["liver"])] == [True, True, False]
    # One of two kidneys is gone.
    assert [value == 1 for value in scores(item, spilled, CLASSES)] == [True, False, True]


def test_voxels_that_are_not_annotated_are_not_scored(tmp_path: Path) -> None:
    label = label_map()
    pred = np.select([label == 1, label == 6, label > 0], [1.0, 2.0, 3.0])
    label[:, :, 9:], pred[15:, 12:, 12:] = 9, 3  # a part of the liver and of the spleen; who knows whether it is right
    item = {**write(tmp_path, "a", label), "ignored": [9]}
    maps = read_maps(item, MetaTensor(torch.as_tensor(pred)[None], affine=np.diag([*SPACING, 1.0])), CLASSES)
    assert not maps.label[:, :, 9:].any()
    assert not maps.pred[:, :, 9:].any()
    scores = score_case(item, maps, CLASSES).structures
    assert [(each.dice, each.hd95, each.surface_dice, each.outcome) for each in scores] == [(1, 0, 1, "scored")] * 3


@pytest.mark.parametrize(
    ("class_names", "pred", "message"),
    [
        (["heart"], torch.zeros(2, *SHAPE), r"must share a structure with the `labels` of .*\['heart'\] and \['liv"),
        (["liver"], torch.zeros(4, *SHAPE), r"must name the 3 classes of the prediction, got \['liver'\]"),
        (CLASSES, torch.zeros(3, *SHAPE), "must name the 2 classes of the prediction, got .*'kidneys'"),
        (["liver"], torch.full((1, *SHAPE), 2), r"must name the 2 classes of the prediction, got \['liver'\]"),
        (CLASSES, torch.full((1, *SHAPE), 0.5), "`pred` must hold integers, got fractions"),
    ],
)
def test_classes_that_fit_nothing_are_refused(tmp_path: Path, class_names: Any, pred: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_maps(write(tmp_path, "a", label_map()), MetaTensor(pred, affine=np.diag([*SPACING, 1.0])), class_names)


def test_a_label_file_on_another_grid_or_with_fractions_is_named(tmp_path: Path) -> None:
    item = write(tmp_path, "a", label_map())
    nib.save(nib.Nifti1Image(label_map(), np.eye(4)), item["label"])
    with pytest.raises(ValueError, match=r"label map .*a_label\.nii\.gz must be on the grid of its image, got shape"):
        evaluated([item], SegmentationEvaluation(CLASSES, num_samples=20), pixdim=(2.5, 2.5, 2.5))
    nib.save(nib.Nifti1Image(label_map() * 0.5, np.eye(4)), item["label"])
    with pytest.raises(ValueError, match=r"`label map .*a_label.nii.gz` must hold integers"):
        evaluated([item], SegmentationEvaluation(CLASSES, num_samples=20))
