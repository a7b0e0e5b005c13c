"""What an evaluation of a segmentation leaves: tables of cases and structures, and a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, SpatialResample
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from dissect_monai.common import PICTURE, Array, Interval, Item
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.metrics.intervals import bootstrap
from dissect_monai.metrics.segmentation import NAN, Overlap, StructureScore
from dissect_monai.transforms.intensity import is_ct, sample_voxels
from dissect_monai.transforms.labels import LabelMap
from dissect_monai.visualize.page import LIMITS, Case, colored, item_name, write_report
from dissect_monai.visualize.segmentation import organ_color, picture_overlay, segmentation_overlay
from dissect_monai.writing import columns, metric_name, metrics_by_name, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = Overlap._fields
PLANES = "Three planes of the image: predictions filled, labels outlined, in the colours of the table."
SIDE_BY_SIDE = PLANES.replace("Three planes of the image", "The picture alone, and with its structures")
MEAN = "mean"  # what the line of the mean over structures is called
HEADINGS = ("Structure", "Subjects", "Dice", "HD95", "Surface Dice", "Missed", "False positives")
SEGMENTATION_LIMITS = (
    *LIMITS,
    "Missed: cases whose label has the structure and whose prediction does not; they count as Dice 0 and have no HD95. "
    "False positives: the reverse; they have no score, for the structure may never have been contoured.",
    "Three planes do not show a whole volume: open the weakest cases in a viewer.",
)


# --- tables


class CaseScores(NamedTuple):
    """The scores of one case."""

    case: str  # path of the image
    subject: str
    structures: list[StructureScore]
    pseudonym: str = ""  # if there is one, this is written instead of the subject
    in_pixels: bool = False  # a picture without a spacing


class StructureSummary(NamedTuple):
    """Mean over subjects of one structure, or of the mean over structures, with its 95 % interval and its spread."""

    structure: str
    n: int  # subjects that have the structure in a label
    dice: Interval
    dice_std: float  # over subjects, as are the others
    hd95: Interval  # mm, or pixels
    hd95_std: float
    surface_dice: Interval
    surface_dice_std: float
    missed: int  # cases
    false_positives: int  # cases


def summarize(cases: Sequence[CaseScores], num_samples: int = 1000, seed: int = 0) -> list[StructureSummary]:
    """A line for the mean over structures, then one for every structure.

    Of a structure, the score of a subject is the mean of its cases, and the line holds mean and standard deviation
    (with n − 1) over the subjects that have one. The first line does the same with the mean over the structures of
    each subject, so that every subject counts alike, and not every structure. Intervals are from resampling subjects;
    one subject has none. A structure that no label has, has counts alone, and is left out of the mean. There must be
    one case; the structures may differ between cases.
    """
    matrices = [_matrix(cases, metric) for metric in METRICS]
    summaries = []
    for index, name in enumerate([MEAN, *_names(cases)]):
        scores = [_over_subjects(matrix[:, index], num_samples, seed) for matrix in matrices]
        num_subjects = int((~np.isnan(matrices[0][:, index])).sum())
        counts = _counts(cases, name if index else None)
        summaries.append(StructureSummary._make([name, num_subjects, *chain.from_iterable(scores), *counts]))
    return summaries


def summary_metrics(summaries: Sequence[StructureSummary]) -> dict[str, float]:
    """`dice_mean` and the like with `_low` and `_high`, `dice_<structure>`, where defined; `missed` and the like."""
    mean, *structures = summaries
    found = metrics_by_name({metric_name(metric, MEAN): getattr(mean, metric) for metric in METRICS})
    found |= {metric_name("dice", each.structure): each.dice.value for each in structures}
    defined = {name: value for name, value in found.items() if not isnan(value)}
    return {**defined, "missed": mean.missed, "false_positives": mean.false_positives}


def write_tables(output_dir: str | Path, cases: Sequence[CaseScores], summaries: Sequence[StructureSummary]) -> None:
    """Write cases.csv and summary.csv, of `summaries` as `summarize` gives them."""
    lines = [[case.case, _subject(case), *score] for case in cases for score in case.structures]
    write_csv(Path(output_dir, "cases.csv"), ["case", "subject", *StructureScore._fields], lines)
    write_csv(Path(output_dir, "summary.csv"), columns(StructureSummary), summaries)


def _names(cases: Sequence[CaseScores]) -> list[str]:
    return list(dict.fromkeys(score.structure for case in cases for score in case.structures))


def _matrix(cases: Sequence[CaseScores], metric: str) -> Array:
    """A metric of each subject: the mean over structures, then each of them, (S, 1 + K); NaN where there is none."""
    cells: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        own = cells.setdefault(case.subject, {})
        for score in case.structures:
            own.setdefault(score.structure, []).append(getattr(score, metric))
    rows = [[_mean(own.get(name, [])) for name in _names(cases)] for own in cells.values()]
    return np.array([[_mean(row), *row] for row in rows])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return float(np.mean(known)) if known else NAN


def _over_subjects(values: Array, num_samples: int, seed: int) -> tuple[Interval, float]:
    """Mean of the known values of subjects with its interval, and their standard deviation."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return Interval(_mean(known.tolist()), NAN, NAN), NAN
    interval = bootstrap(lambda weight: weight @ known / weight.sum(1), np.arange(len(known)), num_samples, seed)
    return interval, float(known.std(ddof=1))


def _counts(cases: Sequence[CaseScores], structure: str | None = None) -> list[int]:
    """Cases that miss a structure, or each of them, and cases that have it wrongly."""
    outcomes = [each.outcome for case in cases for each in case.structures if structure in (None, each.structure)]
    return [outcomes.count(outcome) for outcome in ("missed", "false_positive")]


