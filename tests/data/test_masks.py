import json
import logging
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from monai.transforms import Compose, LoadImage, LoadImaged
from PIL import Image

from dissect_monai.data.datalists import read_datalist
from dissect_monai.data.masks import LoadLabeld, load_label
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.data.volume_lists import aggregate, read_segmentation, read_volumes
from dissect_monai.transforms.labels import ValuesToClassesd

RNG = np.random.default_rng(0)
RED, GREEN = [255, 0, 0], [0, 255, 0]
TURN = {0x0112: 6}  # Exif: shown a quarter to the right


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (12, 9), **options: Any) -> Path:
    """`size` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def mask(path: Path, values: Any = (0, 255), size: tuple[int, int] = (12, 9), mode: str | None = None) -> np.ndarray:
    """Rows of a mask whose values are bands, from the left; values may be colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = np.repeat(np.arange(len(values)), -(-size[0] // len(values)))[: size[0]]
    rows = np.broadcast_to(np.array(values)[bands], (size[1], size[0], *np.shape(values)[1:]))
    image = Image.fromarray(rows.astype(np.uint8 if rows.max() < 256 else np.uint16))
    (image if mode is None else image.convert(mode)).save(path)
    return rows


def listed(folder: Path, **head: Any) -> Path:
    names = sorted(path.name for path in (folder / "images").iterdir())
    items = [{"image": f"images/{name}", "label": f"labels/{Path(name).stem}.png"} for name in names]
    (folder / "dataset.json").write_text(json.dumps({"training": items, **head}))
    return folder


def pairs(folder: Path, count: int = 3, values: Any = (0, 255)) -> Path:
    for index in range(count):
        picture(folder / "images" / f"{index}.jpg")
        mask(folder / "labels" / f"{index}.png", values)
    return folder


def classes(folder: Path, **arguments: Any) -> np.ndarray:
    """The classes of all masks of a folder as training sees them, (N, rows, columns)."""
    datalist = read_segmentation(folder, spatial_dims=2, **arguments)
    image = LoadImaged("image", ImageFileReader(3, datalist.in_channels), ensure_channel_first=True)
    steps = Compose([image, LoadLabeld("label"), ValuesToClassesd("label", datalist.class_names, "image")])
    return np.stack([steps(item)["label"][0, :, :, 0].numpy().T for item in datalist.items()])


# ---- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_pictures_are_slices_of_luminance_or_of_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        Image.fromarray(RNG.integers(0, 2**16, (9, 12)).astype(np.uint16)).save(tmp_path / "a.png")
    else:
        picture(tmp_path / "a.png", mode)
    with Image.open(tmp_path / "a.png") as image:
        grey, colour = (np.asarray(image if mode == "I;16" else image.convert(each)) for each in ("L", "RGB"))
    colour = colour if colour.ndim == 3 else np.stack([colour] * 3, -1)
    for channels, expected in ((1, grey[..., None]), (3, colour)):
        loaded = LoadImage(ImageFileReader(3, channels), image_only=True, ensure_channel_first=True)(tmp_path / "a.png")
        assert loaded.shape == (channels, 12, 9, 1)
        np.testing.assert_array_equal(loaded[..., 0].numpy().T, expected)
        np.testing.assert_array_equal(loaded.affine, np.eye(4))


def test_a_network_takes_colours_if_any_picture_has_them(tmp_path: Path) -> None:
    grey = pairs(tmp_path / "grey")
    for path in (grey / "images").iterdir():
        picture(path, "L")
    colour = pairs(tmp_path / "colour", 1)
    assert read_segmentation(grey, spatial_dims=2).in_channels == 1
    assert read_segmentation([grey, colour], spatial_dims=2, validation_fraction=0).in_channels == 3
    assert read_segmentation(colour, spatial_dims=2, in_channels=1).in_channels == 1
    arguments = {"task": "t", "group": "g", "spatial_dims": 2}
    assert aggregate(grey, **arguments).in_channels == 1
    assert aggregate([grey, colour], **arguments).in_channels == 3
    for suffix in ("png", "jpg"):  # grey that is stored in RGB
        stored = pairs(tmp_path / suffix)
        for path in (stored / "images").iterdir():
            path.unlink()
            Image.open(grey / "images" / path.name).convert("RGB").save(path.with_suffix(f".{suffix}"))
        assert read_segmentation(stored, spatial_dims=2).in_channels == 1


def test_volumes_leave_pictures_out(tmp_path: Path) -> None:
    folder = pairs(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"must hold a dataset.json or images.*for other pictures train with `spatial_dims` 2"
    ):
        read_segmentation(folder)
    with pytest.raises(ValueError, match=r"must hold volumes, got 2-D images"):
        aggregate(listed(folder), task="t", group="g")


# ---- masks -------------------------------------------------------------------------------------------------------


MASKS: list[tuple[Any, str | None, Any, list[str]]] = [  # values, mode of the picture, labels and names
    ((0, 300, 65535), None, {"a": 300, "b": 65535}, ["a", "b"]),
    ((0, 255), "1", None, ["foreground"]),
    ((0, 255), None, None, ["foreground"]),
    ((0, 1), None, None, ["foreground"]),
    ((0, 255), "RGB", None, ["foreground"]),
    ((0, 255), "RGBA", {"1": "polyp"}, ["polyp"]),
    ((0, 255), None, {"background": 0, "polyp": 1}, ["polyp"]),
    ((0, 255), "1", {"255": "polyp"}, ["polyp"]),
    ((0, 1, 2), None, None, ["class_1", "class_2"]),
    ((0, 85, 170, 255), None, {"a": 85, "b": 170, "c": 255}, ["a", "b", "c"]),
]


@pytest.mark.parametrize(
    ("values", "mode", "labels", "names", "suffix"),
    [*((*case, "png") for case in MASKS), *((*case, "tif") for case in MASKS[:3])],
)
def test_values_of_masks_are_classes(
    tmp_path: Path, values: Any, mode: str | None, labels: Any, names: list[str], suffix: str
) -> None:
    folder = pairs(tmp_path, 2)
    for path in sorted((folder / "labels").iterdir()):
        path.unlink()
        rows = mask(path.with_suffix(f".{suffix}"), values, mode=mode)
    if labels is not None:
        names_of = sorted(path.name for path in (folder / "labels").iterdir())
        items = [{"image": f"images/{Path(name).stem}.jpg", "label": f"labels/{name}"} for name in names_of]
        (folder / "dataset.json").write_text(json.dumps({"training": items, "labels": labels}))
    assert read_segmentation(folder, spatial_dims=2).class_names == names
    np.testing.assert_array_equal(classes(folder), np.stack([np.searchsorted(values, rows)] * 2))


def test_indices_of_a_palette_are_values_unless_colours_are_named(tmp_path: Path) -> None:
    folder = pairs(tmp_path, 1)
    rows = mask(folder / "labels/0.png", (0, 1, 2))
    image = Image.fromarray(rows.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, *GREEN, *RED])
    image.save(folder / "labels/0.png")
    np.testing.assert_array_equal(classes(folder)[0], rows)
    listed(folder, colours={"polyp": RED, "tool": GREEN})
    np.testing.assert_array_equal(classes(folder)[0], np.array([0, 2, 1])[rows])


@pytest.mark.parametrize(
    ("key", "labels"),
    [("colours", {}), ("colors", {}), ("colours", {"labels": {"background": 0, "polyp": 1, "tool": 7}})],
)
def test_colours_are_classes_by_name(tmp_path: Path, key: str, labels: Any) -> None:
    folder = pairs(tmp_path, 2, ([255, 255, 255], RED, GREEN, [0, 0, 0]))
    listed(folder, **{key: {"background": [255, 255, 255], "polyp": RED, "tool": GREEN}}, **labels)
    datalist = read_segmentation(folder, spatial_dims=2)
    assert datalist.class_names == ["polyp", "tool"]
    assert datalist.mask_values == {"background": [255] * 3, "polyp": RED, "tool": GREEN}
    assert [np.unique(row).tolist() for row in classes(folder)[:, 0]] == [[0, 1, 2]] * 2


def test_ignored_colours_are_no_structures(tmp_path: Path) -> None:
    folder = listed(pairs(tmp_path, 1, ([0, 0, 0], RED, GREEN)), colours={"polyp": RED, "ignore": GREEN})
    assert read_segmentation(folder, spatial_dims=2).class_names == ["polyp"]
    assert np.unique(classes(folder)).tolist() == [0, 1, 255]


def test_values_of_predictions_are_those_of_the_masks(tmp_path: Path) -> None:
    for values, labels in (((0, 1), {"1": "polyp"}), ((0, 255), {"1": "polyp"}), ((0, 3, 9), {"a": 3, "b": 9})):
        folder = listed(pairs(tmp_path, 1, values), labels=labels)
        found = read_segmentation(folder, spatial_dims=2).mask_values
        assert list(found.values()) == list(values[1:])


def test_nifti_masks_have_the_axes_of_the_picture(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    rows = mask(tmp_path / "a.png", (0, 1, 2))
    for shape in ((12, 9), (12, 9, 1)):
        (tmp_path / "labels").mkdir(exist_ok=True)
        affine = np.diag([-0.3, -0.3, 1, 1])
        nib.save(nib.Nifti1Image(rows.T.reshape(shape).astype(np.uint8), affine), tmp_path / "labels/a.nii.gz")
        np.testing.assert_array_equal(classes(tmp_path)[0], rows)


def test_exif_turns_a_picture_and_its_mask_alike(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.update(TURN)
    picture(tmp_path / "images/a.jpg", exif=exif)
    rows = mask(tmp_path / "labels/a.png", size=(9, 12))  # as it is shown
    np.testing.assert_array_equal(classes(tmp_path)[0], rows == 255)
    raw = mask(tmp_path / "labels/a.png")
    Image.fromarray(raw.astype(np.uint8)).save(tmp_path / "labels/a.png", exif=exif)
    np.testing.assert_array_equal(classes(tmp_path)[0], np.rot90(raw == 255, -1))
    mask(tmp_path / "labels/a.png")
    with pytest.raises(RuntimeError) as refusal:
        classes(tmp_path)
    assert "got 12 x 9 and 9 x 12 pixels" in str(refusal.value.__cause__)


def anti_aliased(path: Path) -> None:
    rows = mask(path, size=(24, 18))
    Image.fromarray(rows.astype(np.uint8)).rotate(20).resize((12, 9), Image.Resampling.BILINEAR).save(path)


@pytest.mark.parametrize(
    ("spoil", "labels", "message"),
    [
        (
            lambda path: mask(path, size=(6, 9)),
            {"1": "a"},
            "0.png must have the size of its picture.* got 6 x 9 and 12 x 9",
        ),
        (
            anti_aliased,
            {"1": "a"},
            r"0.png must hold values that `labels` of its dataset.json names \(0, 1, 255\), got \d",
        ),
        (anti_aliased, {}, "0.png has the values .*, which nothing names"),
        (
            lambda path: mask(path, ([0] * 3, RED)),
            {"1": "a"},
            r"0.png has colours, such as \[255, 0, 0\], that nothing",
        ),
        (lambda path: path.write_bytes(b"PNG"), {"1": "a"}, "0.png must be an intact image"),
        (lambda path: path.unlink(), {"1": "a"}, "must list existing files, got 1 missing: .*0.png"),
    ],
)
def test_masks_that_cannot_be_used_are_named(tmp_path: Path, spoil: Any, labels: Any, message: str) -> None:
    folder = pairs(tmp_path, 2)
    spoil(folder / "labels/0.png")
    listed(folder, **({"labels": labels} if labels else {}))
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)) as refusal:
        classes(folder)
    error: BaseException = refusal.value
    while isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__
    assert re.search(message, str(error)), error


def test_an_unknown_colour_is_named_with_its_count(tmp_path: Path) -> None:
    folder = listed(pairs(tmp_path, 1, ([0, 0, 0], RED, GREEN, [1, 2, 3])), colours={"polyp": RED})
    item = read_segmentation(folder, spatial_dims=2).training[0]
    with pytest.raises(ValueError, match=r"0.png .*got 2 others: \[1, 2, 3\] in 27 pixels, \[0, 255, 0\] in 27 pixels"):
        load_label(item["label"], item)


@pytest.mark.parametrize(
    "head",
    [{"colours": {"polyp": [255, 0]}}, {"colours": {"polyp": "red"}}, {"colours": {"a": RED, "b": RED}},
     {"colours": [RED]}, {"colours": {"a": [256, 0, 0]}}, {"colours": {"a": RED}, "labels": {"1": "b"}}],
)  # fmt: skip
def test_colours_that_name_no_structures_are_refused(tmp_path: Path, head: Any) -> None:
    folder = listed(pairs(tmp_path, 1), **head)
    with pytest.raises(ValueError, match=r"the `colours` of .* must be one for each structure"):
        read_segmentation(folder, spatial_dims=2)


def test_jpeg_and_pages_are_no_masks(tmp_path: Path) -> None:
    mask(tmp_path / "a.jpg")
    pages = [Image.new("L", (4, 4)), Image.new("L", (4, 4), 1)]
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:])
    Image.new("L", (4, 4)).save(tmp_path / "c.tif", compression="jpeg")
    for name, message in (("a.jpg", "is JPEG"), ("b.tif", "one page, got 2"), ("c.tif", "is JPEG")):
        with pytest.raises(ValueError, match=message):
            load_label(str(tmp_path / name), {})


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_with_1_and_255_is_refused_where_one_is_named(tmp_path: Path, value: int) -> None:
    folder = listed(pairs(tmp_path, 1, (0, 1, 255)), labels={"polyp": value})
    with pytest.raises(ValueError, match=r"0.png must hold 1 or 255 .* got both.*list the other as `ignore`"):
        classes(folder)
    listed(folder, labels={"polyp": value, "ignore": 256 - value})
    assert np.unique(classes(folder)[0]).tolist() == [0, 1, 255]
    listed(folder, labels={"polyp": [1, 255]})
    assert np.unique(classes(folder)[0]).tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_mask_whose_shape_is_in_the_alpha_channel_is_refused(tmp_path: Path, mode: str) -> None:
    rows = mask(tmp_path / "a.png")
    image = Image.new(mode, (12, 9), "white")
    image.putalpha(Image.fromarray(rows.astype(np.uint8)))
    image.save(tmp_path / "a.png")
    for item in ({}, {"labels": {"a": [1]}, "colours": {"a": [255] * 3}}):
        with pytest.raises(ValueError, match=r"a.png must be .* its shape in the alpha channel: save it as grey"):
            load_label(str(tmp_path / "a.png"), item)


