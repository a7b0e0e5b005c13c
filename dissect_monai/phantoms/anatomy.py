"""Schematic anatomy of abdomen and head: structures in the order in which they are painted.

Coordinates are in mm and grow to the patient's right, front and head; so the liver, on the right, has positive x.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dissect_monai.phantoms.shapes import Shapes, Structure, blend, minus

Array = NDArray[np.float32]
SIDES = ((1, "right"), (-1, "left"))


def abdomen(shapes: Shapes) -> Iterator[Structure]:
    """The trunk from the bases of the lungs to the lower poles of the kidneys, with all organs that BTCV labels."""
    cavity = blend(40, *(shapes.column((42 * side, 2), (92, 86), vary=0.4) for side, _ in SIDES))
    domes = blend(25, *(shapes.ellipsoid((68 * side, 0, -15 + 6 * side), (76, 88, 92), vary=0.6) for side, _ in SIDES))
    yield from _trunk_wall(shapes, cavity)
    yield from _bowel(shapes, cavity + 4)
    heart = shapes.ellipsoid((-20, 25, 100), (64, 46, 42))
    mediastinum = shapes.column((0, -20), (24, 60))
    lungs = np.maximum(cavity + 3, 5 - shapes.points[2])
    yield Structure("lung", minus(lungs, domes, heart, mediastinum, gap=2))
    yield Structure("blood", minus(np.maximum(heart, cavity + 3), domes, gap=3))
    yield from _spine(shapes)
    yield from _digestive_organs(shapes, np.maximum(cavity, domes) + 3)
    yield from _vessels_and_kidneys(shapes)
    yield from _small_organs(shapes)


def _trunk_wall(shapes: Shapes, cavity: Array) -> Iterator[Structure]:
    """Skin, fat, muscles and ribs around the cavity, and the fat that fills it."""
    back = blend(10, *(shapes.column((36 * side, -92), (36, 26), vary=0.5) for side, _ in SIDES))
    muscles = blend(12, cavity - 13, back)
    fat = np.float32(shapes.rng.uniform(7, 24))
    yield Structure("skin", muscles - fat - 2)
    yield Structure("fat", muscles - fat)
    yield Structure("muscle", muscles)
    yield Structure("fat", cavity)
    ribs = np.maximum(np.abs(cavity - 6) - 4, shapes.layers(30, 8, slope=0.7))
    yield Structure("bone", np.maximum(ribs, -20 - shapes.points[2]))


def _bowel(shapes: Shapes, cavity: Array) -> Iterator[Structure]:
    """Loops with fluid and gas, before and below the organs."""
    _, y, z = shapes.points
    space = np.maximum(cavity, np.maximum(z + 10 - 0.4 * y, -25 - y))
    loops = np.maximum(space, 14 * np.abs(shapes.ripples(75)) - 10)
    yield Structure("bowel", loops)
    yield Structure("content", loops + 4)
    yield Structure("gas", np.maximum(loops + 5, 10 - 10 * shapes.ripples(60)))


def _spine(shapes: Shapes) -> Iterator[Structure]:
    """Vertebrae, discs and canal, with the muscles beside them."""
    for side, _ in SIDES:
        path = [(26 * side, -58, 20), (36 * side, -56, -50), (50 * side, -46, -140)]
        yield Structure("muscle", shapes.tube(path, (4, 16, 22)))
    discs = shapes.layers(34, 8)
    arch = blend(4, shapes.column((0, -92), (17, 15), vary=0.3), shapes.column((0, -112), (5, 16), vary=0.3))
    yield Structure("bone", minus(arch, discs, gap=4))
    body = shapes.column((0, -66), (24, 18), vary=0.3)
    yield Structure("bone", body)
    yield Structure("marrow", body + 3)
    yield Structure("disc", np.maximum(body, discs))
    yield Structure("nerve", shapes.column((0, -90), (9, 8), vary=0.3))


def _digestive_organs(shapes: Shapes, space: Array) -> Iterator[Structure]:
    x, y, z = shapes.points
    path = [(-62, -6, 56), (-72, 16, 24), (-58, 44, -8), (-22, 54, -22), (22, 44, -16)]
    stomach = np.maximum(shapes.tube(path, (34, 34, 29, 22, 13)), space)
    yield Structure("bowel", stomach, "stomach")
    yield Structure("content", stomach + 5, "stomach")
    yield Structure("gas", np.maximum(stomach + 5, shapes.rng.uniform(15, 55) - y), "stomach")
    spleen = np.maximum(shapes.ellipsoid((-104, -28, 34), (36, 46, 52), tilt=(20, 0, 30)), space)
    yield Structure("spleen", minus(spleen, shapes.ellipsoid((-62, 2, 36), (40, 44, 60))), "spleen")
    liver = blend(25, shapes.ellipsoid((75, -4, 12), (62, 78, 74)), shapes.ellipsoid((6, 40, 32), (66, 36, 30)))
    liver = np.maximum(liver, np.maximum(space, 0.8 * (-0.55 * x - 0.45 * y - z - 4)))
    yield Structure("liver", liver, "liver")
    portal = [(30, 0, -10), (40, 4, 16), (84, 2, 26), (110, -20, 40)]
    yield Structure("blood", np.maximum(shapes.tube(portal, (7, 8, 6, 4)), liver + 4), "liver")
    path = [(34, 8, -42), (28, 14, -16), (-2, 20, 2), (-36, -2, 10), (-70, -16, 18)]
    yield Structure("pancreas", shapes.tube(path, (15, 15, 12, 11, 9)), "pancreas")
    yield Structure("bile", shapes.ellipsoid((56, 44, -34), (16, 19, 28), tilt=(25, 0, 0)), "gallbladder")


def _vessels_and_kidneys(shapes: Shapes) -> Iterator[Structure]:
    cava = shapes.tube([(24, -34, -140), (22, -34, 0), (24, -10, 80)], (12, 12, 12))
    yield Structure("blood", cava, "inferior_vena_cava")
    yield Structure("blood", shapes.tube([(-12, -40, 140), (-6, -34, 10), (-4, -34, -140)], (13, 11, 9)), "aorta")
    for side, name in SIDES:
        centre, tilt = np.array((66 * side, -48, -28 - 9 * side)), (-12, 14 * side, -25 * side)
        hilum = shapes.ellipsoid(centre - (24 * side, -8, 0), (14, 11, 20), tilt=tilt, vary=0.7)
        kidney = minus(shapes.ellipsoid(centre, (27, 25, 52), tilt=tilt), hilum)
        yield Structure("kidney", kidney, f"{name}_kidney")
        yield Structure("medulla", kidney + 8, f"{name}_kidney")


def _small_organs(shapes: Shapes) -> Iterator[Structure]:
    for side, name in SIDES:
        # An upside-down V, twice as large as in life, so that a grid of the default size does not lose it; in a bed of
        # fat, as the right one touches the liver.
        limbs = [(22 * side, -52, 2), (29 * side, -44, 34), (42 * side, -49, 2)]
        gland = shapes.tube(limbs, (6, 7, 6), vary=0.5)
        yield Structure("fat", gland - 4)
        yield Structure("pancreas", gland, f"{name}_adrenal_gland")
    gullet = [(-5, -14, 150), (-8, -13, 90), (-17, -8, 70), (-30, -5, 58)]
    yield Structure("bowel", shapes.tube(gullet, (10, 10, 9, 9)), "esophagus")
    veins = [(-86, -27, 38), (-58, -26, 27), (-24, -8, 18), (3, 3, 9), (24, 1, 12), (42, 3, 20)]
    yield Structure("blood", shapes.tube(veins, (6, 7, 7, 9, 9, 8)), "portal_and_splenic_veins")


def head(shapes: Shapes) -> Iterator[Structure]:
    """The head and the upper neck; the origin is between the lateral ventricles."""
    _, y, z = shapes.points
    cranium = shapes.ellipsoid((0, 0, 0), (74, 93, 82), vary=0.4)
    base = -48 + 10 * np.tanh((y - 26) / 7) + 12 * np.tanh((y + 12) / 8) - z  # three steps, the lowest at the back
    neck = np.maximum(shapes.column((0, -20), (54, 56)), z + 45)
    skin = blend(25, cranium - 7, shapes.ellipsoid((0, 48, -72), (58, 50, 60)), neck)
    yield Structure("skin", skin)
    yield Structure("fat", skin + 2)
    yield Structure("muscle", skin + 5)
    yield Structure("gas", shapes.tube([(0, 86, -62), (0, 30, -62), (0, 14, -100), (0, 12, -160)], (7, 10, 9, 9)))
    yield Structure("bone", np.maximum(cranium, base - 6))
    yield Structure("fluid", np.maximum(cranium + 7, base))
    yield from _brain(shapes, np.maximum(cranium + 9, base + 2))
    for side, name in SIDES:
        orbit = shapes.tube([(32 * side, 66, -46), (16 * side, 36, -44)], (16, 5), vary=0.4)
        yield Structure("fat", minus(orbit, np.maximum(cranium, base - 6)))
        yield Structure("fluid", shapes.ellipsoid((32 * side, 70, -46), (12, 12, 12), vary=0.4), f"{name}_eye")


def _brain(shapes: Shapes, inner: Array) -> Iterator[Structure]:
    x, y, z = shapes.points
    folds = np.abs(shapes.ripples(38))
    fissure = minus(np.abs(x) - 1.2, shapes.ellipsoid((0, -4, 6), (30, 36, 22)))
    floor = -36 - 17 * np.tanh((y + 14) / 8) + 0.3 * np.minimum(y + 40, 0)  # the back of it rests on the cerebellum
    cerebrum = minus(np.maximum(inner + 8 * np.maximum(0.45 - folds, 0), floor - z), fissure)
    yield Structure("grey_matter", cerebrum, "cerebrum")
    yield Structure("white_matter", cerebrum + 6 + 3 * folds, "cerebrum")
    cerebellum = np.maximum(shapes.ellipsoid((0, -55, -44), (52, 42, 34)), np.maximum(inner, z + 2 - floor))
    yield Structure("grey_matter", cerebellum, "cerebellum")
    yield Structure("white_matter", cerebellum + 9 + 4 * folds, "cerebellum")
    stem = shapes.tube([(0, -12, -20), (0, -13, -40), (0, -26, -72), (0, -40, -160)], (13, 15, 9, 6))
    yield Structure("nerve", stem)
    yield Structure("nerve", np.maximum(stem, -76 - z), "brainstem")
    yield Structure("fluid", shapes.ellipsoid((0, -30, -44), (7, 5, 9)), "ventricles")
    size = shapes.rng.uniform(0.8, 1.7)
    for side, _ in SIDES:
        path = [(10, 34, 6), (11, 10, 20), (14, -20, 22), (25, -42, 8), (32, -24, -14), (30, 0, -24)]
        horns = shapes.tube([(side * across, *rest) for across, *rest in path], size * np.array((6, 6, 6, 7, 4, 2)))
        yield Structure("fluid", horns, "ventricles")
    yield Structure("fluid", shapes.ellipsoid((0, -4, 0), (2.5 * size, 12, 9)), "ventricles")
