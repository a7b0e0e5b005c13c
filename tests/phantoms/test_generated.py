from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import read

from dissect_monai.phantoms.generated import write_once

SPEC = {"version": 1, "seed": 0}


def write_set(folder: Path, text: str = "new", spec: dict[str, Any] = SPEC) -> Path:
    def write(partial: Path) -> dict[str, list[dict[str, Any]]]:
        (partial / "image.txt").write_text(text)
        return {"training": [{"image": "image.txt"}]}

    return write_once(folder, spec, {"name": "set"}, write)


def test_writes_the_set_into_a_new_or_empty_folder_and_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "deep" / "set", tmp_path / "empty"):
        assert write_set(folder) == write_set(folder, "other") == folder
        assert (folder / "image.txt").read_text() == "new"
        assert read(folder / "dataset.json") == {"name": "set", "spec": SPEC, "training": [{"image": "image.txt"}]}


def test_a_set_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def fail(partial: Path) -> Any:
        (partial / "image.txt").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_once(tmp_path / "set", SPEC, {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_several_writers_at_once_leave_one_whole_set(tmp_path: Path) -> None:
    def write_late(partial: Path) -> Any:
        write_set(tmp_path / "set", "theirs")
        return {}

    write_once(tmp_path / "set", SPEC, {}, write_late)
    assert (tmp_path / "set" / "image.txt").read_text() == "theirs"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: write_set(tmp_path / "other"), range(4))) == {tmp_path / "other"}
    assert set(tmp_path.iterdir()) == {tmp_path / "set", tmp_path / "other"}


def test_other_data_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_set(tmp_path / "set", spec={"version": 0})
    with pytest.raises(ValueError, match=r"must be new, empty or hold the set .*, got .* holding \{'version': 0\}"):
        write_set(tmp_path / "set")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holding other files\. Choose another folder"):
        write_set(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
