from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import as_process, images, write_images
from monai.transforms import (
    Compose,
    EnsureTyped,
    LoadImaged,
    RandGaussianNoised,
    Resized,
    ScaleIntensityRangePercentilesd,
    SelectItemsd,
)
from torch.utils.data import DataLoader

from dissect_monai.common import InputError
from dissect_monai.data.datasets import DeviceLoader, cached_dataset, items_of, labelled_part, readable_items
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.data.sampling import ImageSampler

NAN = float("nan")


def preprocessing(size: int = 8) -> Compose:
    """The deterministic transforms of the X-ray bundles."""
    return Compose(
        [
            LoadImaged("image", reader=ImageFileReader(spatial_dims=2), ensure_channel_first=True),
            Resized("image", spatial_size=[size, size], mode="area"),
            ScaleIntensityRangePercentilesd("image", lower=0.5, upper=99.5, b_min=0, b_max=255, clip=True),
            EnsureTyped("image", dtype=torch.uint8, track_meta=False),
            EnsureTyped("label", dtype=torch.float32, track_meta=False, allow_missing_keys=True),
            SelectItemsd(["image", "label"], allow_missing_keys=True),
        ]
    )


def make_items(folder: Path, count: int = 6) -> list[dict[str, Any]]:
    names = write_images(folder, count)
    return [{"image": str(folder / name), "label": [1.0, NAN], "subject": name} for name in names]


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_processes_share_all_items_and_none_has_nothing(tmp_path: Path, world_size: int) -> None:
    data, found = make_items(tmp_path, 5), []
    for rank in range(world_size):
        with as_process(rank, world_size):
            found.append(images(cached_dataset(data, preprocessing(), shard=True).data))
            assert cached_dataset([], preprocessing(), shard=True).data == []
    assert all(found)
    assert {name for share in found for name in share} == {*images(data)}
    assert sum(map(len, found)) == max(5, world_size)


def test_items_are_completed_before_they_are_read(tmp_path: Path) -> None:
    data = make_items(tmp_path, 2)
    dataset = cached_dataset(data, preprocessing(), complete=lambda items: [{**item, "label": [2.0]} for item in items])
    assert [item["label"] for item in dataset.data] == [[2.0], [2.0]]
    assert [item["label"].tolist() for item in dataset] == [[2.0], [2.0]]


@pytest.fixture(params=["memory", "disk"])
def cache_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


def test_cached_items_are_what_the_transform_gives(tmp_path: Path, cache_dir: Path | None) -> None:
    data, threads = make_items(tmp_path), torch.get_num_threads()
    dataset = cached_dataset(data, preprocessing(), cache_dir, num_workers=2)
    assert (len(dataset), torch.get_num_threads()) == (6, threads)
    for item, cached in zip(data, dataset, strict=True):
        expected = preprocessing()(item)
        assert set(cached) == {"image", "label"}
        assert type(cached["image"]) is torch.Tensor
        assert cached["image"].dtype == torch.uint8
        assert cached["label"].dtype == torch.float32
        torch.testing.assert_close(cached["image"], expected["image"], rtol=0, atol=0)
        np.testing.assert_equal(cached["label"].numpy(), [1, NAN])
    for item in data:
        Path(item["image"]).unlink()
    assert dataset[5]["image"].shape == (1, 8, 8)  # decoded once


def test_images_keep_their_metadata_and_nothing_else_gets_some(tmp_path: Path, cache_dir: Path | None) -> None:
    load = LoadImaged("image", reader=ImageFileReader(spatial_dims=2), ensure_channel_first=True)
    steps = Compose([load, Resized("image", spatial_size=[8, 8]), EnsureTyped("label", track_meta=False)])
    data, written = make_items(tmp_path / "images", 2), []
    for _ in range(2):  # the second time from what is stored
        dataset = cached_dataset(data, steps, cache_dir)
        for item, given in zip(dataset, data, strict=True):
            assert item["image"].meta["filename_or_obj"] == given["image"]
            assert item["image"].applied_operations[0]["class"] == "Resize"
            assert type(item["label"]) is torch.Tensor
        written.append([path.stat().st_mtime_ns for path in sorted(cache_dir.iterdir())] if cache_dir else [])
    assert written[0] == written[1]


def test_a_disk_cache_is_found_again_but_not_by_other_settings(tmp_path: Path) -> None:
    data, cache_dir = make_items(tmp_path / "images"), tmp_path / "cache"
    for size, expected in ((8, 6), (8, 6), (9, 12)):
        dataset = cached_dataset(data, preprocessing(size), cache_dir)
        assert dataset[0]["image"].shape == (1, size, size)
        assert len(list(cache_dir.iterdir())) == expected


def test_random_transforms_stay_random(tmp_path: Path, cache_dir: Path | None) -> None:
    transform = Compose([*preprocessing().transforms[:3], RandGaussianNoised("image", prob=1.0, std=9.0)])
    dataset = cached_dataset(make_items(tmp_path, 1), transform, cache_dir)
    assert not torch.equal(dataset[0]["image"], dataset[0]["image"])


@pytest.mark.parametrize("context", ["fork", "forkserver"])  # by pickle, as with spawn
def test_workers_can_load_it(tmp_path: Path, cache_dir: Path | None, context: str) -> None:
    dataset = cached_dataset(make_items(tmp_path), preprocessing(), cache_dir)
    batch = next(iter(DataLoader(dataset, batch_size=6, num_workers=1, multiprocessing_context=context)))
    assert batch["image"].shape == (6, 1, 8, 8)
    assert batch["label"].shape == (6, 2)


