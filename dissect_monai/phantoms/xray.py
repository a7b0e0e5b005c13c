"""Chest X-ray phantoms with labels: the data on which every bundle can be tried, without a download."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dissect_monai.phantoms.generated import SPLITS, Splits, write_once

# Diffuse ones: a finding that a crop can lose is one that two views need not agree on.
XRAY_FINDINGS = ("nodules", "reticulation", "cysts", "consolidation")
XRAY_VIEWS = ("PA", "AP")
Array = NDArray[np.float64]
_PREVALENCE = 0.3
_VERSION = 2  # raise it when the drawing changes, so that a folder written before is not taken for the same set
_IMAGES_PER_SUBJECT = (1, 2, 1, 3)


class Phantom(NamedTuple):
    """One generated chest X-ray and its view."""

    image: NDArray[np.float32]  # (1, H, W) in [0, 1], bright where dense
    view: str  # one of XRAY_VIEWS
    lungs: NDArray[np.bool_]  # (H, W), where neither heart nor mediastinum covers them


# What stays the same in every image of a subject, and the range it is drawn from; lengths in half image widths.
_ANATOMY = {
    "dome": (0.38, 0.58),  # height of the diaphragm
    "width": (0.88, 1.08),  # of the chest
    "height": (0.92, 1.1),  # of the lungs
    "apex": (0.25, 0.45),  # narrowing of the lungs towards the top
    "left_dome": (0.0, 0.1),  # how much higher the diaphragm is on the left of the image
    "right_dome": (-0.02, 0.06),  # how much lower it is on the right
    "heart": (0.24, 0.31),  # radius
    "heart_shift": (0.08, 0.16),
    "mediastinum": (0.11, 0.17),
    "rib_spacing": (0.17, 0.23),
    "rib_phase": (0, 1),
    "rib_slope": (0.2, 0.5),
    "thickness": (0.85, 1.15),  # attenuation of the body, relative
}
_Anatomy = Mapping[str, float]


def xray_phantom(seed: int, image_size: int, *, subject_seed: int, label: ArrayLike) -> Phantom:
    """Draw a schematic frontal chest X-ray: body, lungs, heart, bones, findings, noise and a corner marker.

    The anatomy is the subject's; view, pose, exposure, noise and place and size of the findings are the image's. The
    view (even odds) sets magnification, heart size, lung volume and the marker's corner. It is independent of the
    findings, so that a feature which encodes it is a shortcut. Equal seeds give images that differ in the findings
    alone, which `label`, of shape (4,), says.
    """
    subject_rng, rng = np.random.default_rng([0, subject_seed]), np.random.default_rng([1, seed])
    anatomy = dict(zip(_ANATOMY, subject_rng.uniform(*np.transpose([*_ANATOMY.values()])), strict=True))
    view = XRAY_VIEWS[rng.integers(2)]
    attenuation, lungs = _attenuation(anatomy, view, np.asarray(label), image_size, rng)
    image = _expose(attenuation, rng)
    _stamp_marker(image, view, rng)
    return Phantom(image.astype(np.float32)[None], view, lungs > 0.5)


def write_xray_phantoms(
    output_dir: str | Path,
    num_training: int = 256,
    num_validation: int = 64,
    num_test: int = 64,
    image_size: int = 64,
    seed: int = 0,
    masks: bool = False,
) -> Path:
    """Write a data set of X-ray phantoms: 8-bit PNG images and a Decathlon-style dataset.json.

    Each item is {"image", "label", "subject", "view"}, with one to three images a subject and no subject in two splits;
    within a split of two or more subjects every finding has a positive and a negative. With `masks`, for segmentation,
    labels are PNG masks of the lungs (255) instead of findings.

    The folder is created and returned, see `write_once`; numbers are of images, whose height and width is `image_size`
    pixels, 16 or more.
    """
    counts = dict(zip(SPLITS, (num_training, num_validation, num_test), strict=True))
    spec = {"version": _VERSION, **counts, "image_size": image_size, "seed": seed}
    head: dict[str, Any] = {"name": "xray_phantoms", "description": "generated chest X-ray phantoms"}
    head |= {"modality": {"0": "CR"}, **({"labels": {"255": "lungs"}} if masks else {"label_names": XRAY_FINDINGS})}
    spec |= {"masks": True} if masks else {}
    return write_once(output_dir, spec, head, partial(_write_files, spec=spec))


def _write_files(folder: Path, spec: dict[str, int]) -> Splits:
    for name in ("images", "labels")[: 1 + spec.get("masks", False)]:
        (folder / name).mkdir()
    rng = np.random.default_rng(spec["seed"])
    splits: Splits = {}
    num_subjects = 0
    for split in SPLITS:
        count = spec[split]
        subjects = np.repeat(np.arange(count), np.resize(_IMAGES_PER_SUBJECT, count))[:count]
        labels = _balanced_labels(len(np.unique(subjects)), rng)
        subject_seeds = rng.integers(2**62, size=len(labels))
        splits[split] = []
        for index, subject in enumerate(subjects):
            image_seed, subject_seed = int(rng.integers(2**62)), int(subject_seeds[subject])
            phantom = xray_phantom(image_seed, spec["image_size"], subject_seed=subject_seed, label=labels[subject])
            name = f"images/{split}_{index:05d}.png"
            Image.fromarray((phantom.image[0] * 255).round().astype(np.uint8)).save(folder / name)
            item = {"image": name, "label": labels[subject].astype(int).tolist()}
            if spec.get("masks"):
                item["label"] = name.replace("images", "labels")
                Image.fromarray(phantom.lungs.astype(np.uint8) * 255).save(folder / item["label"])
            splits[split].append(item | {"subject": f"{num_subjects + subject:05d}", "view": phantom.view})
        num_subjects += len(labels)
    return splits


def _balanced_labels(num_subjects: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Labels (num_subjects, 4) of exact prevalence, each finding independent of the others."""
    num_positive = min(max(round(_PREVALENCE * num_subjects), 1), max(num_subjects - 1, 0))
    ranks = rng.permuted(np.tile(np.arange(num_subjects)[:, None], len(XRAY_FINDINGS)), axis=0)
    return ranks < num_positive


