"""Signed distances of randomly varied solids, in millimetres: what the volume phantoms are built of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float32]
_NUM_WAVES = 16


class Structure(NamedTuple):
    """A part of the body, painted over those before it."""

    tissue: str  # decides its intensity
    distance: Array  # mm to its surface, negative within it, (X, Y, Z)
    name: str = ""  # its label; "" if it has none


class Shapes:
    """Solids at the points of an image, each varied in place, size and tilt, so that no two bodies agree.

    They are functions of the point alone: another grid samples the same body.
    """

    def __init__(self, points: Array, rng: np.random.Generator) -> None:
        self.points = points  # (3, X, Y, Z), in mm: right, anterior, superior
        self.rng = rng

    def ellipsoid(self, centre: ArrayLike, radii: ArrayLike, *, tilt: ArrayLike = (0, 0, 0), vary: float = 1) -> Array:
        """Distance to an ellipsoid; `tilt` in degrees about the x, y and z axis, in this order.

        `vary` is the standard deviation of its variation: times 3 mm, 8 % and 6 degrees.
        """
        centre = np.asarray(centre) + vary * self.rng.normal(0, 3, 3)
        scaled: NDArray[np.float64] = np.asarray(radii) * np.exp(vary * self.rng.normal(0, 0.08, 3))
        turn = rotation(np.asarray(tilt) + vary * self.rng.normal(0, 6, 3))
        return _from_surface(_transform(turn.T, self.points, centre), scaled)

    def column(self, centre: tuple[float, float], radii: tuple[float, float], *, vary: float = 1) -> Array:
        """Distance to an endless elliptic cylinder along z; as `ellipsoid`, without a tilt."""
        middle = np.asarray(centre) + vary * self.rng.normal(0, 3, 2)
        widths = np.asarray(radii) * np.exp(vary * self.rng.normal(0, 0.08, 2))
        return _from_surface(self.points[:2] - middle.astype(np.float32)[:, None, None, None], widths)

    def tube(self, path: Sequence[Sequence[float]], radii: ArrayLike, *, vary: float = 1) -> Array:
        """Distance to a tube along a path of points in mm, with a radius in mm at each."""
        bent = np.asarray(path) + vary * self.rng.normal(0, 3, 3) + vary * self.rng.normal(0, 1.5, (len(path), 3))
        widths = np.asarray(radii) * np.exp(vary * self.rng.normal(0, 0.08))
        distance = np.full(self.points.shape[1:], np.inf, dtype=np.float32)
        for (start, end), (first, last) in zip(pairwise(bent), pairwise(widths), strict=True):
            along, length = end - start, float(np.linalg.norm(end - start))
            offset = _transform(np.eye(3), self.points, start)
            place = np.clip(np.tensordot((along / length**2).astype(np.float32), offset, 1), 0, 1)
            gap = _norm(offset - along.astype(np.float32)[:, None, None, None] * place)
            distance = np.minimum(distance, gap - np.float32(first) - np.float32(last - first) * place)
        return distance

    def ripples(self, wavelength: float) -> Array:
        """A smooth random field of zero mean and unit variance; `wavelength` in mm is that of its waves."""
        return ripples(self.points, wavelength, self.rng)[0]

    def layers(self, period: float, thickness: float, slope: float = 0) -> Array:
        """Distance to a stack of slabs, `period` mm apart in z and random in phase; each sinks by `slope` along y."""
        height = self.points[2] + np.float32(slope) * self.points[1] + np.float32(self.rng.uniform(0, period))
        return np.abs(np.mod(height, np.float32(period)) - np.float32(period / 2)) - np.float32(thickness / 2)


def blend(width: float, solid: Array, *others: Array) -> Array:
    """Union of solids with a rounded seam of `width` mm."""
    for other in others:
        overlap = np.maximum(np.float32(width) - np.abs(solid - other), 0)
        solid = np.minimum(solid, other) - overlap**2 / np.float32(4 * width)
    return solid


def minus(solid: Array, *others: Array, gap: float = 0) -> Array:
    """A solid less others, and less `gap` mm around them."""
    for other in others:
        solid = np.maximum(solid, np.float32(gap) - other)
    return solid


def posed(points: Array, rng: np.random.Generator) -> Array:
    """Patient coordinates of points: a body of another size and pose, and smoothly deformed."""
    turn = rotation(rng.normal(0, 3, 3)) / np.exp(rng.normal(0, 0.05, 3) + rng.normal(0, 0.03))[:, None]
    still = _transform(turn, points, rng.normal(0, 6, 3))
    return still + 3 * ripples(still, 180, rng, 3) + np.float32(1.2) * ripples(still, 70, rng, 3)


def ripples(points: Array, wavelength: float, rng: np.random.Generator, num_fields: int = 1) -> Array:
    """Smooth random fields (num_fields, X, Y, Z) of zero mean and unit variance: plane waves in random directions."""
    directions = rng.normal(size=(_NUM_WAVES, 3))
    directions *= 2 * np.pi / wavelength / np.linalg.norm(directions, axis=1, keepdims=True)
    phases = rng.uniform(0, 2 * np.pi, (_NUM_WAVES, 1, 1, 1)).astype(np.float32)
    signs = rng.choice((-1, 1), (num_fields, _NUM_WAVES)) * np.sqrt(2 / _NUM_WAVES)
    return np.tensordot(signs.astype(np.float32), np.cos(_transform(directions, points, (0, 0, 0)) + phases), 1)


def rotation(degrees: ArrayLike) -> NDArray[np.float64]:
    """Matrix (3, 3) that turns about the x, then the y, then the z axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _transform(matrix: ArrayLike, points: Array, origin: ArrayLike) -> Array:
    """`matrix` times each point less `origin`."""
    matrix, origin = np.asarray(matrix, dtype=np.float32), np.asarray(origin, dtype=np.float32)
    return np.tensordot(matrix, points, 1) - (matrix @ origin)[:, None, None, None]


def _from_surface(local: Array, radii: NDArray[np.float64]) -> Array:
    """About the distance to an ellipse or ellipsoid on the axes; exact for a ball, of the right sign for all."""
    scaled = local / radii.astype(np.float32)[:, None, None, None]
    level = np.maximum(_norm(scaled), np.float32(1e-6))  # 1 at the surface
    slope = np.maximum(_norm(scaled / radii.astype(np.float32)[:, None, None, None]), np.float32(1e-8))
    return level * (level - 1) / slope


def _norm(vectors: Array) -> Array:
    return np.sqrt(np.einsum("i...,i...", vectors, vectors))
