"""Files that a killed process leaves whole, a lock of folders, tables as CSV, and names of metrics."""

from __future__ import annotations

import atexit
import csv
import errno
import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from threading import Event, Thread
from typing import Any, BinaryIO, get_type_hints

import torch

from dissect_monai.common import InputError, Interval

logger = logging.getLogger(__name__)
BEAT = 10.0  # seconds between signs of life of a lock
_BEATS = 3.5  # without a sign after which its holder is dead
TEMPORARY = ".dissect_monai."  # how folders for temporary files begin
_ENDS = ("", "_low", "_high")  # of the columns and metrics of an interval
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}
# A text that a spreadsheet would run, which no numbers are, or what stands for it in our tables.
_FORMULA = re.compile(r"'*(?![+-]?[\d.]+( [+-]?[\d.]+)*$)[=+\-@\t\r]")

# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def written_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to beside `path`; at the end it is flushed to disk and renamed to `path`, or deleted on an error.

    So a killed process leaves `path` as it was. Its folder is made if need be.

    Raises:
        OSError: naming `path`, if the disk is full or fails, whatever the writer makes of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        fault = disk_fault(error)
        if fault is None or fault.filename == str(path):
            raise
        raise OSError(fault.errno, fault.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_fault(error: BaseException | None) -> OSError | None:
    """What a full or failing disk has said, in an error or in what led to it: `torch.save` says something else."""
    while error is not None and not (isinstance(error, OSError) and error.errno in _DISK):
        error = error.__cause__ or error.__context__
    return error


def load_whole(path: str | Path, check: bool = True) -> Any:
    """Load plain tensors and values, as `torch.save` wrote them, onto the CPU.

    Args:
        path: of the file.
        check: whether to compare its content with its checksums, which `torch.load` does not.

    Raises:
        ValueError: if it is damaged, by as little as a bit, or no such file.
    """
    with open(path, "rb") as file:
        file.read(1)  # what cannot be read is not damaged
    try:
        if check and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise InputError(f"{damaged} has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may say anything to a parser
        raise InputError(f"{path} cannot be loaded, it is damaged or no file of torch.save") from error


def temporary_folder() -> TemporaryDirectory[str]:
    """A folder in that for temporary files, which the next run removes if this process is killed."""
    return TemporaryDirectory(f".{os.getpid()}.tmp", TEMPORARY)


def remove_halves(*folders: str | Path, only: str = ".") -> None:
    """Delete what dead processes were writing, if its name begins with `only`; what living ones write stays."""
    for half in (half for folder in folders for half in Path(folder).glob(f"{only}*.tmp")):
        pid = half.name.split(".")[-2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            if half.is_dir():
                shutil.rmtree(half, ignore_errors=True)
            else:
                half.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    # A zombie has no command line, and neither has a thread of the kernel, which writes no such file.
    line = Path(f"/proc/{pid}/cmdline")
    return not line.exists() or bool(line.read_bytes())


def save_atomically(state: Any, path: str | Path) -> None:
    """`torch.save` that leaves `path` whole at any moment."""
    with written_atomically(path) as file:
        torch.save(state, file)


# ---- the lock of a folder --------------------------------------------------------------------------------------------

_held: dict[Path, tuple[Any, Event]] = {}  # locks of this process: the open file, and what ends its signs of life


def hold(folder: str | Path) -> None:
    """Take the lock of a folder for this process, until `release` or its end; taking it twice is nothing.

    It is the file `.lock`, which says who holds it, with `flock` where the file system has that. Elsewhere, and where
    the holder is on another machine, signs of life tell: the time of the file, which changes every `BEAT` seconds.
    The same Slurm job takes it over from another machine of its own, on which it was before. Of two that take it at
    once without `flock`, the one whose line is the first in the file has it.

    Raises:
        InputError: naming machine and process, if another living one holds it.
    """
    path = Path(folder).absolute() / ".lock"
    if path in _held:
        return
    own = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    file, state = _open_lock(path)
    holder = _holder(file)
    here = holder.get("host") == own["host"]
    moved = not here and own["job"] is not None and holder.get("job") == own["job"]
    known_dead = not holder or moved or (here and state == "ours")
    if (state == "taken" and not moved) or (state != "taken" and not known_dead and _beats(path, holder)):
        file.close()
        raise _in_use(path, holder)
    if state == "taken":  # by a machine that is gone, as the file server does not know yet
        path.unlink(missing_ok=True)
        file.close()
        file, state = _open_lock(path)
    file.truncate(0)
    file.write(json.dumps(own) + "\n")
    file.flush()
    if state == "unknown":
        os.fsync(file.fileno())
        time.sleep(BEAT / 5)
        with open(path, "a+", encoding="utf-8") as again:
            holder = _holder(again)
        if holder != own:
            file.close()
            raise _in_use(path, holder)
    stop = Event()
    _held[path] = file, stop
    Thread(target=_beat, args=(path, stop), daemon=True).start()


def _in_use(path: Path, holder: Mapping[str, Any]) -> InputError:
    return InputError(
        f"{path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}: wait for its end, or give "
        "another `output_dir`."
    )


def release() -> None:
    """Give all locks of this process back."""
    while _held:
        path, (file, stop) = _held.popitem()
        stop.set()
        path.unlink(missing_ok=True)
        file.close()


def _open_lock(path: Path) -> tuple[Any, str]:
    """The open file, and whether its `flock` is "ours", "taken" by another process, or "unknown"."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        state = _flock(file)
        with suppress(FileNotFoundError):  # removed by its holder meanwhile
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file, state
        file.close()


def _flock(file: Any) -> str:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "taken"
    except (ImportError, OSError):  # not on Windows, nor on all that is mounted
        return "unknown"
    return "ours"


def _holder(file: Any) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.readline()))
    except ValueError:  # nothing yet, or half a line of one who was killed
        return {}


def _beats(path: Path, holder: Mapping[str, Any]) -> bool:
    """Whether a lock's holder gives a sign of life, by the clock of the file system."""
    last = path.stat().st_mtime
    logger.warning("%s is of process %s on %s: looking whether it lives.", path, holder.get("pid"), holder.get("host"))
    while True:
        with TemporaryFile(dir=path.parent) as clock:
            now = os.fstat(clock.fileno()).st_mtime
        if path.stat().st_mtime != last:
            return True
        if now - last > _BEATS * BEAT:
            return False
        time.sleep(BEAT / 10)


def _beat(path: Path, stop: Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):  # the folder may be out of reach for a while
            os.utime(path)


def _forget() -> None:
    """In a fork, which would hold the locks of its parent for longer than that lives."""
    while _held:
        _held.popitem()[1][0].close()


atexit.register(release)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

# ---- tables ----------------------------------------------------------------------------------------------------------


def write_csv(path: str | Path, fields: Sequence[str], rows: Iterable[Sequence[Any]], nan: str = "") -> None:
    """Write a table: floats with four decimals, an `Interval` in three columns, other tuples with blanks between.

    Args:
        path: file to write; its folder is made.
        fields: names of the columns, such as `columns` gives them.
        rows: values in the order of `fields`; None is blank, a text that a spreadsheet would run has a ' before it.
        nan: what stands for NaN.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([cell for name in fields for cell in _cells(name, nan)])
    writer.writerows([cell for value in row for cell in _cells(value, nan)] for row in rows)
    with written_atomically(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table of `write_csv` by column, texts as they were given to it."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return [{plain_text(key): plain_text(value) for key, value in row.items()} for row in csv.DictReader(file)]


def plain_text(cell: Any) -> Any:
    """A cell of a table of `write_csv` without the ' that keeps a spreadsheet from running a text."""
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and _FORMULA.match(cell) else cell


def _cells(value: Any, nan: str) -> list[Any]:
    if isinstance(value, Interval):
        return [cell for each in value for cell in _cells(each, nan)]
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    if isinstance(value, float):
        return [nan if isnan(value) else f"{value:.4f}"]
    return [f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value]


def aligned(lines: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Lines of cells in columns, two blanks apart; with `numbers`, all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(widths) - 1)]
    padded = ([side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def columns(row: type) -> list[str]:
    """Columns of a table of such `NamedTuple`s; an `Interval` has three: `dice`, `dice_low`, `dice_high`."""
    kinds = get_type_hints(row)
    return [f"{name}{end}" for name, kind in kinds.items() for end in (_ENDS if kind is Interval else _ENDS[:1])]


def metrics_by_name(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Each interval as three metrics: `auroc`, `auroc_low`, `auroc_high`."""
    return {
        f"{name}{end}": value
        for name, interval in intervals.items()
        for end, value in zip(_ENDS, interval, strict=True)
    }


def metric_name(metric: str, finding: str) -> str:
    """Name of a finding's metric, without blanks and commas, as a CSV holds it: `auroc_Pleural_Thickening`."""
    return f"{metric}_{finding}".replace(" ", "_").replace(",", "")
