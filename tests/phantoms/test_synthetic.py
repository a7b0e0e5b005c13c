import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dissect_monai.phantoms.xray import XRAY_FINDINGS, XRAY_VIEWS, write_xray_phantoms, xray_phantom

NONE = np.zeros(len(XRAY_FINDINGS))


def read(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


@pytest.mark.parametrize("image_size", [16, 48, 65])
def test_phantom_has_its_size_range_and_label(image_size: int) -> None:
    phantom = xray_phantom(3, image_size)
    assert phantom.image.shape == (1, image_size, image_size)
    assert phantom.image.dtype == phantom.label.dtype == np.float32
    assert 0 <= phantom.image.min() < phantom.image.max() <= 1
    assert phantom.label.shape == (len(XRAY_FINDINGS),)
    assert set(phantom.label) <= {0, 1}
    assert phantom.view in XRAY_VIEWS


def test_phantom_follows_its_seed() -> None:
    np.testing.assert_array_equal(xray_phantom(5, 32).image, xray_phantom(5, 32).image)
    assert not np.array_equal(xray_phantom(5, 32).image, xray_phantom(6, 32).image)


def test_global_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    xray_phantom(0, 32)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_images_of_a_subject_share_the_label_and_resemble_each_other() -> None:
    first, second = (xray_phantom(seed, 32, subject_seed=9) for seed in (1, 2))
    np.testing.assert_array_equal(first.label, second.label)
    assert not np.array_equal(first.image, second.image)

    def distance(subjects: tuple[int, int]) -> float:
        pairs = [[xray_phantom(2 * i + j, 32, subject_seed=s + i, label=NONE).image for j, s in enumerate(subjects)]
                 for i in range(40)]  # fmt: skip
        return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))

    assert distance((100, 100)) < distance((100, 200))


def test_findings_and_views_have_their_prevalence() -> None:
    phantoms = [xray_phantom(seed, 16) for seed in range(400)]
    np.testing.assert_allclose(np.mean([phantom.label for phantom in phantoms], axis=0), 0.3, atol=0.07)
    assert 0.4 < np.mean([phantom.view == "AP" for phantom in phantoms]) < 0.6


@pytest.mark.parametrize("finding", range(len(XRAY_FINDINGS)), ids=XRAY_FINDINGS)
def test_a_finding_adds_density_and_changes_nothing_else(finding: int) -> None:
    label = np.eye(len(XRAY_FINDINGS))[finding]
    changes = [xray_phantom(s, 48, label=label).image - xray_phantom(s, 48, label=NONE).image for s in range(30)]
    for change in changes:
        assert 0 < (np.abs(change) > 0.005).mean() < 0.35
    assert np.mean(changes) > 0.001


def test_view_moves_the_marker_to_the_other_corner() -> None:
    asymmetry: dict[str, list[float]] = {view: [] for view in XRAY_VIEWS}
    for seed in range(80):
        phantom = xray_phantom(seed, 64, label=NONE)
        top = phantom.image[0, :12]
        asymmetry[phantom.view].append(float(top[:, :12].mean() - top[:, -12:].mean()))
    assert np.mean(asymmetry["AP"]) > 0.05
    assert np.mean(asymmetry["PA"]) < -0.05


def test_data_set_lists_every_image_with_its_label(tmp_path: Path) -> None:
    folder = write_xray_phantoms(tmp_path / "set", 12, 5, 4, image_size=24)
    dataset = read(folder)
    assert folder == tmp_path / "set"
    assert dataset["label_names"] == list(XRAY_FINDINGS)
    assert [len(dataset[split]) for split in ("training", "validation", "test")] == [12, 5, 4]
    items = dataset["training"] + dataset["validation"] + dataset["test"]
    assert len(list(folder.rglob("*.png"))) == len({item["image"] for item in items}) == 21
    for item in items:
        with Image.open(folder / item["image"]) as image:
            assert (image.mode, image.size) == ("L", (24, 24))
        assert len(item["label"]) == len(XRAY_FINDINGS)
        assert item["view"] in XRAY_VIEWS


def test_subjects_have_several_images_but_one_split_and_one_label(tmp_path: Path) -> None:
    dataset = read(write_xray_phantoms(tmp_path / "set", 20, 10, 10, image_size=16))
    subjects = [{item["subject"] for item in dataset[split]} for split in ("training", "validation", "test")]
    assert len(set.union(*subjects)) == sum(map(len, subjects)) < 40
    for item in dataset["training"]:
        assert [item["label"]] == [other["label"] for other in dataset["training"] if other == item]
        assert all(item["label"] == o["label"] for o in dataset["training"] if o["subject"] == item["subject"])


@pytest.mark.parametrize("count", [3, 8, 30])
def test_every_finding_has_both_classes_in_every_split(count: int, tmp_path: Path) -> None:
    dataset = read(write_xray_phantoms(tmp_path / "set", count, count, count, image_size=16))
    for split in ("training", "validation", "test"):
        label = np.array([item["label"] for item in dataset[split]])
        assert set(label.min(0)) == {0}
        assert set(label.max(0)) == {1}


def test_same_set_is_not_written_twice(tmp_path: Path) -> None:
    folder = write_xray_phantoms(tmp_path / "set", 3, 2, 2, image_size=16)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_xray_phantoms(str(folder), 3, 2, 2, image_size=16)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert list(tmp_path.iterdir()) == [folder]


def test_set_follows_its_seed(tmp_path: Path) -> None:
    sets = [write_xray_phantoms(tmp_path / name, 2, 2, 0, 16, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = ([path.read_bytes() for path in sorted(folder.rglob("*.png"))] for folder in sets)
    assert first == again != other


def test_several_writers_at_once_leave_one_whole_set(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: write_xray_phantoms(tmp_path / "set", 6, 2, 2, image_size=16), range(4)))
    assert set(folders) == {tmp_path / "set"} == set(tmp_path.iterdir())
    assert len(list(folders[0].rglob("*.png"))) == 10


def test_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_xray_phantoms(tmp_path / "set", 2, 2, 2, image_size=16)
    assert list(tmp_path.iterdir()) == []


def test_rejects_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    write_xray_phantoms(tmp_path / "set", 2, 2, 2, image_size=16)
    with pytest.raises(ValueError, match=r"`output_dir` must be new, empty or hold the set .*'seed': 1"):
        write_xray_phantoms(tmp_path / "set", 2, 2, 2, image_size=16, seed=1)
    with pytest.raises(ValueError, match=r"holding other files\. Choose another folder"):
        write_xray_phantoms(tmp_path, 2, 2, 2, image_size=16)


def test_rejects_negative_counts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"numbers of images must be at least 0, got .*-1"):
        write_xray_phantoms(tmp_path / "set", -1)


def test_rejects_a_tiny_image() -> None:
    with pytest.raises(ValueError, match="`image_size` must be at least 16, got 15"):
        xray_phantom(0, 15)


@pytest.mark.parametrize("label", [[0, 1], [0, 0, 0, 2], [[0, 0, 0, 1]]])
def test_rejects_a_bad_label(label: list) -> None:
    with pytest.raises(ValueError, match="`label` must hold 4 values that are 0 or 1"):
        xray_phantom(0, 16, label=label)
