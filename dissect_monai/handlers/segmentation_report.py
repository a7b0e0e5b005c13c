"""What an evaluation of a segmentation leaves: tables of cases, subjects and structures, and a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from io import BytesIO
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, SpatialResample
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from dissect_monai.common import Array, Interval, Item
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.metrics.intervals import bootstrap
from dissect_monai.metrics.segmentation import NAN, Overlap, StructureScore
from dissect_monai.transforms.intensity import is_ct
from dissect_monai.transforms.labels import LabelMap
from dissect_monai.visualize.page import LIMITS, Case, colored, write_report
from dissect_monai.visualize.segmentation import ORGAN_COLORS, segmentation_overlay
from dissect_monai.writing import columns, metric_name, metrics_by_name, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = Overlap._fields
MEAN = "mean"  # what the line of the mean over structures is called
HEADINGS = ("Structure", "Subjects", "Dice", "HD95 (mm)", "Surface Dice", "Missed", "False positives")
SEGMENTATION_LIMITS = (
    *LIMITS,
    "Missed: cases whose label has the structure and whose prediction does not; they count as Dice 0 and have no HD95. "
    "False positives: the reverse; they have no score, for the structure may never have been contoured. "
    "A dash: not defined, as where no label has the structure (absent).",
    "Three planes do not show a whole volume: open the weakest cases in a viewer.",
)
NO_PICTURE = "No picture: another process has predicted this case."
_NUM_NAMED = 3  # of the weakest and strongest structures


# --- tables


class CaseScores(NamedTuple):
    """The scores of one case."""

    case: str  # path of the image
    subject: str
    structures: list[StructureScore]


class SubjectScores(NamedTuple):
    """Means over the structures of a subject, those left out that have no score."""

    subject: str
    dice: float
    hd95: float  # mm
    surface_dice: float
    missed: int  # structures of its cases
    false_positives: int  # likewise


class StructureSummary(NamedTuple):
    """Mean over subjects of one structure, or of the mean over structures, with its 95 % interval and its spread."""

    structure: str
    n: int  # subjects that have the structure in a label
    dice: Interval
    dice_std: float  # over subjects, as are the others
    hd95: Interval  # mm
    hd95_std: float
    surface_dice: Interval
    surface_dice_std: float
    missed: int  # cases
    false_positives: int  # cases


def subject_scores(cases: Sequence[CaseScores]) -> list[SubjectScores]:
    """The mean over structures of every subject, in their order; of a structure of several cases, their mean."""
    by_subject: dict[str, list[CaseScores]] = {}
    for case in cases:
        by_subject.setdefault(case.subject, []).append(case)
    means = zip(*(_matrix(cases, metric)[:, 0].tolist() for metric in METRICS), strict=True)
    return [
        SubjectScores._make([subject, *row, *_counts(own)])
        for (subject, own), row in zip(by_subject.items(), means, strict=True)
    ]


def summarize(cases: Sequence[CaseScores], num_samples: int = 1000, seed: int = 0) -> list[StructureSummary]:
    """A line for the mean over structures, then one for every structure.

    Of a structure, the score of a subject is the mean of its cases, and the line holds mean and standard deviation
    (with n − 1) over the subjects that have one. The first line does the same with the mean over the structures of
    each subject, so that every subject counts alike, and not every structure. Intervals are from resampling subjects;
    one subject has none. A structure that no label has, has counts alone, and is left out of the mean.

    Args:
        cases: the scores of all cases, at least one; the structures may differ between them.
        num_samples: bootstrap resamples.
        seed: seed of the resamples.
    """
    matrices = {metric: _matrix(cases, metric) for metric in METRICS}
    summaries = []
    for index, name in enumerate([MEAN, *_names(cases)]):
        scores = {metric: matrix[:, index] for metric, matrix in matrices.items()}
        fields: dict[str, Any] = {metric: _interval(values, num_samples, seed) for metric, values in scores.items()}
        fields |= {f"{metric}_std": _std(values) for metric, values in scores.items()}
        missed, false_positives = _counts(cases, name if index else None)
        num_subjects = int((~np.isnan(scores["dice"])).sum())
        summaries.append(StructureSummary(name, num_subjects, missed=missed, false_positives=false_positives, **fields))
    return summaries


def summary_metrics(summaries: Sequence[StructureSummary]) -> dict[str, float]:
    """`dice_mean`, `hd95_mean`, `surface_dice_mean` with `_low` and `_high`, and `dice_<structure>`, where defined.

    Beside them `missed` and `false_positives`, over all structures.
    """
    mean, *structures = summaries
    found = metrics_by_name({metric_name(metric, MEAN): getattr(mean, metric) for metric in METRICS})
    found |= {metric_name("dice", each.structure): each.dice.value for each in structures}
    defined = {name: value for name, value in found.items() if not isnan(value)}
    return {**defined, "missed": mean.missed, "false_positives": mean.false_positives}


def write_tables(output_dir: str | Path, cases: Sequence[CaseScores], summaries: Sequence[StructureSummary]) -> None:
    """Write cases.csv, subjects.csv and summary.csv, of `summaries` as `summarize` gives them."""
    lines = [[case.case, case.subject, *score] for case in cases for score in case.structures]
    write_csv(Path(output_dir, "cases.csv"), ["case", "subject", *StructureScore._fields], lines)
    write_csv(Path(output_dir, "subjects.csv"), SubjectScores._fields, subject_scores(cases))
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


def _std(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else NAN


def _interval(values: Array, num_samples: int, seed: int) -> Interval:
    """Mean of the known values of subjects, and its interval."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return Interval(_mean(values.tolist()), NAN, NAN)
    return bootstrap(lambda weight: weight @ known / weight.sum(1), np.arange(len(known)), num_samples, seed)


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

    def compressed(self) -> bytes:
        """In a hundredth of the size or so."""
        file = BytesIO()
        np.savez_compressed(file, *self)
        return file.getvalue()

    @classmethod
    def restored(cls, content: bytes) -> CaseMaps:
        """What `compressed` gave."""
        with np.load(BytesIO(content)) as arrays:
            return cls(*arrays.values())