def _attenuation(
    anatomy: _Anatomy, view: str, label: Array, image_size: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Attenuation along each ray, (H, W): tissue, less the air in the lungs, plus bone; and how much lung is seen."""
    # Findings draw from a stream of their own, so that the rest of the image is the same without them.
    (finding_rng,) = rng.spawn(1)
    ap = view == "AP"
    x, y = _pose(image_size, 1.06 if ap else 1.0, rng)
    base = rng.normal(-0.05 if ap else 0.0, 0.04)  # a shallow breath raises the diaphragm
    centre = np.maximum(_heart(anatomy, 1.08 if ap else 1.0, base, x, y), _mediastinum(anatomy, x, y))
    lungs = [_lung(anatomy, side, base, x, y) for side in (-1, 1)]

    hila = np.exp(-((np.abs(x) - 0.2) ** 2 + (y + 0.05) ** 2) / 0.1)
    opacity = 0.08 * _smooth_noise(0.15, image_size, rng) + (0.05 + 0.12 * hila) * _smooth_noise(0.03, image_size, rng)
    opacity += 0.25 * hila
    visible = (lungs[0] + lungs[1]) * (1 - centre)
    drawn = (_nodules, _reticulation, _cysts, _consolidation)  # in the order of XRAY_FINDINGS
    for draw, present in zip(drawn, label, strict=True):
        if present:
            opacity += draw(visible, x, y, finding_rng)
    air = visible * np.clip(1 - opacity, 0, 1)
    half_width = 0.93 * anatomy["width"] - 0.62 * _inside(y + 0.86, 0.14)  # shoulders, and the neck above them
    body = _inside(np.abs(x) - half_width, 0.05)
    return anatomy["thickness"] * body * (0.62 - 0.44 * air + 0.1 * centre + _bones(anatomy, x, y)), visible


def _pose(image_size: int, magnification: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Coordinates of the pixels in the patient's frame, x to the right and y down, about [-1, 1]."""
    line = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    x, y = np.meshgrid(line - rng.normal(0, 0.04), line - rng.normal(0, 0.04))
    angle = rng.normal(0, 0.04)
    scale = magnification * rng.normal(1, 0.03)
    return (np.cos(angle) * x + np.sin(angle) * y) / scale, (np.cos(angle) * y - np.sin(angle) * x) / scale


def _inside(distance: Array, softness: float) -> Array:
    """1 where `distance` is well under 0, 0 where it is well over, and a soft edge between."""
    return 0.5 - 0.5 * np.tanh(distance / softness)


def _smooth_noise(scale: float, image_size: int, rng: np.random.Generator) -> Array:
    """Gaussian noise (H, W) of zero mean and unit variance, correlated over `scale` half image widths."""
    frequency = np.hypot(np.fft.fftfreq(image_size)[:, None], np.fft.rfftfreq(image_size)) * image_size / 2
    spectrum = np.fft.rfft2(rng.standard_normal((image_size, image_size))) * np.exp(-((np.pi * scale * frequency) ** 2))
    noise = np.fft.irfft2(spectrum, s=(image_size, image_size))
    return (noise - noise.mean()) / noise.std()


def _dome(anatomy: _Anatomy, side: int) -> float:
    return anatomy["dome"] + (anatomy["right_dome"] if side > 0 else -anatomy["left_dome"])


def _lung(anatomy: _Anatomy, side: int, base: float, x: Array, y: Array) -> Array:
    lateral = (side * x / anatomy["width"] - 0.42) / (0.36 - anatomy["apex"] * 0.5 * _inside(y + 0.45, 0.4))
    vertical = y / (0.82 * anatomy["height"])
    # The dome of the diaphragm falls away towards the costophrenic angle.
    bottom = _dome(anatomy, side) + base + 1.3 * (side * x / anatomy["width"] - 0.36) ** 2
    outline = _inside(np.abs(lateral) ** 2.5 + np.abs(vertical) ** 2.5 - 1, 0.15)
    return outline * _inside(y - bottom, 0.03)


def _heart(anatomy: _Anatomy, scale: float, base: float, x: Array, y: Array) -> Array:
    radius = anatomy["heart"] * scale
    bottom = _dome(anatomy, 1) + base + 0.17
    across, down = x - anatomy["heart_shift"] * scale, y - (bottom - radius)
    across, down = across - 0.5 * down, down - 0.1 * across  # the apex points down and to the patient's left
    return _inside((across / (1.2 * radius)) ** 2 + (down / radius) ** 2 - 1, 0.2)


def _mediastinum(anatomy: _Anatomy, x: Array, y: Array) -> Array:
    knob = _inside(((x - anatomy["mediastinum"]) / 0.1) ** 2 + ((y + 0.33) / 0.11) ** 2 - 1, 0.3)
    return np.maximum(_inside(np.abs(x - 0.02) - anatomy["mediastinum"] * (1 + 0.25 * y), 0.05), knob)


def _bones(anatomy: _Anatomy, x: Array, y: Array) -> Array:
    """Ribs, clavicles and vertebrae: added attenuation."""
    cage = _inside(np.abs(x) - 0.84 * anatomy["width"], 0.04) * _inside(np.abs(y) - 0.85, 0.1)
    arch = y - anatomy["rib_slope"] * np.abs(x) * (1 - 0.6 * np.abs(x))
    ribs = np.maximum(np.cos(2 * np.pi * (arch / anatomy["rib_spacing"] + anatomy["rib_phase"])), 0) ** 2
    clavicles = np.exp(-(((y + 0.66 - 0.08 * np.abs(x) + 0.25 * (np.abs(x) - 0.4) ** 2) / 0.035) ** 2))
    clavicles *= _inside(np.abs(np.abs(x) - 0.42 * anatomy["width"]) - 0.33, 0.03)
    spine = _inside(np.abs(x) - 0.09, 0.03) * (1 + 0.4 * np.cos(2 * np.pi * y / 0.15))
    return 0.07 * ribs * cage * (np.abs(x) > 0.1) + 0.15 * clavicles + 0.06 * spine


def _nodules(visible: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Many small round shadows with a sharp edge, scattered over both lungs."""
    opacity = np.zeros_like(x)
    strength = rng.uniform(0.45, 1.0)
    for _ in range(rng.integers(8, 25)):
        x0, y0 = _place(visible, x, y, rng)
        radius = rng.uniform(0.03, 0.07)
        opacity += strength * rng.uniform(0.7, 1.3) * _inside(np.hypot(x - x0, y - y0) - radius, 0.02)
    return opacity


def _consolidation(visible: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Two to four faint mottled patches with vague edges."""
    patches = np.zeros_like(x)
    for _ in range(rng.integers(2, 5)):
        patches = np.maximum(patches, _patch(visible, x, y, (0.25, 0.5), rng))
    mottle = np.clip(1 + 0.8 * _smooth_noise(0.05, len(x), rng), 0, 2)
    return rng.uniform(0.35, 0.7) * patches * mottle


def _reticulation(visible: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A net of fine lines over a part of the lungs: where a smooth random field crosses zero."""
    region = _patch(visible, x, y, (0.5, 1.2), rng)
    lines = np.exp(-((_smooth_noise(rng.uniform(0.03, 0.06), len(x), rng) / 0.3) ** 2))
    return rng.uniform(0.5, 1.15) * region * lines


def _cysts(visible: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Several rings: a thin wall around air."""
    opacity = np.zeros_like(x)
    strength = rng.uniform(0.65, 1.3)
    for _ in range(rng.integers(6, 18)):
        x0, y0 = _place(visible, x, y, rng)
        from_wall = np.hypot(x - x0, y - y0) - rng.uniform(0.06, 0.12)
        ring = np.exp(-((from_wall / 0.025) ** 2)) - 0.3 * _inside(from_wall, 0.02)
        opacity += strength * rng.uniform(0.7, 1.3) * ring
    return opacity


def _patch(visible: Array, x: Array, y: Array, size: tuple[float, float], rng: np.random.Generator) -> Array:
    """An ellipse with a vague edge somewhere in the lungs, its radii drawn between two sizes."""
    x0, y0 = _place(visible, x, y, rng)
    width, height = rng.uniform(*size, size=2)
    return _inside(((x - x0) / width) ** 2 + ((y - y0) / height) ** 2 - 1, 0.5)


def _place(visible: Array, x: Array, y: Array, rng: np.random.Generator) -> tuple[float, float]:
    """A point where a lung is seen."""
    pixel = rng.choice(np.flatnonzero(visible > 0.5 * visible.max()))
    return x.flat[pixel], y.flat[pixel]


def _expose(attenuation: Array, rng: np.random.Generator) -> Array:
    """What the detector shows in [0, 1]: exposure, contrast curve and noise."""
    image = rng.normal(1, 0.08) * np.clip(attenuation, 0, None) ** np.exp(rng.normal(0, 0.15)) + rng.normal(0.03, 0.02)
    return np.clip(image + rng.uniform(0.01, 0.03) * rng.standard_normal(image.shape), 0, 1)


def _stamp_marker(image: Array, view: str, rng: np.random.Generator) -> None:
    """Draw the marker, a letter L in a corner that depends on the view, in place."""
    size = len(image)
    bar, length = max(size // 32, 1), size // 10
    top = rng.integers(size // 32, size // 12 + 1)
    left = rng.integers(size // 32, size // 12 + 1)
    left = size - length - left if view == "PA" else left
    brightness = rng.uniform(0.8, 1)
    image[top : top + length, left : left + bar] = brightness
    image[top + length - bar : top + length, left : left + length * 2 // 3] = brightness
