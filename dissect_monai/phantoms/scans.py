"""Scanners of the volume phantoms: what each task images, on which grid and with which contrast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dissect_monai.common import BTCV_ORGANS
from dissect_monai.phantoms.anatomy import abdomen, head
from dissect_monai.phantoms.shapes import Shapes, Structure, posed, ripples

Array = NDArray[np.float32]
# Mean and, over subjects, standard deviation in HU. Soft tissues overlap, so that place and shape tell organs apart.
CT_CONTRAST = {
    "gas": (-950, 20), "lung": (-830, 30), "fat": (-100, 8), "skin": (30, 10), "muscle": (55, 6), "bone": (550, 80),
    "marrow": (200, 30), "disc": (80, 8), "nerve": (40, 5), "fluid": (8, 3), "bile": (12, 6), "blood": (90, 15),
    "kidney": (100, 12), "medulla": (85, 14), "liver": (75, 12), "spleen": (80, 12), "pancreas": (65, 10),
    "bowel": (55, 10), "content": (30, 14), "grey_matter": (39, 2), "white_matter": (29, 2),
}  # fmt: skip
# In units of the brightest tissue.
T2_CONTRAST = {
    "gas": (0.02, 0), "lung": (0.06, 0.01), "fat": (0.16, 0.05), "skin": (0.3, 0.05), "muscle": (0.2, 0.03),
    "bone": (0.08, 0.02), "marrow": (0.4, 0.06), "disc": (0.45, 0.1), "nerve": (0.85, 0.05), "fluid": (1, 0.05),
    "bile": (0.95, 0.08), "blood": (0.12, 0.04), "kidney": (0.6, 0.06), "medulla": (0.72, 0.06),
    "liver": (0.33, 0.05), "spleen": (0.52, 0.08), "pancreas": (0.4, 0.05), "bowel": (0.38, 0.05),
    "content": (0.75, 0.2),
}  # fmt: skip
T1_CONTRAST = {
    "gas": (0.02, 0), "fat": (1, 0.08), "skin": (0.5, 0.06), "muscle": (0.42, 0.04), "bone": (0.1, 0.03),
    "nerve": (0.68, 0.03), "fluid": (0.16, 0.03), "grey_matter": (0.52, 0.03), "white_matter": (0.74, 0.03),
}  # fmt: skip


class VolumePhantom(NamedTuple):
    """One generated volume, the truth about it, and where it lies."""

    image: NDArray[np.int16]  # (X, Y, Z), HU in CT, arbitrary units in MR
    label: NDArray[np.uint8]  # (X, Y, Z), index into the labels of its task, 0 is background
    affine: NDArray[np.float64]  # (4, 4), from voxels to mm: right, anterior, superior


class Scan(NamedTuple):
    """What a task images and how; lengths in mm, axes as the array has them, slices along the last."""

    description: str
    group: str
    modality: str  # "CT" or "MR"
    labels: tuple[str, ...]  # from 1 on
    anatomy: Callable[[Shapes], Iterator[Structure]]
    contrast: Mapping[str, tuple[float, float]]
    axes: str  # ends of the array's axes, as nibabel calls them
    field_of_view: tuple[float, float, float]
    slice_ratio: float  # thickness of a slice over the spacing within it
    centre: tuple[float, float, float]  # of the field of view, in patient coordinates
    noise: float  # typical standard deviation, in the units of `contrast`


_HEAD_PARTS = ("cerebrum", "cerebellum", "brainstem", "ventricles", "right_eye", "left_eye")
SCANS = {
    "abdomen_ct": Scan(
        "abdominal CT after contrast, axial", "abdomen", "CT", BTCV_ORGANS, abdomen, CT_CONTRAST,
        "LPS", (350, 264, 250), 1.1, (0, -5, -8), 15,
    ),
    "abdomen_mr": Scan(
        "abdominal T2 MR with fat suppression, coronal", "abdomen", "MR",
        ("liver", "right_kidney", "left_kidney", "spleen"), abdomen, T2_CONTRAST,
        "LSA", (330, 270, 235), 1.5, (0, -8, -10), 0.04,
    ),
    "head_ct": Scan(
        "head CT, axial", "head", "CT", _HEAD_PARTS, head, CT_CONTRAST,
        "RAS", (190, 235, 190), 1.25, (0, 8, -22), 6,
    ),
    "head_mr": Scan(
        "head T1 MR, sagittal", "head", "MR", _HEAD_PARTS, head, T1_CONTRAST,
        "PSR", (225, 225, 180), 1, (0, 10, -24), 0.025,
    ),
}  # fmt: skip


def scan_phantom(scan: Scan, seed: Sequence[int], image_size: int) -> VolumePhantom:
    """Draw a subject and scan it.

    The subject varies in the size, place, pose and shape of every structure and in its intensities, the scan in grid,
    noise, bias field and unit. Spacing, field of view, orientation and noise are the task's: they betray it as a
    scanner does. `image_size`, the voxels along the longest side of the field of view, leaves the subject as it is.
    """
    # The body draws from a stream of its own, so that it is the same on every grid.
    body_rng, rng = np.random.default_rng(seed).spawn(2)
    points, affine = _grid(scan, image_size, rng)
    structures = scan.anatomy(Shapes(posed(points, body_rng), body_rng))
    values = {tissue: body_rng.normal(mean, spread) for tissue, (mean, spread) in scan.contrast.items()}
    spacing = np.linalg.norm(affine[:3, :3], axis=0).mean()
    air = -1000.0 if scan.modality == "CT" else 0.0
    signal = np.full(points.shape[1:], air, dtype=np.float32)
    label = np.zeros(points.shape[1:], dtype=np.uint8)
    for structure in structures:
        # Half a voxel of blur: what partial volume does to an edge.
        inside = 0.5 - 0.5 * np.tanh(structure.distance / np.float32(0.5 * spacing))
        signal += inside * (np.float32(values[structure.tissue]) - signal)
        number = scan.labels.index(structure.name) + 1 if structure.name in scan.labels else 0
        label[structure.distance < 0] = number
    detect = _detect_ct if scan.modality == "CT" else _detect_mr
    noise = scan.noise * rng.uniform(0.7, 1.4)
    return VolumePhantom(detect(signal, points, noise, rng).round().astype(np.int16), label, affine)


def _grid(scan: Scan, image_size: int, rng: np.random.Generator) -> tuple[Array, NDArray[np.float64]]:
    """Patient coordinates of the voxels, (3, X, Y, Z), and the affine, whose origin is the scanner's."""
    spacing = max(scan.field_of_view) / image_size * np.array([1, 1, scan.slice_ratio])
    shape = np.maximum(np.round(scan.field_of_view / spacing * (1, 1, rng.uniform(0.94, 1.06))), 1).astype(int)
    directions = [[(code == end) - (code == start) for code in scan.axes] for start, end in ("LR", "PA", "IS")]
    matrix = np.array(directions, float) * spacing * rng.uniform(0.95, 1.05)
    centre = scan.centre + rng.normal(0, 4, 3)
    corner = centre - matrix @ (shape - 1) / 2
    voxels = np.indices(shape.tolist(), dtype=np.float32)
    points = np.tensordot(matrix.astype(np.float32), voxels, 1) + corner.astype(np.float32)[:, None, None, None]
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = corner + rng.uniform(-1, 1, 3) * (20, 20, 300)  # where the table stood
    return points, affine


def _detect_ct(signal: Array, points: Array, noise: float, rng: np.random.Generator) -> Array:
    texture = 0.3 * ripples(points, 25, rng)[0] * (signal > -200)
    grain = rng.standard_normal(signal.shape, dtype=np.float32)
    return np.clip(signal + np.float32(noise) * (texture + grain), -1024, 3071)


def _detect_mr(signal: Array, points: Array, noise: float, rng: np.random.Generator) -> Array:
    """Bias field, texture, Rician noise and an arbitrary unit."""
    bias = np.exp(0.25 * ripples(points, 400, rng)[0]) * (1 + 0.06 * ripples(points, 25, rng)[0])
    grain = np.float32(noise) * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.float32(rng.uniform(300, 1500)) * np.hypot(signal * bias + grain[0], grain[1])
