from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from dissect_monai.transforms.labels import (
    IGNORED,
    LargestComponentsd,
    ValuesToClassesd,
    chosen_structures,
    integer_map,
    largest_components,
    values_to_classes,
)

# ---- values and classes ------------------------------------------------------------------------------------------


def classes(values: Any, labels: Any, class_names: Sequence[str] = ("spleen", "kidneys"), **meta: Any) -> Any:
    label_map = MetaTensor(torch.as_tensor(values)[None], meta={"filename_or_obj": "/data/a.nii.gz", **meta})
    return ValuesToClassesd("label", class_names)({"label": label_map, "labels": labels})["label"]


def volume(*values: float, dtype: Any = np.uint8) -> np.ndarray:
    return np.array(values, dtype=dtype).reshape(1, 1, -1)


@pytest.mark.parametrize(
    ("values", "labels", "names", "expected"),
    [
        ([0, 6, 2, 40, 3], {"spleen": [6], "kidneys": [2, 3], "heart": [40]}, ["spleen", "kidneys"], [0, 1, 2, 0, 2]),
        ([0, 3, 1], {"kidneys": [1], "heart": [3]}, ["spleen", "kidneys"], [0, 0, 2]),
        # What is not learnt may share values, with what is and with what is not.
        ([0, 2, 3], {"kidneys": [2, 3], "left": [2]}, ["kidneys"], [0, 1, 1]),
        ([0, 2, 3], {"left": [2], "kidneys": [2, 3]}, ["left"], [0, 1, 0]),
        ([0, 5, 1], {"heart": [4, 5], "vessels": [5], "spleen": [1]}, ["spleen"], [0, 0, 1]),
        ([0, 1, 255], {f"s{index}": [index] for index in range(1, 256)}, [f"s{i}" for i in range(1, 256)], [0, 1, 255]),
    ],
)
def test_values_become_classes_by_name(values: Any, labels: Any, names: list[str], expected: list[int]) -> None:
    result = classes(volume(*values), labels, names)
    assert result.flatten().tolist() == expected
    assert (result.shape, result.dtype) == ((1, 1, 1, len(values)), torch.uint8)


def test_values_that_scale_factors_have_moved_are_rounded_and_none_further_off() -> None:
    values = volume(0, 1.0000153, 1.9995, 300.0009, dtype=np.float32)
    assert classes(values, {"spleen": [1], "kidneys": [2, 300]}).flatten().tolist() == [0, 1, 2, 2]
    result = ValuesToClassesd("label", None)({"label": torch.as_tensor(values)[None]})["label"]
    assert (result.flatten().tolist(), result.dtype) == ([0, 1, 2, 300], torch.int32)


def test_voxels_that_are_not_annotated_are_no_class() -> None:
    item = {"label": torch.tensor([[[[0, 1, 3, 2]]]]), "labels": {"spleen": [1], "liver": [2]}, "ignored": [3]}
    assert ValuesToClassesd("label", ["spleen"])(item)["label"].flatten().tolist() == [0, 1, IGNORED, 0]
    many = [f"s{index}" for index in range(255)]
    for labels, names, message in (
        ({"spleen": [3]}, ["spleen"], "one class, got 3"), ({each: [4] for each in many}, many, "at most 254, which"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ValuesToClassesd("label", names)({**item, "labels": labels})


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.uint16])
def test_label_maps_of_whole_numbers_may_have_any_dtype(dtype: Any) -> None:
    assert classes(volume(0, 300, 2, dtype=dtype), {"spleen": [300], "kidneys": [2]}).flatten().tolist() == [0, 1, 2]


