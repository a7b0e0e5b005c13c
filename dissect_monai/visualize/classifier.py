"""Figures of a classifier: ROC and reliability, and what the network looked at."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from markupsafe import Markup
from monai.transforms import LoadImage, Resize, ScaleIntensityRangePercentiles
from monai.visualize import GradCAM
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.common import Array
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.metrics.classification import usable_findings
from dissect_monai.networks.encoders import stage_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
# Okabe & Ito's palette for all kinds of colour vision, without the yellow, which is too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: dict[Any, str] = {  # once the colours are used up, for Matplotlib and for SVG
    "-": "none", "--": "6 3", ":": "2 3", "-.": "7 3 2 3", (0, (7, 2, 2, 2, 2, 2)): "7 2 2 2 2 2",
}  # fmt: skip
GREY = "#6B7280"  # readable on white and on black
NUM_BINS = 10  # of the reliability curves; the calibration error has its own, finer ones
MIN_PLACES = 4  # along every axis of the feature maps that saliency is taken of
MAX_OPACITY = 0.45  # of saliency: the anatomy below stays readable
LEGEND = "Colours: no effect on this output (left) to the strongest in this image (right)"


def curves_figure(labels: Array, probabilities: Array, names: Sequence[str]) -> Figure:
    """ROC curves on the left, reliability curves on the right, of the `usable_findings`; 1500 pixels wide.

    Labels are (N, C), 1, 0 or NaN (unknown), probabilities (N, C) in [0, 1]; a finding has one colour in both panels,
    that of its `named_curve`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    roc, reliability = figure.subplots(1, 2)
    for index in usable_findings(labels, probabilities):
        known = ~np.isnan(labels[:, index])
        label, probability = labels[known, index], probabilities[known, index]
        style: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "linestyle": _line(index)}
        false_positives, true_positives, _ = roc_curve(label, probability)
        roc.plot(false_positives, true_positives, label=names[index], **style)
        frequency, confidence = calibration_curve(label, probability, n_bins=NUM_BINS)
        reliability.plot(confidence, frequency, marker=".", **style)
    roc.set(xlabel="False positive rate (1 − specificity)", ylabel="True positive rate (sensitivity)")
    reliability.set(xlabel="Predicted probability", ylabel="Observed frequency")
    for axes in (roc, reliability):
        axes.axline((0, 0), slope=1, color=GREY, linestyle=":")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    return figure


def named_curve(name: str, index: int) -> Markup:
    """The name of a finding behind its line in the figure, for a page."""
    color = COLORS[index % len(COLORS)].replace("#000000", "currentColor")
    line = '<svg viewBox="0 0 24 8" aria-hidden="true"><path d="M0 4h24" stroke="{}" stroke-dasharray="{}"/></svg>{}'
    return Markup(line).format(color, LINES[_line(index)], name)


def panels_as_svg(figure: Figure) -> list[bytes]:
    """The panels of a figure, each an SVG to stand in a page; what is black has the colour of the text there."""
    from matplotlib import rc_context

    drawings = []
    for index, axes in enumerate(figure.axes):
        for other in figure.axes:
            other.set_visible(other is axes)
        buffer = io.StringIO()
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{index}"}):  # texts, and no id twice in a page
            figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=unsaid)
        drawing = buffer.getvalue()
        drawing = re.sub('<g id="[^"]*">', "<g>", drawing[drawing.index("<svg") :]).replace("#000000", "currentColor")
        drawings.append(drawing.encode())
    return drawings


def _line(index: int) -> Any:
    return [*LINES][index // len(COLORS) % len(LINES)]


def has_saliency(network: nn.Module) -> bool:
    """Whether `saliency_maps` can show what a network looks at; a warning if its stages are not known."""
    if not (known := stage_names(network)):
        logger.warning("There is no saliency of %s, whose stages are not known.", type(network).__name__)
    return bool(known)


def saliency_maps(network: nn.Module, images: Tensor, finding: int) -> Tensor:
    """How much each place of the images speaks for a finding, by MONAI's Grad-CAM.

    Each map is divided by its largest value, so that maps of two images do not say which has more of the finding. The
    maps are those of the last stage that has at least 4 places along every axis: stage 4 from about 100 pixels on,
    stage 2 at 48 (a SegResNet: 4 at 32). Where its map is empty, that of the next coarser stage is taken. The network
    stays as it is, one with stages (`has_saliency`) that returns a logit of each finding.

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


def whole_image(path: str | Path) -> Tensor:
    """A 2-D image as its file has it, (1, x, y) in [0, 1] by percentiles, its longer side of 512 to 1024 pixels."""
    load = LoadImage(ImageFileReader(spatial_dims=2), image_only=True, dtype=np.float32, ensure_channel_first=True)
    image = ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)(load(str(path))[:1])
    side = int(np.clip(max(image.shape), 512, 1024))
    mode = "area" if side < max(image.shape) else "bilinear"
    return Resize(side, size_mode="longest", mode=mode)(image).as_subclass(Tensor).clamp(0, 1)


def overlay(image: Tensor, saliency: Tensor, caption: str = "", kind: str = "PNG") -> bytes:
    """A 2-D image, upright, under its saliency, which is the more opaque the larger it is.

    Both are in [0, 1]: of the image (C, x, y) the first channel is shown in grey, the saliency (1, x', y') is of any
    size. A caption stands above, with a legend of the colours. The file is a PNG or a JPEG.
    """
    (saliency,) = F.interpolate(saliency[None].float(), size=image.shape[1:], mode="bilinear", align_corners=False)
    # MONAI's images are (x, y), a screen's rows are y.
    picture = _blended(*(each[0].T.cpu().numpy().astype(float).clip(0, 1) for each in (image, saliency)))
    if caption:
        above = text_strip(f"{caption}\n{LEGEND}", len(picture[0]), max(12, len(picture[0]) // 34))
        heat = np.tile(np.linspace(0, 1, len(picture[0])), (max(4, len(picture[0]) // 50), 1))
        picture = np.concatenate([above, _blended(np.full_like(heat, 0.5), heat), picture])
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, quality=90, compress_level=1)
    return buffer.getvalue()


def _blended(grey: Array, heat: Array) -> NDArray[np.uint8]:
    from matplotlib import colormaps

    opacity = MAX_OPACITY * heat[..., None]
    blend = (1 - opacity) * grey[..., None] + opacity * colormaps["inferno"](heat)[..., :3]
    return (255 * blend).round().astype(np.uint8)


def text_strip(text: str, width: int, size: int = 15) -> NDArray[np.uint8]:
    """A text, white on black (H, width, 3), in as many lines as it takes."""
    lines = [line for part in text.split("\n") for line in wrap(part, round(width / (0.55 * size)) - 2)]
    strip = Image.new("RGB", (width, round(size * (1.3 * len(lines) + 0.7))))
    style: dict[str, Any] = {"font": ImageFont.load_default(size), "spacing": size * 0.3}
    ImageDraw.Draw(strip).multiline_text((size // 2, size // 3), "\n".join(lines), "white", **style)
    return np.asarray(strip)


def figure_to_png(figure: Figure) -> bytes:
    """PNG of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def figure_to_tensor(figure: Figure) -> Tensor:
    """A figure as TensorBoard's `add_image` takes it: shape (3, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(figure_to_png(figure))).convert("RGB"))).movedim(2, 0) / 255
