from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import images, write_images

from dissect_monai.data.datalists import label_matrix, labelled, read_datalist, with_findings
from dissect_monai.data.splits import select_fraction

NAN = float("nan")


def write_set(folder: Path, **spec: Any) -> Path:
    write_images(folder, 6)
    (folder / "dataset.json").write_text(json.dumps(spec))
    return folder


def labels(items: list[dict[str, Any]]) -> list[Any]:
    return [item.get("label") for item in items]


# --- data lists


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
    np.testing.assert_equal(datalist.training, [first, {"image": str(folder / "1.png"), "task": "chest"}])
    np.testing.assert_equal(labels(datalist.validation), [[0.0, NAN]])
    assert datalist.test == [{"image": str(folder / "3.png"), "task": "chest"}]
    assert datalist.label_names == ["x", "y"]


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        ([[0, 1], [None, 0]], ["finding_0", "finding_1"], [[0, 1], [NAN, 0]]),
        ([1, 0.0], ["finding_0"], [[1], [0]]),
        ([{"x": 1}, {"y": 0, "x": None}], ["x", "y"], [[1, NAN], [NAN, 0]]),
        ([True, None], ["finding_0"], [[1], None]),
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
    datalist = read_datalist(folder, spatial_dims=3)
    assert labels(datalist.training) == [str(folder / "1.png")]
    assert datalist.label_names == []
    assert labelled(datalist.training) == []  # no finding can be learnt from a map


def test_a_folder_of_images_becomes_sorted_training_items(tmp_path: Path) -> None:
    write_images(tmp_path / "b" / "c", 2)
    write_images(tmp_path / ".hidden", 1)
    for name in ("z.nii.gz", "a.TIF", "slice.dcm", ".d.png", "notes.txt", "unknown"):
        (tmp_path / name).touch()
    (tmp_path / "b" / "dicom").write_bytes(bytes(128) + b"DICM")
    datalist = read_datalist(tmp_path)
    names = [str(Path(item["image"]).relative_to(tmp_path)) for item in datalist.training]
    assert names == ["a.TIF", "b/c/0.png", "b/c/1.png", "b/dicom", "slice.dcm", "z.nii.gz"]
    assert all(set(item) == {"image"} for item in datalist.training)
    assert (datalist.validation, datalist.test, datalist.label_names) == ([], [], [])


