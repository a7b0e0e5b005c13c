"""Whose images these are, said without a name: keyed pseudonyms of subjects, and digests of what files hold."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import numpy as np

from dissect_monai.common import SALT, InputError, Item
from dissect_monai.data.readers import pixel_files, refuse_odd_file

logger = logging.getLogger(__name__)
DIGITS = 16  # hex digits of what is kept of a digest
_START, _CHUNK = 2**12, 2**16  # bytes that are looked at, at the start and in the middle of a file
_NUM_CONTENTS = 1024  # files of a data list that are looked at


def pseudonyms(items: Sequence[Item]) -> list[str]:
    """For each item 16 hex digits that stand for its subject, the same for all of its images and in all copies.

    They are an HMAC-SHA256 whose key, see `salt_of`, stays in the data folder. Where that can hold none, a warning says
    so, and the key is a digest of the data list. Items of no data folder have the content of an image for a key.
    """
    folders = {item["origin"][0] for item in items if "origin" in item}
    keys = {folder: _key(Path(folder)) for folder in folders}
    names = []
    for item in items:
        folder, subject = item.get("origin", ("", item.get("subject")))
        name = os.path.relpath(item["image"], folder or None) if subject is None else str(subject)
        place = folder or f"\t{name}"
        if place not in keys:
            keys[place] = content_digest(item["image"]).encode()
        names.append(hmac.new(keys[place], name.encode(errors="surrogatepass"), "sha256").hexdigest()[:DIGITS])
    return names


def salt_of(folder: Path) -> bytes:
    """The random key of a data folder: its file `.salt`, made by whoever needs it first, for the owner's eyes alone."""
    path = folder / SALT
    if not path.exists():
        number, half = mkstemp(dir=folder, prefix=SALT)  # of mode 0600
        with open(number, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        try:
            with suppress(FileExistsError):
                os.link(half, path)  # whole, and never over that of another process
        finally:
            os.unlink(half)
    salt = path.read_bytes()
    if len(salt) < 32:
        raise InputError(f"{path} must hold 32 bytes or more, got {len(salt)}: restore it, or remove it for a new one.")
    return salt


def _key(folder: Path) -> bytes:
    listed = folder / "dataset.json"
    places = (folder, listed.resolve().parent)  # where a link to the list leads, too
    try:
        return salt_of(next((place for place in places if (place / SALT).exists()), folder))
    except OSError as error:
        logger.warning(
            "%s: let this file be read, or made; until then pseudonyms of subjects follow from the data list, and "
            "change with it.", error,
        )  # fmt: skip
    return hashlib.sha256(listed.read_bytes() if listed.exists() else f"{sorted(os.listdir(folder))}".encode()).digest()


def content_digest(image: str | Path) -> str:
    """16 hex digits of size, first 4 KiB and middle 64 KiB of a file, or of sizes and the middle file of several."""
    path = Path(image)
    refuse_odd_file(path)
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.is_file() and each.name[0] != ".")
        if not files:
            raise InputError(f"{path} must hold a DICOM series, got an empty folder. Remove it from the data list.")
    else:
        files = [path, *pixel_files(path)]
    sizes = [file.stat().st_size for file in files]
    middle = len(files) // 2
    with open(files[middle], "rb") as opened:
        start = opened.read(_START)
        opened.seek(max(0, sizes[middle] // 2 - _CHUNK // 2))
        return hashlib.sha256(f"{sizes}".encode() + start + opened.read(_CHUNK)).hexdigest()[:DIGITS]


def datalist_digest(items: Sequence[Item], *keys: str) -> str:
    """16 hex digits that change with the images of a data list and with these values of its items, not with its place.

    All names of files count, and the content of up to 1,024 images that are evenly spaced among them; of `label`, where
    it is a file, likewise.
    """
    ordered = sorted(items, key=lambda item: os.path.relpath(item["image"], item.get("origin", "/")[0]))
    digest = hashlib.sha256()
    for item in ordered:
        facts = [Path(item["image"]).name, *(item.get(key) for key in keys)]
        if "label" in keys and isinstance(item.get("label"), str):
            facts[1 + keys.index("label")] = Path(item["label"]).name
        digest.update(("\t".join(map(str, facts)) + "\n").encode(errors="surrogatepass"))
    for index in np.linspace(0, len(ordered) - 1, min(_NUM_CONTENTS, len(ordered))).round().astype(int):
        for file in (ordered[index][key] for key in ("image", *keys) if key in ("image", "label")):
            with suppress(OSError, InputError):  # the data set refuses it, or leaves it out
                digest.update(content_digest(file).encode() if isinstance(file, str) else b"")
    return digest.hexdigest()[:DIGITS]


def training_record(items: Sequence[Item], inherited: Iterable[str] = ()) -> list[str]:
    """What weights keep of the subjects with whose labels they were trained, for `trained_subjects` to find them again.

    Of each, its pseudonym and the digest of an image, which also knows copies of the data without their `.salt`.
    `inherited` is the record of the weights that they started from.
    """
    old = {*inherited}
    kept = {each for each in old if len(each) == DIGITS}
    if kept < old:
        logger.warning(
            "%d subjects of the weights that it starts from are recorded as by version 0.1.0, in a form that can be "
            "guessed, and are not carried over: do not score them with the new weights.", len(old - kept),
        )  # fmt: skip
    named = sorted(zip(pseudonyms(items), items, strict=True), key=lambda pair: str(pair[1]["image"]))
    first = {name: item["image"] for name, item in named[::-1]}
    return sorted({*kept, *first, *map(content_digest, first.values())})


def trained_subjects(items: Sequence[Item], settings: Mapping[str, Any]) -> list[str]:
    """Names of the subjects that the settings of weights record, also those of version 0.1.0."""
    known = {*settings.get("trained_on", ())}
    marks = [{_subject_digest_0_1(item)} for item in items]
    if any(len(each) == DIGITS for each in known):
        for mark, name, item in zip(marks, pseudonyms(items), items, strict=True):
            mark.update((name, content_digest(item["image"])))
    found = (item for mark, item in zip(marks, items, strict=True) if mark & known)
    return sorted({str(item.get("subject", item["image"])) for item in found})


def _subject_digest_0_1(item: Item) -> str:
    return hashlib.sha256(f"{item.get('task')}\t{item.get('subject')}".encode(errors="replace")).hexdigest()[:12]
