"""What all sources of make_datalist.py share: splits, checks, and writing dataset.json."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from datalists.counts import print_findings, print_structures
from datalists.source import Options, Record, Source, Volumes, absolute, is_true, one_of
from datalists.volume_pairs import Found, check_grids, check_values
from dissect_monai import ImageFileReader, read_datalist
from dissect_monai.common import shorten
from dissect_monai.data.datalists import SPLITS
from dissect_monai.data.readers import decoding_reason, image_format

T = TypeVar("T")
DRAWN = "; drawn with seed"  # begins what a description says of the splits
NAMED_PROBLEMS = 10  # of all that are found; the others are counted


def make_datalist(source: Source) -> None:
    """Draw splits, check everything, print the counts and write dataset.json.

    Raises:
        ValueError: saying what must be put right; then nothing is written.
    """
    options, volumes = source.options, source.volumes
    for name, least in {"workers": 1, "seed": 0}.items():
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    output = output_path(options, source.folder)
    records = [record._replace(image=absolute(record.image)) for record in source.records]
    records = draw_splits(records, source.shares, options.seed)
    refuse_repeats(records)
    wanted = {"training", *(split for split, share in source.shares.items() if share), *(r.split for r in records)}
    records = check_volumes(records, volumes, options) if volumes else check_images(records, options)
    splits = {split: [record for record in records if record.split == split] for split in SPLITS}
    empty = [split for split in SPLITS if split in wanted and not splits[split]]
    if empty:
        raise ValueError(f"{' and '.join(empty)} must hold images, got none. Add subjects or change the fractions.")
    shares = "".join(f", {share:g} of the subjects for {split}" for split, share in source.shares.items())
    name = str(options.name or source.name or source.folder.name)
    header = {
        "name": name,
        "description": source.description + (f"{DRAWN} {options.seed}{shares}" if shares else ""),
        "modality": {"0": str(options.modality or source.modality)},
    }
    if volumes:
        found = sorted({value for record in records for value in record.values})
        labels = {value: f"label_{value}" for value in found} if volumes.labels is None else volumes.labels
        print_structures(splits, labels if found else {})
        named = {"labels": {"0": "background", **{str(value): labels[value] for value in labels}}} if labels else {}
        header |= {"task": name, "group": volumes.group, **named, **volumes.about}
    else:
        print_findings(splits, source.label_names)
        header["label_names"] = source.label_names
    write(header, splits, output)


def output_path(options: Options, folder: Path) -> Path:
    """Where dataset.json goes; refused if it may not."""
    output, overwrite = absolute(options.output or folder), is_true("overwrite", options.overwrite)
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
    twice = [image for image, count in Counter(record.image for record in records).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} images are listed more than once: {shorten(twice, 3)}. Remove the repetitions.")
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        splits[record.group].add(str(record.split))
    leaks = [f"{group} ({', '.join(sorted(found))})" for group, found in splits.items() if len(found) > 1]
    if leaks:
        raise ValueError(
            f"{len(leaks)} subjects are in more than one split: {shorten(leaks, 3)}. "
            "Move each to one split, else the evaluation is on training data."
        )


def check_images(records: list[Record], options: Options) -> list[Record]:
    """The records whose image can be read: all of them, or less what `skip_corrupt` leaves out."""
    images = [record.image for record in records]
    opens, skip = (
        one_of("check", options.check, "open", "exists") == "open",
        is_true("skip_corrupt", options.skip_corrupt),
    )
    found = concurrently(os.path.isfile, images, options.workers, "Looking for images", 16)
    missing = [image for image, is_file in zip(images, found, strict=True) if not is_file]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} images do not exist: {shorten(missing, 3)}. "
            "Complete the download, correct the paths, or remove them from the table."
        )
    if not opens:
        return records
    errors = concurrently(reading_error, images, options.workers, "Opening images", 16)
    corrupt = [f"{image} ({error})" for image, error in zip(images, errors, strict=True) if error]
    if corrupt and not skip:
        raise ValueError(
            f"{len(corrupt)} of {len(images)} images cannot be read: {shorten(corrupt, 3)}. "
            "Replace them, or leave them out with --skip_corrupt true."
        )
    leave_out(corrupt, len(images), skip)
    return [record for record, error in zip(records, errors, strict=True) if not error]


def check_volumes(records: list[Record], volumes: Volumes, options: Options) -> list[Record]:
    """The records that can be used, with the values of their label maps: all, or less what `skip_corrupt` leaves out.

    Headers come first, since they are quick: a label map is read only once all images and label maps agree.
    """
    skip = is_true("skip_corrupt", options.skip_corrupt)
    if one_of("check", options.check, "open", "exists") == "exists":
        return records

    def usable(check: Callable[[Record], Found], title: str) -> list[Record]:
        found = concurrently(check, records, options.workers, title, 1)
        leave_out([each.error for each in found if each.error], len(records), skip)
        return [
            record._replace(values=each.values) for record, each in zip(records, found, strict=True) if not each.error
        ]

    records = usable(lambda record: check_grids(record.image, record.label_map), "Reading headers")
    if volumes.labels == {}:
        return records
    return usable(lambda record: check_values(record.image, record.label_map, volumes.labels), "Reading label maps")


def leave_out(problems: Sequence[str], total: int, skip: bool) -> None:
    """Name what cannot be used, which is left out with `skip`.

    Raises:
        ValueError: naming the volumes and the remedy, if there are any and `skip` is False.
    """
    if skip:
        for problem in problems:
            print(f"warning: skipped {problem}", file=sys.stderr)
    elif problems:
        more = len(problems) - NAMED_PROBLEMS
        lines = [*problems[:NAMED_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError(
            "\n  ".join([f"{len(problems)} of {total} volumes cannot be used:", *lines])
            + "\nCorrect them, or leave them out with --skip_corrupt true."
        )


def concurrently(
    function: Callable[[T], Any], items: Sequence[T], workers: int, title: str, chunksize: int
) -> list[Any]:
    """Map a function over items with a progress bar; in threads, as files and decoders do not hold Python's lock."""
    with ThreadPool(workers) as pool:
        return list(tqdm(pool.imap(function, items, chunksize=chunksize), title, len(items)))


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
    """A record as dataset.json has it, without what is not known; paths are relative to `start`."""

    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, start)).as_posix()

    label = relative(record.label_map) if record.label_map else record.label
    item = {"image": relative(record.image), "label": label, "subject": record.subject, **record.extra}
    return {key: value for key, value in item.items() if value is not None and value != ""}