@pytest.mark.parametrize("head", [None, {"labels": {"polyp": 1}}])
def test_masks_that_cannot_be_read_are_counted_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, head: dict[str, Any] | None
) -> None:
    folder = pairs(tmp_path, 4)
    for index in (0, 1):
        (folder / f"labels/{index}.png").write_bytes(b"PNG")
    if head is not None:
        listed(folder, **head)
    found = r"masks must .* got 2 of 4 that cannot: .*0.png must be an intact image .* \(and 1 others\) Repair"
    with pytest.raises(ValueError, match=found if head is None else "got 1 of 1 that cannot: .*0.png"):
        read_segmentation(folder, spatial_dims=2, validation_fraction=0)
    datalist = read_segmentation(folder, spatial_dims=2, validation_fraction=0, on_corrupt="skip")
    assert [*datalist.mask_values.values()] == [255]
    if head is None:
        assert "Skipped: " in caplog.text
        for path in (folder / "labels").iterdir():
            path.write_bytes(b"PNG")
        with pytest.raises(ValueError, match="got 4 of 4 that cannot"):
            read_segmentation(folder, spatial_dims=2, on_corrupt="skip")


@pytest.mark.parametrize(
    ("trained", "head", "scored", "expected"),
    [
        ((0, 1, 2), None, (0, 1), [0, 1]),  # else a foreground
        ((0, 1, 2), None, (0, 0), [0]),
        ((0, 255), None, (0, 1), [0, 1]),
        ((0, 3, 7), {"labels": {"a": 3, "b": 7}}, (0, 7), [0, 2]),
        (([0] * 3, RED, GREEN), {"colours": {"a": RED, "b": GREEN}}, ([0] * 3, GREEN), [0, 2]),
    ],
)
def test_weights_name_the_values_that_a_folder_to_be_scored_does_not(
    tmp_path: Path, trained: Any, head: Any, scored: Any, expected: list[int]
) -> None:
    folder = pairs(tmp_path / "trained", 2, trained)
    known = read_segmentation(listed(folder, **head) if head else folder, spatial_dims=2)
    weights = {"class_names": known.class_names, "mask_values": known.mask_values}
    other = pairs(tmp_path / "scored", 2, scored)
    datalist = read_segmentation(other, spatial_dims=2, weights=weights)
    assert {*datalist.class_names} == {*known.class_names}
    steps = Compose([LoadLabeld("label"), ValuesToClassesd("label", known.class_names)])
    assert np.unique(steps(datalist.items()[0])["label"]).tolist() == expected
    mask(other / "labels/0.png", (0, 9) if isinstance(trained[0], int) else ([0] * 3, [9] * 3))
    with pytest.raises(
        ValueError, match=r"0.png (has the values 9, of which the weights know|must have the `colours`)"
    ):
        read_segmentation(other, spatial_dims=2, weights=weights)


