from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, list_data_collate
from monai.transforms import RandCropByPosNegLabeld, Spacingd

from dissect_monai.data.datasets import cached_dataset
from dissect_monai.data.sampling import SeededDataset, SeededIndex
from dissect_monai.transforms.intensity import ForegroundIndicesd, NormalizeModalityd, is_ct, sample_voxels
from dissect_monai.transforms.spatial import AdaptiveSpacingd


def normalized(image: Any, modality: str | None = "MR", **arguments: Any) -> torch.Tensor:
    item = {"image": torch.as_tensor(image, dtype=torch.float32), "modality": modality, "other": 3}
    result = NormalizeModalityd("image", **arguments)(item)
    assert (result["modality"], result["other"]) == (modality, 3)
    return result["image"]


def body(air: float = 0.0, noise: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """A cube of values from 100 to 200 in the middle of three times as much air."""
    rng = np.random.default_rng(0)
    image = air + noise * rng.random((1, 16, 16, 16))
    image[:, 3:13, 3:13, 3:13] = rng.uniform(100, 200, (1, 10, 10, 10))
    return torch.as_tensor(image * scale)


# --- intensities


def test_ct_is_scaled_by_its_window() -> None:
    hounsfield = [[-1000.0, -125.0, -25.0, 75.0, 275.0, 3000.0]]
    expected = torch.tensor([[0, 0, 0.25, 0.5, 1, 1]])
    torch.testing.assert_close(normalized(hounsfield, "CT"), expected)
    torch.testing.assert_close(normalized(hounsfield, "ct angiography"), expected)
    torch.testing.assert_close(normalized(hounsfield, "CT", b_max=255), expected * 255)
    window = torch.tensor([[0, 0.875, 0.975, 1, 1, 1]])
    torch.testing.assert_close(normalized(hounsfield, "CT", a_min=-1000, a_max=0), window)


@pytest.mark.parametrize("modality", ["MR", "unknown", "PET", None])
def test_other_modalities_are_scaled_by_their_own_percentiles(modality: str | None) -> None:
    image = normalized(body(), modality)
    inside = image[:, 3:13, 3:13, 3:13]
    assert (image.min(), image.max()) == (0, 1)
    assert float(inside.mean()) == pytest.approx(0.5, abs=0.02)
    assert float((inside == 0).float().mean()) == pytest.approx(0.005, abs=0.003)
    assert float((inside == 1).float().mean()) == pytest.approx(0.005, abs=0.003)


@pytest.mark.parametrize(("air", "noise", "scale"), [(0, 8, 1), (-7, 5, 1), (0, 0, 1e-3), (0, 3, 50)])
def test_amount_and_noise_of_air_and_unit_do_not_count(air: float, noise: float, scale: float) -> None:
    plain, other = normalized(body()), normalized(body(air, noise, scale))
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-3)
    assert (other[:, 0] == 0).all()
    without_air = normalized(body()[:, 3:13, 3:13, 3:13])
    torch.testing.assert_close(without_air, plain[:, 3:13, 3:13, 3:13], rtol=0, atol=0.06)


def test_a_few_outliers_do_not_darken_the_rest() -> None:
    image = body()
    image[0, 5, 5, 5:8] = 10_000
    assert float((normalized(image) - normalized(body())).abs().median()) < 0.01


def test_a_volume_mostly_of_air_keeps_its_contrast() -> None:
    image = torch.zeros(1, 40, 40, 40)
    image[0, :3, :3, :3] = torch.arange(1, 28).view(3, 3, 3)
    assert float(normalized(image).max()) == 1
    assert len(normalized(image).unique()) > 20


def test_metadata_stay() -> None:
    image = MetaTensor(body(), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    image = NormalizeModalityd("image")({"image": image})["image"]
    assert isinstance(image, MetaTensor)
    np.testing.assert_allclose(image.pixdim, [1, 2, 3])


@pytest.mark.parametrize(
    ("values", "modality"), [([[5.0] * 9], "MR"), ([[-1000.0, -125.0]], "CT"), ([[0.0] * 9], None)]
)
def test_a_volume_of_one_value_is_refused(values: Any, modality: str | None) -> None:
    with pytest.raises(ValueError, match=r"must have values between .*: correct its modality, or remove it"):
        normalized(values, modality)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a_min": 5, "a_max": 5}, "`a_min` must be below `a_max`, got 5 and 5"),
        ({"lower": 60, "upper": 50}, "`lower` and `upper` must be increasing percentages, got 60 and 50"),
        ({"upper": 101}, "`lower` and `upper` must be increasing percentages"),
        ({"b_max": 0}, "`b_max` must be over 0, got 0"),
    ],
)
def test_bad_ranges_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormalizeModalityd("image", **arguments)


