import re
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, Invertd, LoadImaged, Orientationd, Spacingd, SpatialPadd
from torch import Tensor

from dissect_monai.common import PICTURE, PLANES, acquired_plane
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.transforms import spatial
from dissect_monai.transforms.labels import ValuesToClassesd
from dissect_monai.transforms.spatial import (
    AdaptiveSpacingd,
    OriginalGridd,
    SliceOrientationd,
    refuse_other_grid,
    same_grid,
    to_original_grid,
)

SHAPE, SPACING = (22, 17, 13), (1.0, 1.4, 2.5)
ORIENTATIONS = list(product(permutations(range(3)), product((1, -1), repeat=3)))
every_orientation = pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)


def affine_of(
    axes: tuple[int, ...] = (0, 1, 2), signs: tuple[int, ...] = (1, 1, 1), spacing: tuple[float, ...] = SPACING
) -> np.ndarray:
    """Axis i of the array runs along axis `axes[i]` of the patient, or against it."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, column] = sign * spacing[column]
    affine[:3, 3] = (-31.5, 12.25, 7.0)
    return affine


def label_map(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A large and a small structure, at no symmetric place, with air on every side."""
    places = np.stack(np.meshgrid(*(np.arange(size) / (size - 1) for size in shape), indexing="ij"), -1)
    label = np.zeros(shape, dtype=np.uint8)
    label[(((places - [0.42, 0.45, 0.55]) / [0.36, 0.34, 0.34]) ** 2).sum(-1) < 1] = 1
    label[(((places - [0.55, 0.3, 0.4]) / [0.16, 0.18, 0.2]) ** 2).sum(-1) < 1] = 2
    return label


def preprocessed(label: np.ndarray, affine: np.ndarray, pixdim: tuple[float, ...] | None, mode: str) -> MetaTensor:
    """As a bundle prepares an image: in RAS, resampled, without its air, and padded."""
    channels = label[None] if mode == "nearest" else np.stack([label == value for value in range(3)])
    item = {"image": MetaTensor(torch.as_tensor(channels, dtype=torch.float32), affine=torch.as_tensor(affine))}
    steps = [
        Orientationd("image", axcodes="RAS", labels=None),
        *([Spacingd("image", pixdim, mode=mode)] if pixdim else []),
        CropForegroundd("image", source_key="image", select_fn=foreground, allow_smaller=True),
        SpatialPadd("image", spatial_size=(21, 19, 18)),
    ]
    return Compose(steps)(item)["image"]


def foreground(image: Tensor) -> Tensor:
    return image[-1:] > 0 if len(image) == 1 else image[1:].sum(0, keepdim=True) > 0.01


def logits_of(channels: MetaTensor) -> MetaTensor:
    """Logits whose largest is that of the class; padding, which has no class, becomes background."""
    channels[0] += 1 - channels.sum(0)
    return channels * 20 - 10


def dice(first: Any, second: Any, value: int) -> float:
    first, second = np.asarray(first) == value, np.asarray(second) == value
    return 2 * (first & second).sum() / (first.sum() + second.sum())


@every_orientation
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_what_was_not_resampled_comes_back_exactly(axes: Any, signs: Any, mode: str) -> None:
    label, affine = label_map(), affine_of(axes, signs)
    pred = preprocessed(label, affine, None, mode)
    restored = to_original_grid(pred if mode == "nearest" else logits_of(pred), SHAPE, affine)
    np.testing.assert_array_equal(restored[0], label)


@every_orientation
def test_logits_of_another_spacing_come_back_to_the_label(axes: Any, signs: Any) -> None:
    label, affine = label_map(), affine_of(axes, signs)
    pred = preprocessed(label, affine, (1.3, 1.3, 1.6), "bilinear")
    np.testing.assert_allclose(pred.pixdim, [1.3, 1.3, 1.6])
    restored = to_original_grid(logits_of(pred), SHAPE, affine)
    assert restored.shape == (1, *SHAPE)
    assert dice(restored[0], label, 1) > 0.95
    assert dice(restored[0], label, 2) > 0.9
    for value in (1, 2):  # nothing is shifted
        shift = np.argwhere(restored[0].numpy() == value).mean(0) - np.argwhere(label == value).mean(0)
        assert np.abs(shift).max() < 0.15


def test_oblique_volumes_come_back() -> None:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]]
    label, affine = label_map(), turn @ affine_of((1, 2, 0), (-1, 1, -1))
    exact = to_original_grid(preprocessed(label, affine, None, "nearest"), SHAPE, affine)
    np.testing.assert_array_equal(exact[0], label)
    restored = to_original_grid(logits_of(preprocessed(label, affine, (1.3, 1.3, 1.6), "bilinear")), SHAPE, affine)
    assert dice(restored[0], label, 1) > 0.95


