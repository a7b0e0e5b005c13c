from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import patch_transform
from monai.data import DataLoader
from monai.transforms import Compose, EnsureTyped, Lambdad, RandSpatialCropSamplesd

from dissect_monai.data.patches import LABEL_MAP, patch_dataset


def write_volumes(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Dim bodies in air with a bright structure in each, at another place in each volume, and their label maps."""
    items, shared = [], {"task": "a", "group": "g", "modality": "MR", "labels": {"lump": [1], "other": [2]}}
    for index in range(count):
        rng = np.random.default_rng(index)
        image = np.zeros((16, 18, 14))
        body = tuple(slice(2, length - 1) for length in image.shape)
        image[body] = rng.uniform(60, 100, image[body].shape)
        corner = rng.integers(3, 6, 3)
        bright = tuple(slice(start, start + length) for start, length in zip(corner, (3, 5, 4), strict=True))
        image[bright] = rng.uniform(180, 200, (3, 5, 4))
        paths = {"image": str(folder / f"{index}.nii.gz"), "label": str(folder / f"{index}_label.nii.gz")}
        affine = np.diag([-1.0, 1, 1, 1])
        nib.save(nib.Nifti1Image(image, affine), paths["image"])
        nib.save(nib.Nifti1Image((image > 150).astype(np.uint8), affine), paths["label"])
        items.append({**paths, "subject": str(index), **shared})
    return items


def pixels(dataset: Any) -> torch.Tensor:
    return torch.stack([patch["image"] for patch in dataset])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_patches_know_the_structures_that_they_show(tmp_path: Path, spatial_dims: int) -> None:
    data = write_volumes(tmp_path)
    dataset = patch_dataset(data, patch_transform(spatial_dims, num_samples=10), num_workers=2)
    assert len(dataset) == len(dataset.data) == 30
    images = pixels(dataset)
    assert images.shape == (30, 1, *[8] * spatial_dims)
    assert images.dtype == torch.uint8
    assert [item["subject"] for item in dataset.data] == [str(index // 10) for index in range(30)]
    lump = [item["structures"]["lump"] for item in dataset.data]
    counts = (images > 150).flatten(1).sum(1).tolist()
    assert {0, 1} <= {*lump}
    assert all((value == 0) == (count == 0) for value, count in zip(lump, counts, strict=True))
    assert all(np.isnan(item["structures"]["other"]) for item in dataset.data)  # no volume has it annotated


def test_patches_come_with_names_for_loaders_and_views(tmp_path: Path) -> None:
    dataset = patch_dataset(write_volumes(tmp_path), patch_transform())
    assert type(dataset[0]["image"]) is torch.Tensor
    batch = next(iter(DataLoader(dataset, batch_size=5)))
    assert batch.pop("image").shape == (5, 1, 8, 8, 8)
    assert batch == {"task": ["a"] * 5, "group": ["g"] * 5}


def test_structures_of_volumes_without_label_map_or_names_are_unknown(tmp_path: Path) -> None:
    data = write_volumes(tmp_path, 4)
    del data[0]["label"], data[3]["labels"]
    data[1]["label"] = [1.0, 0.0]  # findings of the whole volume
    dataset = patch_dataset(data, patch_transform())
    assert ["structures" in item for item in dataset.data] == [False] * 8 + [True] * 4 + [False] * 4
    assert dataset.data[4]["label"] == [1.0, 0.0]
    assert dataset.data[8]["label"] == data[2]["label"]


def shown(label_map: np.ndarray, size: int, labels: dict[str, list[int]], **more: Any) -> list[dict[str, float]]:
    """Structures of the patches of one label map, two along its first axis."""

    def halves(item: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: item[key][:, start : start + size] for key in ("image", LABEL_MAP)} for start in (0, size)]

    def load(path: str) -> np.ndarray:
        return label_map[None]

    item = {"image": "i", "label": "l", "labels": labels, **more}
    transform = Compose([Lambdad(["image", LABEL_MAP], load), EnsureTyped(["image", LABEL_MAP]), halves])
    return [each["structures"] for each in patch_dataset([item], transform).data]


def test_a_structure_counts_from_a_thousandth_of_a_patch_or_half_of_itself() -> None:
    label_map = np.zeros((40, 20, 10), dtype=np.uint8)  # patches of 4,000 voxels
    label_map[:20, 0, 0] = 1  # 20 voxels, all in the first
    label_map[18:21, 1, 0] = 2  # 2 of 3 in the first, 1 in the second
    label_map[:3, 2, 0] = label_map[20:24, 2, 0] = 3  # 3 of 7, 4 of 7
    label_map[5:10, 3, 0] = label_map[20:23, 3, :8] = 4  # 5 of 29, 24 of 29
    names = {"large": [1], "tiny": [2], "split": [3], "part": [4], "both": [1, 2], "absent": [300]}
    first, second = shown(label_map, 20, names)
    nan = pytest.approx(np.nan, nan_ok=True)
    assert first == {"large": 1, "tiny": 1, "split": nan, "part": 1, "both": 1, "absent": nan}
    assert second == {"large": 0, "tiny": nan, "split": 1, "part": 1, "both": nan, "absent": nan}


def test_a_structure_is_unknown_where_a_patch_without_it_is_not_wholly_annotated() -> None:
    label_map = np.zeros((40, 20, 10), dtype=np.uint8)
    label_map[:10, :9], label_map[30:, :9], label_map[:5, 12] = 1, 2, 9
    first, second = shown(label_map, 20, {"a": [1], "b": [2]}, ignored=[9])
    assert (first, second) == ({"a": 1, "b": pytest.approx(np.nan, nan_ok=True)}, {"a": 0, "b": 1})


def test_what_is_drawn_follows_from_the_seed_and_the_item_alone(tmp_path: Path) -> None:
    data, transform = write_volumes(tmp_path, 3), patch_transform()
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    images = pixels(patch_dataset(data, transform))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    transform.set_random_state(7)
    assert torch.equal(pixels(patch_dataset(data, transform, num_workers=3)), images)
    assert torch.equal(pixels(patch_dataset(data[:2], transform)), images[:8])
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    other = pixels(patch_dataset(data, transform, seed=1))
    assert (images != other).flatten(1).any(1).float().mean() > 0.5
    assert len(images.flatten(1).unique(dim=0)) > 8


def test_a_skipped_volume_changes_no_draw_of_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_volumes(tmp_path, 3)
    images = pixels(patch_dataset(data, patch_transform()))
    Path(data[1]["image"]).write_bytes(b"broken")
    dataset = patch_dataset(data, patch_transform(), on_corrupt="skip")
    assert torch.equal(pixels(dataset), images[[0, 1, 2, 3, 8, 9, 10, 11]])
    assert [item["subject"] for item in dataset.data] == ["0"] * 4 + ["2"] * 4
    assert caplog.text.count("Skipped: ") == 1


def test_patches_do_not_keep_their_volumes() -> None:
    load = Lambdad("image", lambda path: torch.zeros(1, 32, 32, 32))
    transform = Compose([load, RandSpatialCropSamplesd("image", [4, 32, 32], 2, random_size=False)])
    for patch in patch_dataset([{"image": "a"}], transform):
        assert patch["image"].untyped_storage().nbytes() == 4 * 4 * 32 * 32
    assert len(patch_dataset([], transform)) == 0
