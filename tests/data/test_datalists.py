from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import images, sitk, volume, write_images, write_series

from dissect_monai.data.datalists import label_matrix, labelled, read_datalist

NAN = float("nan")


def write_set(folder: Path, **spec: Any) -> Path:
    write_images(folder, 4)
    (folder / "dataset.json").write_text(json.dumps(spec))
    return folder


def labels(items: list[dict[str, Any]]) -> list[Any]:
    return [item.get("label") for item in items]


# --- reading


@pytest.mark.parametrize("listed", [True, False])
def test_volumes_are_no_x_rays_and_the_refusal_says_which_bundle_takes_them(tmp_path: Path, listed: bool) -> None:
    sitk.WriteImage(volume(), str(tmp_path / "a.nii.gz"))
    if listed:
        (tmp_path / "dataset.json").write_text(json.dumps({"training": ["a.nii.gz"]}))
    with pytest.raises(ValueError, match=r"must hold 2-D images, got volumes in .*: pretrain .*volumes\.json"):
        read_datalist(tmp_path)
    assert len(read_datalist(tmp_path, spatial_dims=3).training) == 1
    with pytest.raises(ValueError, match="must hold 2-D images, got volumes in"):
        read_datalist(tmp_path, check=False)
    write_images(tmp_path, 1)
    if listed:
        (tmp_path / "dataset.json").write_text(json.dumps({"training": ["a.nii.gz", "0.png"]}))
    assert len(read_datalist(tmp_path, check=False).training) == 2  # of which predictions name the one that is no film


def test_slices_of_a_ct_that_nobody_has_listed_are_a_volume(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", volume())
    with pytest.raises(ValueError, match="must hold 2-D images, got volumes in"):
        read_datalist(folder)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "dataset.json").write_text(json.dumps({"training": names}))
    assert len(read_datalist(folder).training) == len(names)


def test_reads_splits_with_absolute_paths_and_keeps_other_keys(tmp_path: Path) -> None:
    folder = write_set(
        tmp_path / "a",
        label_names=["x", "y"],
        task="chest",
        training=[{"image": "0.png", "label": [1, None], "subject": 7, "age": None}, {"image": "1.png", "label": None}],
        validation=[{"image": "./2.png", "label": [0, NAN]}],
        test=["3.png"],
    )
    datalist = read_datalist(str(folder))
    first = {"image": str(folder / "0.png"), "label": [1.0, NAN], "subject": "7", "age": None, "task": "chest"}
    first["origin"], alone = (str(folder), "7"), {"task": "chest", "origin": (str(folder), None)}
    np.testing.assert_equal(datalist.training, [first, {"image": str(folder / "1.png"), **alone}])
    np.testing.assert_equal(labels(datalist.validation), [[0.0, NAN]])
    assert datalist.test == [{"image": str(folder / "3.png"), **alone}]
    assert datalist.label_names == ["x", "y"]
    assert images(datalist.items()) == ["0.png", "1.png", "2.png", "3.png"]
    assert images(read_datalist(folder / "1.png").training) == ["1.png"]
    np.testing.assert_equal(read_datalist(folder / "dataset.json"), datalist)


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        ([[0, 1], [None, 0]], ["finding_0", "finding_1"], [[0, 1], [NAN, 0]]),
        ([1, 0.0, None], ["finding_0"], [[1], [0], None]),
        ([{"x": 1}, {"y": 0, "x": None}], ["x", "y"], [[1, NAN], [NAN, 0]]),
        ([None, None], [], [None, None]),
    ],
)
def test_labels_without_names_are_understood(tmp_path: Path, given: Any, names: list[str], expected: Any) -> None:
    training = [{"image": f"{index}.png", "label": label} for index, label in enumerate(given)]
    datalist = read_datalist(write_set(tmp_path / "a", training=training))
    assert datalist.label_names == names
    np.testing.assert_equal(labels(datalist.training), expected)