def test_masks_that_a_server_lists_have_classes_or_the_values_of_training(tmp_path: Path) -> None:
    image, label = picture(tmp_path / "a.png"), tmp_path / "b.png"
    settings = {"class_names": ["disc", "cup"], "mask_values": {"disc": 2, "cup": 255}, "in_channels": 1}
    items = [{"image": str(image), "label": str(label)}]
    datalist = read_segmentation(None, given=(items, []), settings=settings, spatial_dims=2)
    assert datalist.training[0]["labels"] == {"disc": [1], "cup": [2, 255]}
    assert datalist.mask_values == settings["mask_values"]


def test_two_channels_are_none_of_a_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 channel\(s\), got picture for .*: set `in_channels` to 1 or 3"):
        read_segmentation(pairs(tmp_path), spatial_dims=2, in_channels=2)


def test_weights_without_values_ask_for_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'do not know those of liver: write `labels`, such as {"liver": 1}'):
        read_segmentation(pairs(tmp_path), spatial_dims=2, weights={"class_names": ["liver"]})


def test_an_evaluation_of_pretraining_names_values_task_by_task(tmp_path: Path) -> None:
    one, two = pairs(tmp_path / "one", 5), pairs(tmp_path / "two", 5, (0, 1, 2))
    arguments = {"task": {"one": "a", "two": "b"}, "group": "g", "spatial_dims": 2}
    assert not any("labels" in item for item in aggregate([one, two], **arguments).items())
    names = {item["task"]: [*item["labels"]] for item in aggregate([one, two], **arguments, test_seed=0).items()}
    assert names == {"a": ["foreground"], "b": ["class_1", "class_2"]}


