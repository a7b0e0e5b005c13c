from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import write, write_images

from dissect_monai.common import Item
from dissect_monai.data import identity
from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.identity import content_digest, datalist_digest, pseudonyms, trained_subjects, training_record


def data(folder: Path, count: int = 6, **spec: Any) -> Path:
    """Two images of each subject, called 0, 1, ...; the last image has none."""
    names = write_images(folder, count)
    items: list[Item] = [{"image": name, "subject": index // 2} for index, name in enumerate(names)]
    del items[-1]["subject"]
    write(folder / "dataset.json", {"training": items, **spec})
    return folder


def items_of(*folders: Path) -> list[Item]:
    return read_datalist(folders).training


def test_a_pseudonym_is_a_keyed_hash_of_the_subject_whose_key_stays_with_the_data(tmp_path: Path) -> None:
    folders = [data(tmp_path / name) for name in "ab"]
    first, second = (pseudonyms(items_of(folder)) for folder in folders)
    salt = folders[0] / ".salt"
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    said = [*(str(index // 2) for index in range(5)), "5.png"]
    assert first == [hmac.new(salt.read_bytes(), name.encode(), "sha256").hexdigest()[:16] for name in said]
    assert not {*first} & {*second}
    assert pseudonyms(items_of(*folders)) == first + second  # also where subjects have their folder's name before them


def test_the_key_is_made_once_whoever_asks_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({*pool.map(lambda _: identity.salt_of(tmp_path), range(32))}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".salt"]
    (tmp_path / ".salt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.salt must hold 32 bytes or more, got 0: restore it, or remove"):
        identity.salt_of(tmp_path)


def test_a_folder_that_can_hold_no_key_has_that_of_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(folder / ".salt"))

    monkeypatch.setattr(identity, "salt_of", refuse)
    a, b, c = (pseudonyms(items_of(data(tmp_path / name, task=name.upper()[0]))) for name in ("a", "another", "c"))
    assert a == b != c
    assert "let this file be read, or made" in caplog.text


def test_files_and_series_are_known_by_their_sizes_and_the_middle(tmp_path: Path) -> None:
    large, series = tmp_path / "large.mha", tmp_path / "series"
    digests = []
    for content in (bytes(10**6), bytes(10**6 + 1), bytes(5 * 10**5) + b"1" + bytes(5 * 10**5 - 1)):
        large.write_bytes(content)
        digests.append(content_digest(large))
    (series / "deeper").mkdir(parents=True)
    for contents in (["a", "b", "c"], ["a", "x", "c"], ["a", "x", "cc"]):
        for index, text in enumerate(contents):
            (series / f"{index}.dcm").write_text(text)
        digests.append(content_digest(series))
    assert len({*digests}) == 6


def test_a_digest_follows_the_images_and_not_their_place(tmp_path: Path) -> None:
    items = items_of(data(tmp_path / "a", 1100))
    digest = datalist_digest(items, "task")
    moved = items_of((tmp_path / "a").rename(tmp_path / "b"))
    assert digest == datalist_digest(items_of(tmp_path / "b")[::-1], "task")
    others = [datalist_digest(each, "task") for each in (moved[1:], [{**moved[0], "task": "u"}, *moved[1:]])]
    (tmp_path / "b" / "0.png").write_bytes(b"other data of the same name")
    assert len({digest, *others, datalist_digest(moved, "task")}) == 4


def linked(folder: Path) -> Path:
    folder.with_name("other").symlink_to(folder)
    return folder.with_name("other")


def linked_one_by_one(folder: Path) -> Path:
    folder.with_name("other").mkdir()
    for path in folder.glob("[!.]*"):
        (folder.with_name("other") / path.name).symlink_to(path)
    return folder.with_name("other")


def staged_without_key(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("other"), ignore=shutil.ignore_patterns(".*")))


def listed_elsewhere(folder: Path) -> Path:
    paths = [f"../{folder.name}/{index}.png" for index in range(6)]
    return write(folder.with_name("other") / "dataset.json", {"training": paths}).parent


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (lambda folder: folder.rename(folder.with_name("other")), ["0", "1"]),
        (linked, ["0", "1"]),
        (linked_one_by_one, ["0", "1"]),
        (staged_without_key, ["0", "1"]),
        (listed_elsewhere, ["0.png", "2.png"]),  # the images that are recorded, which have no subjects there
    ],
)
def test_the_same_data_are_known_under_another_name(
    tmp_path: Path, move: Callable[[Path], Path], expected: list[str]
) -> None:
    settings = {"trained_on": training_record(items_of(data(tmp_path / "set"))[:4])}
    found = trained_subjects(items_of(move(tmp_path / "set")), settings)
    assert [Path(name).name for name in found] == expected


def test_a_new_image_of_a_subject_is_known_and_other_data_under_the_same_name_are_not(tmp_path: Path) -> None:
    items = items_of(data(tmp_path / "set"))
    settings = {"trained_on": training_record([items[0]])}
    assert trained_subjects([items[1]], settings) == ["0"]
    shutil.rmtree(tmp_path / "set")
    data(tmp_path / "set")
    (tmp_path / "set" / "0.png").write_bytes(b"another image")
    assert trained_subjects(items_of(tmp_path / "set"), settings) == []


def test_records_of_version_0_1_0_are_understood_and_not_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [{**item, "task": "liver"} for item in items_of(data(tmp_path / "set"))]
    old = [hashlib.sha256(b"liver\t1").hexdigest()[:12]]
    assert trained_subjects(items, {"trained_on": old}) == ["1"]
    record = training_record(items[:2], old)
    assert "1 subjects of the weights that it starts from are recorded as by version 0.1.0" in caplog.text
    assert record == training_record(items[:2])
    assert {*record} < {*training_record(items[2:4], record)}  # but records of this version are


def test_what_is_no_image_is_refused_unopened_and_pixels_beside_a_header_count(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "empty").mkdir()
    for name, message in (("pipe.nii", "got a pipe, a socket or a device"), ("empty", "got an empty folder")):
        with pytest.raises(ValueError, match=message):
            content_digest(tmp_path / name)
    digests = set()
    for pixels in (b"1", b"2"):
        (tmp_path / "a.mhd").write_text("ElementDataFile = a.raw")
        (tmp_path / "a.raw").write_bytes(pixels)
        digests.add(content_digest(tmp_path / "a.mhd"))
    assert len(digests) == 2
