"""A segmentation over its image, as a radiologist reads it: three planes with organ names and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dissect_monai.transforms.intensity import sample_voxels
from dissect_monai.transforms.labels import Box, LabelMap, Mask, box_around
from dissect_monai.visualize.classifier import GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# For grey and black: Okabe & Ito's palette, its blue lighter, then others that differ from it.
ORGAN_COLORS = (
    "#E69F00", "#56B4E9", "#00B783", "#F0E442", "#3F7FFF", "#FF6A1F", "#EE86C2", "#A5F53D",
    "#FF4D5E", "#A77BFF", "#00F0E0", "#C48A5A", "#FF2FD0", "#B9C7FF", "#9AA83A", "#FFC9A8",
)  # fmt: skip
FILL = 0.38  # opacity of the prediction: the anatomy below stays readable
WIDTH = 10.0  # inches
_MARGIN = 15.0  # mm of image around all structures
_LEGEND_COLUMNS = 5
_BARS = (200, 100, 50, 20, 10, 5, 2, 1)  # mm


# Axis that is cut, of an array in RAS, and the patient's sides on the left, right, top and bottom.
_PLANES = {"Axial": (2, "RLAP"), "Coronal": (1, "RLSI"), "Sagittal": (0, "APSI")}


def segmentation_overlay(
    image: NDArray[Any],
    label: LabelMap,
    pred: LabelMap,
    labels: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
    window: tuple[float, float] | None = None,
) -> Figure:
    """Three planes of a volume: the prediction as filled areas, the label as outlines of the same colours.

    The orientation is radiological: the patient's right on the left of axial and coronal planes, the front on the left
    of sagittal ones. Each plane is the one that cuts most structures, with 15 mm of the image around them; all planes
    have one scale.

    Args:
        image: shape (X, Y, Z) in RAS, as MONAI's `Orientation` makes it; any real dtype.
        label: label map of the same shape.
        pred: the same of the prediction, with the same values.
        labels: values of each named structure; its place among them is its colour.
        spacing: mm between voxels along the three axes.
        window: values of the image that are black and white, such as (-160, 240) for the abdomen in CT; by default the
            0.5 and 99.5 % percentiles of what is shown.

    Returns:
        A figure 1500 pixels wide.
    """
    maps = label, pred
    found = [ndimage.find_objects(each) for each in maps]
    tight = box_around(found, [value for values in labels.values() for value in values])
    if not tight[0].stop:  # no structure: the whole volume
        tight = slice(0, label.shape[0]), slice(0, label.shape[1]), slice(0, label.shape[2])
    center = _center(maps, list(labels.values()), tight)
    box = tuple(
        slice(max(0, part.start - margin), part.stop + margin)
        for part, margin in zip(tight, (round(_MARGIN / step) for step in spacing), strict=True)
    )
    low, high = np.percentile(sample_voxels(image[box]), (0.5, 99.5)) if window is None else window
    extent = [size * step for size, step in zip(image[box].shape, spacing, strict=True)]
    figure, panels = _figure(extent, len(labels))
    for (title, (axis, letters)), axes in zip(_PLANES.items(), panels, strict=True):
        picture, *cuts = (_as_seen(each, axis, center, box) for each in (image, *maps))
        across, up = (step for other, step in enumerate(spacing) if other != axis)
        norm: dict[str, Any] = {"vmin": float(low), "vmax": max(float(high), float(low) + 1e-6)}
        axes.imshow(picture, "gray", origin="lower", aspect=up / across, interpolation="bilinear", **norm)
        for index, values in enumerate(labels.values()):
            _draw(axes, ORGAN_COLORS[index % len(ORGAN_COLORS)], *(np.isin(each, values) for each in cuts))
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        _annotate(axes, letters, picture.shape, across)
    _legend(figure, labels, found)
    return figure


def _center(maps: Sequence[LabelMap], groups: Sequence[Sequence[int]], box: Box) -> list[int]:
    """Along each axis the slice that cuts most structures, and of several the one that cuts them best."""
    scores = [np.zeros(part.stop - part.start) for part in box]
    for values in groups:
        mask = np.isin(maps[0][box], values) | np.isin(maps[1][box], values)
        for axis, score in enumerate(scores):
            area = mask.sum(tuple(other for other in range(3) if other != axis))
            score += (area > 0) + area / max(area.max(), 1) / (len(groups) + 1)
    best = [int(score.argmax()) if score.any() else len(score) // 2 for score in scores]
    return [part.start + place for part, place in zip(box, best, strict=True)]


def _as_seen(volume: NDArray[Any], axis: int, center: Sequence[int], box: Sequence[slice]) -> NDArray[Any]:
    """A plane of an array in RAS, its rows from below to above and its columns from left to right."""
    within = tuple(part for other, part in enumerate(box) if other != axis)
    return volume.take(center[axis], axis)[within].T[:, ::-1]


def _figure(extent: Sequence[float], num_structures: int) -> tuple[Figure, list[Axes]]:
    """Three panels as wide as their planes, for a volume of `extent` mm, above a legend."""
    from matplotlib.figure import Figure

    widths = [extent[0], extent[0], extent[1]]
    height = WIDTH * max(extent[1], extent[2]) / sum(widths)
    around = 0.6 + 0.2 * (2 + num_structures) / _LEGEND_COLUMNS
    figure = Figure(figsize=(WIDTH, min(12.0, height + around)), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.06)
    return figure, figure.subplots(1, 3, squeeze=False, width_ratios=widths, subplot_kw={"anchor": "N"})[0].tolist()


def _draw(axes: Axes, color: str, label: Mask, pred: Mask) -> None:
    from matplotlib.colors import to_rgb

    if pred.any():
        fill = np.zeros((*pred.shape, 4))
        fill[pred] = (*to_rgb(color), FILL)
        axes.imshow(fill, origin="lower", aspect=axes.get_aspect(), interpolation="nearest")
    if label.any():
        # With a border, for outlines to close where a structure is cut off; along the edges of voxels.
        enlarged = np.pad(label, 1).repeat(4, 0).repeat(4, 1)
        rows, columns = (np.arange(4 * size + 8) / 4 - 1.375 for size in label.shape)
        axes.contour(columns, rows, enlarged, levels=[0.5], colors=[color], linewidths=1.3)


def _annotate(axes: Axes, letters: str, shape: tuple[int, ...], across: float) -> None:
    """The patient's sides and a scale."""
    from matplotlib.patheffects import withStroke

    axes.set(xticks=[], yticks=[], xlim=(-0.5, shape[1] - 0.5), ylim=(-0.5, shape[0] - 0.5), facecolor="black")
    axes.spines[:].set_visible(False)
    style: dict[str, Any] = {"color": "white", "fontsize": 9, "fontweight": "bold", "transform": axes.transAxes}
    halo = [withStroke(linewidth=2.5, foreground="black")]  # to be read on bone
    places = [(0.015, 0.5, "left", "center"), (0.985, 0.5, "right", "center")]
    places += [(0.5, 0.985, "center", "top"), (0.5, 0.015, "center", "bottom")]
    for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
        axes.text(x, y, letter, ha=horizontal, va=vertical, path_effects=halo, **style)
    length = next((bar for bar in _BARS if bar <= 0.3 * shape[1] * across), 1)
    ends = [0.03, 0.03 + length / across / shape[1]]
    axes.plot(ends, [0.03, 0.03], color="white", linewidth=2, transform=axes.transAxes, path_effects=halo)
    small = {**style, "fontsize": 8, "fontweight": "normal"}
    axes.text(ends[0], 0.045, f"{length} mm", ha="left", va="bottom", path_effects=halo, **small)


def _legend(figure: Figure, labels: Mapping[str, Sequence[int]], found: Sequence[Sequence[Box | None]]) -> None:
    """What colours, areas and outlines mean; a structure that only one of the label maps has is called so."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=GREY, alpha=FILL, label="Prediction"),
        Patch(facecolor="none", edgecolor=GREY, label="Label"),
    ]
    for index, (name, values) in enumerate(labels.items()):
        label, pred = (box_around([each], values)[0].stop > 0 for each in found)
        if label or pred:
            only = " (missed)" if not pred else " (not in the label)" if not label else ""
            color = ORGAN_COLORS[index % len(ORGAN_COLORS)]
            handles.append(Patch(facecolor=color, label=f"{name.replace('_', ' ')}{only}"))
    place: dict[str, Any] = {"loc": "outside lower left", "ncols": _LEGEND_COLUMNS, "frameon": False, "fontsize": 9}
    figure.legend(handles=handles, handlelength=1.4, columnspacing=1.6, **place)