def test_a_file_may_be_named_instead_of_its_folder(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", training=[{"image": "0.png"}])
    assert read_datalist(folder / "dataset.json") == read_datalist(folder)
    assert images(read_datalist(folder / "1.png").training) == ["1.png"]


def labels_of(items: list[dict[str, Any]]) -> list[list[float]]:
    return [item["label"] for item in items]


def test_findings_are_chosen_ordered_and_derived(tmp_path: Path) -> None:
    items = [{"image": "0.png", "label": [1, 0]}, {"image": "1.png", "label": [0, 0]}, {"image": "1.png"}]
    datalist = read_datalist(write_set(tmp_path / "a", training=items, label_names=["x", "y"]))
    chosen = with_findings(datalist, ["No finding", "y", "x"])
    assert chosen.label_names == ["No finding", "y", "x"]
    assert labels_of(chosen.training) == [[0, 0, 1], [1, 0, 0]]  # without the item that has no label
    assert labels_of(with_findings(datalist).training) == [[1, 0], [0, 0]]
    assert labels_of(with_findings(datalist, "x").training) == [[1], [0]]
    assert labels_of(datalist.training[:1]) == [[1, 0]]  # the given items are left alone


def test_a_column_of_no_finding_is_taken_as_it_is(tmp_path: Path) -> None:
    items = [{"image": "0.png", "label": [1, 0]}, {"image": "1.png", "label": [0, 1]}]
    datalist = read_datalist(write_set(tmp_path / "a", training=items, label_names=["No Finding", "x"]))
    assert labels_of(with_findings(datalist, ["No finding", "x"]).training) == [[1, 0], [0, 1]]


def test_no_finding_of_more_findings_than_are_labelled_is_unknown(tmp_path: Path) -> None:
    items = [{"image": "0.png", "label": [0]}]
    datalist = read_datalist(write_set(tmp_path / "a", training=items, label_names=["x"]))
    chosen = with_findings(datalist, ["x", "y", "No finding"], allow_missing=True)
    np.testing.assert_equal(labels_of(chosen.training), [[0, NAN, NAN]])


def test_findings_that_are_not_labelled_are_refused_or_unknown(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", training=[{"image": "0.png", "label": [1, 0]}], label_names=["x", "y"])
    datalist = read_datalist(folder)
    with pytest.raises(ValueError, match="the labels must know z, got x, y"):
        with_findings(datalist, ["x", "z"])
    np.testing.assert_equal(labels_of(with_findings(datalist, ["z", "x"], allow_missing=True).training), [[NAN, 1]])
    with pytest.raises(ValueError, match="the labels must know z, got x, y"):
        with_findings(datalist, ["z"], allow_missing=True)
    with pytest.raises(ValueError, match="labels are needed, and there are none"):
        with_findings(datalist._replace(label_names=[]))


def test_in_three_dimensions_a_folder_of_slices_is_one_item(tmp_path: Path) -> None:
    for name in ("v.nii", "p.png", "series/1.dcm", "series/2.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert images(read_datalist(tmp_path, spatial_dims=3).training) == ["series", "v.nii"]


def test_several_folders_unite_label_names_and_tell_subjects_apart(tmp_path: Path) -> None:
    a = write_set(
        tmp_path / "a", label_names=["x", "y"], training=[{"image": "0.png", "label": [1, 0], "subject": "1"}]
    )
    b = write_set(
        tmp_path / "b",
        label_names=["z", "x"],
        validation=[{"image": "0.png", "label": [0, 1], "subject": "1"}],
        training=[],
    )
    write_images(tmp_path / "c", 1)
    datalist = read_datalist([str(a), str(b), str(tmp_path / "c")])
    assert datalist.label_names == ["x", "y", "z"]
    assert datalist.training[0]["subject"] == "a/1"
    assert datalist.validation[0]["subject"] == "b/1"
    np.testing.assert_equal(labels(datalist.training + datalist.validation), [[1, 0, NAN], None, [1, NAN, 0]])


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [
        write_set(tmp_path / parent / "a", training=[{"image": "0.png", "subject": "1"}]) for parent in ("p", "q")
    ]
    subjects = [item["subject"] for item in read_datalist(folders).training]
    assert subjects == [f"{folder}/1" for folder in folders]


# --- subsets and matrices


def subjects_and_labels() -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = [
        {"image": f"{index}", "subject": str(index // 2), "label": [float(index == 0), 1.0]} for index in range(40)
    ]
    return [*items, {"image": "a"}, {"image": "b"}]


def test_fractions_are_nested_keep_the_order_and_whole_subjects() -> None:
    items = subjects_and_labels()
    previous: list[str] = []
    for fraction in (0.01, 0.1, 0.5, 1.0):
        selected = select_fraction(items, fraction, seed=3)
        names = images(selected)
        assert set(previous) <= set(names)
        assert selected == [item for item in items if item in selected]
        subjects = {item["subject"] for item in selected if "subject" in item}
        assert sum("subject" in item for item in selected) == 2 * len(subjects)
        assert len(subjects) + sum("subject" not in item for item in selected) == max(1, round(fraction * 22))
        previous = names
    assert selected == items
    assert images(select_fraction(items, 0.5, seed=4)) != images(select_fraction(items, 0.5, seed=3))


@pytest.mark.parametrize(("names", "expected"), [(["x", "y"], "of: x."), (None, "of: finding_0.")])
def test_a_finding_that_loses_its_positives_is_logged(
    names: list[str] | None, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    seed = next(seed for seed in range(99) if "0" not in images(select_fraction(subjects_and_labels(), 0.3, seed)))
    caplog.clear()
    select_fraction(subjects_and_labels(), 0.3, seed, names)
    assert expected in caplog.text


def test_labelled_needs_one_known_value() -> None:
    items = [{"image": "a", "label": [NAN, 0.0]}, {"image": "b", "label": [NAN, NAN]}, {"image": "c"}]
    assert images(labelled(items)) == ["a"]


def test_label_matrix_has_nan_for_unknown() -> None:
    items = [{"image": "a", "label": [1.0, NAN]}, {"image": "b"}]
    np.testing.assert_equal(label_matrix(items, ["x", "y"]), [[1, NAN], [NAN, NAN]])
    assert label_matrix([], ["x", "y"]).shape == (0, 2)


# --- errors


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_rejects_bad_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\]"):
        select_fraction(subjects_and_labels(), fraction, seed=0)


def test_label_matrix_rejects_other_lengths() -> None:
    with pytest.raises(ValueError, match="label of a must have 1 values, got 2"):
        label_matrix([{"image": "a", "label": [1.0, 0.0]}], ["x"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "must be a JSON object with a list `training`, got a list"),
        ({"images": []}, r"list `training`, got the keys \['images'\]"),
        ({"training": {}}, "`training` must be a list of items, got a dict"),
        ({"training": [], "test": [{"label": 1}]}, r"`test`\[0\] must have the path of an \"image\""),
        ({"training": [], "validation": [3]}, r"`validation`\[0\] must have the path of an \"image\", got 3"),
        ({"training": [f"no{index}.png" for index in range(5)]}, r"got 5 missing: .*no0.png, .*no2.png, \.\.\."),
        ({"training": [{"image": "0.png", "label": "no.nii"}]}, r"got 1 missing: .*no\.nii"),
        ({"training": [{"image": "0.png", "label": [1, 2]}]}, r"`training`\[0\] .*0\.png.* must be 1, 0 or null"),
        ({"training": [{"image": "0.png", "label": [[1]]}]}, "must be 1, 0 or null"),
        (
            {"training": [{"image": "0.png", "label": [1, 0]}, {"image": "1.png", "label": [1]}]},
            r"`training`\[1\] .* must have 2 values \(finding_0, finding_1\), got 1",
        ),
        ({"label_names": ["x"], "training": [{"image": "0.png", "label": {"y": 1}}]}, r"use the names .*x.*, got .*y"),
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


def test_broken_json_is_located(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{\n "training": [,]}')
    with pytest.raises(ValueError, match=r"dataset\.json must be JSON .* line 2 column 15"):
        read_datalist(tmp_path)


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"existing folder, got .*no"):
        read_datalist(tmp_path / "no")
    with pytest.raises(ValueError, match=r"must be a folder or an image, got the file .*notes\.txt"):
        read_datalist(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"dataset\.json or images \(\.png .* \.nii\.gz\), got neither"):
        read_datalist(tmp_path)
    for folders in ([], [tmp_path, tmp_path]):
        with pytest.raises(ValueError, match="one folder or several different ones"):
            read_datalist(folders)
    with pytest.raises(ValueError, match="`spatial_dims` must be 2 or 3"):
        read_datalist(tmp_path, spatial_dims=4)
