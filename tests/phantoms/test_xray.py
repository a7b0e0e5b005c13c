from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SPLITS, content
from PIL import Image

from dissect_monai.phantoms.xray import XRAY_FINDINGS, XRAY_VIEWS, Phantom, write_xray_phantoms, xray_phantom

NONE = np.zeros(len(XRAY_FINDINGS))


def phantom(seed: int, size: int = 32, *, subject: int | None = None, label: Any = NONE) -> Phantom:
    return xray_phantom(seed, size, subject_seed=seed if subject is None else subject, label=label)


@pytest.mark.parametrize("image_size", [16, 65])
def test_phantom_has_its_size_range_and_view(image_size: int) -> None:
    drawn = phantom(3, image_size, label=[0, 1, 0, 1])
    assert drawn.image.shape == (1, image_size, image_size)
    assert drawn.image.dtype == np.float32
    assert 0 <= drawn.image.min() < drawn.image.max() <= 1
    assert drawn.view in XRAY_VIEWS


def test_images_follow_their_seed_and_those_of_a_subject_resemble_each_other() -> None:
    np.testing.assert_array_equal(phantom(1, subject=9).image, phantom(1, subject=9).image)
    assert not np.array_equal(phantom(1, subject=9).image, phantom(2, subject=9).image)

    def distance(first: int, second: int) -> float:
        pairs = [(phantom(2 * i, subject=first + i), phantom(2 * i + 1, subject=second + i)) for i in range(40)]
        return float(np.mean([np.abs(a.image - b.image).mean() for a, b in pairs]))

    assert distance(100, 100) < distance(100, 200)


@pytest.mark.parametrize("finding", range(len(XRAY_FINDINGS)), ids=XRAY_FINDINGS)
def test_a_finding_adds_density_and_changes_nothing_else(finding: int) -> None:
    label = np.eye(len(XRAY_FINDINGS))[finding]
    changes = [phantom(seed, 48, label=label).image - phantom(seed, 48).image for seed in range(30)]
    for change in changes:
        assert 0 < (np.abs(change) > 0.005).mean() < 0.35
    assert np.mean(changes) > 0.001


def test_half_of_the_views_are_ap_with_the_marker_in_the_other_corner() -> None:
    asymmetry: dict[str, list[float]] = {view: [] for view in XRAY_VIEWS}
    for seed in range(80):
        drawn = phantom(seed, 64)
        top = drawn.image[0, :12]
        asymmetry[drawn.view].append(float(top[:, :12].mean() - top[:, -12:].mean()))
    assert np.mean(asymmetry["AP"]) > 0.05
    assert np.mean(asymmetry["PA"]) < -0.05
    assert 25 < len(asymmetry["AP"]) < 55


def test_data_set_lists_every_image_with_its_label_and_no_subject_in_two_splits(tmp_path: Path) -> None:
    folder = write_xray_phantoms(tmp_path / "set", 12, 5, 4, image_size=24)
    dataset = content(folder)
    assert folder == tmp_path / "set"
    assert dataset["label_names"] == list(XRAY_FINDINGS)
    assert [len(dataset[split]) for split in SPLITS] == [12, 5, 4]
    items = [item for split in SPLITS for item in dataset[split]]
    assert len(list(folder.rglob("*.png"))) == len({item["image"] for item in items}) == 21
    for item in items:
        with Image.open(folder / item["image"]) as image:
            assert (image.mode, image.size) == ("L", (24, 24))
        assert item["view"] in XRAY_VIEWS
    subjects = [{item["subject"] for item in dataset[split]} for split in SPLITS]
    assert len(set.union(*subjects)) == sum(map(len, subjects)) < 21
    assert len({(item["subject"], *item["label"]) for item in items}) == len(set.union(*subjects))


@pytest.mark.parametrize("count", [3, 30])
def test_every_finding_has_both_classes_in_every_split(count: int, tmp_path: Path) -> None:
    dataset = content(write_xray_phantoms(tmp_path / "set", count, count, count, image_size=16))
    for split in SPLITS:
        label = np.array([item["label"] for item in dataset[split]])
        assert label.shape == (count, 4)
        assert set(label.min(0)) == {0}
        assert set(label.max(0)) == {1}


def test_set_follows_its_seed_and_is_not_written_twice(tmp_path: Path) -> None:
    sets = [write_xray_phantoms(tmp_path / name, 2, 2, 0, 16, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = ([path.read_bytes() for path in sorted(folder.rglob("*.png"))] for folder in sets)
    assert first == again != other
    times = {path: path.stat().st_mtime_ns for path in sets[0].rglob("*")}
    write_xray_phantoms(str(sets[0]), 2, 2, 0, 16, 0)
    assert times == {path: path.stat().st_mtime_ns for path in sets[0].rglob("*")}


def test_masks_show_both_lungs_darker_than_the_rest_and_change_no_image(tmp_path: Path) -> None:
    plain = write_xray_phantoms(tmp_path / "plain", 2, 1, 1, 32)
    folder = write_xray_phantoms(tmp_path / "masks", 2, 1, 1, 32, masks=True)
    dataset = content(folder)
    assert dataset["labels"] == {"255": "lungs"}
    for item in (item for split in SPLITS for item in dataset[split]):
        image, mask = (np.asarray(Image.open(folder / item[key])) for key in ("image", "label"))
        np.testing.assert_array_equal(image, np.asarray(Image.open(plain / item["image"])))
        assert np.unique(mask).tolist() == [0, 255]
        assert (mask > 0).any(0)[[8, 24]].all()
        assert image[mask > 0].mean() < image[mask == 0].mean()
