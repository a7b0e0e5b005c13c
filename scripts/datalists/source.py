"""What a source of make_datalist.py is, and what all sources read their folders and options with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Label = list[int | None]  # 1, 0 or None (unknown) per finding


class Record(NamedTuple):
    """One image of a source."""

    image: Path
    label: Label | None = None
    subject: str | None = None  # None: a subject of its own
    split: str | None = None  # None: to be drawn
    extra: Mapping[str, Any] = {}
    label_map: Path | None = None
    values: tuple[int, ...] = ()  # of the structures in its label map, once that is read

    @property
    def group(self) -> str:
        """What must not be divided among splits."""
        return self.subject or str(self.image)


class Volumes(NamedTuple):
    """What a source of volumes knows beside its records."""

    group: str  # region or modality, which several tasks share
    labels: Mapping[int, str] | None  # names of the values of label maps, if there are any; None: as found
    about: Mapping[str, Any] = {}  # what else dataset.json says, such as a licence


class Source(NamedTuple):
    """What a subcommand has read; `make_datalist` does the rest."""

    options: Options
    folder: Path  # where dataset.json goes by default
    description: str
    label_names: list[str]
    records: list[Record]
    shares: Mapping[str, float] = {}  # split → share of the subjects whose split is to be drawn
    name: str = ""  # that of the folder if empty
    modality: str = "CR"
    volumes: Volumes | None = None  # None: X-rays


@dataclass
class Options:
    """What all sources share; see `Sources` of make_datalist.py."""

    output: str = ""
    overwrite: bool | str = False
    check: str = "open"
    workers: int = 8
    skip_corrupt: bool | str = False
    seed: int = 0
    name: str = ""
    modality: str = ""


def find_file(folder: Path, *names: str) -> Path:
    """The first of several files that exists."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} must hold {' or '.join(names)}. Give the folder of the whole data set.")


def walk(folder: Path, without: Path | None = None) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder in a folder and its files, hidden ones left out and links followed, as training does."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != without]
        yield Path(parent), [Path(parent, name) for name in names if not name.startswith(".")]


def subject_of(name: str, pattern: str) -> str | None:
    """The subject in a file name; None without a pattern."""
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise ValueError(f"`subject_pattern` must be a regular expression, got {pattern!r}: {error}.") from error
    if pattern and (found is None or len(found.groups()) != 1 or not found[1]):
        raise ValueError(f"`subject_pattern` must match every file name, with one group, got {pattern!r} for {name}.")
    return found[1] if found and pattern else None


def columns(given: str | Sequence[str]) -> list[str]:
    """Names from the command line, where "[A,B]" arrives as a list but "[A B,C]" as text."""
    names = given if isinstance(given, (list, tuple)) else str(given).strip("[]").split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def one_of(name: str, value: str, *choices: str) -> str:
    """The value, if it is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    return value


def is_true(name: str, value: bool | str) -> bool:
    """A switch, which the command line gives as text: `--overwrite true`."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    return str(value).lower() == "true"


def absolute(path: str | Path) -> Path:
    """A path as the command line or a table gives it, made absolute without following links."""
    return Path(os.path.abspath(os.path.expanduser(str(path))))
