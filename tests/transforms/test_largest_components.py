from __future__ import annotations

import numpy as np
import pytest

from dissect_monai.transforms.labels import integer_map, largest_components


def box(start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros((22, 20, 18), dtype=bool)
    mask[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = True
    return mask


def test_only_the_largest_part_of_a_structure_stays() -> None:
    large, small, other = box((1, 1, 1), (5, 5, 5)), box((8, 8, 8), (10, 10, 10)), box((5, 5, 5), (6, 6, 6))
    label = large * 1 + small * 1 + other * 1  # the corner of `large` touches `other`
    islands = box((12, 1, 1), (13, 2, 2)) * 2 + box((15, 1, 1), (17, 2, 2)) * 2
    cleaned = largest_components(label + islands, [[1]])
    np.testing.assert_array_equal(cleaned, large * 1 + islands)
    np.testing.assert_array_equal(largest_components(label + islands, [[1], [2]])[15:17, 1, 1], [2, 2])
    assert label[8, 8, 8] == 1  # the given one stays


def test_values_of_one_structure_are_connected_to_each_other() -> None:
    label = box((1, 1, 1), (3, 3, 3)) * 2 + box((3, 1, 1), (5, 3, 3)) * 3 + box((8, 1, 1), (11, 3, 3)) * 2
    cleaned = largest_components(label, [[2, 3], [7]])
    np.testing.assert_array_equal(cleaned, label * (np.arange(22) < 6)[:, None, None])


def test_nothing_to_clean_is_left_as_it_is() -> None:
    label = np.random.default_rng(0).integers(0, 2, (4, 5, 6)).astype(np.uint8)
    assert largest_components(label, []).dtype == np.uint8
    np.testing.assert_array_equal(largest_components(label, []), label)
    assert not largest_components(np.zeros((3, 3, 3)), [[1]]).any()
    with pytest.raises(ValueError, match="`label_map` must hold integers"):
        largest_components(label * 0.5, [[1]])


def test_a_map_of_integers_is_not_copied() -> None:
    label = np.zeros((2, 2, 2), dtype=np.int16)
    assert integer_map("label", label) is label
