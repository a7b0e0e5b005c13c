"""Time of HD95 and surface Dice of one structure, against MONAI's two calls.

    python benchmarks/surface_metrics.py

The masks are generated: an organ is a smooth blob that fills about a third of its box, as structures of an abdomen do,
and the prediction is the same blob with a shifted, wavy border. "scattered" adds to the prediction false positives all
over the box: single voxels and small specks, what an undertrained network draws; "small, scattered" does so with an
organ of a third of the diameter, from which most of them are far. Both get the masks in one box without
air around, as `score_structures` crops them; MONAI's calls (percentile 95; surface Dice by subvoxels with the spacing)
get them as tensors made before the clock starts. Ours also computes the Dice. One thread and process time; a ratio is
the median over the rounds, with its extremes.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Timings, compare, conclude
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from dissect_monai.metrics.segmentation import mask_overlap
from dissect_monai.transforms.labels import Mask

SPACING, TOLERANCE = (0.8, 0.8, 2.5), 2.0  # mm
BOXES = {"0.5 M": (96, 96, 56), "4 M": (192, 192, 112)}  # voxels
RADII = {"organ": 0.85, "scattered": 0.85, "small, scattered": 0.28}  # parts of half the box
SPECKS = 1 / 2000  # of the voxels of the box are centres of false positives


class Case(NamedTuple):
    """Two masks of one structure, and the same as tensors (1, 1, X, Y, Z)."""

    label: Mask
    pred: Mask
    tensors: tuple[Tensor, Tensor]  # prediction and label, as MONAI takes them


def build(shape: tuple[int, ...], kind: str) -> Case:
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    distance = np.sqrt(sum(axis**2 for axis in axes))

    def wave(amplitude: float) -> NDArray[Any]:
        """A smooth random field with that standard deviation."""
        coarse = rng.normal(size=[8] * 3)
        field = ndimage.zoom(coarse, [size / 8 for size in shape], order=3, mode="nearest")
        return field * (amplitude / field.std())

    surface = distance + wave(0.08)
    label, pred = surface < RADII[kind], surface + wave(0.03) < RADII[kind] - 0.01
    if "scattered" in kind:
        pred |= rng.random(shape) < SPECKS
        pred |= ndimage.binary_dilation(rng.random(shape) < SPECKS / 4)
    return Case(label, pred, (torch.from_numpy(pred)[None, None], torch.from_numpy(label)[None, None]))


def ours(case: Case) -> tuple[float, float]:
    return mask_overlap(case.label, case.pred, SPACING, TOLERANCE)[1:]


def monai(case: Case) -> tuple[float, float]:
    hd95 = compute_hausdorff_distance(*case.tensors, include_background=True, percentile=95, spacing=list(SPACING))
    dice = compute_surface_dice(
        *case.tensors, [TOLERANCE], include_background=True, spacing=list(SPACING), use_subvoxels=True
    )
    return float(hd95), float(dice)


def measure(case: Case, rounds: int) -> Timings:
    """Check that both compute the same, then time them side by side."""
    np.testing.assert_allclose(ours(case), monai(case), rtol=1e-5)
    variants: dict[str, Callable[[], object]] = {"ours": partial(ours, case), "monai": partial(monai, case)}
    return compare(variants, rounds, warmup=1)


def report(name: str, case: Case, timings: Timings) -> None:
    hd95, dice = ours(case)
    shape = "x".join(map(str, case.label.shape))
    print(f"{name}, {shape}: {timings}   (HD95 {hd95:.2f} mm, surface Dice {dice:.3f})")
    print(f"    monai / ours {timings.ratio('monai', 'ours')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    ratios = {}
    for size, shape in BOXES.items():
        for kind in RADII:
            name, case = f"{kind}, {size} voxels", build(shape, kind)
            timings = measure(case, args.rounds)
            report(name, case, timings)
            ratios[name] = timings.ratio("monai", "ours").median
    conclude({f"time, {name}, monai / ours >= 1.5": ratio >= 1.5 for name, ratio in ratios.items()})


if __name__ == "__main__":
    main()
