from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dissect_monai.phantoms.generated import write_once

SPEC = {"version": 1, "seed": 0}


def writer(text: str = "new", spec: dict[str, Any] = SPEC) -> Any:
    """Writes a set of one image and one label map."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "image.txt").write_text(text)
        (folder / "label.txt").write_text(text)
        item = {"image": "image.txt", "label": "label.txt"}
        (folder / "dataset.json").write_text(json.dumps({"spec": spec, "training": [item]}))

    return write


def test_writes_the_set_into_a_new_or_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "deep" / "set", tmp_path / "empty"):
        assert write_once(str(folder), SPEC, writer()) == folder
        assert (folder / "image.txt").read_text() == "new"


def test_a_whole_set_is_kept(tmp_path: Path) -> None:
    write_once(tmp_path / "set", SPEC, writer("old"))
    write_once(tmp_path / "set", SPEC, writer("new"))
    assert (tmp_path / "set" / "image.txt").read_text() == "old"


@pytest.mark.parametrize("lost", ["image.txt", "label.txt"])
def test_a_set_that_lacks_a_file_is_replaced(lost: str, tmp_path: Path) -> None:
    write_once(tmp_path / "set", SPEC, writer("old"))
    (tmp_path / "set" / lost).unlink()
    write_once(tmp_path / "set", SPEC, writer("new"))
    assert {(tmp_path / "set" / name).read_text() for name in ("image.txt", "label.txt")} == {"new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_a_failed_replacement_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    write_once(tmp_path / "set", SPEC, writer("old"))
    (tmp_path / "set" / "label.txt").unlink()
    with pytest.raises(OSError, match="disk full"):
        write_once(tmp_path / "set", SPEC, fail)
    assert (tmp_path / "set" / "image.txt").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_the_set_of_a_faster_process_is_taken(tmp_path: Path) -> None:
    def write_late(folder: Path) -> None:
        writer("mine")(folder)
        write_once(tmp_path / "set", SPEC, writer("theirs"))

    write_once(tmp_path / "set", SPEC, write_late)
    assert (tmp_path / "set" / "image.txt").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_other_data_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_once(tmp_path / "set", SPEC, writer(spec={"version": 0}))
    with pytest.raises(ValueError, match=r"must be new, empty or hold the set .*, got .* holding \{'version': 0\}"):
        write_once(tmp_path / "set", {"version": 1}, writer())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holding other files\. Choose another folder"):
        write_once(tmp_path / "mine", SPEC, writer())
    assert (tmp_path / "mine" / "thesis.txt").exists()