def test_agrees_with_monais_inversion(tmp_path: Path) -> None:
    affine = affine_of((2, 0, 1), (-1, 1, 1))
    nib.save(nib.Nifti1Image(label_map(), affine), tmp_path / "a.nii.gz")
    steps = Compose([
        LoadImaged("image", reader=ImageFileReader(), ensure_channel_first=True),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", (1.3, 1.2, 1.6), mode="nearest"),
        CropForegroundd("image", source_key="image", allow_smaller=True),
        SpatialPadd("image", spatial_size=(20, 18, 16)),
    ])  # fmt: skip
    item = steps({"image": str(tmp_path / "a.nii.gz")})
    item["pred"] = item["image"].clone()
    inverted = Invertd("pred", transform=steps, orig_keys="image", nearest_interp=True)(dict(item))["pred"]
    restored = OriginalGridd("pred")(dict(item))["pred"]
    assert restored.shape == inverted.shape
    np.testing.assert_allclose(restored.affine, inverted.affine)
    assert dice(restored, inverted, 1) > 0.97
    assert dice(restored, label_map()[None], 1) >= dice(inverted, label_map()[None], 1) - 0.01


def test_logits_are_interpolated_linearly_before_the_largest_wins() -> None:
    logits = MetaTensor(torch.randn(4, 9, 8, 7, generator=torch.Generator().manual_seed(0)))
    finer = np.diag([0.5, 0.5, 0.5, 1])
    finer[:3, 3] = -0.25
    expected = F.interpolate(logits.as_tensor()[None], scale_factor=2, mode="trilinear")[0].argmax(0)
    restored = to_original_grid(logits, (18, 16, 14), finer)
    assert restored.dtype == torch.uint8
    assert (restored[0] == expected).float().mean() > 0.999  # rounding, where two are equal


def test_what_lies_beyond_the_prediction_is_background() -> None:
    affine, meta = np.diag([2.0, 2, 2, 1]), {"filename_or_obj": "a.nii"}
    ones = MetaTensor(torch.full((1, 4, 4, 4), 7, dtype=torch.int16), affine=affine, meta=meta)
    origin = np.eye(4)
    origin[:3, 3] = -5
    restored = to_original_grid(ones, (16, 16, 16), origin)
    assert restored.dtype == torch.int16
    assert restored.meta["filename_or_obj"] == "a.nii"
    np.testing.assert_allclose(restored.affine, origin)
    expected = torch.zeros(16, 16, 16)
    expected[4:13, 4:13, 4:13] = 7  # -1 to 7 mm: the voxels, from edge to edge
    torch.testing.assert_close(restored[0].as_tensor().float(), expected)
    origin[:3, 3] = 50
    assert not to_original_grid(ones, (5, 5, 5), origin).any()


def test_slabs_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    affine, source = affine_of((2, 1, 0), (1, -1, 1), (0.5, 0.4, 0.6)), affine_of(spacing=(1.0, 1.0, 1.0))
    source[:3, 3] = affine[:3, 3] - (0, 8, 0)
    logits = MetaTensor(torch.randn(5, 10, 9, 8), affine=source)
    whole = to_original_grid(logits, (14, 16, 18), affine)
    assert len(whole.unique()) == 5
    sizes = []
    sample = F.grid_sample

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        values = sample(*arguments, **keywords)
        sizes.append((values.numel(), arguments[0].numel()))
        return values

    monkeypatch.setattr(spatial, "_MAX_VALUES", 5 * 2 * 16 * 18)
    monkeypatch.setattr(F, "grid_sample", counted)
    torch.testing.assert_close(to_original_grid(logits, (14, 16, 18), affine), whole)
    assert [values for values, _ in sizes] == [5 * 2 * 16 * 18] * 7
    assert max(used for _, used in sizes) < logits.numel() / 2  # of the logits, what the slab needs
    monkeypatch.setattr(spatial, "_MAX_VOXELS", 1)
    torch.testing.assert_close(to_original_grid(logits, (14, 16, 18), affine), whole)


