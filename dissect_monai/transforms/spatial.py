"""Volumes on grids: to the spacing of training, and back to the grid of their file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, Resize, Spacing
from monai.utils import MetaKeys
from nibabel import aff2axcodes
from nibabel.affines import apply_affine, voxel_sizes
from torch import Tensor

from dissect_monai.common import PICTURE, PLANES, Array, InputError, acquired_plane

_MAX_VOXELS, _MAX_VALUES = 2**22, 2**25  # of a slab, the values being those of all classes: 128 MiB
_ROUNDING = 1e-3  # of a voxel, by which a position may miss the border


class SliceOrientationd(MapTransform):
    """Turns volumes to RAS, or for a 2-D network so that the axis across their slices is the last one.

    Axial slices then are (x, y), coronal ones (x, z) and sagittal ones (y, z): right, front and top are at the end of
    their axis. Nothing is resampled, and the affine says what was turned.

    Args:
        keys: keys of the images: `MetaTensor`s of shape (C, X, Y, Z), as `LoadImaged` gives them.
        spatial_dims: of the network, 2 or 3.
        slice_axis: plane of the slices, "axial", "coronal" or "sagittal"; "auto" takes for every volume that in which
            it was acquired, see `acquired_plane`. With 3 dimensions it says nothing.

    Raises:
        ValueError: if `slice_axis` is none of these.
    """

    def __init__(self, keys: KeysCollection, spatial_dims: int = 3, slice_axis: str = "auto") -> None:
        super().__init__(keys)
        if slice_axis not in ("auto", *PLANES):
            raise InputError(f"`slice_axis` must be auto or one of {', '.join(PLANES)}, got {slice_axis!r}.")
        self.spatial_dims, self.slice_axis = spatial_dims, slice_axis

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the images of an item, and in 2-D add the plane of the slices as `slice_axis`; pictures stay."""
        item = dict(data)
        for key in self.key_iterator(item):
            if PICTURE in item[key].meta:
                item["slice_axis"] = PICTURE
                continue
            image = Orientation("RAS", labels=None)(item[key])
            if self.spatial_dims == 2:
                plane = self.slice_axis
                if plane == "auto":
                    plane = acquired_plane(image.shape[1:], voxel_sizes(image.affine.numpy()))
                image = Orientation("".join("RAS"[axis] for axis in PLANES[plane]), labels=None)(image)
                item["slice_axis"] = plane
            item[key] = image
        return item


class OriginalGridd(MapTransform):
    """Replaces a prediction by the label map on the grid of its file, see `to_original_grid`.

    Shape and affine of the file are those that `LoadImaged` left in the metadata, which a prediction has from its
    image. For `postprocessing`, before `SaveImaged`; nothing is inverted step by step.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the predictions of an item."""
        item = dict(data)
        for key in self.key_iterator(item):
            meta = item[key].meta
            shape = [int(size) for size in meta[MetaKeys.SPATIAL_SHAPE]]
            item[key] = to_original_grid(item[key], shape, meta[MetaKeys.ORIGINAL_AFFINE])
        return item


