"""Where a classifier looks: Grad-CAM maps and pictures of them."""

from __future__ import annotations

from copy import deepcopy

import torch
from monai.visualize import GradCAM
from torch import Tensor, nn

from dissect_monai.plots import image_to_png, saliency_overlay


def saliency_maps(network: nn.Module, images: Tensor, finding: int, layer: str = "layer4") -> Tensor:
    """How much each place of the images speaks for a finding, by MONAI's Grad-CAM.

    Each map is divided by its largest value, so that maps of two images do not say which has more of the finding. The
    network stays as it is: without hooks, in its mode, its gradients untouched.

    Args:
        network: classifier that returns logits (B, C).
        images: shape (B, C, *spatial), as the network takes them, on its device.
        finding: index of the logit.
        layer: name of the module whose feature maps are weighed; the last stage of a ResNet by default.

    Returns:
        Shape (B, 1, *spatial) in [0, 1]; 0 throughout where nothing speaks for the finding.

    Raises:
        ValueError: if the network has no such layer, or `finding` is negative.

    Reference:
        Selvaraju et al., Grad-CAM: visual explanations from deep networks via gradient-based localization, ICCV 2017,
        Eq. 1–2.
    """
    if layer not in dict(network.named_modules()):
        raise ValueError(f"`layer` must name a module of the {type(network).__name__}, got {layer!r}.")
    if finding < 0:
        raise ValueError(f"`finding` must be the index of a logit, got {finding}.")
    # A copy, because GradCAM leaves its hooks in the network and gradients in the parameters.
    camera = GradCAM(deepcopy(network), layer, postprocessing=_unchanged)
    with torch.enable_grad():
        # The images need gradients, too: all parameters may be frozen.
        maps = camera(images.detach().clone().requires_grad_(), class_idx=finding).detach()
    peak = maps.amax(dim=tuple(range(1, maps.ndim)), keepdim=True)
    return (maps / peak.clamp_min(torch.finfo(maps.dtype).tiny)).as_subclass(Tensor)


def overlay_png(image: Tensor, saliency: Tensor) -> bytes:
    """A 2-D image under its saliency as PNG, upright.

    Args:
        image: shape (C, x, y) in [0, 1], of which the first channel is shown.
        saliency: shape (1, x, y) in [0, 1]; zeros show the image alone.
    """
    # MONAI's images are (x, y), a screen's rows are y.
    return image_to_png(saliency_overlay(*(each[0].T.cpu().numpy() for each in (image, saliency))))


def _unchanged(maps: Tensor) -> Tensor:
    return maps