def load_volume(path: str, dtype: torch.dtype | None = None) -> MetaTensor:
    """A volume as its file has it, of shape (C, X, Y, Z), in its own dtype or another."""
    load = LoadImage(ImageFileReader(spatial_dims=3), image_only=True, dtype=dtype, ensure_channel_first=True)
    return load(path)


def case_figure(
    item: Item, maps: CaseMaps, labels: Mapping[str, Sequence[int]], window: Sequence[float] | None = None
) -> Figure:
    """Draw a prediction and its label over the image of a case, see `segmentation_overlay`.

    All three are brought to RAS without interpolation. Only an image on another grid than its label is resampled to it;
    of several channels, the first is drawn.

    Args:
        item: "image": its path; "modality", if it is known: of the image, or a list with that of each channel.
        maps: label and prediction.
        labels: class of each structure, {name: [class]}; its place among them is its colour. One without is not drawn.
        window: values that are black and white in HU, for CT or an unknown modality.
    """
    image, grid = load_volume(item["image"], torch.float32), maps.label.shape
    if image.shape[1:] != grid or not np.allclose(image.affine.numpy(), maps.affine, atol=1e-3):
        image = SpatialResample(mode="bilinear")(image, dst_affine=torch.as_tensor(maps.affine), spatial_size=grid)
    turn = io_orientation(maps.affine)
    volume, label, pred = (apply_orientation(each, turn) for each in (image[0].numpy(), maps.label, maps.pred))
    spacing = voxel_sizes(maps.affine @ inv_ornt_aff(turn, grid)).tolist()
    known = item.get("modality")
    is_hu = not known or is_ct(known if isinstance(known, str) else known[0])
    limits = (window[0], window[1]) if window is not None and is_hu else None
    return segmentation_overlay(volume, label, pred, labels, spacing, limits)


def representative_cases(cases: Sequence[CaseScores]) -> dict[str, CaseScores]:
    """The "best", "median" and "worst" case by the mean Dice; of two, no median; of one, the "only case".

    Of an even number of cases, the median is the lower of the two in the middle; of equal ones, the first is better.
    Cases without any Dice are left out.
    """
    scored = [case for case in cases if not isnan(_mean_dice(case))]
    ordered = sorted(scored, key=_mean_dice, reverse=True)
    if len(ordered) < 2:
        return dict(zip(["only case"], ordered, strict=False))
    median = {"median": ordered[len(ordered) // 2]} if len(ordered) > 2 else {}
    return {"best": ordered[0], **median, "worst": ordered[-1]}


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
    """Write a page with a line for every structure, and the `representative_cases` over their images.

    Args:
        path: file to write; its folder is made.
        cases: the scores of all cases.
        summaries: what `summarize` makes of them.
        pictures: the PNG of a case by the path of its image.
        class_names: structures in the order of their colours.
        facts: headline facts by name, such as where the weights come from.
        notes: sentences below the table, on how to read it.
    """
    names = ["Mean of structures"]
    for each in summaries[1:]:
        color = ORGAN_COLORS[class_names.index(each.structure) % len(ORGAN_COLORS)]
        names.append(colored(_words(each.structure), color))
    rows = [
        (name, each.n, each.dice, each.hd95, each.surface_dice, each.missed, each.false_positives)
        for name, each in zip(names, summaries, strict=True)
    ]
    shown = [
        Case({"Overlay": pictures.get(case.case, NO_PICTURE)}, _facts(rank, case))
        for rank, case in representative_cases(cases).items()
    ]
    facts = {"mean Dice": summaries[0].dice, **facts, "date": date.today().isoformat()}
    heading = "Cases by their mean Dice"
    write_report(
        path, "Evaluation of the segmentation", facts, HEADINGS, rows, {}, shown, heading, notes, SEGMENTATION_LIMITS
    )


def _mean_dice(case: CaseScores) -> float:
    return subject_scores([case])[0].dice


def _facts(rank: str, case: CaseScores) -> dict[str, str]:
    ordered = sorted((score for score in case.structures if not isnan(score.dice)), key=lambda score: -score.dice)
    count = min(_NUM_NAMED, len(ordered) // 2)  # so that no structure is among both
    return {
        "rank": rank,
        "subject": Path(case.subject).name,
        "image": Path(case.case).name,
        "mean Dice": f"{_mean_dice(case):.3f}",
        "strongest": _listed(ordered[: max(count, 1)]),
        "weakest": _listed(ordered[::-1][:count]),
    }


def _listed(scores: Sequence[StructureScore]) -> str:
    values = ("missed" if each.outcome == "missed" else f"{each.dice:.3f}" for each in scores)
    return ", ".join(f"{_words(each.structure)} {value}" for each, value in zip(scores, values, strict=True)) or "–"


def _words(structure: str) -> str:
    return structure.replace("_", " ")