# ---- folders -----------------------------------------------------------------------------------------------------


def test_images_and_labels_are_paired_by_name_or_stem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = pairs(tmp_path, 3)
    picture(folder / "images/deep/a.tif")
    mask(folder / "labels/deep/a.tif", (0, 0))  # an empty mask is one
    picture(folder / "images/alone.png")
    mask(folder / "labels/left.png")
    datalist = read_segmentation(folder, spatial_dims=2, validation_fraction=0)
    assert [Path(item["label"]).name for item in datalist.training] == ["0.png", "1.png", "2.png", "a.tif"]
    assert datalist.training[0]["subject"] == "images/0.jpg"
    for said in ("Images without a label map: 1 (", "alone.png", "Label maps without an image: 1 (", "left.png",
                 "1 volumes have no label map and are left out"):  # fmt: skip
        assert said in caplog.text
    assert len(read_volumes(folder, spatial_dims=2)) == 5


def test_the_folder_of_masks_may_be_called_so(tmp_path: Path) -> None:
    folder = pairs(tmp_path)
    (folder / "labels").rename(folder / "masks")
    assert read_segmentation(folder, spatial_dims=2).class_names == ["foreground"]
    mask(folder / "gt/0.png")
    with pytest.raises(ValueError, match="must have one folder of label maps beside images, got gt, masks"):
        read_segmentation(folder, spatial_dims=2)