# --- pictures


class CaseMaps(NamedTuple):
    """Label and prediction of a case, as classes on the grid of the label file."""

    label: LabelMap  # (X, Y, Z)
    pred: LabelMap  # (X, Y, Z)
    affine: Array  # (4, 4), from voxels to mm in RAS
    spacing: Sequence[float]  # mm
    is_picture: bool = False


def load_volume(path: str, dtype: torch.dtype | None = None) -> MetaTensor:
    """A volume as its file has it, of shape (C, X, Y, Z), in its own dtype or another; a picture is (3, X, Y, 1)."""
    reader = ImageFileReader(spatial_dims=3, channels=3)
    return LoadImage(reader, image_only=True, dtype=dtype, ensure_channel_first=True)(path)


def case_figure(
    item: Item, maps: CaseMaps, class_names: Sequence[str], window: tuple[float, float] | None = None
) -> Figure:
    """Draw a prediction and its label over the image of a case, see `segmentation_overlay` and `picture_overlay`.

    All three are brought to RAS without interpolation. Only an image on another grid than its label is resampled to it;
    of several channels, the first is drawn. The window, in HU, is for CT or an unknown modality.
    """
    image, grid = load_volume(item["image"], torch.float32), maps.label.shape
    if maps.is_picture:
        top = image.meta[PICTURE] or np.percentile(sample_voxels(image), 99.5)
        shown = (image[..., 0] / max(float(top), 1e-6)).clamp(0, 1).numpy()
        return picture_overlay(shown, maps.label[..., 0], maps.pred[..., 0], class_names)
    if image.shape[1:] != grid or not np.allclose(image.affine.numpy(), maps.affine, atol=1e-3):
        image = SpatialResample(mode="bilinear")(image, dst_affine=torch.as_tensor(maps.affine), spatial_size=grid)
    turn = io_orientation(maps.affine)
    volume, label, pred = (apply_orientation(each, turn) for each in (image[0].numpy(), maps.label, maps.pred))
    spacing = voxel_sizes(maps.affine @ inv_ornt_aff(turn, grid)).tolist()
    known = item.get("modality")
    is_hu = not known or is_ct(known if isinstance(known, str) else known[0])
    return segmentation_overlay(volume, label, pred, class_names, spacing, window if is_hu else None)


def representative_cases(cases: Sequence[CaseScores]) -> dict[str, CaseScores]:
    """The "best", "median" and "worst" case by the mean Dice; of two, no median. Cases without any are left out."""
    scored = [case for case in cases if not isnan(_mean_dice(case))]
    ordered = sorted(scored, key=_mean_dice, reverse=True)
    if len(ordered) < 3:
        return dict(zip(("best", "worst"), ordered, strict=False))
    return {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]}


# --- the page


def write_segmentation_report(
    path: str | Path,
    cases: Sequence[CaseScores],
    summaries: Sequence[StructureSummary],
    pictures: Mapping[str, bytes],
    class_names: Sequence[str],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Write a page with a line for every structure, and the `representative_cases`, of whose images `pictures` are."""
    structures = ["Mean of structures"]
    for each in summaries[1:]:
        structures.append(colored(_words(each.structure), organ_color(class_names.index(each.structure) + 1)))
    rows = [
        (name, each.n, each.dice, each.hd95, each.surface_dice, each.missed, each.false_positives)
        for name, each in zip(structures, summaries, strict=True)
    ]
    shown, subjects = [], [_subject(case) for case in cases]
    for rank, case in representative_cases(cases).items():
        index = cases.index(case)
        first = 2 + sum(len(each.structures) for each in cases[:index])
        place = {"lines of cases.csv": f"{first}–{first + len(case.structures) - 1}"}
        caption, kind = (SIDE_BY_SIDE, "picture") if _is_picture(case) else (PLANES, "volume")
        picture = {caption: pictures[case.case]} if case.case in pictures else {}  # another process has predicted it
        shown.append(
            Case(f"{rank.capitalize()}: {item_name(index, subjects, kind)}", picture, {**place, **_facts(case)})
        )
    if only_pictures := all(map(_is_picture, cases)):  # which are not resampled to a spacing
        facts = {"pictures" if name == "volumes" else name: facts[name] for name in facts if name != "pixdim"}
    facts = {"mean Dice": summaries[0].dice, **facts}
    title, heading = "Evaluation of the segmentation", "Cases by their mean Dice"
    units = " or ".join(sorted({"pixels" if case.in_pixels else "mm" for case in cases}))
    headings = [f"{each} ({units})" if each == "HD95" else each for each in HEADINGS]
    limits = SEGMENTATION_LIMITS[: -1 if only_pictures else None]  # without planes
    if "pixels" in units:
        notes = [*notes, "HD95 of pictures without a spacing is in pixels, and so is the tolerance of surface Dice."]
    write_report(path, title, facts, headings, rows, {}, shown, heading, notes, limits)


def _is_picture(case: CaseScores) -> bool:
    return all(isnan(each.label_ml) for each in case.structures)


def _mean_dice(case: CaseScores) -> float:
    return _mean([score.dice for score in case.structures])


def _facts(case: CaseScores) -> dict[str, str]:
    ordered = sorted((score for score in case.structures if not isnan(score.dice)), key=lambda score: -score.dice)
    return {
        "subject": _subject(case),  # of which cases.csv has the image; the page may leave the house
        "mean Dice": f"{_mean_dice(case):.3f}",
        "Dice": ", ".join(f"{_words(each.structure)} {each.dice:.3f}" for each in ordered),
    }


def _subject(case: CaseScores) -> str:
    return case.pseudonym or case.subject


def _words(structure: str) -> str:
    return structure.replace("_", " ")
