"""Where a classifier looks: Grad-CAM maps and pictures of them."""

from __future__ import annotations

from copy import deepcopy

import torch
from monai.visualize import GradCAM
from torch import Tensor, nn

from dissect_monai.common import InputError
from dissect_monai.visualize.classifier import image_to_png, saliency_overlay

STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet, fine to coarse
MIN_SIDE = 4


def saliency_maps(network: nn.Module, images: Tensor, finding: int, layer: str | None = None) -> Tensor:
    """How much each place of the images speaks for a finding, by MONAI's Grad-CAM.

    Each map is divided by its largest value, so that maps of two images do not say which has more of the finding. The
    network stays as it is: without hooks, in its mode, its gradients untouched.

    By default the maps are those of the last stage of a ResNet that has at least 4 places along every axis: stage 4
    from about 100 pixels on, stage 2 at 48. A finer stage says more of where and less of what; where its map is empty,
    that of the next coarser one is taken. The last one's is empty only if its features lower the logit on balance.

    Args:
        network: classifier that returns logits (B, C).
        images: shape (B, C, *spatial), as the network takes them, on its device.
        finding: index of the logit.
        layer: name of the module whose feature maps are weighed; None takes the stage described above.

    Returns:
        Shape (B, 1, *spatial) in [0, 1]; 0 throughout where nothing speaks for the finding.

    Raises:
        ValueError: if the network has no such layer, or no stages, or `finding` is negative.

    Reference:
        Selvaraju et al., Grad-CAM: visual explanations from deep networks via gradient-based localization, ICCV 2017,
        Eq. 1–2.
    """
    layers = [name for name, _ in network.named_modules() if name in (STAGES if layer is None else [layer])]
    if not layers:
        raise InputError(f"`layer` must name a module of the {type(network).__name__}, got {layer!r}.")
    if finding < 0:
        raise InputError(f"`finding` must be the index of a logit, got {finding}.")
    # A copy, because GradCAM leaves its hooks in the network and gradients in the parameters.
    camera = GradCAM(deepcopy(network), layers, postprocessing=_unchanged)
    with torch.enable_grad():
        # The images need gradients, too: all parameters may be frozen.
        images = images.detach().clone().requires_grad_()
        _, features, _ = camera.nn_module(images[:1], class_idx=finding)
        fine = [index for index, each in enumerate(features) if min(each.shape[2:]) >= MIN_SIDE]
        index = max(fine, default=0)
        maps = camera(images, class_idx=finding, layer_idx=index).detach()
        while index < len(layers) - 1 and (empty := ~maps.flatten(1).any(1)).any():
            index += 1
            maps[empty] = camera(images[empty], class_idx=finding, layer_idx=index).detach()
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
