"""What all sources of make_datalist.py share: splits, checks, counts, and writing dataset.json."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dissect_monai.data import SPLITS, read_datalist
from dissect_monai.knobs import is_true
from dissect_monai.readers import ImageFileReader, decoding_reason, image_format

Label = list[int | None]  # 1, 0 or None (unknown) per finding


class Record(NamedTuple):
    """One image of a source."""

    image: Path
    label: Label | None = None
    subject: str | None = None  # None: a subject of its own
    split: str | None = None  # None: to be drawn
    extra: Mapping[str, Any] = {}

    @property
    def group(self) -> str:
        """What must not be divided among splits."""
        return self.subject or str(self.image)


class Source(NamedTuple):
    """What a subcommand has read; `make_datalist` does the rest."""

    options: Options
    folder: Path  # where dataset.json goes by default
    description: str
    label_names: list[str]
    records: list[Record]
    shares: Mapping[str, float] = {}  # split → share of the subjects whose split is to be drawn


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
    modality: str = "CR"


def make_datalist(source: Source) -> None:
    """Draw splits, check everything, print the counts and write dataset.json.

    Raises:
        ValueError: saying what must be put right; then nothing is written.
    """
    options = source.options
    for name, least in {"workers": 1, "seed": 0}.items():
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    output = output_path(options, source.folder)
    records = [record._replace(image=absolute(record.image)) for record in source.records]
    records = draw_splits(records, source.shares, options.seed)
    refuse_repeats(records)
    asked = {split for split, share in source.shares.items() if share}
    wanted = {"training", *asked, *(record.split for record in records)}
    records = check_images(records, options)
    splits = {split: [record for record in records if record.split == split] for split in SPLITS}
    empty = [split for split in SPLITS if split in wanted and not splits[split]]
    if empty:
        raise ValueError(f"{' and '.join(empty)} must hold images, got none. Add subjects or change the fractions.")
    print_counts(splits, source.label_names)
    shares = "".join(f", {share:g} of the subjects for {split}" for split, share in source.shares.items())
    header = {
        "name": str(options.name or source.folder.name),
        "description": source.description + (f"; drawn with seed {options.seed}{shares}" if shares else ""),
        "modality": {"0": options.modality},
        "label_names": source.label_names,
    }
    write(header, splits, output)


def output_path(options: Options, folder: Path) -> Path:
    """Where dataset.json goes; refused if it may not."""
    output, overwrite = absolute(options.output or folder), is_true(options.overwrite, "overwrite")
    output = output / "dataset.json" if output.is_dir() else output
    if output.name != "dataset.json" or not output.parent.is_dir():
        raise ValueError(f"`output` must be an existing folder, with or without /dataset.json, got {output}.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists. Replace it with --overwrite true, or name another folder with --output.")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"{output.parent} must be writable. Name another folder with --output.")
    return output


def draw_splits(records: Sequence[Record], shares: Mapping[str, float], seed: int) -> list[Record]:
    """Give a split to every record without one, the same to all of a subject; what no share asks for is training.

    Any share but 0 draws one subject at least.
    """
    if (
        not all(isinstance(share, (int, float)) and share >= 0 for share in shares.values())
        or sum(shares.values()) >= 1
    ):
        raise ValueError(f"fractions must be 0 or more and sum to less than 1, got {dict(shares)}.")
    groups = list(dict.fromkeys(record.group for record in records if record.split is None))
    split_of = dict.fromkeys(groups, "training")
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    for split, share in shares.items():
        count = max(1, round(share * len(groups))) if share else 0
        split_of.update({groups[index]: split for index in order[:count]})
        order = order[count:]
    return [record._replace(split=record.split or split_of[record.group]) for record in records]


def refuse_repeats(records: Sequence[Record]) -> None:
    """Refuse images that are listed twice and subjects in several splits."""
    twice = [str(image) for image, count in Counter(record.image for record in records).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} images are listed more than once: {few(twice)}. Remove the repetitions.")
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        splits[record.group].add(str(record.split))
    leaks = [f"{group} ({', '.join(sorted(found))})" for group, found in splits.items() if len(found) > 1]
    if leaks:
        raise ValueError(
            f"{len(leaks)} subjects are in more than one split: {few(leaks)}. "
            "Move each to one split, else the evaluation is on training data."
        )


def check_images(records: list[Record], options: Options) -> list[Record]:
    """The records whose image can be read: all of them, or less what `skip_corrupt` leaves out."""
    images = [record.image for record in records]
    opens = one_of("check", options.check, "open", "exists") == "open"
    skip = is_true(options.skip_corrupt, "skip_corrupt")
    found = concurrently(os.path.isfile, images, options.workers, "Looking for images")
    missing = [str(image) for image, is_file in zip(images, found, strict=True) if not is_file]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} images do not exist: {few(missing)}. "
            "Complete the download, correct the paths, or remove them from the table."
        )
    if not opens:
        return records
    errors = concurrently(reading_error, images, options.workers, "Opening images")
    corrupt = [f"{image} ({error})" for image, error in zip(images, errors, strict=True) if error]
    if corrupt and not skip:
        raise ValueError(
            f"{len(corrupt)} of {len(images)} images cannot be read: {few(corrupt)}. "
            "Replace them, or leave them out with --skip_corrupt true."
        )
    for line in corrupt:
        print(f"warning: skipped {line}", file=sys.stderr)
    return [record for record, error in zip(records, errors, strict=True) if not error]


def concurrently(function: Callable[[Path], Any], images: list[Path], workers: int, title: str) -> list[Any]:
    """Map a function over images with a progress bar; in threads, as files and decoders do not hold Python's lock."""
    with ThreadPool(workers) as pool:
        return list(tqdm(pool.imap(function, images, chunksize=16), title, len(images)))


