from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from dissect_monai.common import BTCV_ORGANS
from dissect_monai.visualize.classifier import figure_to_tensor
from dissect_monai.visualize.segmentation import (
    FILL,
    ORGAN_COLORS,
    organ_color,
    picture_overlay,
    segmentation_overlay,
)

CLASSES = ["liver", "right_kidney", "heart", "spleen"]
SHAPE, SPACING = (24, 20, 12), (1.0, 2.0, 5.0)


def maps() -> tuple[np.ndarray, np.ndarray]:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[12:20, 8:16, 3:9], label[4:9, 9:13, 4:8] = 1, 2
    pred = np.where(label == 2, 0, label)
    pred[3:6, 3:6, 4:7] = 4
    return label, pred


def overlay(**changes: Any) -> Any:
    label, pred = maps()
    image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    return segmentation_overlay(
        **{"image": image, "label": label, "pred": pred, "class_names": CLASSES, "spacing": SPACING, **changes}
    )


def shown(axes: Any) -> np.ndarray:
    """Grey values as a screen shows them: rows from above."""
    return np.asarray(axes.images[0].get_array())[::-1]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_figure_is_1500_pixels_wide_and_voxels_have_their_proportions() -> None:
    figure = overlay()
    picture = figure_to_tensor(figure)
    assert picture.shape[::2] == (3, 1500)
    assert (picture.min(), picture.max()) == (0, 1)
    assert [axes.get_aspect() for axes in figure.axes] == [2, 5, 2.5]


def test_planes_have_the_orientation_of_a_radiologist() -> None:
    places = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    # Columns go to the patient's left, or to the back; rows go to the back, or down.
    steps = {0: [(0, 1, -1), (1, 0, -1)], 1: [(0, 1, -1), (2, 0, -1)], 2: [(1, 1, -1), (2, 0, -1)]}
    for plane, directions in steps.items():
        for axis, direction, sign in directions:
            picture = shown(overlay(image=places[axis]).axes[plane])
            assert (np.diff(picture.astype(int), axis=direction) == sign).all()


def test_the_patients_sides_are_written_where_they_are() -> None:
    figure = overlay()
    for axes, sides in zip(figure.axes, ("RLAP", "RLSI", "APSI"), strict=True):
        found = {text.get_text(): text.get_position() for text in axes.texts if len(text.get_text()) == 1}
        left, right, top, bottom = (found[side] for side in sides)
        assert left[0] < 0.1 < 0.9 < right[0]
        assert bottom[1] < 0.1 < 0.9 < top[1]


def center(**changes: Any) -> list[int]:
    """Where the planes meet, told from images whose values are places along one axis."""
    places = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    return [int(shown(overlay(**changes, image=places[axis]).axes[2 - axis])[0, 0]) for axis in range(3)]


def test_planes_show_most_structures_or_most_of_a_single_one() -> None:
    label, pred = maps()
    x, y, z = center()
    for cut in (np.s_[:, :, z], np.s_[:, y], np.s_[x]):
        assert len(set(np.unique([label[cut], pred[cut]])) - {0}) >= 2
    assert set(np.unique([label[:, :, z], pred[:, :, z]])) == {0, 1, 2, 4}
    for value, of in ((2, label), (4, pred)):  # the label lacks the spleen
        areas = [(of == value).sum(tuple({0, 1, 2} - {axis})) for axis in range(3)]
        found = center(label=label * (label == value), pred=pred * (pred == value))
        assert [area[place] for area, place in zip(areas, found, strict=True)] == [area.max() for area in areas]


def test_predictions_are_areas_and_labels_are_outlines_of_one_colour() -> None:
    axes = overlay().axes[0]
    fills = [np.asarray(image.get_array()) for image in axes.images[1:]]
    assert len(fills) == 2  # liver and spleen; the kidney is missed
    np.testing.assert_allclose(fills[0].max((0, 1)), (*to_rgb(ORGAN_COLORS[0]), FILL))
    assert (fills[0][..., 3] > 0).sum() == 8 * 8
    outlines = [tuple(contour.get_edgecolor()[0][:3]) for contour in axes.collections]
    assert outlines == [pytest.approx(to_rgb(ORGAN_COLORS[index])) for index in (0, 1)]
    (path,) = axes.collections[0].get_paths()
    ends = path.get_extents()
    # Along the edges of the voxels of the liver, x from right to left.
    first = fills[0][..., 3].any(0).argmax()
    assert (ends.x0, ends.x1) == pytest.approx((first - 0.5, first + 7.5), abs=0.13)


