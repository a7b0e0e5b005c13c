"""Pictures of a run for TensorBoard: the two views, and what the codebooks see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.visualize.classifier import text_strip

TILE_SIDE = 192  # pixels of a picture's longer side, at least, for anatomy to be recognised in TensorBoard
MASK_COLOR = (0.12, 0.28, 0.45)  # dark, but no grey


def code_colors(codes: Tensor) -> Tensor:
    """Colours (num_embeddings, 3) in [0, 1] of a codebook (num_embeddings, embedding_dim), alike for similar codes.

    Three principal components are red, green and blue.
    """
    centered = codes.float() - codes.float().mean(0)
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:3].T
    components = F.pad(components, (0, 3 - components.shape[1]))
    # Ranks instead of values: an outlying code would leave all others the same grey.
    return components.argsort(0).argsort(0) / max(1, len(codes) - 1)


def code_figure(
    images: Tensor, indices: Sequence[Tensor], codebooks: Sequence[Tensor], captions: Sequence[str] = ()
) -> Tensor:
    """`view_figure` of images (B, C, *spatial) in [0, 1] beside their code maps, one column a scale, fine to coarse.

    Of each scale there are `indices` (B, *spatial_i), and the codes (num_embeddings, embedding_dim) that they number.
    """
    columns = [pictures := _enlarged(_pictures(images))]
    for codes, codebook in zip(indices, codebooks, strict=True):
        colored = code_colors(codebook.cpu())[codes.cpu()].movedim(-1, 1)
        columns.append(F.interpolate(_pictures(colored), size=pictures.shape[2:], mode="nearest"))
    return _tile(columns, captions)


def view_figure(columns: Sequence[Tensor], captions: Sequence[str] = (), slices: bool = False) -> Tensor:
    """A picture (3, rows, columns) in [0, 1] of batches (B, C, *spatial) in [0, 1] side by side, one row an image.

    With `captions`, each column has its own above it, and the last line says what a row is.

    Small images are enlarged. Three channels are colours, else the first is shown; of volumes the middle slice. With
    `slices`, 2-D images are axial slices, which a radiologist sees from below.
    """
    return _tile([_enlarged(_pictures(images, slices)) for images in columns], captions)


def show_mask(images: Tensor, masked: Tensor | None) -> Tensor:
    """The first channel of images as colours (B, 3, *spatial), masked voxels blue: else they would look like air."""
    grey = images[:, :1].expand(-1, 3, *images.shape[2:])
    if masked is None:
        return grey
    return torch.where(masked, images.new_tensor(MASK_COLOR).view(1, 3, *[1] * (images.ndim - 2)), grey)


def _pictures(images: Tensor, slices: bool = False) -> Tensor:
    """(B, C, x, y[, z]) as MONAI stores it → (B, 3, rows, columns) as a screen shows it.

    Volumes are in RAS, and so are slices of them: a radiologist sees the patient's right on the left, the front above.
    """
    images = images.detach().float().cpu()
    if images.ndim == 5 or slices:
        images = images.flip(2, 3)
    if images.ndim == 5:
        images = images[..., images.shape[-1] // 2]
    channels = 3 if images.shape[1] >= 3 else 1
    return images[:, :channels].expand(-1, 3, -1, -1).transpose(2, 3)


def _enlarged(pictures: Tensor) -> Tensor:
    height, width = pictures.shape[2:]
    factor = max(1.0, TILE_SIDE / max(height, width))
    size = [round(factor * height), round(factor * width)]
    return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)


def _tile(columns: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
    rows = [torch.cat(list(row), dim=2) for row in zip(*columns, strict=True)]
    tiles = torch.cat(rows, dim=1).clamp(0, 1)
    heads = [_strip(text, column.shape[3]) for text, column in zip(captions, columns, strict=False)]
    height = max((head.shape[1] for head in heads), default=0)
    above = [torch.cat([F.pad(head, (0, 0, 0, height - head.shape[1])) for head in heads], dim=2)] if heads else []
    below = [_strip("Each row is one image of the last batch of the epoch.", tiles.shape[2])] if heads else []
    return torch.cat([*above, tiles, *below], dim=1)


def _strip(text: str, width: int) -> Tensor:
    return torch.tensor(text_strip(text, width)).movedim(2, 0) / 255
