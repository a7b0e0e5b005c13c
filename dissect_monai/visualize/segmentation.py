"""A segmentation over its image, as a radiologist reads it: three planes with organ names and colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dissect_monai.transforms.intensity import sample_voxels
from dissect_monai.transforms.labels import LabelMap, Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In the order of BTCV's organs. Chosen by CIEDE2000: any two of the 16 differ by 22 and more, over grey as areas by 12;
# organs that touch by 36, as areas by 20.
ORGAN_COLORS = (
    "#B36600", "#FF80E6", "#0080E6", "#FFCC99", "#4DCCFF", "#00FF4D", "#E61A66", "#FF9999",
    "#808000", "#B3B3FF", "#00FFE6", "#FF0000", "#E6E600", "#1A994D", "#009999", "#994DFF",
)  # fmt: skip
FILL = 0.38  # opacity of the prediction: the anatomy below stays readable
_MARGIN = 15.0  # mm of image around all structures
_LEGEND_COLUMNS = 5
# Axis that is cut, of an array in RAS, and the patient's sides on the left, right, top and bottom.
_PLANES = {"Axial": (2, "RLAP"), "Coronal": (1, "RLSI"), "Sagittal": (0, "APSI")}


def segmentation_overlay(
    image: NDArray[Any],
    label: LabelMap,
    pred: LabelMap,
    class_names: Sequence[str],
    spacing: Sequence[float],
    window: tuple[float, float] | None = None,
) -> Figure:
    """Three planes of a volume: the prediction as filled areas, the label as outlines of the same colours.

    The orientation is radiological: the patient's right on the left of axial and coronal planes, the front on the left
    of sagittal ones. Each plane is the one that cuts most structures, with 15 mm of the image around them; all planes
    have one scale. The figure is 1500 pixels wide.

    Image and both label maps are (X, Y, Z) in RAS, `spacing` in mm; `class_names` are the structures of the values 1,
    2, ..., in the order of their colours. The values in `window` are black and white: None takes the 0.5 and 99.5 %
    percentiles of what is shown.
    """
    from matplotlib.figure import Figure

    maps = label, pred
    found = ndimage.find_objects(((label > 0) | (pred > 0)).astype(np.uint8))
    tight = found[0] if found else tuple(slice(0, size) for size in label.shape)
    center = _center(maps, len(class_names), tight)
    margins = [round(_MARGIN / step) for step in spacing]
    box = tuple(
        slice(max(0, part.start - margin), part.stop + margin) for part, margin in zip(tight, margins, strict=True)
    )
    low, high = np.percentile(sample_voxels(image[box]), (0.5, 99.5)) if window is None else window
    x, y, z = (size * step for size, step in zip(image[box].shape, spacing, strict=True))
    height = 10 * max(y, z) / (x + x + y) + 0.6 + 0.2 * (2 + len(class_names)) / _LEGEND_COLUMNS
    figure = Figure(figsize=(10, min(12.0, height)), dpi=150, facecolor="black")
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.06)
    panels = figure.subplots(1, 3, width_ratios=[x, x, y], subplot_kw={"anchor": "N"})
    for (title, (axis, letters)), axes in zip(_PLANES.items(), panels, strict=True):
        picture, *cuts = (_as_seen(each, axis, center, box) for each in (image, *maps))
        across, up = (step for other, step in enumerate(spacing) if other != axis)
        norm: dict[str, Any] = {"vmin": float(low), "vmax": max(float(high), float(low) + 1e-6)}
        axes.imshow(picture, "gray", origin="lower", aspect=up / across, interpolation="bilinear", **norm)
        for value in range(1, len(class_names) + 1):
            _draw(axes, organ_color(value), *(each == value for each in cuts))
        axes.set_title(title, loc="left", fontsize=10, color="white")
        _annotate(axes, letters, picture.shape)
    _legend(figure, class_names, maps)
    return figure


def picture_overlay(
    picture: NDArray[Any],
    label: LabelMap,
    pred: LabelMap,
    class_names: Sequence[str],
) -> Figure:
    """A picture (3, X, Y) of RGB in [0, 1], and beside it the same with prediction and label (X, Y) drawn over it."""
    from matplotlib.figure import Figure

    across, down = label.shape
    height = 5 * down / across + 0.5 + 0.2 * (2 + len(class_names)) / _LEGEND_COLUMNS
    figure = Figure(figsize=(10, min(12.0, height)), dpi=150, facecolor="black")
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.06)
    for title, axes in zip(("Picture", "Prediction and label"), figure.subplots(1, 2), strict=True):
        axes.imshow(picture.transpose(2, 1, 0), interpolation="bilinear")
        for value in range(1, len(class_names) + 1) if title != "Picture" else ():
            own, found = (np.equal(each.T, value) for each in (label, pred))
            _draw(axes, organ_color(value), own, found, edged=True)
        axes.set_title(title, loc="left", fontsize=10, color="white")
        axes.set(xticks=[], yticks=[], xlim=(-0.5, across - 0.5), ylim=(down - 0.5, -0.5))
        axes.spines[:].set_visible(False)
    _legend(figure, class_names, (label, pred))
    return figure


def organ_color(value: int) -> str:
    """Colour of the class 1, 2, ... in pictures and tables."""
    return ORGAN_COLORS[(value - 1) % len(ORGAN_COLORS)]


def _center(maps: Sequence[LabelMap], num_structures: int, box: tuple[slice, ...]) -> list[int]:
    """Along each axis the slice that cuts most structures, and of several the one that cuts them best."""
    label, pred = (each[box] for each in maps)
    scores = [np.zeros(size) for size in label.shape]
    for value in range(1, num_structures + 1):
        mask = (label == value) | (pred == value)
        for axis, score in enumerate(scores):
            area = mask.sum(tuple(other for other in range(3) if other != axis))
            score += (area > 0) + area / max(area.max(), 1) / (num_structures + 1)
    best = [int(score.argmax()) if score.any() else len(score) // 2 for score in scores]
    return [part.start + place for part, place in zip(box, best, strict=True)]


def _as_seen(volume: NDArray[Any], axis: int, center: Sequence[int], box: Sequence[slice]) -> NDArray[Any]:
    """A plane of an array in RAS, its rows from below to above and its columns from left to right."""
    within = tuple(part for other, part in enumerate(box) if other != axis)
    return volume.take(center[axis], axis)[within].T[:, ::-1]


def _draw(axes: Axes, color: str, label: Mask, pred: Mask, edged: bool = False) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    if pred.any():
        fill = np.zeros((*pred.shape, 4))
        fill[pred] = (*to_rgb(color), FILL)
        axes.imshow(fill, origin="lower", aspect=axes.get_aspect(), interpolation="nearest")
    if label.any():
        # With a border, for outlines to close where a structure is cut off.
        rows, columns = (np.arange(-1, size + 1) for size in label.shape)
        outline = axes.contour(columns, rows, np.pad(label, 1), levels=[0.5], colors=[color], linewidths=1.3)
        if edged:  # to be seen on an area of its own colour, and on a picture of any
            outline.set_path_effects([withStroke(linewidth=3.5, foreground="white")])


def _annotate(axes: Axes, letters: str, shape: tuple[int, ...]) -> None:
    """The patient's sides."""
    from matplotlib.patheffects import withStroke

    axes.set(xticks=[], yticks=[], xlim=(-0.5, shape[1] - 0.5), ylim=(-0.5, shape[0] - 0.5), facecolor="black")
    axes.spines[:].set_visible(False)
    style: dict[str, Any] = {"color": "white", "fontsize": 9, "fontweight": "bold", "transform": axes.transAxes}
    style["path_effects"] = [withStroke(linewidth=2.5, foreground="black")]  # to be read on bone
    for letter, x, y in zip(letters, (0.025, 0.975, 0.5, 0.5), (0.5, 0.5, 0.975, 0.025), strict=True):
        axes.text(x, y, letter, ha="center", va="center", **style)


def _legend(figure: Figure, class_names: Sequence[str], maps: Sequence[LabelMap]) -> None:
    """What colours, areas and outlines mean; a structure that only one of the label maps has is called so."""
    from matplotlib.patches import Patch

    handles = [Patch(color="white", alpha=FILL, label="Prediction"), Patch(fc="none", ec="white", label="Label")]
    in_label, in_pred = (set(np.unique(each).tolist()) for each in maps)
    for value, name in enumerate(class_names, 1):
        if value in in_label | in_pred:
            only = " (missed)" if value not in in_pred else " (not in the label)" if value not in in_label else ""
            handles.append(Patch(facecolor=organ_color(value), label=f"{name.replace('_', ' ')}{only}"))
    place: dict[str, Any] = {"loc": "outside lower left", "ncols": _LEGEND_COLUMNS, "frameon": False, "fontsize": 9}
    figure.legend(handles=handles, handlelength=1.4, columnspacing=1.6, labelcolor="white", **place)