@pytest.mark.parametrize(
    ("image", "label", "split", "subject"),
    [
        ("Images/a.png", "Masks/a.png", "training", None),
        ("IMG/a.jpg", "Ground Truth/a.tif", "training", None),
        ("train/images/a.png", "train/masks/a.png", "training", None),
        ("val/Images/a.png", "val/Labels/a.png", "validation", None),
        ("images/testing/a.png", "labels/testing/a.png", "test", None),
        ("valid_images/a.png", "valid_masks/a.png", "validation", None),
        ("images-test/a.png", "masks-test/a.png", "test", None),
        ("imagesTr/a_0000.png", "labelsTr/a.png", "training", None),
        ("imagesTs/a.nii.gz", "labelsTs/a.nii.gz", "test", None),
        ("images/a.jpg", "masks/a_mask.png", "training", None),
        ("images/ISIC_1.jpg", "masks/ISIC_1_segmentation.png", "training", None),
        ("images/image_1.png", "labels/label_1.png", "training", None),
        ("images/p1/a.png", "labels/p1/a.png", "training", "p1"),
        ("train/images/p1/b/a.png", "train/masks/p1/b/a.png", "training", "p1"),
        ("a.png", "a_mask.png", "training", None),
        ("p1/a (1).png", "p1/a (1)_mask.png", "training", "p1"),
    ],
)
def test_usual_layouts_are_read(tmp_path: Path, image: str, label: str, split: str, subject: str | None) -> None:
    for name, draw in ((image, picture), (label, mask)):
        if name.endswith(".nii.gz"):
            (tmp_path / name).parent.mkdir(parents=True)
            nib.save(nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 2, np.eye(4)), tmp_path / name)
        else:
            draw(tmp_path / name)
    datalist = read_segmentation(tmp_path, spatial_dims=2, validation_fraction=0)
    (item,) = datalist.items()
    assert getattr(datalist, split) == [item]
    assert (item["image"], item["label"]) == (str(tmp_path / image), str(tmp_path / label))
    assert item["subject"] == (subject or image)
    assert [each["image"] for each in read_volumes(tmp_path, spatial_dims=2)] == [item["image"]]


