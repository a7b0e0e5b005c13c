"""What all sources of make_datalist.py share: splits, checks, counts, and writing dataset.json."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from datalists.source import SPLITS, Record, Source
from datalists.volume_pairs import check_grids, check_values
from dissect_monai import ImageFileReader, read_datalist
from dissect_monai.data.identity import salt_of
from dissect_monai.writing import aligned

Splits = Mapping[str, Sequence[Record]]
WORKERS = 8  # more than cores, since they wait for the disk
NAMED_PROBLEMS = 10  # of all that are found; the others are counted


def make_datalist(
    source: Source, output: Path | None, overwrite: bool, skip_corrupt: bool, seed: int, name: str
) -> None:
    """Draw splits, check everything, print the counts and write dataset.json.

    Raises:
        ValueError: saying what must be put right; then nothing is written.
    """
    path = output_path(output or source.folder, overwrite)
    # Before the images are opened, which takes long.
    listed = Counter(record.image for record in source.records)
    repeated = [f"{image} is listed {times} times" for image, times in listed.items() if times > 1]
    leave_out([*source.problems, *repeated], len(listed) + len(source.problems), skip_corrupt)
    records = [record for record in draw_splits(source, seed) if listed[record.image] == 1]
    refuse_empty(records, source)
    if source.group:
        # Headers come first, since they are quick: a label map is read only once all images and label maps agree.
        records = usable(records, check_grids, "Reading headers", skip_corrupt)
        if source.labels:
            records = usable(records, partial(check_values, names=source.labels), "Reading label maps", skip_corrupt)
    else:
        records = usable(records, check_xray, "Opening images", skip_corrupt)
    refuse_empty(records, source)
    splits = {split: [record for record in records if record.split == split] for split in SPLITS}
    drawn = {split: share for split, share in source.shares.items() if share}
    name = name or source.name or source.folder.name
    shares = "".join(f", {share:g} of the subjects for {split}" for split, share in drawn.items())
    header = {
        "name": name,
        "description": source.description + (f"; drawn with seed {seed}{shares}" if shares else ""),
        "modality": {"0": source.modality},
    }
    if source.group:
        header |= {"task": name, "group": source.group}
        if source.labels:
            header["labels"] = {"0": "background", **{str(value): each for value, each in source.labels.items()}}
        header |= source.about
    else:
        header["label_names"] = source.label_names
    print_counts(source, splits)
    write(header, splits, path)


def output_path(output: Path, overwrite: bool) -> Path:
    """Where dataset.json goes; refused if it may not."""
    output = output if output.suffix == ".json" and not output.is_dir() else output / "dataset.json"
    folder = output.parent if output.parent.exists() else output.parent.parent
    if output.name != "dataset.json" or not folder.is_dir():
        raise ValueError(f"--output must be a folder, or a new one in a folder that exists, got {output}.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists. Replace it with --overwrite, or name another folder with --output.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} must be writable. Name another folder with --output.")
    return output


def leave_out(problems: Sequence[str], total: int, skip: bool) -> None:
    """Name what cannot be used: an error, or a warning if it is to be left out."""
    if not problems:
        return
    more = [f"and {len(problems) - NAMED_PROBLEMS} more"] if len(problems) > NAMED_PROBLEMS else []
    text = "\n  ".join([f"{len(problems)} of {total} images cannot be used:", *problems[:NAMED_PROBLEMS], *more])
    if not skip:
        raise ValueError(f"{text}\nCorrect them, or leave them out with --skip_corrupt.")
    print(f"warning: left out, {text}", file=sys.stderr)


def draw_splits(source: Source, seed: int) -> list[Record]:
    """Give a split to every record without one, the same to all of a subject; what no share asks for is training.

    It follows from a hash of seed and subject, so that a subject keeps its split when others come or go.
    """
    shares = source.shares
    if min(shares.values(), default=0) < 0 or sum(shares.values()) >= 1:
        raise ValueError(f"fractions must be 0 or more and sum to less than 1, got {dict(shares)}.")

    def drawn(name: str) -> str:
        digest = hashlib.sha256(f"{seed}\t{name}".encode(errors="surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for split, share in shares.items():
            if place < share:
                return split
            place -= share
        return "training"

    return [record._replace(split=record.split or drawn(record.group(source.folder))) for record in source.records]


def refuse_empty(records: Sequence[Record], source: Source) -> None:
    """Refuse splits that must hold images and do not; where another seed would fill them, say which."""
    needed = {"training", *(split for split, share in source.shares.items() if share)}
    empty = sorted(needed - {record.split for record in records}, key=SPLITS.index)
    if empty:
        left = {record.image for record in records}
        of_these = source._replace(records=[record for record in source.records if record.image in left])
        filled = (seed for seed in range(100) if needed <= {each.split for each in draw_splits(of_these, seed)})
        seed, count = next(filled, None), len({record.group(source.folder) for record in records})
        raise ValueError(
            f"{' and '.join(empty)} must hold images, got none, of {count} subject(s). Add subjects or change the "
            f"fractions{'' if seed is None else f', or draw others with --seed {seed}'}."
        )


def usable(
    records: Sequence[Record], check: Callable[[Record], Record], title: str, skip_corrupt: bool
) -> list[Record]:
    """What a check makes of the records that pass it; in threads, as files and decoders do not hold Python's lock."""

    def checked(record: Record) -> Record | str:
        try:
            return check(record)
        except ImportError:
            raise  # a missing package is no fault of the file
        except (OSError, ValueError) as error:
            return str(error)

    with ThreadPool(WORKERS) as pool:
        found = list(tqdm(pool.imap(checked, records), title, len(records)))
    leave_out([each for each in found if isinstance(each, str)], len(records), skip_corrupt)
    return [each for each in found if not isinstance(each, str)]


