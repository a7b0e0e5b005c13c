"""Figures of a classifier: ROC and reliability, and what the network looked at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.visualize import GradCAM
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from dissect_monai.common import Array
from dissect_monai.metrics.classification import usable_findings
from dissect_monai.networks.encoders import stage_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette for all kinds of colour vision, without the yellow, which is too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")  # once the colours are used up
INK, GREY = "#111827", "#6B7280"
NUM_BINS = 10  # of the reliability curves; the calibration error has its own, finer ones
MIN_PLACES = 4  # along every axis of the feature maps that saliency is taken of
MAX_OPACITY = 0.45  # of saliency: the anatomy below stays readable


def curves_figure(labels: Array, probabilities: Array, names: Sequence[str]) -> Figure:
    """ROC curves on the left, reliability curves on the right, of the `usable_findings`; 1500 pixels wide.

    Labels are (N, C), 1, 0 or NaN (unknown), probabilities (N, C) in [0, 1]; a finding has one colour in both panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.4 + 0.06 * len(names)), dpi=150, layout="constrained")
    roc, reliability = figure.subplots(1, 2)
    for index in usable_findings(labels, probabilities):
        known = ~np.isnan(labels[:, index])
        label, probability = labels[known, index], probabilities[known, index]
        line = LINES[index // len(COLORS) % len(LINES)]
        style: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "linestyle": line}
        false_positives, true_positives, _ = roc_curve(label, probability)
        roc.plot(false_positives, true_positives, label=names[index], **style)
        frequency, confidence = calibration_curve(label, probability, n_bins=NUM_BINS)
        reliability.plot(confidence, frequency, marker=".", **style)
    roc.set(xlabel="False positive rate (1 − specificity)", ylabel="True positive rate (sensitivity)")
    reliability.set(xlabel="Predicted probability", ylabel="Observed frequency")
    for axes in (roc, reliability):
        axes.axline((0, 0), slope=1, color=GREY, linestyle=":")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def saliency_maps(network: nn.Module, images: Tensor, finding: int) -> Tensor:
    """How much each place of the images speaks for a finding, by MONAI's Grad-CAM.

    Each map is divided by its largest value, so that maps of two images do not say which has more of the finding. The
    maps are those of the last stage that has at least 4 places along every axis: stage 4 from about 100 pixels on,
    stage 2 at 48 (a SegResNet: 4 at 32). Where its map is empty, that of the next coarser stage is taken. The network
    stays as it is, one of `build_encoder` that returns a logit of each finding.

    Of images (B, C, *spatial) the maps are (B, 1, *spatial) in [0, 1]; 0 throughout where nothing speaks for it.

    Reference:
        Selvaraju et al., Grad-CAM, ICCV 2017, Eq. 1–2.
    """
    layers = stage_names(network)
    # A copy, because GradCAM leaves its hooks in the network and gradients in the parameters.
    copied: Any = deepcopy(network)
    for module in copied.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # else a ReLU would change what a hook holds
    camera = GradCAM(copied, layers, postprocessing=lambda maps: maps)
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
    """PNG of a 2-D image, upright, under its saliency (1, x, y), which is the more opaque the larger it is.

    Both are in [0, 1]; of the image (C, x, y) the first channel is shown in grey.
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