def test_splits_are_those_of_the_folders_and_subjects_those_below(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, subjects in (("train", "abc"), ("val", "d"), ("test", "e")):
        for name in subjects:
            for index in range(2):
                picture(tmp_path / split / f"images/{name}/{index}.png")
                mask(tmp_path / split / f"masks/{name}/{index}.png")
    picture(tmp_path / "images/left.png")  # which no split has
    caplog.set_level(logging.INFO)
    datalist = read_segmentation(tmp_path, spatial_dims=2)
    assert [sorted({item["subject"] for item in part}) for part in datalist[:3]] == [["a", "b", "c"], ["d"], ["e"]]
    assert "Found 6 images of 3 subjects in" in caplog.text
    folds = [read_segmentation(tmp_path, spatial_dims=2, fold=fold, num_folds=4).validation for fold in range(4)]
    assert sorted(len(fold) for fold in folds) == [2] * 4
    (tmp_path / "val/images/d").rename(tmp_path / "val/images/a")
    (tmp_path / "val/masks/d").rename(tmp_path / "val/masks/a")
    with pytest.raises(ValueError, match="must share no subject, got 1 in both: a "):
        read_segmentation(tmp_path, spatial_dims=2)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_list_without_lists_names_what_lies_in_the_folders(tmp_path: Path, dims: int) -> None:
    for index in range(3):
        for name in (f"imagesTr/s{index // 2}_{index}_0000.nii.gz", f"labelsTr/s{index // 2}_{index}.nii.gz"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 3, np.eye(4)), tmp_path / name)
    head = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "a": 1, "b": 2}, "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({**head, "subject_pattern": r"^(s\d+)_"}))
    datalist = read_segmentation(tmp_path, spatial_dims=dims, validation_fraction=0)
    assert (datalist.class_names, datalist.modality) == (["a", "b"], "T2")
    assert [item["subject"] for item in datalist.training] == ["s0", "s0", "s1"]
    for pattern, message in (("(", "must be a regular expression"), ("x(.)", "must match every file name"), (3, "reg")):
        (tmp_path / "dataset.json").write_text(json.dumps({**head, "subject_pattern": pattern}))
        with pytest.raises(ValueError, match=message):
            read_segmentation(tmp_path, spatial_dims=dims)


@pytest.mark.parametrize("names", [["disc", "cup"], ["background", "disc", "cup"]])
def test_names_of_labels_are_those_of_values_in_order(tmp_path: Path, names: list[str]) -> None:
    folder = pairs(tmp_path, 2, (0, 2, 1))
    (folder / "dataset.json").write_text(json.dumps({"label_names": names}))
    datalist = read_segmentation(folder, spatial_dims=2)
    assert datalist.class_names == ["disc", "cup"]
    assert datalist.mask_values == {"disc": 1, "cup": 2}