def check_xray(record: Record) -> Record:
    """The record, if its image can be read."""
    reader = ImageFileReader(spatial_dims=2)
    reader.get_data(reader.read(record.image))
    return record


def print_counts(source: Source, splits: Splits) -> None:
    """Print the numbers of images, of subjects and of each label in every split."""
    lines = [
        ["", *splits],
        ["images", *(str(len(records)) for records in splits.values())],
        ["subjects", *(str(len({record.group(source.folder) for record in records})) for records in splits.values())],
    ]
    for index, name in enumerate(source.label_names):
        counts = [Counter(record.label[index] for record in records if record.label) for records in splits.values()]
        lines.append([name, *(f"{count[1]} / {count[0]} / {count[None]}" for count in counts)])
    for value, name in source.labels.items():
        if name.lower() == "ignore":  # which is no structure
            continue
        shown = [
            {record.group(source.folder) for record in records if value in record.values} for records in splits.values()
        ]
        lines.append([name, *(str(len(subjects)) for subjects in shown)])
    print(aligned(lines, numbers=True))
    if source.label_names:
        print("(images: positive / negative / unknown)")
    if source.labels:
        print("(structures: subjects whose label map shows them)")


def write(header: Mapping[str, Any], splits: Splits, output: Path) -> None:
    """Write dataset.json, and read it back, as training does, before it takes the place of another."""
    output.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".make_datalist_") as folder:
        staged = Path(folder, "dataset.json")
        # First as it must be to be read from here, then as it must be to be moved.
        for start in (staged.parent, output.parent):
            items = {split: [as_item(record, start) for record in records] for split, records in splits.items()}
            staged.write_text(json.dumps({**header, **items}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            if start == staged.parent:
                read_datalist(start, spatial_dims=3 if "task" in header else 2)
        staged.replace(output)
    salt_of(output.parent)  # now, while the folder can be written, for all copies of it
    print(f"wrote {output}")


def as_item(record: Record, start: Path) -> dict[str, Any]:
    """A record as dataset.json has it, without what is not known; paths are relative to `start`."""

    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, start)).as_posix()

    label = relative(record.label_map) if record.label_map else record.label
    item = {"image": relative(record.image), "label": label, "subject": record.subject, **record.extra}
    return {key: value for key, value in item.items() if value is not None and value != ""}
