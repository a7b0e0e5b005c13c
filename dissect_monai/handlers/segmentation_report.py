"""A one-page report of a segmentation: scores of every structure, and the best, median and worst case as pictures."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import cycle
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, SpatialResample
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import ArrayLike

from dissect_monai.common import InputError, Interval, Item
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.handlers.segmentation_table import CaseScores, StructureSummary, subject_scores
from dissect_monai.metrics.segmentation import StructureScore
from dissect_monai.transforms.intensity import is_ct
from dissect_monai.transforms.labels import LabelMap, integer_map
from dissect_monai.visualize.classifier import figure_to_png
from dissect_monai.visualize.page import LIMITS, Swatch, write_report
from dissect_monai.visualize.segmentation import ORGAN_COLORS, segmentation_overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEGMENTATION_LIMITS = (
    *LIMITS[:2],
    "Missed: cases whose label has the structure and whose prediction does not; they count as Dice 0 and have no HD95. "
    "False positives: the reverse; they have no score, for the structure may never have been contoured. "
    "A dash: not defined, as where no label has the structure (absent).",
    "Three planes do not show a whole volume: open the weakest cases in a viewer.",
)
NO_MAP = "No picture: the prediction of this case was not kept."
_NUM_NAMED = 3  # of the weakest and strongest structures


class StoredMap:
    """A label map kept compressed in memory, in a hundredth of its size or so; `array` gives it back.

    Args:
        label_map: shape (1, X, Y, Z) or (X, Y, Z), integers, best uint8; an array or a tensor on the CPU.

    Raises:
        ValueError: if the shape is another, or the label map has fractions.
    """

    def __init__(self, label_map: ArrayLike) -> None:
        array = _label_map("label_map", label_map)
        self.shape, self.dtype = array.shape, array.dtype
        self.compressed = zlib.compress(array.tobytes())

    def array(self) -> LabelMap:
        """The label map of shape (X, Y, Z), in its dtype, read-only."""
        return np.frombuffer(zlib.decompress(self.compressed), self.dtype).reshape(self.shape)


class _Row(NamedTuple):
    """One line of the table."""

    structure: str | Swatch
    subjects: int  # that have the structure in a label
    dice: Interval
    hd95: Interval  # mm
    surface_dice: Interval
    missed: int  # cases
    false_positives: int  # cases


class _Overlay(NamedTuple):
    """One case as a picture, and what to read beside it."""

    overlay_png: bytes | str
    rank: str  # among the cases
    subject: str
    image: str  # file name
    mean_dice: str
    strongest: str
    weakest: str


def case_figure(
    item: Item,
    pred_map: ArrayLike,
    labels: Mapping[str, Sequence[int]],
    window: Sequence[float] | None = None,
    structure: str | None = None,
    title: str = "",
) -> Figure:
    """Draw a prediction and its label over the image of a case, see `segmentation_overlay`.

    All three are brought to RAS, by the affine of the label file and without interpolation. Only an image on another
    grid than its label is resampled to it; of several channels, the first is drawn.

    Args:
        item: "image", "label": paths; "modality", if it is known: of the image, or a list with that of each channel.
        pred_map: shape (1, X, Y, Z) or (X, Y, Z), integers: on the grid of the label file, with its values.
        labels: values of each named structure; its place among them is its colour. One without values is not drawn.
        window: values of the image that are black and white, in HU; only for CT or an unknown modality, others have
            the default of `segmentation_overlay`.
        structure: what to show in the middle; None shows all.
        title: heading, such as the name of the case.

    Returns:
        A figure 1500 pixels wide.

    Raises:
        ValueError: if `item` lacks a path, `pred_map` is on another grid, a label map has fractions, or as
            `segmentation_overlay` says.
        FileNotFoundError: if a file does not exist.
    """
    image, label = (_load(item, key) for key in ("image", "label"))
    grid, affine = tuple(label.shape[1:]), label.affine.numpy()
    pred = _label_map("pred_map", pred_map)
    if pred.shape != grid:
        raise InputError(
            f"`pred_map` must lie on the grid of {item['label']}, of shape {grid}, got {pred.shape}: bring it there "
            "by `to_original_grid`."
        )
    if image.shape[1:] != grid or not np.allclose(image.affine.numpy(), affine, atol=1e-3):
        image = SpatialResample(mode="bilinear")(image, dst_affine=label.affine, spatial_size=grid)
    turn = io_orientation(affine)
    arrays = image[0].numpy(), _label_map(f"label map {item['label']}", label.numpy()), pred
    volume, label_map, pred = (apply_orientation(each, turn) for each in arrays)
    spacing = voxel_sizes(affine @ inv_ornt_aff(turn, grid)).tolist()
    known = item.get("modality")
    is_hu = not known or is_ct(known if isinstance(known, str) else known[0])
    limits = (window[0], window[1]) if window is not None and is_hu else None
    return segmentation_overlay(volume, label_map, pred, labels, spacing, structure, limits, title)


def representative_cases(cases: Sequence[CaseScores]) -> dict[str, CaseScores]:
    """The best, the median and the worst case by the mean Dice over their structures, which leaves out NaN.

    Of an even number of cases, the median is the lower of the two in the middle; of equal ones, the first is better.

    Args:
        cases: the scores of any number of cases; those without any Dice are left out.

    Returns:
        Cases by "best", "median" and "worst"; of two, "best" and "worst"; of one, "only case"; of none, nothing.
    """
    scored = [case for case in cases if not isnan(_mean_dice(case))]
    ordered = sorted(scored, key=_mean_dice, reverse=True)
    if len(ordered) < 2:
        return dict(zip(["only case"], ordered, strict=False))
    median = {"median": ordered[len(ordered) // 2]} if len(ordered) > 2 else {}
    return {"best": ordered[0], **median, "worst": ordered[-1]}


def write_segmentation_report(
    path: str | Path,
    cases: Sequence[CaseScores],
    summaries: Sequence[StructureSummary],
    items: Mapping[str, Item],
    maps: Mapping[str, StoredMap],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    window: Sequence[float] | None = None,
) -> None:
    """Write the report as one HTML file: a line for every structure, and three cases over their images.

    The cases are those of `representative_cases`. One whose item or prediction is not given, since another process has
    it, is described without a picture.

    Args:
        path: file to write; its folder is made.
        cases: the scores of all cases.
        summaries: what `summarize` makes of them.
        items: by the path of their image, as `case_figure` takes them.
        maps: predictions on the grid of the label files, with their values, by the path of their image.
        facts: headline facts by name, such as where the weights come from.
        notes: sentences below the table, on how to read it.
        window: values of CT images that are black and white in the pictures, in HU.

    Raises:
        ValueError: if there are no cases or summaries, or as `case_figure` says.
    """
    if not cases or not summaries:
        raise InputError(
            f"`cases` and `summaries` must hold the scores of at least one case, got {len(cases)} and {len(summaries)}."
        )
    names = [each.structure for each in summaries[1:]]
    titles: list[str | Swatch] = ["Mean of structures"]
    titles += [Swatch(_words(name), color) for name, color in zip(names, cycle(ORGAN_COLORS), strict=False)]
    rows = [
        _Row(title, each.n, each.dice, each.hd95, each.surface_dice, each.missed, each.false_positives)
        for title, each in zip(titles, summaries, strict=True)
    ]
    # All structures in all pictures, so that each has one colour.
    base: dict[str, Sequence[int]] = dict.fromkeys(names, ())
    overlays = []
    for rank, case in representative_cases(cases).items():
        picture: bytes | str = NO_MAP
        if case.case in maps and case.case in items:
            labels = base | {score.structure: score.values for score in case.structures}
            picture = figure_to_png(case_figure(items[case.case], maps[case.case].array(), labels, window))
        overlays.append(_overlay(picture, rank, case))
    write_report(
        path,
        title="Evaluation of the segmentation",
        summary={"mean Dice": summaries[0].dice, **facts, "date": date.today().isoformat()},
        metrics_rows=rows,
        cases=overlays,
        notes=notes,
        limits=SEGMENTATION_LIMITS,
        cases_heading="Cases by their mean Dice",
        wide_cases=True,
    )


def _label_map(name: str, given: ArrayLike) -> LabelMap:
    array = np.asarray(given)
    return integer_map(name, array[0] if array.ndim == 4 and len(array) == 1 else array)


def _load(item: Item, key: str) -> MetaTensor:
    """A volume as its file has it, of shape (C, X, Y, Z); label maps in their own dtype."""
    if not isinstance(item.get(key), str | Path):
        raise InputError(f"`item` must have the path of its `{key}`, got {item.get(key)!r}.")
    dtype = torch.float32 if key == "image" else None
    volume = LoadImage(ImageFileReader(spatial_dims=3), image_only=True, dtype=dtype, ensure_channel_first=True)
    return volume(item[key])


def _mean_dice(case: CaseScores) -> float:
    return subject_scores([case])[0].dice


def _overlay(picture: bytes | str, rank: str, case: CaseScores) -> _Overlay:
    ordered = sorted((score for score in case.structures if not isnan(score.dice)), key=lambda score: -score.dice)
    count = min(_NUM_NAMED, len(ordered) // 2)  # so that no structure is among both
    strongest, weakest = ordered[: max(count, 1)], ordered[::-1][:count]
    subject, image = (Path(name).name for name in (case.subject, case.case))
    return _Overlay(picture, rank, subject, image, f"{_mean_dice(case):.3f}", _listed(strongest), _listed(weakest))


def _listed(scores: Sequence[StructureScore]) -> str:
    texts = ("missed" if score.outcome == "missed" else f"{score.dice:.3f}" for score in scores)
    named = zip(scores, texts, strict=True)
    return ", ".join(f"{_words(score.structure)} {text}" for score, text in named) or "–"


def _words(structure: str) -> str:
    return structure.replace("_", " ")