def test_affine_path_and_the_given_item_stay() -> None:
    affine = torch.tensor([[0.0, 2, 0, -5], [-1.5, 0, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
    label = MetaTensor(torch.ones(1, 2, 3, 4), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    item = {"label": label, "labels": {"spleen": [1]}, "image": 3}
    result = ValuesToClassesd("label", ["spleen"])(item)
    np.testing.assert_allclose(result["label"].affine, affine)
    assert (result["label"].meta["filename_or_obj"], result["image"]) == ("a.nii.gz", 3)
    assert item["label"] is label
    assert label.dtype == torch.float32


def test_several_channels_and_more_structures_than_uint8_can_number_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at most 255, which uint8 can number, got 256"):
        ValuesToClassesd("label", [f"s{index}" for index in range(256)])
    label_map = torch.zeros(2, 3, 3, 3)
    with pytest.raises(ValueError, match=r"`label map label` must have shape \(X, Y, Z\), got \(2, 3, 3, 3\)"):
        ValuesToClassesd("label", ["spleen"])({"label": label_map, "labels": {"spleen": [1]}})


def test_a_label_map_must_be_on_the_grid_of_its_image() -> None:
    affine = torch.diag(torch.tensor([2.0, 2, 3, 1], dtype=torch.float64))
    item = {"label": MetaTensor(torch.ones(1, 4, 5, 6), affine=torch.eye(4)), "labels": {"spleen": [1]}}
    item["image"] = MetaTensor(torch.ones(1, 4, 5, 6), affine=affine)
    with pytest.raises(ValueError, match="label map label must be on the grid of its image, got shape"):
        ValuesToClassesd("label", ["spleen"], image_key="image")(item)
    assert ValuesToClassesd("label", ["spleen"])(item)["label"].dtype == torch.uint8  # nobody looks
    item["label"].affine = affine
    assert (ValuesToClassesd("label", ["spleen"], image_key="image")(item)["label"] == 1).all()


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([0, 1, 9, 8], {"spleen": [1]}, r"label map /data/a\.nii\.gz must hold values .* names \(0, 1\), got 8, 9"),
        ([0, -1], {"spleen": [1]}, r"/data/a\.nii\.gz must hold values .*got -1"),
        ([0, 0.5], {"spleen": [1]}, r"`label map /data/a\.nii\.gz` must hold integers, got fractions \(0\.5\)"),
        (
            [0, 0.996, 1.002],
            {"spleen": [1]},
            r"fractions \(0\.996, 1\.002\): it was saved with a scale factor .* or resam",
        ),
        ([0, np.nan], {"spleen": [1]}, "must hold integers"),
        ([0, 1], None, r"a\.nii\.gz must come with the names of its values \(`labels`\), got None"),
        ([0, 1], {"spleen": [1], "kidneys": [2, 1]}, "give each value one class, got 1 in kidneys and another one"),
        ([0, 1], {"spleen": [0, 1]}, "must have structures with values over 0, got 0 for spleen"),
        ([0, 1, -1], {"spleen": [1], "void": [-1]}, r"values over 0, got -1 for void"),
    ],
)
def test_label_maps_that_do_not_fit_their_names_are_refused(values: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classes(volume(*values, dtype=np.float64), labels)


def test_values_without_a_name_become_background_and_are_told() -> None:
    found, unknown = values_to_classes(np.array([-1, 0, 5, 2, 9, 70_000]), {"a": [5], "b": [1, 2]}, ["b", "a"], "here")
    assert (found.tolist(), found.dtype, unknown) == ([0, 0, 2, 1, 0, 0], np.uint8, [-1, 9, 70_000])


# ---- largest components ------------------------------------------------------------------------------------------


def box(start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros((22, 20, 18), dtype=bool)
    mask[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = True
    return mask


def test_only_the_largest_part_of_a_structure_stays() -> None:
    large, small, other = box((1, 1, 1), (5, 5, 5)), box((8, 8, 8), (10, 10, 10)), box((5, 5, 5), (6, 6, 6))
    label = large * 1 + small * 1 + other * 1  # the corner of `large` touches `other`
    islands = box((12, 1, 1), (13, 2, 2)) * 2 + box((15, 1, 1), (17, 2, 2)) * 2
    cleaned = largest_components(label + islands, [1])
    np.testing.assert_array_equal(cleaned, large * 1 + islands)
    np.testing.assert_array_equal(largest_components(label + islands, [1, 2])[15:17, 1, 1], [2, 2])
    assert label[8, 8, 8] == 1  # the given one stays


def test_nothing_to_clean_is_left_as_it_is() -> None:
    label = np.random.default_rng(0).integers(0, 2, (4, 5, 6)).astype(np.uint8)
    assert integer_map("label", label) is label
    assert largest_components(label, []).dtype == np.uint8
    np.testing.assert_array_equal(largest_components(label, []), label)
    assert not largest_components(np.zeros((3, 3, 3)), [1]).any()
    with pytest.raises(ValueError, match="`label_map` must hold integers"):
        largest_components(label * 0.5, [1])


# ---- chosen structures -------------------------------------------------------------------------------------------


STRUCTURES = ["spleen", "liver"]


@pytest.mark.parametrize(
    ("names", "expected"), [("none", []), ("all", STRUCTURES), ("liver", ["liver"]), (STRUCTURES[::-1],) * 2, ([], [])]
)
def test_structures_are_chosen_by_name(names: Any, expected: list[str]) -> None:
    assert chosen_structures(names, STRUCTURES) == expected


@pytest.mark.parametrize(("names", "got"), [(["liver", "heart", "lung"], "heart, lung"), (3, "3")])
def test_structures_that_are_unknown_are_refused(names: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"must be none, all, or among spleen, liver, got {got}"):
        chosen_structures(names, STRUCTURES)


@pytest.mark.parametrize("structures", [["liver"], STRUCTURES, []])
def test_only_the_largest_part_of_the_chosen_structures_stays(structures: list[str]) -> None:
    label = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    label[0, 0, 0, 0], label[0, 2:5, 0, 0] = 1, 1
    label[0, 0, 4, 4], label[0, 2:5, 4, 4] = 2, 2
    given = MetaTensor(label.clone(), affine=torch.diag(torch.tensor([1, 2, 3, 1.0])), meta={"filename_or_obj": "a"})
    item = LargestComponentsd("pred", STRUCTURES, structures)({"pred": given, "other": 1})
    result = item["pred"]
    for value, name in enumerate(STRUCTURES, 1):
        assert int((result == value).sum()) == (3 if name in structures else 4)
    assert (result.dtype, item["other"], result.meta["filename_or_obj"]) == (torch.uint8, 1, "a")
    np.testing.assert_allclose(result.affine, given.affine)
    assert torch.equal(given.as_tensor(), label)
