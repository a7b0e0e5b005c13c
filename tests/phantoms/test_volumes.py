from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import SPLITS, content

from dissect_monai import write_volume_phantoms
from dissect_monai.phantoms.scans import SCANS, scan_phantom
from dissect_monai.phantoms.volumes import VOLUME_TASKS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_volume_phantoms(tmp_path_factory.mktemp("volumes"), 3, 2, 1, image_size=24)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_writes_a_folder_for_each_task_in_two_groups_and_modalities(folders: list[Path]) -> None:
    datasets = [content(folder) for folder in folders]
    for names in ([folder.name for folder in folders], *([each[key] for each in datasets] for key in ("name", "task"))):
        assert names == list(VOLUME_TASKS)
    kinds = [(dataset["group"], dataset["modality"]["0"]) for dataset in datasets]
    assert {*kinds} == {("abdomen", "CT"), ("abdomen", "MR"), ("head", "CT"), ("head", "MR")}
    assert all(dataset["description"] for dataset in datasets)


def test_items_name_their_files_of_one_grid_and_one_subject_each(folders: list[Path]) -> None:
    for folder in folders:
        dataset = content(folder)
        assert [len(dataset[split]) for split in SPLITS] == [3, 2, 1]
        items = [item for split in SPLITS for item in dataset[split]]
        assert len({item["subject"] for item in items}) == 6
        listed = {item[key] for item in items for key in ("image", "label")}
        assert listed == {name for name in files(folder) if name.endswith(".nii.gz")}
        for item in dataset["training"]:
            image, label = (nib.load(folder / item[key]) for key in ("image", "label"))
            assert image.shape == label.shape
            np.testing.assert_array_equal(image.affine, label.affine)
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
            assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
            values = [int(value) for value in dataset["labels"]]
            assert values == list(range(len(values)))
            assert set(np.unique(np.asarray(label.dataobj))) <= set(values)
            assert image.header.get_xyzt_units()[0] == "mm"


def test_files_hold_the_phantom_of_their_seed(folders: list[Path]) -> None:
    phantom = scan_phantom(SCANS[VOLUME_TASKS[0]], (0, 0, 0, 2), 24)
    item = content(folders[0])["training"][2]
    np.testing.assert_array_equal(np.asarray(nib.load(folders[0] / item["image"]).dataobj), phantom.image)
    np.testing.assert_array_equal(np.asarray(nib.load(folders[0] / item["label"]).dataobj), phantom.label)


def test_sets_follow_their_seed_and_no_other_number(folders: list[Path], tmp_path: Path) -> None:
    (chosen,) = write_volume_phantoms(tmp_path / "same", 3, 2, 1, image_size=24, tasks=["head_ct"])
    assert [*(tmp_path / "same").iterdir()] == [chosen] == [tmp_path / "same" / "head_ct"]
    assert files(chosen) == files(folders[VOLUME_TASKS.index("head_ct")])
    few, other = (
        {name: content for name, content in files(folder).items() if name.endswith(".nii.gz")}
        for seed in (0, 1)
        for folder in write_volume_phantoms(tmp_path / str(seed), 1, 0, 1, 24, seed, ["head_ct"])
    )
    assert few.keys() == other.keys()
    assert few != other
    assert few.items() <= files(chosen).items()  # more training subjects leave the test subjects as they are
