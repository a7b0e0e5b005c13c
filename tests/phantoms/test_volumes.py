from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import read

from dissect_monai import read_datalist, write_volume_phantoms
from dissect_monai.phantoms.scans import SCANS, scan_phantom
from dissect_monai.phantoms.volumes import VOLUME_TASKS

SPLITS = ("training", "validation", "test")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_volume_phantoms(tmp_path_factory.mktemp("volumes"), 3, 2, 1, image_size=24)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_writes_a_folder_for_each_task_in_two_or_more_groups(folders: list[Path]) -> None:
    assert [folder.name for folder in folders] == list(VOLUME_TASKS)
    datasets = [read(folder / "dataset.json") for folder in folders]
    assert len(datasets) >= 4
    assert [dataset["task"] for dataset in datasets] == [dataset["name"] for dataset in datasets] == list(VOLUME_TASKS)
    groups = [dataset["group"] for dataset in datasets]
    assert len(set(groups)) >= 2
    assert max(map(groups.count, groups)) >= 2  # a group is more than a task
    assert {dataset["modality"]["0"] for dataset in datasets} == {"CT", "MR"}
    assert all(dataset["description"] for dataset in datasets)


def test_items_name_their_files_and_one_subject_each(folders: list[Path]) -> None:
    for folder in folders:
        dataset = read(folder / "dataset.json")
        assert [len(dataset[split]) for split in SPLITS] == [3, 2, 1]
        items = [item for split in SPLITS for item in dataset[split]]
        assert len({item["subject"] for item in items}) == 6
        listed = {item[key] for item in items for key in ("image", "label")}
        assert listed == {name for name in files(folder) if name.endswith(".nii.gz")}


def test_read_datalist_merges_them_without_a_leak(folders: list[Path]) -> None:
    datalist = read_datalist(folders, spatial_dims=3)
    assert [len(datalist.training), len(datalist.validation), len(datalist.test)] == [15, 10, 5]
    assert {item["task"] for item in datalist.training} == set(VOLUME_TASKS)
    assert {item["group"] for item in datalist.test} == {read(folder / "dataset.json")["group"] for folder in folders}
    assert len({item["subject"] for split in datalist[:3] for item in split}) == 30


def test_image_and_label_map_share_grid_and_both_forms_of_the_affine(folders: list[Path]) -> None:
    for folder in folders:
        dataset = read(folder / "dataset.json")
        for item in dataset["training"]:
            image, label = (nib.load(folder / item[key]) for key in ("image", "label"))
            assert image.shape == label.shape
            np.testing.assert_array_equal(image.affine, label.affine)
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
            assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
            assert {str(value) for value in np.unique(np.asarray(label.dataobj))} <= set(dataset["labels"])
            assert image.header.get_xyzt_units()[0] == "mm"


def test_files_hold_the_phantom_of_their_seed(folders: list[Path]) -> None:
    phantom = scan_phantom(SCANS[VOLUME_TASKS[0]], (0, 0, 0, 2), 24)
    item = read(folders[0] / "dataset.json")["training"][2]
    np.testing.assert_array_equal(np.asarray(nib.load(folders[0] / item["image"]).dataobj), phantom.image)
    np.testing.assert_array_equal(np.asarray(nib.load(folders[0] / item["label"]).dataobj), phantom.label)


def test_labels_are_named_from_background_on(folders: list[Path]) -> None:
    for folder in folders:
        labels = read(folder / "dataset.json")["labels"]
        assert list(labels) == [str(value) for value in range(len(labels))]
        assert labels["0"] == "background"
        assert len({*labels.values()}) == len(labels) >= 4


def test_same_sets_are_not_written_twice(tmp_path: Path) -> None:
    folders = write_volume_phantoms(tmp_path, 1, 1, 0, image_size=16)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_volume_phantoms(str(tmp_path), 1, 1, 0, image_size=16) == folders
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_partial_set_is_written_anew_and_the_others_are_kept(tmp_path: Path) -> None:
    folders = write_volume_phantoms(tmp_path, 2, 1, 0, image_size=16)
    before = files(tmp_path)
    times = {folder: folder.stat().st_mtime_ns for folder in folders}
    (folders[1] / read(folders[1] / "dataset.json")["training"][0]["label"]).unlink()
    assert write_volume_phantoms(tmp_path, 2, 1, 0, image_size=16) == folders
    assert files(tmp_path) == before
    assert [folder for folder in folders if folder.stat().st_mtime_ns == times[folder]] == folders[:1] + folders[2:]
    assert sorted(tmp_path.iterdir()) == sorted(folders)


def test_sets_follow_their_seed(tmp_path: Path) -> None:
    tasks = VOLUME_TASKS[-1:]
    sets = [
        write_volume_phantoms(tmp_path / name, 1, 0, 1, 16, seed, tasks)[0]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (files(folder) for folder in sets)
    assert first == again != other


def test_more_training_subjects_leave_the_test_subjects_as_they_are(tmp_path: Path) -> None:
    few, many = (write_volume_phantoms(tmp_path / str(n), n, 0, 2, 16, tasks=["heart_mr"])[0] for n in (1, 3))
    kept = {name: content for name, content in files(few).items() if name.endswith(".nii.gz")}
    assert len(kept) == 6
    assert kept.items() <= files(many).items()


def test_some_tasks_can_be_chosen_and_are_the_same_sets(folders: list[Path], tmp_path: Path) -> None:
    (chosen,) = write_volume_phantoms(tmp_path, 3, 2, 1, image_size=24, tasks=["head_ct"])
    assert chosen == tmp_path / "head_ct"
    assert list(tmp_path.iterdir()) == [chosen]
    assert files(chosen) == files(folders[VOLUME_TASKS.index("head_ct")])


def test_several_writers_at_once_leave_whole_sets(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: write_volume_phantoms(tmp_path, 1, 1, 1, 16, tasks=["heart_mr"]), range(3)))
    assert found == [[tmp_path / "heart_mr"]] * 3
    assert list(tmp_path.iterdir()) == found[0]
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 6


def test_rejects_a_folder_that_holds_another_set(tmp_path: Path) -> None:
    write_volume_phantoms(tmp_path, 1, 0, 0, 16, tasks=["heart_mr"])
    with pytest.raises(ValueError, match=r"must be new, empty or hold the set .*'seed': 1.*heart_mr holding"):
        write_volume_phantoms(tmp_path, 1, 0, 0, 16, seed=1, tasks=["heart_mr"])


def test_rejects_bad_counts_sizes_and_tasks_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"numbers of images must be at least 0, got .*-1"):
        write_volume_phantoms(tmp_path, -1)
    with pytest.raises(ValueError, match="`image_size` must be at least 16, got 8"):
        write_volume_phantoms(tmp_path, 1, image_size=8)
    for tasks in ([], "head_ct", ["head_ct", "head_ct"], ["head_ct", "knee"]):
        with pytest.raises(ValueError, match=r"`tasks` must be different ones of abdomen_ct, .*, got "):
            write_volume_phantoms(tmp_path, 1, 0, 0, 16, tasks=tasks)
    assert list(tmp_path.iterdir()) == []
