"""Figures of a classifier and of its features: ROC, reliability, a map, saliency."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.visualize import GradCAM
from PIL import Image
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from dissect_monai.common import Array
from dissect_monai.metrics.classification import auroc, expected_calibration_error, reliability, usable_findings
from dissect_monai.metrics.intervals import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette for all kinds of colour vision, without the yellow, which is too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")  # once the colours are used up
MARKERS = ("o", "^", "s", "D")  # likewise
INK, GREY, PALE = "#111827", "#6B7280", "#D1D5DB"
NUM_BINS = 10  # of the drawn curves; the calibration error keeps its own, finer ones
STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet, fine to coarse
MIN_PLACES = 4  # along every axis of the feature maps that saliency is taken of
MAX_OPACITY = 0.45  # of saliency: the anatomy below stays readable


def roc_plot(labels: Array, scores: Array, names: Sequence[str]) -> Figure:
    """ROC curve of each of the `usable_findings`, best first in the legend.

    Args:
        labels: shape (N, C), 1, 0 or NaN (unknown).
        scores: shape (N, C), larger for positives.
        names: names of the C findings; equal positions have equal colours in `reliability_plot`.

    Returns:
        A figure 900 pixels wide.
    """
    figure, (axes,) = _panels(6, _height(names))
    curves: list[tuple[float, Any]] = []
    for index, label, score in _columns(labels, scores):
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


def reliability_plot(labels: Array, probabilities: Array, names: Sequence[str]) -> Figure:
    """Observed frequency over probability, per finding and pooled, above a histogram of the probabilities.

    Arguments and findings are those of `roc_plot`, but the scores must be in [0, 1]. The pooled curve has 95 % Wilson
    intervals, which take labels for independent. Its calibration error is not the mean over the findings, which is in
    the title: pooled in one bin, findings whose probabilities are too high cancel those whose are too low.
    """
    figure, (axes, histogram) = _panels(6, _height(names), rows=2, height_ratios=[3.2, 1])
    lines: list[Any] = []
    known, errors = [], []
    for index, label, probability in _columns(labels, probabilities):
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


def embedding_map(features: Array, task: Sequence[str], group: Sequence[str]) -> Figure:
    """The two principal components of features (N, D), by task on the left and by group on the right.

    Returns:
        A figure 1500 pixels wide. The axes say how much of the variance they show.
    """
    points, share = _principal_components(features.astype(float))
    num_rows = (max(len(set(task)), len(set(group))) + 1) // 2
    figure, panels = _panels(10, 4.6 + 0.22 * num_rows, columns=2)
    for axes, title, names in zip(panels, ("task", "group"), (task, group), strict=True):
        for index, name in enumerate(sorted(set(names))):
            chosen = points[[each == name for each in names]]
            style: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "alpha": 0.75, "s": 26, "linewidth": 0}
            style["marker"] = MARKERS[index // len(COLORS) % len(MARKERS)]
            axes.scatter(*chosen.T, label=f"{name}  ({len(chosen):,})", **style)
        axes.set_title(f"Features by {title}", loc="left")
        axes.set(xlabel=f"Component 1 ({share[0]:.0%} of the variance)", ylabel=f"Component 2 ({share[1]:.0%})")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, frameon=False, fontsize=9, borderpad=0)
    return figure


def saliency_maps(network: nn.Module, images: Tensor, finding: int) -> Tensor:
    """How much each place of the images speaks for a finding, by MONAI's Grad-CAM.

    Each map is divided by its largest value, so that maps of two images do not say which has more of the finding. The
    network stays as it is. The maps are those of the last stage that has at least 4 places along every axis: stage 4
    from about 100 pixels on, stage 2 at 48. Where its map is empty, that of the next coarser stage is taken.

    Args:
        network: a ResNet that returns logits (B, C).
        images: shape (B, C, *spatial), as the network takes them, on its device.
        finding: index of the logit.

    Returns:
        Shape (B, 1, *spatial) in [0, 1]; 0 throughout where nothing speaks for the finding.

    Reference:
        Selvaraju et al., Grad-CAM, ICCV 2017, Eq. 1–2.
    """
    layers = [name for name, _ in network.named_modules() if name in STAGES]
    # A copy, because GradCAM leaves its hooks in the network and gradients in the parameters.
    camera = GradCAM(deepcopy(network), layers, postprocessing=lambda maps: maps)
    with torch.enable_grad():
        # The images need gradients, too: all parameters may be frozen.
        images = images.detach().clone().requires_grad_()
        _, features, _ = camera.nn_module(images[:1], class_idx=finding)
        fine = [index for index, each in enumerate(features) if min(each.shape[2:]) >= MIN_PLACES]
        index = max(fine, default=0)
        maps = camera(images, class_idx=finding, layer_idx=index).detach()
        while index < len(layers) - 1 and (empty := ~maps.flatten(1).any(1)).any():
            index += 1
            maps[empty] = camera(images[empty], class_idx=finding, layer_idx=index).detach()
    peak = maps.amax(dim=tuple(range(1, maps.ndim)), keepdim=True)
    return (maps / peak.clamp_min(torch.finfo(maps.dtype).tiny)).as_subclass(Tensor)


def overlay_png(image: Tensor, saliency: Tensor) -> bytes:
    """PNG of a 2-D image, upright, under its saliency, which is the more opaque the larger it is.

    Args:
        image: shape (C, x, y) in [0, 1], of which the first channel is shown in grey.
        saliency: shape (1, x, y) in [0, 1]; zeros show the image alone.
    """
    from matplotlib import colormaps

    # MONAI's images are (x, y), a screen's rows are y.
    grey, heat = (each[0].T.cpu().numpy().astype(float).clip(0, 1) for each in (image, saliency))
    opacity = MAX_OPACITY * heat[..., None]
    blend = (1 - opacity) * grey[..., None] + opacity * colormaps["inferno"](heat)[..., :3]
    buffer = io.BytesIO()
    Image.fromarray((255 * blend).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def figure_to_png(figure: Figure) -> bytes:
    """PNG of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def figure_to_tensor(figure: Figure) -> Tensor:
    """A figure as TensorBoard's `add_image` takes it: shape (3, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(figure_to_png(figure))).convert("RGB"))).movedim(2, 0) / 255


def _height(names: Sequence[str]) -> float:
    """Inches of a figure above a legend of two columns."""
    return 6.3 + 0.2 * (len(names) // 2 + 1)


def _panels(width: float, height: float, rows: int = 1, columns: int = 1, **ratios: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    panels = figure.subplots(rows, columns, squeeze=False, **ratios).ravel().tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E5E7EB", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _principal_components(features: Array) -> tuple[Array, Array]:
    """Two coordinates of each item (N, 2), 0 where there are no more, and their shares of the variance (2,)."""
    left, values, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
    # The sign is arbitrary: fixed, so that maps of two epochs can be compared.
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    variance = np.pad(values**2, (0, 2))
    points = np.pad(left * values * signs, ((0, 0), (0, 2)))
    return points[:, :2], variance[:2] / max(variance.sum(), np.finfo(float).tiny)


def _columns(labels: Array, scores: Array) -> Iterator[tuple[int, Array, Array]]:
    """Index, labels and scores of each usable finding, for the items of known label."""
    for index in usable_findings(labels, scores):
        known = ~np.isnan(labels[:, index])
        yield index, labels[known, index], scores[known, index]


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