def test_a_list_of_colours_alone_is_enough_beside_folders(tmp_path: Path) -> None:
    folder = pairs(tmp_path, 2, ([0] * 3, RED, GREEN))
    (folder / "dataset.json").write_text(json.dumps({"colours": {"polyp": RED, "tool": GREEN}}))
    assert read_segmentation(folder, spatial_dims=2).class_names == ["polyp", "tool"]
    assert len(read_datalist(folder).training) == 2  # of a bundle for pictures without masks
    (folder / "images").rename(folder / "frames")
    with pytest.raises(ValueError, match=r"list `training`.*without lists, it must lie beside folders called images"):
        read_segmentation(folder, spatial_dims=2)


def test_several_channels_of_nnunet_are_refused(tmp_path: Path) -> None:
    for channel in range(2):
        picture(tmp_path / f"imagesTr/a_000{channel}.png")
    mask(tmp_path / "labelsTr/a.png")
    with pytest.raises(ValueError, match=r"a_0001.png must be the only file of its case, got channel 0001"):
        read_segmentation(tmp_path, spatial_dims=2)


def test_two_masks_of_one_picture_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "benign/a (1).png")
    for name in ("a (1)_mask.png", "a (1)_mask_1.png"):
        mask(tmp_path / "benign" / name)
    with pytest.raises(
        ValueError, match=r"a \(1\).png must have one label map of its own, got .*_mask.png, .*_mask_1.png"
    ):
        read_segmentation(tmp_path, spatial_dims=2)


def test_two_folders_of_one_kind_or_none_of_images_are_refused(tmp_path: Path) -> None:
    folder = pairs(tmp_path)
    picture(folder / "imgs/0.png")
    with pytest.raises(ValueError, match="must have one folder of images, got images, imgs"):
        read_segmentation(folder, spatial_dims=2)
    mask(tmp_path / "other/masks/a.png")
    (tmp_path / "other/images").mkdir()
    with pytest.raises(FileNotFoundError, match="images must hold images, got none"):
        read_segmentation(tmp_path / "other", spatial_dims=2)


def test_names_that_fit_two_files_or_none_are_refused(tmp_path: Path) -> None:
    folder = pairs(tmp_path, 2)
    picture(folder / "images/0.png")
    mask(folder / "labels/0.tif")
    with pytest.raises(ValueError, match=r"images/0.* must have one label map of its own, got .*labels/0"):
        read_segmentation(folder, spatial_dims=2)
    (folder / "labels/0.tif").unlink()
    with pytest.raises(ValueError, match=r"images/0.* must have one label map of its own, got .*labels/0"):
        read_segmentation(folder, spatial_dims=2)
    other = pairs(tmp_path / "other", 1)
    (other / "labels/0.png").rename(other / "labels/z.png")
    with pytest.raises(ValueError, match=r"must hold label maps with the names of the images.*0.jpg and .*z.png"):
        read_segmentation(other, spatial_dims=2)


def test_masks_that_are_all_empty_name_no_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masks must show something, got 2 that are empty"):
        read_segmentation(pairs(tmp_path, 2, (0, 0)), spatial_dims=2)


def test_a_picture_of_dicom_has_its_spacing_and_its_mask_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index in range(2):  # of one series, without a place
        image = sitk.GetImageFromArray(RNG.integers(0, 4000, (1, 9, 12), dtype=np.int16))
        image.SetSpacing((0.25, 0.5, 1))
        for tag, value in (("0008|0060", "DX"), ("0008|0016", "1.2.840.10008.5.1.4.1.1.2"))[: 1 + index]:  # then CT's
            image.SetMetaData(tag, value)
        path = tmp_path / f"images/{index}.dcm"
        sitk.WriteImage(image, path, imageIO="GDCMImageIO")
        path.write_bytes(path.read_bytes().replace(b"\x20\x00\x32\x00DS", b"\x20\x00\x33\x00DS"))
        rows = mask(tmp_path / f"labels/{index}.png")
    datalist = read_segmentation(tmp_path, spatial_dims=2, validation_fraction=0)
    assert len(datalist.training) == 2
    np.testing.assert_array_equal(classes(tmp_path)[0], rows == 255)
    assert [item["modality"] for item in datalist.training] == ["DX", "DX"]
    for item in datalist.training:
        loaded = LoadImage(ImageFileReader(3, 1), image_only=True, ensure_channel_first=True)(item["image"])
        np.testing.assert_allclose(loaded.affine.diag(), [0.25, 0.5, 1, 1])