def test_only_hounsfield_units_are_ct() -> None:
    assert all(map(is_ct, ["CT", " ct", "CTA"]))
    assert not any(map(is_ct, ["CBCT", "MR", "T1", "unknown", None, ""]))


def test_a_sample_has_the_percentiles_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(size=(150, 128, 128)) + np.linspace(0, 3, 128)
    sample = sample_voxels(values)
    assert sample.size < 2**20
    np.testing.assert_allclose(np.percentile(sample, [1, 50, 99]), np.percentile(values, [1, 50, 99]), atol=0.02)
    assert sample_voxels(np.ones((5, 5))).size == 25


def test_every_channel_is_scaled_by_its_own_modality() -> None:
    hounsfield = torch.linspace(-200, 400, body().numel()).view_as(body())
    both = torch.cat([hounsfield, body(scale=7).float()])
    expected = [normalized(hounsfield, "CT"), normalized(body(scale=7), "MR")]
    for names in (["CT", "MR"], ("CT", None)):
        torch.testing.assert_close(normalized(both, names), torch.cat(expected))
    swapped = normalized(both.flip(0), ["MR", "CT"])
    torch.testing.assert_close(swapped, torch.cat(expected).flip(0))


def test_channels_keep_metadata_and_fractions_of_whatever_type_they_come() -> None:
    values = torch.stack([torch.linspace(-200, 400, 60).view(3, 4, 5), torch.arange(60.0).view(3, 4, 5)])
    image = MetaTensor(values.to(torch.int16), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    result = NormalizeModalityd("image")({"image": image, "modality": ["CT", "MR"]})["image"]
    assert isinstance(result, MetaTensor)
    np.testing.assert_allclose(result.pixdim, [1, 2, 3])
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    expected = NormalizeModalityd("image")({"image": image[1:], "modality": "MR"})["image"]
    torch.testing.assert_close(result[1:].as_tensor(), expected.as_tensor())


@pytest.mark.parametrize("modality", [["CT"], "CT", ["CT", "MR", "PET"]])
def test_another_number_of_channels_than_modalities_is_refused(modality: Any) -> None:
    both = torch.cat([body(), body()])
    names = modality if isinstance(modality, str) else ", ".join(modality)
    message = rf"a channel for each of the modalities {names}, got 2: correct `modality` in dataset\.json"
    with pytest.raises(ValueError, match=message):
        normalized(both, modality)


def test_items_that_say_no_modality_have_the_one_that_is_given() -> None:
    hounsfield = torch.tensor([[-1000.0, -125.0, -25.0, 75.0, 275.0, 3000.0]])
    expected = normalized(hounsfield, "CT")
    image = NormalizeModalityd("image", modality="CT")({"image": hounsfield})["image"]
    torch.testing.assert_close(image, expected)
    both = NormalizeModalityd("image", modality=["CT", "CT"])({"image": torch.cat([hounsfield] * 2)})["image"]
    torch.testing.assert_close(both, torch.cat([expected] * 2))
    own = NormalizeModalityd("image", modality="CT")({"image": body(), "modality": "MR"})["image"]
    torch.testing.assert_close(own, normalized(body(), "MR"))


# --- spacing


def volume(shape: tuple[int, ...], spacing: tuple[float, ...]) -> MetaTensor:
    values = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    return MetaTensor(values, affine=torch.diag(torch.tensor([*spacing, 1.0])))


def spaced(image: MetaTensor, pixdim: list[float], spatial_size: list[int]) -> MetaTensor:
    result = AdaptiveSpacingd("image", pixdim, spatial_size)({"image": image})["image"]
    assert result.dtype == torch.float32
    return result


def test_volumes_larger_than_a_patch_get_the_common_spacing() -> None:
    image = volume((20, 31, 8), (1, 1, 4))
    resampled = spaced(image, [2, 2, 2], [8, 8, 8])
    assert resampled.shape == (1, 10, 16, 15)  # distances between the centres of voxels are kept
    expected = Spacingd("image", pixdim=[2, 2, 2])({"image": image})["image"]
    torch.testing.assert_close(resampled.as_tensor(), expected.as_tensor(), rtol=0, atol=1e-4)


def test_a_volume_smaller_than_a_patch_is_magnified_to_its_sides() -> None:
    image = spaced(volume((9, 16, 8), (1, 1, 1)), [2, 2, 2], [16, 16, 16])
    assert image.shape == (1, 9, 16, 8)  # as it was, for 16 voxels of 1 mm fill the side
    np.testing.assert_allclose(image.pixdim, [1, 1, 1], rtol=1e-5)
    image = spaced(volume((9, 16, 8), (1, 1, 1)), [2, 2, 4], [31, 31, 15])
    assert image.shape == (1, 17, 31, 8)
    np.testing.assert_allclose(image.pixdim, [0.5, 0.5, 1], rtol=1e-5)


def test_one_side_as_long_as_the_patch_is_enough() -> None:
    assert spaced(volume((41, 11, 5), (1, 1, 1)), [2, 2, 2], [16, 16, 16]).shape == (1, 21, 6, 3)


def test_slices_stay_where_the_spacing_is_left_or_the_patch_is_one() -> None:
    image = volume((10, 10, 5), (1, 1, 8))
    kept = spaced(image, [2, 2, -1], [19, 19, 1])
    assert kept.shape == (1, 19, 19, 5)
    np.testing.assert_allclose(kept.pixdim, [0.5, 0.5, 8], rtol=1e-5)
    np.testing.assert_allclose(spaced(image, [2, 2, 4], [19, 19, 1]).pixdim, [0.5, 0.5, 4], rtol=1e-5)


def test_a_volume_without_extent_is_left_as_it_is() -> None:
    assert spaced(volume((1, 1, 5), (1, 1, 8)), [2, 2, -1], [19, 19, 1]).shape == (1, 1, 1, 5)


@pytest.mark.parametrize(("pixdim", "spatial_size"), [([1, 1], [8, 8, 8]), ([1, 1, 1], [8, 8]), ([1, 1, 1], [8, 8, 0])])
def test_sizes_of_other_dimensions_are_refused(pixdim: list[float], spatial_size: list[int]) -> None:
    with pytest.raises(ValueError, match="`pixdim` and `spatial_size` must hold three values"):
        AdaptiveSpacingd("image", pixdim, spatial_size)


# --- the whole chain, as a bundle has it

TRANSFORMS = [
    {
        "_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True,
        "reader": {"_target_": "dissect_monai.ImageFileReader", "spatial_dims": 3},
    },
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    {"_target_": "dissect_monai.NormalizeModalityd", "keys": "image", "b_max": 255},
    {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "allow_smaller": True},
    {
        "_target_": "dissect_monai.AdaptiveSpacingd", "keys": "image", "pixdim": "@pixdim", "spatial_size": "@crop_size"
    },
    {"_target_": "SpatialPadd", "keys": "image", "spatial_size": "@crop_size"},
    {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.uint8", "track_meta": False},
    {"_target_": "CopyItemsd", "keys": "image", "names": "content"},
    {"_target_": "AsDiscreted", "keys": "content", "threshold": 13},
    {"_target_": "ClassesToIndicesd", "keys": "content", "num_classes": 2, "max_samples_per_class": 4096},
    {"_target_": "SelectItemsd", "keys": ["image", "content_cls_indices", "task_id", "group_id"]},
    {
        "_target_": "RandCropByLabelClassesd", "keys": "image", "label_key": "image",
        "indices_key": "content_cls_indices", "ratios": [0, 1], "num_classes": 2, "warn": False,
        "spatial_size": "@crop_size",
    },
    {"_target_": "SqueezeDimd", "_disabled_": "$@spatial_dims == 3", "keys": "image", "dim": -1},
    {"_target_": "EnsureTyped", "keys": "image", "track_meta": False},
]  # fmt: skip


def chain(spatial_dims: int, patch_size: list[int], pixdim: list[float]) -> Any:
    config = {
        "imports": ["$import torch", "$import dissect_monai"],
        "spatial_dims": spatial_dims,
        "pixdim": pixdim,
        "patch_size": patch_size,
        "crop_size": "$@patch_size + [1] * (3 - @spatial_dims)",
        "preprocessing": {"_target_": "Compose", "transforms": TRANSFORMS},
    }
    return ConfigParser(config).get_parsed_content("preprocessing")


def write_body(path: Path, low: float, size: int = 24) -> dict[str, Any]:
    """A body in one corner, with air around and under it, in a file whose first axis runs to the left."""
    rng = np.random.default_rng(0)
    image = np.full((size, size, size // 2), float(low))
    half = size // 2
    image[2:half, 2:half, 1 : size // 3] = rng.uniform(20, 100, (half - 2, half - 2, size // 3 - 1))
    nib.save(nib.Nifti1Image(image, np.diag([-1.0, 1, 2, 1])), path)
    return {"image": str(path), "task": "a", "task_id": 0, "group_id": 0}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_patches_have_content_and_one_size(tmp_path: Path, spatial_dims: int) -> None:
    items = [
        {**write_body(tmp_path / "a.nii.gz", low=-1000, size=48), "modality": "CT"},
        {**write_body(tmp_path / "b.nii.gz", low=0), "modality": "MR"},
        {**write_body(tmp_path / "c.nii.gz", low=0, size=8), "modality": "MR"},
    ]
    patch_size = [8, 8, 6][:spatial_dims]
    dataset = SeededDataset(cached_dataset(items, chain(spatial_dims, patch_size, [1.5, 1.5, 2.0])))
    patches = [dataset[SeededIndex(number % 3, number)] for number in range(60)]
    images = list_data_collate(patches)["image"]
    assert images.shape == (60, 1, *patch_size)
    assert images.dtype == torch.uint8
    assert type(images) is torch.Tensor
    content = (images >= 13).flatten(1).float().mean(1)
    assert content.min() > 0.1
    assert content.mean() > 0.5
    assert len(images[::3].flatten(1).unique(dim=0)) > 10  # crops of one volume at different places
    assert {(int(patch["task_id"]), int(patch["group_id"])) for [patch] in patches} == {(0, 0)}


def test_cached_volumes_are_small(tmp_path: Path) -> None:
    item = {**write_body(tmp_path / "a.nii.gz", low=-1000), "modality": "CT"}
    dataset = cached_dataset([item], chain(3, [8, 8, 4], [1.0, 1.0, 2.0]))
    (cached,) = dataset._cache
    assert cached["image"].dtype == torch.uint8
    assert cached["image"].shape == (1, 10, 10, 7)  # the body without its air
    assert type(cached["image"]) is torch.Tensor


def test_a_file_that_cannot_be_scaled_is_named(tmp_path: Path) -> None:
    items = [{**write_body(tmp_path / "a.nii.gz", low=-1000), "modality": "CT"}]
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4)), np.eye(4)), tmp_path / "b.nii.gz")
    items.append({**items[0], "image": str(tmp_path / "b.nii.gz"), "modality": "MR"})
    with pytest.raises(ValueError, match=r"got 1 of 2 that cannot:\n .*b\.nii\.gz: a volume must have values"):
        cached_dataset(items, chain(3, [8, 8, 4], [1.0, 1.0, 2.0]))


# --- where patches are drawn


def test_patches_are_centred_where_a_volume_is_not_air() -> None:
    image = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    image[:, 4:9, 6:12, 3:5] = 7
    item = ForegroundIndicesd("image", max_indices=17)({"image": image, "other": 3})
    places = item["image_fg_indices"]
    assert (len(places), item["other"]) == (17, 3)
    assert (image.flatten()[places] == 7).all()
    columns = np.unravel_index(places, (20, 20, 20))
    assert [len(np.unique(axis)) for axis in columns] == [5, 6, 2]
    keys = {"fg_indices_key": "image_fg_indices", "bg_indices_key": "image_bg_indices"}
    crop = RandCropByPosNegLabeld("image", "image", (1, 1, 1), neg=0, **keys).set_random_state(0)
    assert all((crop(dict(item))[0]["image"] == 7).all() for _ in range(20))
    single = {**item, "image_fg_indices": places[:1], "image_bg_indices": places[:1]}
    marked = image.clone()
    marked.flatten()[places[0]] = 9
    assert crop({**single, "image": marked})[0]["image"] == 9


def test_keeps_every_place_of_a_small_volume() -> None:
    image = torch.zeros(2, 3, 3, 3)
    image[1, 1, 1, 1] = 0.5
    assert ForegroundIndicesd("image")({"image": image})["image_fg_indices"].tolist() == [13]


def test_refuses_a_volume_of_air_and_a_bad_number_of_places() -> None:
    with pytest.raises(ValueError, match="must have voxels above 0 after scaling, got none"):
        ForegroundIndicesd("image")({"image": torch.zeros(1, 3, 3, 3)})
    with pytest.raises(ValueError, match="`max_indices` must be at least 1, got 0"):
        ForegroundIndicesd("image", max_indices=0)
