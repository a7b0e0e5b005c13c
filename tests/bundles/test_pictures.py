"""Pictures with masks in the bundles for volumes: from pretraining to masks of the same size and colours."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, metrics_of, read, refused, run_config, settings, tiny_knobs
from PIL import Image

from dissect_monai.phantoms.xray import xray_phantom

pytestmark = pytest.mark.usefixtures("_in_root")
HSSL, SEG = (ROOT / "bundles" / name / "configs" for name in ("hssl_multidomain", "seg_finetune_btcv"))
SMALL = {
    "spatial_dims": 2,
    "patch_size": [32, 32],
    "pixdim": [1, 1],
    "image_size": 48,
    "max_epochs": 1,
    "val_interval": 1,
}
GREEN = (0, 255, 0)


def lungs(folder: Path, colour: bool, count: int = 4) -> Path:
    """X-rays of 60 x 40 pixels in `images`, and masks of the lungs in `labels`, of 0 and 255 or in green."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        drawn = xray_phantom(index, 60, subject_seed=index, label=np.zeros(4))
        grey = Image.fromarray((drawn.image[0, 10:50] * 255).astype(np.uint8))
        (Image.merge("RGB", (grey, grey.rotate(180), grey)) if colour else grey).save(folder / f"images/{index}.png")
        mask = drawn.lungs[10:50]
        pixels = mask[..., None] * np.array(GREEN) if colour else mask * 255
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"labels/{index}.png")
    if colour:
        items = [{"image": f"images/{index}.png", "label": f"labels/{index}.png"} for index in range(count)]
        content = {"training": items[1:], "test": items[:1], "colours": {"lungs": GREEN}}
        (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def run(config: Path, folder: Any, output_dir: Path, **knobs: Any) -> None:
    run_config(config, **{"num_workers": 0, "dataset_dir": folder, "output_dir": output_dir, **knobs})


def mask_of(folder: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder / "eval" / "label_maps" / f"{name}_seg.png"))


def test_pictures_in_colour_are_pretrained_on_segmented_scored_and_written_in_colours(tmp_path: Path) -> None:
    grey, colour = lungs(tmp_path / "grey", False), lungs(tmp_path / "colour", True)
    both = {"task": {"grey": "a", "colour": "b"}, "group": "chest"}
    tiny = {**tiny_knobs("hssl_multidomain"), **SMALL}
    run(HSSL / "train.json", [str(grey), str(colour)], tmp_path / "hssl", **{**tiny, **both})
    assert settings(tmp_path / "hssl")["in_channels"] == 3

    tiny = {**tiny_knobs("seg_finetune_btcv"), **SMALL, "pretrained": tmp_path / "hssl/models/model.pt"}
    run(SEG / "train.json", str(colour), tmp_path / "seg", **tiny)
    own = settings(tmp_path / "seg")
    assert [own[key] for key in ("in_channels", "image_size", "class_names")] == [3, 48, ["lungs"]]
    assert own["mask_values"] == {"lungs": list(GREEN)}

    run(SEG / "evaluate.json", str(colour), tmp_path / "seg")
    with open(tmp_path / "seg/eval/cases.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["structure"], row["values"], row["label_ml"]) == ("lungs", "1", "")
    assert "HD95 (pixels)" in (tmp_path / "seg/eval/report.html").read_text(encoding="utf-8")
    assert 0 <= metrics_of(tmp_path / "seg")["dice_mean"] <= 1

    run(SEG / "inference.json", [str(grey), str(colour)], tmp_path / "seg")
    for name in ("grey/images/0", "colour/images/3"):
        mask = mask_of(tmp_path / "seg", name)
        assert mask.shape == (40, 60, 3)
        assert {*map(tuple, mask.reshape(-1, 3).tolist())} <= {(0, 0, 0), GREEN}
        said = read(tmp_path / f"seg/eval/label_maps/{name}_seg.json")
        assert said["areas_pixels"]["lungs"] == (mask[..., 1] > 0).sum()


def test_grey_pictures_in_two_folders_are_enough(tmp_path: Path) -> None:
    grey = lungs(tmp_path / "grey", False)
    knobs = {"iterations_per_epoch": 12, "max_epochs": 4, "learning_rate": 0.01, "select": "last"}
    tiny = {**tiny_knobs("seg_finetune_btcv"), **SMALL, **knobs, "validation_fraction": 0}
    run(SEG / "train.json", str(grey), tmp_path / "seg", **tiny)
    own = settings(tmp_path / "seg")
    assert [own[key] for key in ("in_channels", "class_names", "mask_values")] == [
        1,
        ["foreground"],
        {"foreground": 255},
    ]
    run(SEG / "inference.json", str(grey), tmp_path / "seg")
    masks = np.stack([mask_of(tmp_path / "seg", str(index)) for index in range(4)])
    assert {*np.unique(masks).tolist()} == {0, 255}
    truth = np.stack([np.asarray(Image.open(grey / f"labels/{index}.png")) for index in range(4)])
    assert 2 * ((masks > 0) & (truth > 0)).sum() / ((masks > 0).sum() + (truth > 0).sum()) > 0.6
    for path in (grey / "labels").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 255 * 7).save(path)
    with refused(r"0.png has the values 7, of which the weights know 1, 255 alone"):
        run(SEG / "evaluate.json", str(grey), tmp_path / "seg", split="all")
