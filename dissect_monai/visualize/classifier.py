"""Figures of a classifier and of its features: ROC, reliability, saliency and a map, for TensorBoard and the report."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from sklearn.metrics import roc_curve
from torch import Tensor

from dissect_monai.common import InputError
from dissect_monai.metrics.classification import auroc, expected_calibration_error, reliability
from dissect_monai.metrics.intervals import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.floating[Any]]
# Okabe & Ito's palette for all kinds of colour vision, without the yellow, which is too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")  # once the colours are used up
MARKERS = ("o", "^", "s", "D")  # likewise
INK, GREY, PALE = "#111827", "#6B7280", "#D1D5DB"
MAX_OPACITY = 0.45  # of saliency: the anatomy below stays readable
NUM_BINS = 10  # of the drawn curves; the calibration error keeps its own, finer ones


def roc_plot(labels: ArrayLike, scores: ArrayLike, names: Sequence[str]) -> Figure:
    """ROC curve of each finding, best first in the legend; those without both classes or without scores are left out.

    Args:
        labels: shape (N, C), 1, 0 or NaN (unknown).
        scores: shape (N, C), larger for positives.
        names: names of the C findings; equal positions have equal colours in `reliability_plot`.

    Returns:
        A figure 900 pixels wide.

    Raises:
        ValueError: if the shapes disagree or a label is not 1, 0 or NaN.
    """
    figure, (axes,) = _figure(len(names))
    curves: list[tuple[float, Any]] = []
    for index, label, score in _columns(labels, scores, names):
        area = float(auroc(label, score))
        false_positive_rate, true_positive_rate, _ = roc_curve(label, score)
        text = f"{names[index]}  {area:.3f}"
        (line,) = axes.plot(false_positive_rate, true_positive_rate, label=text, **_style(index))
        curves.append((area, line))
    curves.sort(key=lambda curve: -curve[0])
    mean = f", mean AUROC {np.mean([area for area, _ in curves]):.3f}" if curves else ""
    axes.set_title(f"ROC of {len(curves)} of {len(names)} findings{mean}", loc="left")
    axes.set(xlabel="False positive rate (1 − specificity)", ylabel="True positive rate (sensitivity)")
    _diagonal(axes)
    _legend(figure, "AUROC", [line for _, line in curves])
    return figure


def reliability_plot(labels: ArrayLike, probabilities: ArrayLike, names: Sequence[str]) -> Figure:
    """Observed frequency over probability, per finding and pooled, above a histogram of the probabilities.

    The findings are those of `roc_plot`. The pooled curve, of the labels of all of them, has 95 % Wilson intervals,
    which take labels for independent. Its calibration error is not the mean over the findings, which is in the title:
    pooled in one bin, findings whose probabilities are too high cancel those whose are too low.

    Args:
        labels: shape (N, C), 1, 0 or NaN (unknown).
        probabilities: shape (N, C), in [0, 1].
        names: names of the C findings.

    Returns:
        A figure 900 pixels wide.

    Raises:
        ValueError: if the shapes disagree, a label is not 1, 0 or NaN, or a probability is outside [0, 1].
    """
    figure, (axes, histogram) = _figure(len(names), panels=2)
    lines: list[Any] = []
    known, errors = [], []
    for index, label, probability in _columns(labels, probabilities, names):
        error = float(expected_calibration_error(label, probability))
        known.append((label, probability))
        errors.append(error)
        bins = reliability(label, probability, NUM_BINS)
        text, style = f"{names[index]}  {error:.3f}", _style(index) | {"linewidth": 1, "alpha": 0.8, "marker": "."}
        lines += axes.plot(bins.confidence, bins.frequency, label=text, **style)
    if known:
        pooled_label, pooled = (np.concatenate(part) for part in zip(*known, strict=True))
        lines.insert(0, _pooled(axes, pooled_label, pooled))
        _histogram(histogram, pooled_label, pooled)
    mean = f", mean ECE {np.mean(errors):.3f}" if errors else ""
    axes.set_title(f"Reliability of {len(known)} of {len(names)} findings{mean}", loc="left")
    axes.set(ylabel="Observed frequency")
    _diagonal(axes)
    histogram.set(xlabel="Predicted probability", ylabel="Labels", xlim=axes.get_xlim())
    _legend(figure, "Calibration error (ECE), of all labels pooled and of each finding", lines)
    return figure


def embedding_map(features: ArrayLike, task: Sequence[str], group: Sequence[str]) -> Figure:
    """The two principal components of features, by task on the left and by group on the right.

    Args:
        features: shape (N, D), N > 0, any real dtype.
        task: task of each item.
        group: group of each item.

    Returns:
        A figure 1500 pixels wide. The axes say how much of the variance they show.

    Raises:
        ValueError: if the shapes disagree.
    """
    from matplotlib.figure import Figure

    features = np.asarray(features, dtype=float)
    if features.ndim != 2 or not len(features) == len(task) == len(group) > 0:
        raise InputError(
            "`features` must be (N, D), N > 0, with a task and a group for each item, "
            f"got {features.shape}, {len(task)} and {len(group)}."
        )
    points, share = _principal_components(features)
    figure = Figure(figsize=(10, 4.6 + 0.22 * (max(len(set(task)), len(set(group))) + 1) // 2), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    for axes, title, names in zip(figure.subplots(1, 2), ("task", "group"), (task, group), strict=True):
        _plain(axes)
        for index, name in enumerate(sorted(set(names))):
            chosen = points[[each == name for each in names]]
            style: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "alpha": 0.75, "s": 26, "linewidth": 0}
            style["marker"] = MARKERS[index // len(COLORS) % len(MARKERS)]
            axes.scatter(*chosen.T, label=f"{name}  ({len(chosen):,})", **style)
        axes.set_title(f"Features by {title}", loc="left")
        axes.set(xlabel=f"Component 1 ({share[0]:.0%} of the variance)", ylabel=f"Component 2 ({share[1]:.0%})")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, frameon=False, fontsize=9, borderpad=0)
    return figure


def saliency_overlay(image: ArrayLike, saliency: ArrayLike) -> NDArray[np.uint8]:
    """A grey image under its saliency, which is the more opaque the larger it is.

    Args:
        image: shape (H, W), rows and columns as a screen shows them, in [0, 1]; MONAI's (x, y) must be transposed.
        saliency: same shape, in [0, 1]; both are clipped to it.

    Returns:
        RGB of shape (H, W, 3).

    Raises:
        ValueError: if the shapes are not (H, W) and equal.
    """
    from matplotlib import colormaps

    image, saliency = (np.asarray(part, dtype=float).clip(0, 1) for part in (image, saliency))
    if image.ndim != 2 or image.shape != saliency.shape:
        raise InputError(
            f"`image` and `saliency` must have the same shape (H, W), got {image.shape}, {saliency.shape}."
        )
    opacity = MAX_OPACITY * saliency[..., None]
    blend = (1 - opacity) * image[..., None] + opacity * colormaps["inferno"](saliency)[..., :3]
    return (255 * blend).round().astype(np.uint8)


def image_to_png(image: NDArray[np.uint8]) -> bytes:
    """PNG of a picture of shape (H, W) or (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def figure_to_png(figure: Figure) -> bytes:
    """PNG of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def figure_to_tensor(figure: Figure) -> Tensor:
    """A figure as TensorBoard's `add_image` takes it: shape (3, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(figure_to_png(figure))).convert("RGB"))).movedim(2, 0) / 255


def _figure(num_findings: int, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure 6 inches wide, with room below for a legend of two columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6.3 + 0.2 * (num_findings // 2 + 1)), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    ratios = [1] if panels == 1 else [3.2, 1]
    axes = figure.subplots(panels, 1, squeeze=False, height_ratios=ratios)[:, 0].tolist()
    for each in axes:
        _plain(each)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)


def _principal_components(features: Array) -> tuple[Array, Array]:
    """Two coordinates of each item (N, 2), 0 where there are no more, and their shares of the variance (2,)."""
    left, values, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
    # The sign is arbitrary: fixed, so that maps of two epochs can be compared.
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    variance = np.pad(values**2, (0, 2))
    points = np.pad(left * values * signs, ((0, 0), (0, 2)))
    return points[:, :2], variance[:2] / max(variance.sum(), np.finfo(float).tiny)


def _columns(labels: ArrayLike, scores: ArrayLike, names: Sequence[str]) -> Iterator[tuple[int, Array, Array]]:
    """Index, labels and scores of each finding that has both classes and all scores, for the items of known label."""
    labels, scores = np.asarray(labels, dtype=float), np.asarray(scores, dtype=float)
    if labels.ndim != 2 or scores.shape != labels.shape or labels.shape[1] != len(names):
        raise InputError(
            f"Labels and scores must have shape (N, {len(names)}), one column a finding, "
            f"got {labels.shape} and {scores.shape}."
        )
    for index, (label, score) in enumerate(zip(labels.T, scores.T, strict=True)):
        known = ~np.isnan(label)
        if not np.isnan(auroc(label, score)):
            yield index, label[known], score[known]


def _style(index: int) -> dict[str, Any]:
    line = LINES[index // len(COLORS) % len(LINES)]
    return {"color": COLORS[index % len(COLORS)], "linestyle": line, "linewidth": 1.6}


def _diagonal(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))


def _legend(figure: Figure, title: str, lines: Sequence[Any]) -> None:
    if lines:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False}
        figure.legend(handles=lines, title=title, fontsize=9, title_fontsize=9, handlelength=2.6, **place)


def _pooled(axes: Axes, label: Array, probability: Array) -> Any:
    bins = reliability(label, probability, NUM_BINS)
    low, high = wilson_interval(bins.frequency, bins.num_items)
    error = np.stack([bins.frequency - low, high - bins.frequency])
    text = f"All pooled  {float(expected_calibration_error(label, probability)):.3f}"
    style: dict[str, Any] = {"color": INK, "linewidth": 2, "elinewidth": 1.2, "capsize": 3, "marker": "o"}
    return axes.errorbar(bins.confidence, bins.frequency, error, label=text, markersize=5, **style)


def _histogram(axes: Axes, label: Array, probability: Array) -> None:
    edges = np.linspace(0, 1, 4 * NUM_BINS + 1).tolist()
    negative, positive = probability[label == 0], probability[label == 1]
    axes.hist(negative, edges, color=PALE, label=f"negative ({len(negative):,})")
    axes.hist(positive, edges, color=COLORS[1], label=f"positive ({len(positive):,})", histtype="step", linewidth=1.6)
    axes.set(yscale="log")
    axes.set_ylim(bottom=0.7)  # a single label is to be seen
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=2)
