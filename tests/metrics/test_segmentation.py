from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage
from scipy.spatial.distance import cdist

from dissect_monai.metrics.segmentation import StructureScore, mask_overlap, score_structures

ANISOTROPIC = (1.0, 2.0, 5.0)
SPACINGS = [(1.0, 1.0, 1.0), ANISOTROPIC, (3.0, 0.7, 0.7), (0.8, 0.8, 3.0), (2.0, 1.5, 5.0)]
LABELS = {"liver": [1], "kidneys": [2, 3], "never": [9]}
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def box(start: tuple[int, ...], stop: tuple[int, ...], shape: tuple[int, ...] = (22, 20, 18)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = True
    return mask


def blobs(seed: int) -> np.ndarray:
    """A mask of smooth random shape."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(16, 14, 12)), 2)
    return noise > np.quantile(noise, 0.7)


def score(label: np.ndarray, pred: np.ndarray, labels: Any = None, **arguments: Any) -> list[StructureScore]:
    return score_structures(label, pred, labels or LABELS, arguments.pop("spacing", (1, 1, 1)), **arguments)


# ---- two masks, against MONAI ------------------------------------------------------------------------------------


def assert_as_monai(
    label: np.ndarray, pred: np.ndarray, spacing: tuple[float, ...] = ANISOTROPIC, tolerance: float = 2.0
) -> None:
    tensors = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (pred, label)]
    shared = {"include_background": True, "spacing": list(spacing)}
    expected = [
        float(compute_dice(*(each.float() for each in tensors))),
        float(compute_hausdorff_distance(*tensors, percentile=95, **shared)),
        float(compute_surface_dice(*tensors, [tolerance], use_subvoxels=True, **shared)),
    ]
    np.testing.assert_allclose(mask_overlap(label, pred, spacing, tolerance), expected, rtol=1e-5, atol=1e-6)


@every_spacing
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_monai_on_blobs(seed: int, spacing: tuple[float, ...]) -> None:
    label, pred = blobs(seed), blobs(seed + 10)
    border = [mask.any(axis) for mask in (label, pred) for axis in ((1, 2), (0, 2), (0, 1))]
    assert any(each[0] or each[-1] for each in border)  # they touch it
    for tolerance in (0.0, 1.0, 2.0, 4.5):
        assert_as_monai(label, pred, spacing, tolerance)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.6, 1.7)])
def test_one_slice_is_scored_in_its_plane_as_monai_scores_pictures(spacing: tuple[float, ...]) -> None:
    label, pred = blobs(0)[..., 5], blobs(1)[..., 5]
    assert_as_monai(label, pred, spacing, 1.0)
    (scored,) = score(label[..., None] * 1, pred[..., None] * 1, {"disc": [1]}, spacing=(*spacing, 9), tolerance=1.0)
    assert scored[2:5] == mask_overlap(label, pred, spacing, 1.0)
    assert scored.label_ml == pytest.approx(label.sum() * np.prod(spacing) * 9 / 1000)


@every_spacing
def test_agrees_with_monai_on_scattered_voxels(spacing: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    scattered = [rng.random((9, 8, 7)) < share for share in (0.02, 0.1, 0.5)]
    for label in scattered:
        for pred in scattered:
            assert_as_monai(label, pred, spacing)


# ---- two masks, against their definition -------------------------------------------------------------------------


@every_spacing
@pytest.mark.parametrize("seed", range(3))
def test_hd95_agrees_with_all_pairs_of_edge_voxels(seed: int, spacing: tuple[float, ...]) -> None:
    def edge(mask: np.ndarray) -> np.ndarray:
        """Places in mm of the voxels that are not surrounded by others."""
        padded = np.pad(mask, 1)
        around = [np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (-1, 1)]
        return np.argwhere(mask & ~np.all(around, axis=0)) * np.array(spacing)

    label, pred = blobs(seed), blobs(seed + 10)
    distances = cdist(edge(label), edge(pred))
    expected = max(np.quantile(distances.min(axis), 0.95) for axis in (0, 1))
    assert mask_overlap(label, pred, spacing).hd95 == pytest.approx(expected, rel=1e-5)


def box_areas(size: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    """In mm², of a face across and an edge along each axis and of a corner; marching cubes bevels edges and corners."""
    steps, lengths = np.array(spacing), (size - 1) * spacing
    edges = lengths * np.sqrt((steps**2).sum() - steps**2) / 2
    return lengths.prod() / lengths, edges, float(np.linalg.norm(steps.prod() / steps)) / 8


@every_spacing
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_surface_dice_is_the_share_of_the_area_in_mm(axis: int, spacing: tuple[float, ...]) -> None:
    size = np.array([9, 8, 6])
    longer = size + (np.arange(3) == axis)
    label, pred = (box((4, 4, 4), tuple(4 + each)) for each in (size, longer))
    areas = [box_areas(each, spacing) for each in (size, longer)]
    whole = sum(2 * faces.sum() + 4 * edges.sum() + 8 * corner for faces, edges, corner in areas)
    faces, edges, corner = areas[1]
    # The end of the label lies within `pred`; that of `pred`, with the edges around it, beyond the label.
    wrong = 2 * faces[axis] + 2 * (edges.sum() - edges[axis]) + 4 * corner
    assert mask_overlap(label, pred, spacing, tolerance=0.4).surface_dice == pytest.approx(1 - wrong / whole, rel=1e-5)


@pytest.mark.parametrize("start", range(3, 6))
@pytest.mark.parametrize("step", [0.4, float(np.float32(0.4)), float(np.float32(0.1))])
def test_a_distance_equal_to_the_tolerance_is_within_it_wherever_it_lies(start: int, step: float) -> None:
    label = box((start, 2, 2), (start + 5, 6, 6), (22, 8, 8))
    pred = np.roll(label, 5, 0)  # corners at the end are 5 steps off, those between less
    assert mask_overlap(label, pred, (step,) * 3, round(5 * step, 3)).surface_dice == 1
    assert_as_monai(label, pred, (step,) * 3, round(5 * step, 3))


def test_equal_masks_are_perfect_and_neither_order_nor_air_around_matters() -> None:
    label, pred = blobs(0), blobs(1)  # both reach the border
    assert mask_overlap(label, label, ANISOTROPIC) == (1, 0, 1)
    expected = mask_overlap(label, pred, ANISOTROPIC)
    np.testing.assert_allclose(mask_overlap(pred, label, ANISOTROPIC), expected, rtol=1e-6)
    padded = [np.pad(mask, ((2, 5), (0, 3), (4, 1))) for mask in (label, pred)]
    np.testing.assert_allclose(mask_overlap(*padded, ANISOTROPIC), expected, rtol=1e-6)
    for masks in ([label, pred], padded):
        np.testing.assert_allclose(score(*masks, {"a": [1]}, spacing=ANISOTROPIC)[0][2:5], expected, rtol=1e-6)


def test_every_outcome_is_scored_as_documented() -> None:
    a, b, c = box((1, 1, 1), (6, 6, 6)), box((10, 2, 2), (14, 6, 6)), box((2, 12, 9), (4, 14, 11))
    label, pred = a * 1 + b * 2, np.roll(a, 1, 0) * 1 + c * 4
    labels = {"found": [1], "lost": [2], "nowhere": [3], "added": [4]}
    found, lost, nowhere, added = score(label, pred, labels, spacing=ANISOTROPIC)
    assert [each.outcome for each in (found, lost, added, nowhere)] == ["scored", "missed", "false_positive", "absent"]
    assert found[:2] == ("found", (1,))
    assert found.dice == pytest.approx(0.8)
    assert (lost.dice, lost.surface_dice) == (0, 0)
    assert isnan(lost.hd95)
    assert all(isnan(value) for each in (nowhere, added) for value in each[2:5])
    volumes = [(each.label_ml, each.pred_ml) for each in (found, lost, nowhere, added)]
    np.testing.assert_allclose(volumes, [(1.25, 1.25), (0.64, 0), (0, 0), (0, 0.08)])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.uint16])
def test_values_of_one_structure_are_one_mask_and_structures_may_overlap(dtype: Any) -> None:
    label = box((3, 3, 3), (9, 9, 9)) * 1 + box((5, 5, 5), (7, 7, 7)) * 1 + box((12, 12, 12), (15, 15, 15)) * 200
    pred = torch.from_numpy(label.astype(np.int32))
    whole, core = score(label.astype(dtype), pred, {"whole": [1, 2], "core": [2]})
    assert (whole.values, whole.label_ml, core.label_ml) == ((1, 2), 0.216, 0.008)
    assert whole.dice == core.dice == 1