def reading_error(image: Path) -> str | None:
    """Why an X-ray cannot be read, or None if it can."""
    try:
        with open(image, "rb") as file:
            is_png = file.read(4) == b"\x89PNG"
        if is_png and image_format(image) == "picture":
            # Its checksums find any damage in a small part of the time of decoding.
            with Image.open(image) as picture:
                picture.verify()
        else:
            reader = ImageFileReader(spatial_dims=2)
            reader.get_data(reader.read(image))
    except ImportError:
        raise  # a missing package is no fault of the file
    except Exception as error:  # pillow's verify, which is no part of our reader, raises anything
        return decoding_reason(error.__cause__ or error)
    return None


def print_counts(splits: Mapping[str, list[Record]], label_names: list[str]) -> None:
    """Print a table of what each split holds; warn of empty splits and of findings that one cannot evaluate."""
    empty = [split for split in ("validation", "test") if not splits[split]]
    splits = {split: records for split, records in splits.items() if records}
    lines = [["", *splits], ["images", *(str(len(records)) for records in splits.values())]]
    lines.append(["subjects", *(str(len({record.group for record in records})) for records in splits.values())])
    lacking = defaultdict(list)
    for index, name in enumerate(label_names):
        lines.append([name])
        for split, records in splits.items():
            count = Counter(record.label[index] if record.label else None for record in records)
            lines[-1].append(f"{count[1]} / {count[0]} / {count[None]}")
            for value, word in {1: "positives", 0: "negatives"}.items():
                if not count[value]:
                    lacking[split, word].append(name)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *cells in lines:
        print(
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)),
            sep="  ",
        )
    if label_names:
        print("(positive / negative / unknown)")
        for split in empty:
            print(f"warning: {split} has no images, but cxr_classify needs validation and test.", file=sys.stderr)
    for (split, word), names in sorted(lacking.items()):
        print(f"warning: {split} has no {word} of {', '.join(names)}.", file=sys.stderr)


def write(header: Mapping[str, Any], splits: Mapping[str, list[Record]], output: Path) -> None:
    """Write dataset.json, and read it back before it takes the place of another."""
    with TemporaryDirectory(dir=output.parent, prefix=".make_datalist_") as folder:
        staged = Path(folder, "dataset.json")
        # First as it must be to be read from here, then as it must be to be moved.
        for start in (staged.parent, output.parent):
            items = {split: [as_item(record, start) for record in records] for split, records in splits.items()}
            staged.write_text(json.dumps({**header, **items}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            if start == staged.parent:
                read_datalist(start)
        staged.replace(output)
    print(f"wrote {output}")


def as_item(record: Record, start: Path) -> dict[str, Any]:
    """A record as dataset.json has it, without what is not known; its path is relative to `start`."""
    image = Path(os.path.relpath(record.image, start)).as_posix()
    item = {"image": image, "label": record.label, "subject": record.subject, **record.extra}
    return {key: value for key, value in item.items() if value is not None and value != ""}


def one_of(name: str, value: str, *choices: str) -> str:
    """The value, if it is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    return value


def absolute(path: str | Path) -> Path:
    """A path as the command line or a table gives it, made absolute without following links."""
    return Path(os.path.abspath(os.path.expanduser(str(path))))


def few(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