def test_corrupt_items_can_be_skipped(tmp_path: Path, cache_dir: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    data = make_items(tmp_path)
    Path(data[1]["image"]).write_bytes(b"broken")
    dataset = cached_dataset(data, preprocessing(), cache_dir, on_corrupt="skip")
    assert images(dataset.data) == ["0.png", "2.png", "3.png", "4.png", "5.png"]
    torch.testing.assert_close(dataset[1]["image"], preprocessing()(data[2])["image"])
    assert "1.png must be an intact image" in caplog.text
    assert images(items_of(labelled_part(dataset))) == images(dataset.data)


def test_labelled_images_are_taken_without_reading_them_again(tmp_path: Path) -> None:
    data = make_items(tmp_path)
    del data[2]["label"]
    dataset = cached_dataset(data, preprocessing())
    for item in data:
        Path(item["image"]).unlink()
    part = labelled_part(dataset)
    assert images(items_of(part)) == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert part[2]["image"] is dataset[3]["image"]
    assert images(items_of(labelled_part(dataset, fraction=0.4, seed=1))) != images(items_of(part))


def test_all_corrupt_items_are_named_with_their_cause(tmp_path: Path, cache_dir: Path | None) -> None:
    data = make_items(tmp_path)
    for index in (1, 4):
        Path(data[index]["image"]).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"(?s)got 2 of 6.*1\.png .*4\.png .*`on_corrupt` to skip") as caught:
        cached_dataset(data, preprocessing(), cache_dir)
    assert str(caught.value).count("1.png") == 1  # what pillow repeats is left out


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    data = [{"image": str(tmp_path / f"{index}.png")} for index in range(7)]
    with pytest.raises(ValueError, match=r"(?s)got 7 of 7.*0\.png does not exist.*4\.png.*\.\.\.") as caught:
        cached_dataset(data, preprocessing(), on_corrupt="skip")
    assert "5.png" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_not_a_corrupt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left on device"):
        cached_dataset(make_items(tmp_path), preprocessing(), tmp_path / "cache", on_corrupt="skip")


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "list"])
def test_a_damaged_file_of_the_cache_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    items, cache = make_items(tmp_path / "images"), tmp_path / "cache"
    before = [each["image"] for each in cached_dataset(items, preprocessing(), cache)]
    file = sorted(cache.iterdir())[0]
    content = file.read_bytes()
    if damage == "list":
        torch.save([1, 2], file)
    else:
        middle = max(content.find(image.numpy().tobytes()) for image in before)
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"empty": b"", "cut": content[:-100], "bit": flipped}[damage])
    (cache / ".half.pt.99999999.tmp").touch()
    again = cached_dataset(items, preprocessing(), cache, on_corrupt="skip")
    assert len(again.data) == len(items)
    assert all(torch.equal(*pair) for pair in zip(before, [each["image"] for each in again], strict=True))
    assert (f"{file} cannot be loaded" in caplog.text) == (damage != "list")
    assert file.stat().st_size == len(content)
    assert all(path.suffix == ".pt" for path in cache.iterdir())


def test_a_cache_that_cannot_be_a_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"`cache_dir` must be a folder that can be written, got .*file"):
            cached_dataset(make_items(tmp_path / "images"), preprocessing(), folder)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dissect_monai.data.datasets.save_atomically", refuse)
    with pytest.raises(InputError, match=r"`cache_dir` must be a folder that can be written, got .*new"):
        cached_dataset(make_items(tmp_path / "images"), preprocessing(), tmp_path / "new", on_corrupt="skip")


def test_a_device_gives_the_batches_that_a_loader_gives(tmp_path: Path) -> None:
    dataset = cached_dataset(make_items(tmp_path), preprocessing())
    own, theirs = (ImageSampler(dataset, batch_size=4, seed=3) for _ in range(2))
    batches = DeviceLoader(dataset, batch_size=4, sampler=own, device="cpu")
    expected = DataLoader(dataset, batch_size=4, sampler=theirs, drop_last=True)
    for epoch in (1, 2):
        own.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert [batch["image"].tolist() for batch in batches] == [batch["image"].tolist() for batch in expected]
    assert len(batches) == len(expected) == 1


def test_images_of_several_shapes_do_not_lie_on_a_device() -> None:
    dataset = [{"image": torch.zeros(1, 4, 4)}, {"image": torch.zeros(1, 4, 5)}]
    with pytest.raises(ValueError, match=r"images of one shape to lie on a device, got \(1, 4, 4\), \(1, 4, 5\)"):
        DeviceLoader(dataset, 2, range(2), "cpu")  # type: ignore[arg-type]


def test_all_processes_know_which_items_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_items(tmp_path, 5)
    Path(data[3]["image"]).write_bytes(b"broken")
    assert images(readable_items(data, preprocessing(), on_corrupt="skip")) == ["0.png", "1.png", "2.png", "4.png"]
    assert "Skipped: " in caplog.text
    with pytest.raises(ValueError, match=r"got 1 of 5 that cannot:\n.*3\.png"):
        readable_items(data, preprocessing())