def test_label_maps_are_paths(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", training=[{"image": "0.png", "label": "1.png"}])
    datalist = read_datalist(folder)
    assert labels(datalist.training) == [str(folder / "1.png")]
    assert datalist.label_names == []
    assert labelled(datalist.training) == []  # no finding can be learnt from a map


def test_a_folder_of_images_becomes_sorted_training_items(tmp_path: Path) -> None:
    for name in ("z.nii.gz", "a.TIF", "c/1.dcm", "c/2.dcm", "b/0.png", ".d.png", ".hidden/0.png", "notes.txt", "un"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "dicom").write_bytes(bytes(128) + b"DICM")
    datalist = read_datalist(tmp_path)
    names = [str(Path(item["image"]).relative_to(tmp_path)) for item in datalist.training]
    assert names == ["a.TIF", "b/0.png", "b/dicom", "c/1.dcm", "c/2.dcm", "z.nii.gz"]
    assert all(set(item) == {"image", "origin"} for item in datalist.training)
    assert images(read_datalist(tmp_path, spatial_dims=3).training) == ["b", "c", "z.nii.gz"]


def test_several_folders_unite_label_names_and_tell_subjects_apart(tmp_path: Path) -> None:
    one = {"training": [{"image": "0.png", "label": [1, 0], "subject": "1"}], "label_names": ["x", "y"]}
    items = [{"image": "0.png", "label": [0, 1], "subject": "1"}]
    other = {"training": [], "validation": items, "label_names": ["z", "x"]}
    folders = [write_set(tmp_path / "a", **one), write_set(tmp_path / "b", **other), tmp_path / "c"]
    write_images(tmp_path / "c", 1)
    datalist = read_datalist(folders)
    assert datalist.label_names == ["x", "y", "z"]
    assert [item.get("subject") for item in datalist.items()] == ["a/1", None, "b/1"]
    np.testing.assert_equal(labels(datalist.items()), [[1, 0, NAN], None, [1, NAN, 0]])
    assert read_datalist(str([*map(str, folders)])).label_names == ["x", "y", "z"]  # a list that arrives as one text
    same_name = [write_set(tmp_path / parent / "a", **one) for parent in "pq"]
    subjects = [item["subject"] for item in read_datalist(same_name).training]
    assert subjects == [f"{folder}/1" for folder in same_name]


# --- labels


def test_label_matrix_has_nan_for_unknown() -> None:
    items = [{"image": "a", "label": [1.0, NAN]}, {"image": "b"}, {"image": "c", "label": [NAN, NAN]}]
    np.testing.assert_equal(label_matrix(items, ["x", "y"]), [[1, NAN], [NAN, NAN], [NAN, NAN]])
    assert label_matrix([], ["x", "y"]).shape == (0, 2)
    assert images(labelled(items)) == ["a"]


def test_findings_are_chosen_ordered_and_derived(tmp_path: Path) -> None:
    items = [{"image": "0.png", "label": [1, 0]}, {"image": "1.png", "label": [0, 0]}, {"image": "1.png"}]
    datalist = read_datalist(write_set(tmp_path / "a", training=items, label_names=["x", "y"]))
    chosen = datalist.with_findings(["No finding", "y", "x"])
    assert chosen.label_names == ["No finding", "y", "x"]
    assert labels(chosen.training) == [[0, 0, 1], [1, 0, 0]]  # without the item that has no label
    assert labels(datalist.with_findings().training) == [[1, 0], [0, 0]]
    assert labels(datalist.with_findings("x").training) == [[1], [0]]
    assert labels(datalist.training[:1]) == [[1, 0]]  # the given items are left alone


def test_no_finding_is_a_column_of_the_data_or_derived_where_all_findings_are_known() -> None:
    items = [{"image": "a", "label": label} for label in ([0.0, 0.0], [NAN, 0.0], [NAN, 1.0])]
    names = ["x", "y"]
    np.testing.assert_equal(label_matrix(items, names, ["No finding"]), [[1], [NAN], [0]])
    np.testing.assert_equal(label_matrix(items, ["No Finding", "y"], ["No finding"]), [[0], [NAN], [NAN]])
    more = label_matrix(items, names, ["x", "z", "No finding"], allow_missing=True)
    np.testing.assert_equal(more, [[0, NAN, NAN], [NAN] * 3, [NAN] * 3])


def test_findings_that_are_not_labelled_are_refused_or_unknown(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", training=[{"image": "0.png", "label": [1, 0]}], label_names=["x", "y"])
    datalist = read_datalist(folder)
    np.testing.assert_equal(labels(datalist.with_findings(["z", "x"], allow_missing=True).training), [[NAN, 1]])
    for findings, allow_missing in ((["x", "z"], False), (["z"], True)):
        with pytest.raises(ValueError, match="the labels must include the `findings` z, got x, y"):
            datalist.with_findings(findings, allow_missing)
    with pytest.raises(ValueError, match="`findings` must be different, got x, x"):
        datalist.with_findings(["x", "x"])
    with pytest.raises(ValueError, match="`dataset_dir` must have labels, got none"):
        datalist._replace(label_names=[]).with_findings()


# --- errors


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "must be a JSON object with a list `training`, got a list"),
        ({"images": []}, r"list `training`, got the keys \['images'\]"),
        ({"training": {}}, "`training` must be a list of items, got a dict"),
        ({"training": [], "validation": [3]}, r"`validation`\[0\] must have the path of an \"image\", got 3"),
        ({"training": [], "val": [{"image": "0.png"}]}, "lists of images must be called .*, got `val`. Rename it"),
        ({"training": [f"no{index}.png" for index in range(5)]}, r"got 5 missing: .*no0.png, .*no2.png, \.\.\."),
        ({"training": [{"image": "0.png", "label": "no.nii"}]}, r"got 1 missing: .*no\.nii"),
        ({"training": [{"image": "0.png", "label": "1.png"}, "1.png"]}, r"not list a label map as an image, .*1\.png"),
        ({"training": [{"image": "0.png", "label": [1, 2]}]}, r"the label of .*0\.png must have values 1, 0 or null"),
        ({"label_names": ["x"], "training": [{"image": "0.png", "label": {"y": 1}}]}, "must have values 1, 0 or null"),
        (
            {"training": [{"image": "0.png", "label": [1, 0]}, {"image": "1.png", "label": [1]}]},
            r"the label of .*1\.png must have 2 values \(finding_0, finding_1\), got 1",
        ),
        ({"label_names": ["x", "x"], "training": []}, "`label_names` must be a list of different names"),
        (
            {"training": [{"image": "0.png", "subject": 1}], "test": [{"image": "1.png", "subject": "1"}]},
            "`training` and `test` must share no subject, got 1 in both: 1 \\(see .*0.png and .*1.png\\). Move",
        ),
        ({"training": ["0.png"], "validation": ["./0.png"]}, r"must share no image, got 1 in both: .*0\.png"),
    ],
)  # fmt: skip
def test_malformed_lists_are_explained(tmp_path: Path, spec: Any, message: str) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "dataset.json").write_text(json.dumps(spec))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_datalist(tmp_path)


def test_wrong_folders_and_broken_json_are_explained(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"existing folder or image, got .*no"):
        read_datalist(tmp_path / "no")
    with pytest.raises(ValueError, match=r"must be a folder or an image, got the file .*notes\.txt"):
        read_datalist(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"dataset\.json or images \(\.png .* \.nii\.gz\), got neither"):
        read_datalist(tmp_path)
    for folders in ([], [tmp_path, tmp_path]):
        with pytest.raises(ValueError, match="one folder or several different ones"):
            read_datalist(folders)
    os.rename(tmp_path / "notes.txt", os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(ValueError, match=r"names in UTF-8, got '.*\\udcff.png'. Rename it"):
        read_datalist(tmp_path)
    (tmp_path / "dataset.json").write_text('{\n "training": [,]}')
    with pytest.raises(ValueError, match=r"dataset\.json must be JSON .* line 2 column 15"):
        read_datalist(tmp_path)