def test_the_legend_names_what_is_missed_or_not_in_the_label() -> None:
    figure = overlay()
    names = ["Prediction", "Label", "liver", "right kidney (missed)", "spleen (not in the label)"]
    assert legend(figure) == names
    colors = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()[2:]]
    assert colors == [pytest.approx(to_rgb(ORGAN_COLORS[index])) for index in (0, 1, 3)]  # whatever else is there


def test_structures_fill_the_picture() -> None:
    label = np.zeros((24, 24, 24), dtype=int)
    label[10:12, 10:12, 10:12] = 1
    arguments = {"image": np.zeros(label.shape), "label": label, "pred": label, "spacing": (5.0, 5.0, 5.0)}
    assert shown(overlay(**arguments).axes[0]).shape == (8, 8)  # 15 mm more on every side


def test_a_case_without_structures_shows_its_middle() -> None:
    empty = np.zeros(SHAPE, dtype=int)
    figure = overlay(label=empty, pred=empty)
    assert shown(figure.axes[0]).shape == (20, 24)
    assert legend(figure) == ["Prediction", "Label"]


def test_the_window_is_what_is_black_and_white() -> None:
    assert overlay(window=(-160, 240)).axes[0].images[0].get_clim() == (-160, 240)
    low, high = overlay().axes[0].images[0].get_clim()
    assert 0 < low < high < np.prod(SHAPE)


def test_there_may_be_more_structures_than_colours() -> None:
    label = np.arange(24 * 20 * 12).reshape(SHAPE) % 40
    names = [f"organ {value}" for value in range(1, 40)]
    assert len(legend(overlay(label=label, pred=label, class_names=names))) == 41


TOUCHING = {  # organs of BTCV that lie beside each other
    "liver": ("gallbladder", "right_kidney", "stomach", "inferior_vena_cava", "right_adrenal_gland", "esophagus"),
    "spleen": ("stomach", "left_kidney", "pancreas", "left_adrenal_gland", "portal_and_splenic_veins"),
    "pancreas": ("stomach", "portal_and_splenic_veins", "aorta", "inferior_vena_cava", "left_kidney"),
    "stomach": ("esophagus", "left_adrenal_gland", "portal_and_splenic_veins", "gallbladder"),
    "aorta": ("inferior_vena_cava", "esophagus", "left_adrenal_gland"),
    "left_kidney": ("left_adrenal_gland",),
    "right_kidney": ("right_adrenal_gland", "gallbladder", "inferior_vena_cava"),
}


def lab(color: str, opacity: float = 1.0) -> np.ndarray:
    """CIELAB (D65) of a colour over middle grey, by the formulas of the standard."""
    mixed = opacity * np.array(to_rgb(color)) + (1 - opacity) * 0.5
    linear = np.where(mixed <= 0.04045, mixed / 12.92, ((mixed + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = np.cbrt(matrix @ linear / [0.95047, 1, 1.08883])  # no colour here is so dark that it would be linear
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_organs_have_colours_of_their_own_and_touching_ones_differ_as_areas_too() -> None:
    colors = dict(zip(BTCV_ORGANS, map(organ_color, range(1, 14)), strict=True))
    for one, other in combinations(colors.values(), 2):
        assert np.linalg.norm(lab(one) - lab(other)) > 25
    for organ, others in TOUCHING.items():
        for other in others:
            assert np.linalg.norm(lab(colors[organ], FILL) - lab(colors[other], FILL)) > 20, (organ, other)


def test_outlines_are_read_on_black() -> None:
    for color in ORGAN_COLORS:
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in to_rgb(color)]
        assert (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) / 0.05 > 3  # WCAG 1.4.11


def test_outlines_on_a_picture_are_seen_on_areas_of_their_own_colour() -> None:
    label = np.zeros((40, 30), int)
    label[10:30, 8:22] = 1
    figure = picture_overlay(np.full((3, 40, 30), 0.4), label, label, ["polyp"])
    right = figure_to_tensor(figure)[:, :, 800:]
    assert (right[:, 150:-150, 100:-100] > 0.98).all(0).any()  # a white edge, where all else is darker
