from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from dissect_monai.transforms.labels import ValuesToClassesd


def classes(values: Any, labels: Any, class_names: Sequence[str] = ("spleen", "kidneys"), **meta: Any) -> Any:
    label_map = MetaTensor(torch.as_tensor(values)[None], meta={"filename_or_obj": "/data/a.nii.gz", **meta})
    return ValuesToClassesd("label", class_names)({"label": label_map, "labels": labels})["label"]


def volume(*values: float, dtype: Any = np.uint8) -> np.ndarray:
    return np.array(values, dtype=dtype).reshape(1, 1, -1)


def test_values_become_classes_by_name() -> None:
    result = classes(volume(0, 6, 2, 40, 3, 6), {"spleen": [6], "kidneys": [2, 3], "heart": [40, 41]})
    assert result.flatten().tolist() == [0, 1, 2, 0, 2, 1]  # the heart is not learnt
    assert result.shape == (1, 1, 1, 6)
    assert result.dtype == torch.uint8


def test_names_and_not_values_decide() -> None:
    first = classes(volume(0, 1, 2), {"spleen": [1], "kidneys": [2]})
    second = classes(volume(0, 2, 1), {"kidneys": [1], "spleen": [2]})
    assert first.flatten().tolist() == second.flatten().tolist() == [0, 1, 2]


def test_a_structure_that_a_file_does_not_name_has_no_voxels() -> None:
    assert classes(volume(0, 3, 1), {"kidneys": [1], "heart": [3]}).flatten().tolist() == [0, 0, 2]


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.float32, np.float64, np.uint16])
def test_label_maps_of_whole_numbers_may_have_any_dtype(dtype: Any) -> None:
    assert classes(volume(0, 300, 2, dtype=dtype), {"spleen": [300], "kidneys": [2]}).flatten().tolist() == [0, 1, 2]


def test_affine_and_path_stay() -> None:
    affine = torch.tensor([[0.0, 2, 0, -5], [-1.5, 0, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
    label = MetaTensor(torch.ones(1, 2, 3, 4), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    item = {"label": label, "labels": {"spleen": [1]}, "image": 3}
    result = ValuesToClassesd("label", ["spleen"])(item)
    assert isinstance(result["label"], MetaTensor)
    np.testing.assert_allclose(result["label"].affine, affine)
    assert result["label"].meta["filename_or_obj"] == "a.nii.gz"
    assert result["image"] == 3
    assert item["label"] is label
    assert label.dtype == torch.float32  # the given one stays


def test_more_structures_than_uint8_can_number_are_refused() -> None:
    names = [f"s{index}" for index in range(1, 257)]
    labels = {name: [index] for index, name in enumerate(names, 1)}
    assert classes(volume(0, 1, 255), labels, names[:-1]).flatten().tolist() == [0, 1, 255]
    with pytest.raises(ValueError, match="must be at most 255, which uint8 can number, got 256"):
        ValuesToClassesd("label", names)


@pytest.mark.parametrize("labels", [{"kidneys": [2, 3], "left": [2]}, {"left": [2], "kidneys": [2, 3]}])
def test_a_region_that_is_not_learnt_may_share_values(labels: dict[str, list[int]]) -> None:
    assert classes(volume(0, 2, 3), labels, ["kidneys"]).flatten().tolist() == [0, 1, 1]
    assert classes(volume(0, 2, 3), labels, ["left"]).flatten().tolist() == [0, 1, 0]


def test_a_label_map_of_several_channels_is_refused() -> None:
    label_map = torch.zeros(2, 3, 3, 3)
    with pytest.raises(ValueError, match=r"`label map label` must have shape \(X, Y, Z\), got \(2, 3, 3, 3\)"):
        ValuesToClassesd("label", ["spleen"])({"label": label_map, "labels": {"spleen": [1]}})


def placed(start: float, spacing: float = 1.0) -> MetaTensor:
    """Four voxels along each axis, the first at that place."""
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    affine[:3, 3] = start
    return MetaTensor(torch.ones(1, 4, 4, 4), affine=affine)


@pytest.mark.parametrize(("start", "spacing"), [(0, 1), (3, 1), (-2.9, 1), (-50, 30), (1, 0.1)])
def test_a_label_map_may_cover_a_part_of_its_image(start: float, spacing: float) -> None:
    item = {"label": placed(start, spacing), "image": placed(0), "labels": {"spleen": [1]}}
    assert (ValuesToClassesd("label", ["spleen"], image_key="image")(item)["label"] == 1).all()


@pytest.mark.parametrize(("start", "spacing"), [(4, 1), (-100, 1), (500, 3)])
def test_a_label_map_beside_its_image_is_refused(start: float, spacing: float) -> None:
    item = {"label": placed(start, spacing), "image": placed(0), "labels": {"spleen": [1]}}
    message = r"label map label must lie where its image lies, got x, y, z of .* for the image: correct the affine"
    with pytest.raises(ValueError, match=message):
        ValuesToClassesd("label", ["spleen"], image_key="image")(item)
    assert ValuesToClassesd("label", ["spleen"])(item)["label"].dtype == torch.uint8  # nobody looks


def test_missing_keys_may_be_allowed() -> None:
    assert ValuesToClassesd("label", ["spleen"], allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError):
        ValuesToClassesd("label", ["spleen"])({"image": 1})


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (
            [0, 1, 9, 8],
            {"spleen": [1]},
            r"label map /data/a\.nii\.gz must hold values that .* names \(0, 1\), got 8, 9",
        ),
        ([0, -1], {"spleen": [1]}, r"/data/a\.nii\.gz must hold values .*got -1"),
        ([0, 0.5], {"spleen": [1]}, r"`label map /data/a\.nii\.gz` must hold integers, got fractions"),
        ([0, np.nan], {"spleen": [1]}, "must hold integers"),
        ([0, 1], None, r"a\.nii\.gz must come with the names of its values \(`labels`\), got None"),
        (
            [0, 1],
            {"spleen": [1], "kidneys": [2, 1]},
            "must give each value one class, got 1 in kidneys and another one",
        ),
        ([0, 1], {"spleen": [0, 1]}, "must have structures with values over 0, got 0 for spleen"),
        ([0, 1, -1], {"spleen": [1], "void": [-1]}, r"values over 0, got -1 for void"),
    ],
)
def test_label_maps_that_do_not_fit_their_names_are_refused(values: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classes(volume(*values, dtype=np.float64), labels)


def test_structures_that_are_not_learnt_may_share_a_value() -> None:
    labels = {"heart": [4, 5], "vessels": [5], "spleen": [1]}
    assert classes(volume(0, 5, 1), labels).flatten().tolist() == [0, 0, 1]
