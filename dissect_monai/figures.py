"""Pictures of a run for TensorBoard: the two views, and what the codebooks see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_SIDE = 128  # pixels of a tile that can be read in TensorBoard


def code_colors(codes: Tensor) -> Tensor:
    """One colour per code, similar codes in similar colours: three principal components as red, green and blue.

    Args:
        codes: codebook of shape (num_embeddings, embedding_dim).

    Returns:
        colours of shape (num_embeddings, 3) in [0, 1].
    """
    centered = codes.float() - codes.float().mean(0)
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:3].T
    components = F.pad(components, (0, 3 - components.shape[1]))
    # Ranks instead of values: an outlying code would leave all others the same grey.
    return components.argsort(0).argsort(0) / max(1, len(codes) - 1)


def code_figure(
    images: Tensor, indices: Sequence[Tensor], codebooks: Sequence[Tensor], min_side: int = MIN_SIDE
) -> Tensor:
    """Images beside their code maps, one row an image, one column a scale, fine to coarse.

    Args:
        images: (B, C, *spatial) in [0, 1], three channels as colours, else the first; of volumes the middle slice.
        indices: per scale, codes of shape (B, *spatial_i).
        codebooks: per scale, codes of shape (num_embeddings, embedding_dim).
        min_side: pixels that the longer side of an image has at least; smaller ones are enlarged.

    Returns:
        picture of shape (3, rows, columns) in [0, 1].
    """
    pictures = _enlarged(_pictures(images), min_side)
    columns = [pictures]
    for codes, codebook in zip(indices, codebooks, strict=True):
        colored = code_colors(codebook.cpu())[codes.cpu()].movedim(-1, 1)
        columns.append(F.interpolate(_pictures(colored), size=pictures.shape[2:], mode="nearest"))
    return _tile(columns)


def view_figure(columns: Sequence[Tensor], min_side: int = MIN_SIDE) -> Tensor:
    """Batches of equal shape side by side, one row an image: the two views, or images and their reconstructions.

    Args:
        columns: batches (B, C, *spatial) in [0, 1].
        min_side: pixels that the longer side of an image has at least; smaller ones are enlarged.

    Returns:
        picture of shape (3, rows, columns) in [0, 1].
    """
    return _tile([_enlarged(_pictures(images), min_side) for images in columns])


def _pictures(images: Tensor) -> Tensor:
    """(B, C, x, y[, z]) as MONAI stores it → (B, 3, rows, columns) as a screen shows it."""
    images = images.detach().float().cpu()
    if images.ndim == 5:
        images = images[..., images.shape[-1] // 2]
    channels = 3 if images.shape[1] >= 3 else 1
    return images[:, :channels].expand(-1, 3, -1, -1).transpose(2, 3)


def _enlarged(pictures: Tensor, min_side: int) -> Tensor:
    height, width = pictures.shape[2:]
    factor = max(1.0, min_side / max(height, width))
    size = [round(factor * height), round(factor * width)]
    return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)


def _tile(columns: Sequence[Tensor]) -> Tensor:
    rows = [torch.cat(list(row), dim=2) for row in zip(*columns, strict=True)]
    return torch.cat(rows, dim=1).clamp(0, 1)