def to_original_grid(pred: MetaTensor, shape: Sequence[int], affine: Tensor | Array) -> MetaTensor:
    """Resample the logits of classes, or a label map, to another grid, as a label map.

    Logits are interpolated linearly, and the largest wins; of a label map, the nearest voxel is taken. Both affines say
    where voxels lie, so that orientation, spacing, cropping and padding need not be undone one by one. What lies beyond
    the outermost voxels of `pred` is background: cropping to the foreground removed it as such.

    The grid is filled in slabs along its first axis, so that about 0.5 GB are needed beside `pred` and the result,
    whatever their size and the number of classes.

    Args:
        pred: logits (C, X, Y, Z), C > 1, the first of the background, any float dtype; or a label map (1, X, Y, Z).
        shape: voxels of the grid along its three axes.
        affine: affine (4, 4) of the grid, from voxels to mm in RAS.

    Returns:
        Label map (1, *shape) on the device of `pred`, with its metadata but for the affine: uint8 of indices of
        classes, or the dtype of the label map.
    """
    to_pred = np.linalg.solve(_affine("affine of `pred`", pred.affine), _affine("affine", affine))
    meta = {key: value for key, value in pred.meta.items() if key != MetaKeys.AFFINE}
    values = pred.detach().as_subclass(Tensor)
    label_map = torch.empty(tuple(shape), dtype=pred.dtype if len(pred) == 1 else torch.uint8, device=pred.device)
    thickness = max(1, min(_MAX_VOXELS, _MAX_VALUES // len(pred)) // (shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        slab = label_map[start : start + thickness]
        shift = np.eye(4)
        shift[0, 3] = start
        slab.copy_(_resample(values, tuple(slab.shape), to_pred @ shift))
    return MetaTensor(label_map[None], affine=torch.as_tensor(np.asarray(affine, dtype=float)), meta=meta)


def refuse_other_grid(label: MetaTensor, image: MetaTensor, where: str) -> None:
    """Refuse a label map (C, X, Y, Z), as its file has it, on another grid than the file of its image, see `same_grid`.

    `image` may have been resampled or cropped since, or be a prediction from it. A label map of the same shape on
    another grid has most often lost its affine, and would lie beside what it shows. The mask of a picture, which has no
    place of its own, must have its size alone, and gets its affine.
    """
    if PICTURE in image.meta:
        sizes = [tuple(map(int, each)) for each in (label.shape[1:], image.meta[MetaKeys.SPATIAL_SHAPE])]
        if sizes[0] != sizes[1]:
            got = " and ".join(f"{width} x {height}" for width, height, *_ in sizes)
            raise InputError(
                f"{where} must have the size of its picture, as Exif turns it, got {got} pixels: save it anew from the "
                "picture."
            )
        label.affine = torch.as_tensor(image.meta[MetaKeys.ORIGINAL_AFFINE], dtype=torch.float64)
        return
    own = tuple(label.shape[1:]), _affine("affine", label.affine)
    shape, affine = image.meta.get(MetaKeys.SPATIAL_SHAPE), image.meta.get(MetaKeys.ORIGINAL_AFFINE)
    shape = image.shape[1:] if shape is None else shape
    other = tuple(int(size) for size in shape), _affine("affine", image.affine if affine is None else affine)
    if not same_grid(*own, *other):
        raise InputError(
            f"{where} must be on the grid of its image, got {describe_grid(*own)}, and {describe_grid(*other)} for the "
            "image: save it with the affine of the image if its voxels are the same, else resample it to the image."
        )


def same_grid(shape: Sequence[int], affine: Array, other_shape: Sequence[int], other_affine: Array) -> bool:
    """Whether two grids have the same voxels, whatever the order and direction of their axes.

    Their corners may lie a tenth of the smallest spacing apart. Formats round an affine to far less, while the least
    real mistake, origins that differ by half a voxel, is far more.
    """
    if sorted(shape) != sorted(other_shape):
        return False
    corners, others = (
        apply_affine(matrix, list(product(*((0, size - 1) for size in sizes))))
        for sizes, matrix in ((shape, affine), (other_shape, other_affine))
    )
    apart = np.linalg.norm(corners[:, None] - others, axis=-1)
    tolerance = 0.1 * min(voxel_sizes(affine).min(), voxel_sizes(other_affine).min())
    return bool(max(apart.min(0).max(), apart.min(1).max()) <= tolerance)


def describe_grid(shape: Sequence[int], affine: Array) -> str:
    """A grid in words."""
    numbers = (np.round(each, 3) + 0.0 for each in (voxel_sizes(affine), affine[:3, 3]))  # adding 0 turns -0 into 0
    spacing, origin = (each.tolist() for each in numbers)
    return f"shape {tuple(shape)}, spacing {spacing}, orientation {''.join(aff2axcodes(affine))}, origin {origin}"


def _affine(name: str, affine: Tensor | Array) -> Array:
    matrix = np.asarray(torch.as_tensor(affine).cpu(), dtype=float)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise InputError(f"the {name} must be a matrix (4, 4) that can be inverted, got {matrix.tolist()}.")
    return matrix


def _resample(pred: Tensor, shape: tuple[int, ...], to_pred: Array) -> Tensor:
    """Label map of shape `shape`, whose voxels `to_pred` maps to those of `pred`."""
    sizes = pred.shape[1:]
    positions = _positions(shape, to_pred, pred.device)
    inside = torch.ones(shape, dtype=torch.bool, device=pred.device)
    grid, crop = [], []
    for position, size in zip(positions, sizes, strict=True):
        inside &= (position >= -0.5 - _ROUNDING) & (position <= size - 0.5 + _ROUNDING)
        position.clamp_(0, size - 1)
        # Only what this slab needs becomes float32.
        first, last = int(position.min().floor()), int(position.max().ceil())
        crop.append(slice(first, last + 1))
        grid.append(((2 * (position - first) + 1) / (last + 1 - first) - 1).float())
    if not inside.any():
        return torch.zeros(shape, dtype=torch.uint8, device=pred.device)
    mode = "nearest" if len(pred) == 1 else "bilinear"
    near = pred[(slice(None), *crop)].float()[None]
    # grid_sample's x is the last axis.
    values = F.grid_sample(near, torch.stack(grid[::-1], -1)[None], mode, "border", align_corners=False)[0]
    # Several times as fast as argmax.
    labels = values[0] if len(pred) == 1 else values.max(0).indices
    return torch.where(inside, labels, 0)


def _positions(shape: Sequence[int], to_pred: Array, device: torch.device) -> list[Tensor]:
    """Position of each voxel along each axis of the prediction, in its voxels, float64 of shape `shape`."""
    steps = torch.meshgrid(*(torch.arange(size, dtype=torch.float64, device=device) for size in shape), indexing="ij")
    return [
        sum((weight * step for weight, step in zip(row[:3].tolist(), steps, strict=True)), start=torch.zeros(()))
        + row[3]
        for row in to_pred[:3]
    ]


class AdaptiveSpacingd(MapTransform):
    """Resamples to a common spacing, but to a finer one where a whole volume is smaller than a patch.

    MONAI's `Spacingd` would leave a crop of the hippocampus as a few voxels in a patch of padding. Here the spacing of
    such a volume shrinks, by one factor for all axes, until it reaches two opposite sides of the patch.

    Args:
        keys: keys of the images: `MetaTensor`s of shape (C, X, Y, Z), as `LoadImaged` gives them.
        pixdim: spacing in mm along the three axes; one that is not positive leaves the axis as it is.
        spatial_size: voxels of the patch along the three axes; one of 1 (a slice) is no reason to shrink, nor shrunk.
        image_size: pixels that the longer side of a picture gets, whatever its spacing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        pixdim: Sequence[float],
        spatial_size: Sequence[int],
        image_size: int = 256,
    ) -> None:
        super().__init__(keys)
        self.pixdim = np.array(pixdim, dtype=float)
        self.spatial_size, self.image_size = np.array(spatial_size), image_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the images of an item."""
        item = dict(data)
        counted = (self.pixdim > 0) & (self.spatial_size > 1)
        for key in self.key_iterator(item):
            image = item[key]
            if PICTURE in image.meta:
                sides = np.array(image.shape[1:3])
                size = np.rint(sides * self.image_size / sides.max()).clip(1).astype(int)
                mode = "area" if self.image_size < sides.max() else "trilinear"  # without aliasing
                item[key] = Resize((*size.tolist(), 1), mode=mode)(image)
                continue
            # From the centre of the first voxel to that of the last, which is what resampling keeps.
            extent = (np.array(image.shape[1:]) - 1) * image.pixdim.numpy()
            filled = (extent / np.maximum((self.spatial_size - 1) * self.pixdim, 1e-6))[counted]  # parts of the sides
            factor = min(1.0, filled.max()) if filled.any() else 1.0
            # In single precision, which halves the time, positions are right to a hundredth of a voxel.
            spacing = Spacing(np.where(counted, self.pixdim * factor, self.pixdim), mode="bilinear", dtype=np.float32)
            item[key] = spacing(image)
        return item
