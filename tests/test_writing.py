"""Whole files, a lock of folders, tables that no spreadsheet runs."""

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import OTHERS

from dissect_monai import writing
from dissect_monai.common import InputError, Interval
from dissect_monai.writing import (
    columns,
    hold,
    load_whole,
    metric_name,
    metrics_by_name,
    plain_text,
    read_csv,
    release,
    remove_halves,
    save_atomically,
    write_csv,
    written_atomically,
)

NAN = float("nan")
DEAD = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True).stdout
DEAD_PID = int(DEAD)

# ---- files -------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_file_of_before_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    save_atomically({"a": torch.ones(1)}, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(*_: object) -> None:  # as torch does, whose own error hides that of the disk
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    for name, fails in ((("os", "fsync"), full), (("torch", "save"), save)):
        with monkeypatch.context() as patch:
            patch.setattr(".".join(name), fails)
            with pytest.raises(OSError, match=r"No space left on device: '.*model\.pt'"):
                save_atomically({"a": torch.zeros(1)}, path)
        assert path.read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_atomically(path) as first, written_atomically(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_halves_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    living = tmp_path / f".model.pt.{os.getpid()}.tmp"
    for path in (living, tmp_path / f".model.pt.{DEAD_PID}.tmp", tmp_path / f".model.pt.ab12.{DEAD_PID}.tmp"):
        path.touch()
    (tmp_path / f".dissect_monai.x.{DEAD_PID}.tmp").mkdir()
    others = [tmp_path / ".notes.tmp", tmp_path / ".tmp", tmp_path / f"model.{DEAD_PID}.tmp"]
    for path in others:
        path.touch()
    remove_halves(tmp_path, tmp_path / "nowhere")
    assert {*tmp_path.iterdir()} == {living, *others}


def damaged(path: Path, folder: Path) -> Iterator[Path]:
    """Cut off at several places, with other bytes at others, and other files altogether."""
    whole = path.read_bytes()
    for index, end in enumerate((0, 1, 60, len(whole) // 2, len(whole) - 1)):
        (folder / f"cut{index}").write_bytes(whole[:end])
        yield folder / f"cut{index}"
    for index, content in enumerate((b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x02]q\x00", b"torch", b"\x00" * 999)):
        (folder / f"other{index}").write_bytes(content)
        yield folder / f"other{index}"


def test_damage_of_any_kind_is_one_refusal(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    tensor = torch.arange(1000.0)
    save_atomically({"a": tensor}, path)
    assert torch.equal(load_whole(path)["a"], tensor)
    for file in damaged(path, tmp_path):
        try:
            found = load_whole(file)
        except InputError as error:
            assert str(error) == f"{file} cannot be loaded, it is damaged or no file of torch.save"  # noqa: PT017
        else:
            assert found == {}, file  # a pickle of an empty dictionary
    content = bytearray(path.read_bytes())
    content[content.find(tensor.numpy().tobytes()) + 1234] ^= 1
    path.write_bytes(content)
    torch.load(path)  # which does not see it
    with pytest.raises(InputError, match="it is damaged"):
        load_whole(path)


# ---- the lock ----------------------------------------------------------------------------------------------------


def hold_until_told(folder: Path, pipe: Any) -> None:
    hold(folder)
    pipe.send("held")
    pipe.recv()


@pytest.fixture
def _released() -> Iterator[None]:
    yield
    release()


def lock_of(folder: Path, **facts: object) -> Path:
    """As another process has left it."""
    path = folder / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": DEAD_PID, "job": None, **facts}))
    return path


@pytest.mark.usefixtures("_released")
def test_a_folder_is_of_one_living_process(tmp_path: Path) -> None:
    ours, theirs = OTHERS.Pipe()
    other = OTHERS.Process(target=hold_until_told, args=(tmp_path, theirs))
    other.start()
    assert ours.recv() == "held"
    with pytest.raises(InputError, match=f"is in use by process {other.pid} on .*: wait .* another `output_dir`"):
        hold(tmp_path)
    other.kill()
    other.join()
    assert (tmp_path / ".lock").exists()
    hold(tmp_path)
    hold(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    release()
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("_released")
@pytest.mark.parametrize("flock", ["ours", "unknown"])
@pytest.mark.parametrize("beats", [True, False])
def test_a_holder_on_another_machine_lives_as_long_as_it_gives_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: str, beats: bool
) -> None:
    monkeypatch.setattr(writing, "_flock", lambda file: flock)
    monkeypatch.setattr(writing, "BEAT", 0.05)
    path = lock_of(tmp_path)
    if beats:
        monkeypatch.setattr(writing.time, "sleep", lambda seconds: os.utime(path, (1, 1)))
        with pytest.raises(InputError, match=r"is in use by process .* on elsewhere"):
            hold(tmp_path)
    else:
        hold(tmp_path)
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.usefixtures("_released")
@pytest.mark.parametrize("flock", ["ours", "unknown", "taken"])
def test_a_slurm_job_that_has_moved_takes_its_own_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: str
) -> None:
    monkeypatch.setattr(writing, "_flock", lambda file: flock)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    path = lock_of(tmp_path, job="7")
    hold(tmp_path)
    assert json.loads(path.read_text())["host"] != "elsewhere"


@pytest.mark.usefixtures("_released")
@pytest.mark.parametrize("first", [True, False])
def test_one_of_two_that_take_a_lock_at_once_has_it_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """The other, who saw an empty file, too, writes after this one: into the emptied file, or behind its line."""
    path = tmp_path / ".lock"

    def other(seconds: float) -> None:
        line = json.dumps({"host": "elsewhere", "pid": DEAD_PID, "job": None})
        path.write_text(path.read_text() + line if first else line)

    monkeypatch.setattr(writing, "_flock", lambda file: "unknown")
    monkeypatch.setattr(writing.time, "sleep", other)
    if first:
        hold(tmp_path)
        release()
    else:
        with pytest.raises(InputError, match=rf"is in use by process {DEAD_PID} on elsewhere"):
            hold(tmp_path)
    assert path.exists() is not first


@pytest.mark.usefixtures("_released")
def test_a_lock_shows_that_its_holder_lives_and_half_a_line_is_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "BEAT", 0.01)
    path = tmp_path / ".lock"
    path.write_text('{"host": "els')
    hold(tmp_path)
    os.utime(path, (1, 1))
    for _ in range(1000):
        if path.stat().st_mtime > 1:
            break
        writing.time.sleep(0.01)
    assert path.stat().st_mtime > 1


# ---- tables ------------------------------------------------------------------------------------------------------


def test_a_spreadsheet_runs_no_text_of_a_table_and_its_reader_has_it_as_it_was(tmp_path: Path) -> None:
    texts = ["=1+1", "+cmd", "-x", "@sum", "\t=1", "'=1", "''@a", "plain", "'quoted'", "", "-1.5", "+3 -4", "a=b"]
    write_csv(tmp_path / "table.csv", ["=name", "number", "several"], [(text, -0.5, (text, "b")) for text in texts])
    with open(tmp_path / "table.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=name", "number", "several"]
    for text, (cell, number, _) in zip(texts, rows, strict=True):
        assert number == "-0.5000"
        assert cell.lstrip("'")[:1] not in "=@\t" or cell[:1] in ("'", "")
        assert plain_text(cell) == text
    found = read_csv(tmp_path / "table.csv")
    assert [row["=name"] for row in found] == texts
    assert [row["several"] for row in found] == [f"{text} b" for text in texts]


class Row(NamedTuple):
    structure: str
    values: tuple[int, ...]
    dice: Interval
    n: int | None


@pytest.mark.parametrize("nan", ["", "nan"])
def test_a_table_has_four_decimals_and_three_columns_for_an_interval(tmp_path: Path, nan: str) -> None:
    rows = [Row("liver", (2, 3), Interval(0.5, 0.25, NAN), None), Row("a,b", (), Interval(1.0, NAN, 1 / 3), 3)]
    write_csv(tmp_path / "new" / "table.csv", columns(Row), rows, nan)
    assert (tmp_path / "new" / "table.csv").read_text().splitlines() == [
        "structure,values,dice,dice_low,dice_high,n",
        f"liver,2 3,0.5000,0.2500,{nan},",
        f'"a,b",,1.0000,{nan},0.3333,3',
    ]


def test_metrics_are_named_without_blanks_and_commas() -> None:
    name = metric_name("auroc", "Mass, large")
    assert metrics_by_name({name: Interval(0.5, 0.25, 0.75)}) == {
        "auroc_Mass_large": 0.5, "auroc_Mass_large_low": 0.25, "auroc_Mass_large_high": 0.75,
    }  # fmt: skip