@pytest.mark.parametrize(
    ("affine", "pred_affine", "message"),
    [
        (np.zeros((4, 4)), np.eye(4), "the affine must be a matrix"),
        (np.eye(4), np.eye(3), "the affine of `pred` must be a matrix"),
    ],
)
def test_grids_without_volume_are_refused(affine: Any, pred_affine: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_original_grid(MetaTensor(torch.ones(1, 3, 3, 3), affine=torch.as_tensor(pred_affine)), (3, 3, 3), affine)


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


@pytest.mark.parametrize(
    ("shape", "spacing", "pixdim", "patch", "expected", "found"),
    [
        ((9, 16, 8), (1, 1, 1), [2, 2, 2], [16, 16, 16], (9, 16, 8), [1, 1, 1]),  # as it was: 16 voxels fill the side
        ((9, 16, 8), (1, 1, 1), [2, 2, 4], [31, 31, 15], (17, 31, 8), [0.5, 0.5, 1]),
        ((41, 11, 5), (1, 1, 1), [2, 2, 2], [16, 16, 16], (21, 6, 3), [2, 2, 2]),  # one side as long is enough
        ((10, 10, 5), (1, 1, 8), [2, 2, -1], [19, 19, 1], (19, 19, 5), [0.5, 0.5, 8]),  # slices stay
        ((10, 10, 5), (1, 1, 8), [2, 2, 4], [19, 19, 1], (19, 19, 9), [0.5, 0.5, 4]),
        ((1, 1, 5), (1, 1, 8), [2, 2, -1], [19, 19, 1], (1, 1, 5), [2, 2, 8]),  # without extent
    ],
)
def test_a_volume_smaller_than_a_patch_is_magnified_to_its_sides(
    shape: Any, spacing: Any, pixdim: Any, patch: Any, expected: Any, found: Any
) -> None:
    image = spaced(volume(shape, spacing), pixdim, patch)
    assert image.shape == (1, *expected)
    np.testing.assert_allclose(image.pixdim, found, rtol=1e-5)


# --- slices


@pytest.mark.parametrize(
    ("shape", "spacing", "plane"),
    [
        ((64, 64, 20), (1, 1, 5), "axial"),
        ((64, 20, 64), (1, 5, 1), "coronal"),
        ((20, 64, 64), (5, 1, 1), "sagittal"),
        ((64, 64, 64), (1, 1, 1), "axial"),
        ((64, 64, 64), (1.2, 1, 1), "axial"),  # as good as isotropic
        ((64, 64, 64), (1.5, 1, 0.5), "sagittal"),
        ((64, 64, 64), (5, 5, 1), "axial"),  # two coarse axes have no plane between them
        ((64, 1, 64), (1, 1, 1), "coronal"),  # a single slice, whatever its thickness
        ((64, 1, 64), (1, 1, 5), "coronal"),
        ((1, 1, 64), (1, 1, 5), "axial"),
    ],
)
def test_the_plane_is_across_the_coarsest_axis_or_that_of_the_only_slice(shape: Any, spacing: Any, plane: str) -> None:
    assert acquired_plane(shape, spacing) == plane


def places(axes: Any, signs: Any, spacing: Any = SPACING) -> MetaTensor:
    """A volume whose channels say where a voxel lies in mm, to the right, the front and the top."""
    affine = torch.as_tensor(affine_of(axes, signs, spacing))
    steps = torch.meshgrid([torch.arange(size, dtype=torch.float64) for size in SHAPE], indexing="ij")
    where = torch.einsum("ij,jxyz->ixyz", affine[:3, :3], torch.stack(steps)) + affine[:3, 3, None, None, None]
    return MetaTensor(where, affine=affine)


@every_orientation
def test_slices_are_upright_and_across_the_last_axis_whatever_the_order_of_the_file(axes: Any, signs: Any) -> None:
    image = places(axes, signs)
    acquired = {2: "axial", 1: "coronal", 0: "sagittal"}[axes[2]]  # the third axis of `SPACING` is the coarsest
    for plane in (*PLANES, "auto"):
        item = SliceOrientationd("image", 2, plane)({"image": image})
        expected = acquired if plane == "auto" else plane
        assert item["slice_axis"] == expected
        for along, of_patient in enumerate(PLANES[expected]):
            steps = item["image"].as_tensor().diff(dim=1 + along)
            assert (steps[of_patient] > 0).all()  # right, front and top come last
            assert steps.abs().sum() == pytest.approx(float(steps[of_patient].sum()))
        back = to_original_grid(item["image"][:1], SHAPE, image.affine)
        np.testing.assert_allclose(back, image[:1], atol=1e-4)


def test_a_3d_network_sees_ras() -> None:
    item = {"image": places((2, 0, 1), (1, -1, 1))}
    found = SliceOrientationd("image", 3, "sagittal")(item)
    expected = Orientationd("image", axcodes="RAS", labels=None)(item)["image"]
    assert {*found} == {"image"}
    torch.testing.assert_close(found["image"].as_tensor(), expected.as_tensor(), rtol=0, atol=0)
    np.testing.assert_array_equal(found["image"].affine, expected.affine)


def test_an_unknown_plane_is_refused() -> None:
    with pytest.raises(ValueError, match="`slice_axis` must be auto or one of axial, coronal, sagittal, got 'z'"):
        SliceOrientationd("image", 2, "z")


# --- one grid


STEPS = np.diag([-1.0, -1.0, 2.0, 1.0])
TURNED = np.array([[-0.8, 0.6, 0, 0], [-0.6, -0.8, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
MIRRORED = np.array([[0.0, 1, 0, -3], [-1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])  # axes exchanged
STRETCHED = STEPS @ np.diag([1, 1, 1.001, 1])  # counts by what it moves the far corner


def moved(shift: float) -> np.ndarray:
    return STEPS + np.outer([shift, 0, 0, 0], [0, 0, 0, 1])


@pytest.mark.parametrize(
    ("shape", "affine", "expected"),
    [
        ((4, 5, 3), moved(0), True),
        ((4, 5, 3), moved(0.05), True),
        ((4, 5, 3), moved(0.5), False),
        ((4, 5, 3), TURNED, False),
        ((5, 4, 3), MIRRORED, True),
        ((4, 5, 3), np.eye(4), False),
        ((4, 5, 3), STRETCHED, True),
        ((4, 5, 2), STEPS, False),
    ],
)
def test_grids_are_one_within_a_tenth_of_a_voxel(shape: tuple[int, ...], affine: np.ndarray, expected: bool) -> None:
    assert same_grid(shape, affine, (4, 5, 3), STEPS) == same_grid((4, 5, 3), STEPS, shape, affine) == expected
    assert not same_grid((4, 5, 300), STEPS, (4, 5, 300), STRETCHED)


def test_a_label_map_on_another_grid_than_the_file_of_its_image_is_refused(tmp_path: Path) -> None:
    for name, affine in (("image", STEPS), ("label", STEPS), ("lost", np.eye(4)), ("two", STEPS)):
        values = np.arange(60.0).reshape(4, 5, 3)
        nib.save(
            nib.Nifti1Image(np.stack([values] * 2, -1) if name == "two" else values, affine), tmp_path / f"{name}.nii"
        )
    load = LoadImaged(["image", "label"], reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True)
    steps = Compose([load, AdaptiveSpacingd("image", [3, 3, 3], [1, 1, 1]), ValuesToClassesd("label", None, "image")])
    item = {"image": str(tmp_path / "image.nii")}
    assert steps({**item, "label": str(tmp_path / "label.nii")})["image"].shape != (1, 4, 5, 3)
    for name, message in (
        ("lost", "must be on the grid of its image, got shape"),
        ("two", "must have shape"),
    ):
        with pytest.raises(RuntimeError) as raised:
            steps({**item, "label": str(tmp_path / f"{name}.nii")})
        assert re.search(rf"label map .*{name}\.nii`? {message}", str(raised.value.__cause__))


@pytest.mark.parametrize(("shape", "image_size", "size"), [((40, 30), 20, (20, 15)), ((9, 33), 66, (18, 66))])
@pytest.mark.parametrize("spacing", [1.0, 0.2])
def test_the_longer_side_of_a_picture_gets_its_size_and_comes_back(
    shape: tuple[int, int], image_size: int, size: tuple[int, int], spacing: float
) -> None:
    affine = np.diag([spacing, spacing, 1, 1])
    ramp = torch.arange(shape[0], dtype=torch.float32).view(1, -1, 1, 1).expand(1, *shape, 1)
    picture = MetaTensor(ramp.clone(), affine=affine, meta={PICTURE: 255})
    turned = SliceOrientationd("image", 2, "coronal")({"image": picture})
    assert turned["slice_axis"] == PICTURE
    small = AdaptiveSpacingd("image", [7, 7, 0], [1, 1, 1], image_size)(turned)["image"]
    assert small.shape == (1, *size, 1)
    middle = (size[0] // 2 + 0.5) * shape[0] / size[0] - 0.5  # of a pixel, in those of the file
    assert float(small[0, size[0] // 2, 0, 0]) == pytest.approx(middle, abs=1e-4)
    back = to_original_grid((small > shape[0] / 2).float(), (*shape, 1), affine)
    assert (back != (picture > shape[0] / 2)).float().mean() < 0.06


def test_the_mask_of_a_picture_needs_its_size_alone() -> None:
    meta = {PICTURE: 255, "spatial_shape": np.array([6, 4, 1]), "original_affine": np.diag([0.2, 0.3, 1, 1])}
    image = MetaTensor(torch.zeros(3, 12, 8, 1), meta=meta)
    label = MetaTensor(torch.zeros(1, 6, 4, 1), affine=np.diag([-1, -1, 1, 1]))
    refuse_other_grid(label, image, "mask a.png")
    np.testing.assert_allclose(label.affine, meta["original_affine"])
    with pytest.raises(ValueError, match=r"mask a.png must have the size of its picture.* got 4 x 6 and 6 x 4 pixels"):
        refuse_other_grid(MetaTensor(torch.zeros(1, 4, 6, 1)), image, "mask a.png")
