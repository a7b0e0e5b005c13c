from __future__ import annotations

import hashlib
import hmac
import logging
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import write, write_images

from dissect_monai.common import Item
from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.identity import (
    content_digest,
    datalist_digest,
    pseudonyms,
    salt_of,
    trained_subjects,
    training_record,
)


def data(folder: Path, count: int = 6, **spec: Any) -> Path:
    """Two images of each subject, called 0, 1, ...; the last image has none."""
    items: list[Item] = [
        {"image": name, "subject": index // 2} for index, name in enumerate(write_images(folder, count))
    ]
    del items[-1]["subject"]
    write(folder / "dataset.json", {"training": items, **spec})
    return folder


def items_of(*folders: Path) -> list[Item]:
    return read_datalist(folders).training


# --- pseudonyms


def test_a_pseudonym_is_a_keyed_hash_of_the_subject_whose_key_stays_with_the_data(tmp_path: Path) -> None:
    names = pseudonyms(items_of(data(tmp_path / "a")))
    salt = tmp_path / "a" / ".salt"
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    said = [*(str(index // 2) for index in range(5)), "5.png"]
    assert names == [hmac.new(salt.read_bytes(), name.encode(), "sha256").hexdigest()[:16] for name in said]
    assert not {*names} & {*pseudonyms(items_of(data(tmp_path / "b")))}


def test_folders_read_together_name_subjects_as_alone(tmp_path: Path) -> None:
    folders = [data(tmp_path / "a"), data(tmp_path / "b")]
    assert pseudonyms(items_of(*folders)) == [name for folder in folders for name in pseudonyms(items_of(folder))]


def test_the_key_is_made_once_whoever_asks_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({*pool.map(lambda _: salt_of(tmp_path), range(32))}) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".salt"]
    (tmp_path / ".salt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.salt must hold 32 bytes or more, got 0: restore it, or remove"):
        salt_of(tmp_path)


def test_a_folder_that_can_hold_no_key_has_that_of_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(folder / ".salt"))

    monkeypatch.setattr("dissect_monai.data.identity.salt_of", refuse)
    names = pseudonyms(items_of(data(tmp_path / "a")))
    assert names == pseudonyms(items_of(data(tmp_path / "b")))
    assert names != pseudonyms(items_of(data(tmp_path / "c", task="another list")))
    assert "let this file be read, or made" in caplog.text
    assert not {hashlib.sha256(b"0").hexdigest()[:16], hmac.new(b"", b"0", "sha256").hexdigest()[:16]} & {*names}


# --- contents


def test_a_large_file_is_known_by_its_size_and_its_middle(tmp_path: Path) -> None:
    zeros, path = bytes(10**6), tmp_path / "volume.mha"
    digests = set()
    for content in (zeros, zeros + b"0", zeros[: 5 * 10**5] + b"1" + zeros[: 5 * 10**5 - 1], b"1" + zeros[1:]):
        path.write_bytes(content)
        digests.add(content_digest(path))
    assert len(digests) == 3  # nobody has looked at the start


def test_a_series_is_known_by_the_sizes_of_its_files_and_the_middle_one(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.dcm").write_bytes(bytes([index]) * 9)
    (tmp_path / ".hidden").touch()
    (tmp_path / "deeper").mkdir()
    digests = {content_digest(tmp_path)}
    (tmp_path / "1.dcm").write_bytes(b"x" * 9)
    digests.add(content_digest(tmp_path))
    (tmp_path / "2.dcm").write_bytes(b"x" * 8)
    assert len(digests | {content_digest(tmp_path)}) == 3


def test_a_digest_follows_the_images_and_not_their_place(tmp_path: Path) -> None:
    items = items_of(data(tmp_path / "a", 1100))
    digest = datalist_digest(items, "task")
    assert digest == datalist_digest(items[::-1], "task")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = items_of(tmp_path / "b")
    assert digest == datalist_digest(moved, "task")
    others = [moved[1:], [{**moved[0], "task": "u"}, *moved[1:]]]
    assert len({digest, *(datalist_digest(each, "task") for each in others)}) == 3
    (tmp_path / "b" / "0.png").write_bytes(b"other data of the same name")
    assert digest != datalist_digest(moved, "task")


# --- subjects that weights were trained on


def renamed(folder: Path) -> Path:
    return folder.rename(folder.with_name("other"))


def linked(folder: Path) -> Path:
    folder.with_name("other").symlink_to(folder)
    return folder.with_name("other")


def linked_one_by_one(folder: Path) -> Path:
    folder.with_name("other").mkdir()
    for path in folder.glob("[!.]*"):
        (folder.with_name("other") / path.name).symlink_to(path)
    return folder.with_name("other")


def staged(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("other")))


def staged_without_key(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("other"), ignore=shutil.ignore_patterns(".*")))


def listed_elsewhere(folder: Path) -> Path:
    """The same images in another list, without a subject."""
    write(
        folder.with_name("other") / "dataset.json",
        {"training": [f"../{folder.name}/{index}.png" for index in range(6)]},
    )
    return folder.with_name("other")


@pytest.mark.parametrize(
    "move",
    [renamed, linked, linked_one_by_one, staged, staged_without_key, listed_elsewhere],
    ids=lambda move: move.__name__,
)
def test_the_same_data_are_known_under_another_name(tmp_path: Path, move: Any) -> None:
    settings = {"trained_on": training_record(items_of(data(tmp_path / "set"))[:4])}
    assert trained_subjects(items_of(tmp_path / "set"), settings) == ["0", "1"]
    found = trained_subjects(items_of(move(tmp_path / "set")), settings)
    assert [Path(name).name for name in found] == (["0.png", "2.png"] if move is listed_elsewhere else ["0", "1"])


def test_other_data_under_the_same_name_are_new(tmp_path: Path) -> None:
    settings = {"trained_on": training_record(items_of(data(tmp_path / "set")))}
    shutil.rmtree(tmp_path / "set")
    data(tmp_path / "set")
    for index in range(6):
        (tmp_path / "set" / f"{index}.png").write_bytes(b"another image" + bytes([index]))
    assert trained_subjects(items_of(tmp_path / "set"), settings) == []


def test_a_new_image_of_a_known_subject_is_known(tmp_path: Path) -> None:
    items = items_of(data(tmp_path / "set"))
    settings = {"trained_on": training_record([items[0]])}
    assert trained_subjects([items[1]], settings) == ["0"]


def test_records_of_version_0_1_0_are_understood_and_not_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [{**item, "task": "liver"} for item in items_of(data(tmp_path / "set"))]
    old = {"trained_on": [hashlib.sha256(b"liver\t1").hexdigest()[:12]]}
    assert trained_subjects(items, old) == ["1"]
    with caplog.at_level(logging.WARNING):
        record = training_record(items[:2], old["trained_on"])
    assert "1 subjects of the weights that it starts from are recorded as by version 0.1.0" in caplog.text
    assert record == training_record(items[:2])
    assert {*record} < {*training_record(items[2:4], record)}  # but records of this version are
