"""The bundle of segmentation: what it trains, starts from, scores, writes and refuses."""

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from helpers import (
    DIRECTION,
    ROOT,
    Recipes,
    checkpoint,
    command_line,
    edited,
    events_of,
    metrics_of,
    read,
    refused,
    run_config,
    same,
    settings,
    table,
    tiny_knobs,
    two_processes,
    weights,
    write,
    write_series,
)
from monai.bundle import ConfigParser
from monai.networks.nets import SegResNet

from dissect_monai.common import BTCV_ORGANS
from dissect_monai.data.identity import pseudonyms
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.data.volume_lists import read_segmentation
from dissect_monai.networks.weights import LAST_LAYER, SEGRESNET_ENCODER

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = ROOT / "bundles" / "seg_finetune_btcv" / "configs"
TINY = tiny_knobs("seg_finetune_btcv")
SMALL = {"pixdim": [3, 3, 3]}  # for the volumes of `write_set`
FROZEN = {"learning_rate": 1e-12, "weight_decay": 0}
LEARNS = {  # to see two structures; it validates once, as pictures take longer than an epoch
    "max_epochs": 3, "val_interval": 3, "iterations_per_epoch": 16, "learning_rate": 0.004, "select": "last",
}  # fmt: skip
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def organs(volume_dirs: list[Path]) -> Path:
    """Phantoms of 13 organs, few and small."""
    return volume_dirs[0]


@pytest.fixture(scope="session")
def trained(recipe_of: Recipes) -> Path:
    """Output folder of a run of two epochs, on the phantoms."""
    return recipe_of("seg_finetune_btcv").finished


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six subjects with two structures, without splits."""
    return write_set(tmp_path_factory.mktemp("blocks") / "blocks", 6)


@pytest.fixture(scope="session")
def on_blocks(blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run that sees both structures."""
    output_dir = tmp_path_factory.mktemp("on_blocks")
    train(blocks, output_dir, **SMALL, **LEARNS, batch_size=4)
    return output_dir


def train(dataset_dir: Any, output_dir: Path, **knobs: Any) -> None:
    shared = {"dataset_dir": dataset_dir, "output_dir": output_dir}
    run_config(CONFIGS / "train.json", **{**TINY, **shared, **knobs})


def evaluate(dataset_dir: Any, output_dir: Path, **knobs: Any) -> list[dict[str, str]]:
    shared = {"dataset_dir": dataset_dir, "output_dir": output_dir, "num_workers": 0, "amp": False}
    run_config(CONFIGS / "evaluate.json", **{**shared, "num_samples": 20, "report": False, **knobs})
    return table(output_dir / "eval" / "cases.csv")


def segment(dataset_dir: Any, output_dir: Path, **knobs: Any) -> Path:
    """Folder of the label maps."""
    shared = {"dataset_dir": dataset_dir, "output_dir": output_dir, "num_workers": 0, "amp": False}
    run_config(CONFIGS / "inference.json", **{**shared, **knobs})
    return output_dir / "eval" / "label_maps"


def model(output_dir: Path) -> Path:
    return output_dir / "models" / "model.pt"


def part(state: Weights, prefix: str | tuple[str, ...]) -> Weights:
    return {key: value for key, value in state.items() if key.startswith(prefix)}


def values_of(path: str | Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def box_volume(seed: int, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A CT of a body with two blocks of different HU, and its label map."""
    rng = np.random.default_rng(seed)
    image, label = np.full((20, 18, 16), -1000.0), np.zeros((20, 18, 16), np.uint8)
    image[2:-2, 2:-2, 1:-1] = 0
    for value, x, density in ((1, 4, 100), (2, 11, 200)):
        low, high = rng.integers(3, 6), rng.integers(10, 14)
        image[x : x + 5, low:high, 4:12], label[x : x + 5, low:high, 4:12] = density, value
    image += rng.normal(0, 10, image.shape)
    volumes = [image, 300 - image / 2][:channels]
    return np.stack(volumes, -1).astype(np.int16).squeeze(), label


def write_set(folder: Path, count: int = 4, channels: int = 1, axes: Any = None, **spec: Any) -> Path:
    """A data set of `box_volume`s, 3 mm between voxels; `spec` is what dataset.json says beside the items."""
    affine = np.diag([-3.0, 3.0, 3.0, 1.0])
    affine[:3, :3] = affine[:3, :3] if axes is None else axes
    affine[:3, 3] = 30, -25, 400
    items = []
    for index in range(count):
        item = {"image": f"images/{index}.nii.gz", "label": f"labels/{index}.nii.gz", "subject": f"s{index}"}
        for array, name in zip(box_volume(index, channels), (item["image"], item["label"]), strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), folder / name)
        items.append(item)
    known = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "dim", "2": "bright"}, "training": items}
    write(folder / "dataset.json", {**known, **spec})
    return folder


def dice(label: np.ndarray, pred: np.ndarray) -> float:
    return float(2 * (label & pred).sum() / (label.sum() + pred.sum()))


# ---- training ----------------------------------------------------------------------------------------------------


def test_the_json_says_what_the_weights_are_and_what_they_saw(trained: Path) -> None:
    said = settings(trained)
    assert said["class_names"] == list(BTCV_ORGANS)
    assert (said["modality"], said["in_channels"], said["num_volumes"]) == ("CT", 1, 4)
    assert said["pretrained"] is None
    assert {"data", "fold", "num_folds"} <= said.keys()
    network = SegResNet(3, init_filters=8, out_channels=14, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    network.load_state_dict(weights(trained))


def test_tensorboard_shows_losses_and_overlays(trained: Path, organs: Path) -> None:
    events = events_of(trained)
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("dice/mean")] == [1, 2]
    names = pseudonyms(read_segmentation(organs).validation)
    assert events.Tags()["images"] == [f"overlays/{index}_{name}" for index, name in enumerate(names, 1)]


def test_the_weights_are_those_of_the_best_validation_or_the_last_epoch(trained: Path, on_blocks: Path) -> None:
    scores = [event.value for event in events_of(trained).Scalars("dice/mean")]
    best = int(np.argmax(scores)) + 1
    assert checkpoint(trained, 2)["trainer"]["best_epoch"] == best
    assert same(weights(trained), checkpoint(trained, best)["network"])
    assert same(weights(on_blocks), checkpoint(on_blocks, 3)["network"])


def run_state(dataset_dir: Path, output_dir: Path, **knobs: Any) -> Weights:
    train(dataset_dir, output_dir, **{**SMALL, "select": "last", "validation_fraction": 0, **knobs})
    return weights(output_dir)


@pytest.fixture(scope="session")
def plain(blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights of one epoch, with which those of other knobs are compared."""
    return run_state(blocks, tmp_path_factory.mktemp("plain"))


def test_images_kept_on_the_device_do_not_change_the_weights(blocks: Path, plain: Weights, tmp_path: Path) -> None:
    assert same(run_state(blocks, tmp_path, on_device="true", device="cpu", compile="false"), plain)


def test_deep_supervision_leaves_the_weights_of_a_plain_network(blocks: Path, tmp_path: Path) -> None:
    levels = {"blocks_down": [1, 1, 1, 1], "blocks_up": [1, 1, 1]}
    state = run_state(blocks, tmp_path, **levels, deep_supervision=2)
    network = SegResNet(3, init_filters=8, out_channels=3, blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1))
    network.load_state_dict(state)
    assert len(part(checkpoint(tmp_path, 1)["network"], "heads.")) == 4  # weight and bias of two


def trained_on(dataset_dir: Path, **knobs: Any) -> set[str]:
    """Subjects that a run would train on."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    parser.update({**TINY, **SMALL, "dataset_dir": str(dataset_dir), **knobs})
    return {item["subject"] for item in parser.get_parsed_content("train#dataset").data}


EVERYONE = {f"s{index}" for index in range(6)}


def test_each_fold_is_scored_by_the_weights_that_have_not_seen_it(blocks: Path, tmp_path: Path) -> None:
    folds = [EVERYONE - trained_on(blocks, fold=fold, num_folds=3) for fold in range(3)]
    assert [len(fold) for fold in folds] == [2, 2, 2]
    assert set().union(*folds) == EVERYONE
    train(blocks, tmp_path / "out", **SMALL, fold=1, num_folds=3)
    assert settings(tmp_path / "out")["num_volumes"] == 4
    # The weights know their fold.
    assert {*scored_subjects(blocks, evaluate(blocks, tmp_path / "out"))} == folds[1]


# ---- classes -----------------------------------------------------------------------------------------------------


def scored(cases: list[dict[str, str]]) -> set[tuple[str, str]]:
    return {(row["structure"], row["values"]) for row in cases}


def test_structures_choose_and_order_the_classes(organs: Path, tmp_path: Path) -> None:
    train(organs, tmp_path, structures=["liver", "spleen"], label_fraction=0.5)
    assert settings(tmp_path)["class_names"] == ["liver", "spleen"]
    assert settings(tmp_path)["num_volumes"] == 2
    assert scored(evaluate(organs, tmp_path)) == {("liver", "6"), ("spleen", "1")}
    maps = segment(organs / "images" / "abdomen_ct_test_000.nii.gz", tmp_path)
    said = read(maps / "abdomen_ct_test_000_seg.json")
    assert said["labels"] == {"0": "background", "1": "liver", "2": "spleen"}


def test_two_channels_are_scaled_each_by_its_modality(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", channels=2, modality={"0": "T2", "1": "ADC"})
    train(folder, tmp_path / "out", **SMALL)
    said = settings(tmp_path / "out")
    assert (said["modality"], said["in_channels"]) == (["T2", "ADC"], 2)
    assert weights(tmp_path / "out")["convInit.conv.weight"].shape[1] == 2
    assert len(evaluate(folder, tmp_path / "out")) == 2
    image = folder / "images" / "0.nii.gz"
    maps = segment(image, tmp_path / "out")
    assert values_of(maps / "0_seg.nii.gz").shape == nib.load(image).shape[:3]


def test_voxels_to_ignore_are_neither_learnt_nor_scored(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", labels={"background": 0, "dim": 1, "bright": 2, "ignore": 3})
    for path in folder.glob("labels/*"):
        label, affine = values_of(path).copy(), nib.load(path).affine
        label[:, :, 8:] = 3
        nib.save(nib.Nifti1Image(label, affine), path)
    train(folder, tmp_path / "out", **SMALL)
    assert settings(tmp_path / "out")["class_names"] == ["dim", "bright"]
    (first, *_), scored = nib.load(folder / "labels/0.nii.gz").header.get_zooms(), evaluate(folder, tmp_path / "out")
    assert [row["structure"] for row in scored] == ["dim", "bright"]
    assert all(0 < float(row["label_ml"]) <= 5 * 8 * 4 * first**3 / 1000 for row in scored)


# ---- weights to start from ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hssl(recipe_of: Recipes, organs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of hssl_multidomain, on other voxels and with other blocks than `TINY`."""
    output_dir = tmp_path_factory.mktemp("hssl")
    shape = {"pixdim": [11, 11, 12], "patch_size": [16, 16, 8], "blocks_down": [1, 2, 1]}
    recipe_of("hssl_multidomain").train(output_dir, dataset_dir=organs, a_min=-150, **shape)
    return output_dir


OWN = {name: TINY[name] for name in TINY.keys() - {"pixdim", "patch_size", "blocks_down", "blocks_up", "init_filters"}}


def finetune(dataset_dir: Path, output_dir: Path, pretrained: Path, **knobs: Any) -> None:
    """A run that leaves shape and scaling to the JSON beside the weights."""
    shared = {"dataset_dir": dataset_dir, "output_dir": output_dir, "pretrained": pretrained}
    run_config(CONFIGS / "train.json", **{**OWN, **shared, **knobs})


def test_weights_of_hssl_start_all_but_the_last_layer(hssl: Path, organs: Path, tmp_path: Path) -> None:
    finetune(organs, tmp_path, model(hssl), **FROZEN)
    said = settings(tmp_path)
    shape = {"pixdim": [11, 11, 12], "patch_size": [16, 16, 8], "blocks_down": [1, 2, 1], "a_min": -150}
    assert {name: said[name] for name in shape} == shape
    assert said["pretrained"] == str(model(hssl))
    before, after = weights(hssl), weights(tmp_path)
    kept = [key for key in before if not key.startswith(LAST_LAYER)]
    assert len(kept) == len(before) - 2
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in kept)
    assert len(evaluate(organs, tmp_path)) == 26


def test_the_encoder_is_frozen_for_the_first_epochs(recipe_of: Recipes, organs: Path, tmp_path: Path) -> None:
    vq_ssl = recipe_of("pretrain_vq_ssl_volumes")  # an encoder alone
    two = {"freeze_epochs": 1, "max_epochs": 2, "val_interval": 2, "weight_decay": 0.1, "select": "last"}
    finetune(organs, tmp_path, vq_ssl.model, **two)
    first, second = (checkpoint(tmp_path, epoch)["network"] for epoch in (1, 2))
    assert same(part(first, SEGRESNET_ENCODER), weights(vq_ssl.finished))
    assert not same(part(first, "up_layers."), part(second, "up_layers."))
    assert not any(torch.equal(first[key], second[key]) for key in part(first, "convInit."))


def test_weights_of_xrays_start_a_segmentation_of_slices(recipe_of: Recipes, organs: Path, tmp_path: Path) -> None:
    model_2d, flat = recipe_of("pretrain_vq_ssl").model, {"pixdim": [12, 12], "patch_size": [16, 16]}
    out, two = tmp_path / "out", {"freeze_epochs": 1, "max_epochs": 2, "val_interval": 2, "select": "last"}
    two["structures"] = ["liver"]
    finetune(organs, out, model_2d, **flat, **two)
    assert {key: settings(out)[key] for key in ("encoder", "spatial_dims")} == {
        "encoder": "resnet10",
        "spatial_dims": 2,
    }
    first, second = (checkpoint(out, epoch)["network"] for epoch in (1, 2))
    encoder = {f"encoder.{key}": value for key, value in torch.load(model_2d, weights_only=True).items()}
    assert same(part(first, "encoder."), encoder)  # statistics of its norms, too
    assert not any(torch.equal(first[key], second[key]) for key in ("encoder.conv1.weight", "encoder.bn1.running_mean"))
    (out / "checkpoints" / "checkpoint_epoch=2.pt").unlink()
    finetune(organs, out, model_2d, **flat, **two, resume=True)
    assert same(weights(out), second)
    assert scored(evaluate(organs, out)) == {("liver", "6")}
    assert list(segment(organs / "images" / "abdomen_ct_test_000.nii.gz", out).glob("*_seg.nii.gz"))


def test_a_resnet_that_volumes_have_pretrained_starts_a_segmentation(
    recipe_of: Recipes, organs: Path, tmp_path: Path
) -> None:
    knobs = {"encoder": "resnet10", "stages": [3, 4], "blocks_down": [1, 1, 1, 1], "hidden_dim": 8}
    recipe_of("pretrain_vq_ssl_volumes").train(tmp_path / "ssl", **knobs)
    assert settings(tmp_path / "ssl")["encoder"] == "resnet10"
    finetune(organs, tmp_path / "out", model(tmp_path / "ssl"), structures=["liver"], **FROZEN)
    before, after = weights(tmp_path / "ssl"), weights(tmp_path / "out")
    kernels = [key for key, value in before.items() if value.ndim == 5]
    assert all(torch.allclose(before[key], after[f"encoder.{key}"], atol=1e-6) for key in kernels)
    with refused(r"`--batch_size` must be at least 2 with `--encoder` resnet10 and .* \[16, 16, 16\], got 1"):
        train(organs, tmp_path / "no", encoder="resnet10", batch_size=1)


# ---- slices ------------------------------------------------------------------------------------------------------

SAGITTAL = [[0, 0, -7], [3, 0, 0], [0, -3, 0]]  # array axes to the front, to the feet, to the left
SLICES = {
    **LEARNS, "spatial_dims": 2, "pixdim": [3, 3], "patch_size": [16, 16], "batch_size": 8, "deep_supervision": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def sagittal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six subjects with two structures in sagittal slices, 7 mm apart."""
    return write_set(tmp_path_factory.mktemp("sagittal") / "sagittal", 6, axes=SAGITTAL)


@pytest.fixture(scope="session")
def on_slices(sagittal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run on slices that sees both structures."""
    output_dir = tmp_path_factory.mktemp("on_slices")
    train(sagittal, output_dir, **SLICES)
    return output_dir


def test_a_2d_network_segments_volumes_slice_by_slice_on_their_own_grid(
    on_slices: Path, sagittal: Path, tmp_path: Path
) -> None:
    assert weights(on_slices)["convInit.conv.weight"].ndim == 4
    assert {name: settings(on_slices)[name] for name in ("spatial_dims", "slice_axis", "pixdim", "patch_size")} == {
        "spatial_dims": 2, "slice_axis": "auto", "pixdim": [3, 3], "patch_size": [16, 16],
    }  # fmt: skip
    cases = evaluate(sagittal, tmp_path, pretrained=model(on_slices), report=True)
    assert (tmp_path / "eval" / "report.html").is_file()
    assert len(cases) == 2 * len(read_segmentation(sagittal).validation)
    maps = segment(sagittal, tmp_path, pretrained=model(on_slices))
    expected = scores_by_hand(sagittal, maps, ["dim", "bright"])
    for row in cases:
        assert float(row["dice"]) == pytest.approx(expected[row["case"], row["structure"]], abs=1e-4)
    assert max(float(row["dice"]) for row in cases) > 0.2  # else it says little
    image, label_map = nib.load(sagittal / "images" / "0.nii.gz"), nib.load(maps / "0_seg.nii.gz")
    assert label_map.shape == image.shape
    np.testing.assert_allclose(label_map.affine, image.affine)


def test_a_run_on_slices_goes_on_bit_for_bit(on_slices: Path, sagittal: Path, tmp_path: Path) -> None:
    shutil.copytree(on_slices, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "checkpoint_epoch=3.pt").unlink()
    train(sagittal, tmp_path, **SLICES, resume=True)
    assert part(checkpoint(tmp_path, 3)["network"], "heads.")  # of the deep supervision, too
    assert same(checkpoint(tmp_path, 3), checkpoint(on_slices, 3))
    assert same(weights(tmp_path), weights(on_slices))


def test_training_sees_slices_of_the_plane_of_the_header(sagittal: Path) -> None:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    parser.update({**TINY, **SLICES, "pixdim": [3, 3], "dataset_dir": str(sagittal), "patch_size": [16, 24]})
    item = {"image": str(sagittal / "images" / "0.nii.gz"), "modality": "CT"}
    seen = parser.get_parsed_content("train#preprocessing")(item)["image"]
    image, _ = box_volume(0)
    body = image[2:-2, 2:-2, 1:-1][:, ::-1, ::-1]  # upright: front and top last, and so is the right
    assert seen.shape == (1, 16, 24, 14)  # of the 14 slices, one that shows the body each
    expected = np.pad(np.clip((body + 125) / 400, 0, 1) * 255, ((0, 0), (5, 5), (0, 0)))
    np.testing.assert_allclose(seen[0], expected, atol=1)
    batch = next(iter(parser.get_parsed_content("train#dataloader")))
    assert batch["image"].shape == batch["label"].shape == (8, 1, 16, 24)
    assert {*batch["label"].unique().tolist()} == {0, 1, 2}


def test_weights_of_slices_bring_dimensions_and_plane_along(organs: Path, recipe_of: Recipes, tmp_path: Path) -> None:
    shape = {"spatial_dims": 2, "slice_axis": "coronal", "pixdim": [11, 12], "patch_size": [16, 8]}
    recipe_of("hssl_multidomain").train(tmp_path / "hssl", dataset_dir=organs, **shape)
    finetune(organs, tmp_path / "out", model(tmp_path / "hssl"), **FROZEN)
    said, state = settings(tmp_path / "out"), weights(tmp_path / "out")
    assert {name: said[name] for name in shape} == shape
    key = "convInit.conv.weight"
    torch.testing.assert_close(state[key], weights(tmp_path / "hssl")[key], rtol=0, atol=1e-6)
    assert len(evaluate(organs, tmp_path / "out")) == 26


# ---- evaluation --------------------------------------------------------------------------------------------------


def scored_subjects(dataset_dir: Path, cases: list[dict[str, str]]) -> list[str]:
    """Subject of every line of cases.csv, which has its pseudonym."""
    items = read_segmentation(dataset_dir).items()
    names = dict(zip(pseudonyms(items), (item["subject"] for item in items), strict=True))
    return [names[row["subject"]] for row in cases]


def test_evaluation_writes_tables_metrics_and_a_report_and_nothing_else(
    trained: Path, organs: Path, tmp_path: Path
) -> None:
    cases = evaluate(organs, tmp_path, pretrained=model(trained), report=True)
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]
    written = {"cases.csv", "summary.csv", "metrics.csv", "report.html"}
    assert {path.name for path in (tmp_path / "eval").iterdir()} == written
    summary = table(tmp_path / "eval" / "summary.csv")
    subjects = ["abdomen_ct_test_000", "abdomen_ct_test_001"]
    assert scored_subjects(organs, cases) == [name for name in subjects for _ in BTCV_ORGANS]
    assert [row["structure"] for row in cases] == [*BTCV_ORGANS, *BTCV_ORGANS]
    assert [row["structure"] for row in summary] == ["mean", *BTCV_ORGANS]
    assert metrics_of(tmp_path)["dice_mean"] == pytest.approx(float(summary[0]["dice"]), abs=1e-4)
    report = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert "right adrenal gland" in report
    assert "optimistic" not in report


def test_evaluation_decodes_each_volume_once_but_for_the_pictures(
    trained: Path, organs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], ImageFileReader.get_data
    monkeypatch.setattr(ImageFileReader, "get_data", lambda self, path: decoded.append(str(path)) or decode(self, path))
    evaluate(organs, tmp_path, pretrained=model(trained))
    test = [item["image"] for item in read_segmentation(organs).test]
    assert sorted({*test} & {*decoded}) == sorted(path for path in decoded if path in test) == sorted(test)


def scores_by_hand(dataset_dir: Path, maps: Path, class_names: list[str]) -> dict[tuple[str, str], float]:
    """Dice of each image and structure, of the label maps that inference wrote; NaN without label."""
    datalist = read_segmentation(dataset_dir)
    found = {}
    for item in datalist.validation + datalist.test:
        label = values_of(item["label"])
        pred = values_of(maps / Path(item["image"]).name.replace(".nii.gz", "_seg.nii.gz"))
        for index, name in enumerate(class_names, 1):
            is_label, is_pred = np.isin(label, item["labels"][name]), pred == index
            found[item["image"], name] = dice(is_label, is_pred) if is_label.any() else float("nan")
    return found


def test_scores_are_those_of_the_label_maps(on_blocks: Path, blocks: Path, tmp_path: Path) -> None:
    knobs = {"overlap": 0.25, "largest_only": ["dim"], "pretrained": model(on_blocks)}
    cases = evaluate(blocks, tmp_path, **knobs)
    expected = scores_by_hand(blocks, segment(blocks, tmp_path, **knobs), ["dim", "bright"])
    assert len(cases) == 2 * len(read_segmentation(blocks).validation)
    for row in cases:
        assert float(row["dice"]) == pytest.approx(expected[row["case"], row["structure"]], abs=1e-4)
    assert max(float(row["dice"]) for row in cases) > 0.2  # else it says little


def test_optimism_is_noted(trained: Path, organs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untested = edited(organs, tmp_path, test=None)
    cases = evaluate(untested, tmp_path / "best", pretrained=model(trained), report=True)
    assert {*scored_subjects(untested, cases)} == {f"abdomen_ct_validation_00{index}" for index in (0, 1)}
    note = "The weights were chosen on these very subjects, so that the scores are optimistic"
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "best" / "eval" / "report.html").read_text(encoding="utf-8")


def test_how_label_maps_are_stored_changes_nothing(
    on_blocks: Path, blocks: Path, plain: Weights, tmp_path: Path
) -> None:
    folder = edited(blocks, tmp_path)
    for path in (folder / "labels").iterdir():
        label = nib.load(path)
        floats = nib.Nifti1Image(np.asarray(label.dataobj).astype(np.float32), label.affine)
        nib.save(floats.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]])), path)
    assert same(run_state(folder, tmp_path / "out"), plain)
    first, second = (evaluate(each, tmp_path / each.name, pretrained=model(on_blocks)) for each in (blocks, folder))
    assert [row["dice"] for row in first] == [row["dice"] for row in second]


# ---- label maps --------------------------------------------------------------------------------------------------


def geometry(image: sitk.Image) -> tuple[Any, ...]:
    return image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def test_all_formats_give_one_label_map_on_the_grid_of_the_file(on_blocks: Path, tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(box_volume(2)[0].T.astype(np.int16))  # which will be oblique
    image.SetSpacing((3.0, 3.0, 4.0))
    image.SetOrigin((-10.0, 20.0, 30.0))
    image.SetDirection(DIRECTION)
    folder = tmp_path / "formats"
    folder.mkdir()
    for name in ("a.nii.gz", "b.mha", "c.nrrd"):
        sitk.WriteImage(image, folder / name)
    write_series(folder / "d", image)
    maps = segment(folder, tmp_path, pretrained=model(on_blocks))
    expected = values_of(maps / "b_seg.nii.gz")
    assert len(np.unique(expected)) == 3
    for name in "abcd":
        assert (values_of(maps / f"{name}_seg.nii.gz") != expected).mean() < 2e-3
        seen = sitk.ReadImage(maps / f"{name}_seg.nii.gz")  # as viewers read it
        assert seen.GetSize() == image.GetSize()
        for found, wanted in zip(geometry(seen), geometry(image), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("run", ["on_blocks", "on_slices"])
def test_the_label_map_is_the_same_without_a_bundle_run(
    run: str, blocks: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # As MONAI Label and Deploy call them.
    image, trained = blocks / "images" / "0.nii.gz", request.getfixturevalue(run)
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser["pretrained"] = str(model(trained))
    parser["device"] = "cpu"
    names = ("preprocessing", "network_def", "inferer", "postprocessing")
    preprocessing, network, inferer, postprocessing = (parser.get_parsed_content(name) for name in names)
    network.load_state_dict(weights(trained))
    item = preprocessing({"image": str(image)})
    with torch.no_grad():
        pred = inferer(item["image"][None], network.eval())[0]
    label_map = postprocessing({"image": item["image"], "pred": pred})["pred"]
    maps = segment(image, tmp_path, pretrained=model(trained))
    assert np.array_equal(label_map[0].numpy(), values_of(maps / "0_seg.nii.gz"))


def test_two_processes_are_one_with_the_joined_batch_and_share_its_validation(blocks: Path, tmp_path: Path) -> None:
    # Three volumes to validate: an odd number. The cross-entropy alone is a mean over the samples of a batch.
    knobs = {**TINY, **SMALL, "validation_fraction": 0.5, "max_epochs": 2, "batch_size": 1, "dice_ce#lambda_dice": 0}
    configs = CONFIGS / "train.json", CONFIGS / "multi_gpu_train.json"
    result = two_processes(*configs, cwd=tmp_path, **knobs, dataset_dir=blocks, output_dir=tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    train(blocks, tmp_path / "one", **{**knobs, "batch_size": 2})
    one, two = (checkpoint(tmp_path / name, 2)["network"] for name in ("one", "two"))
    # Adam divides small gradients by their size, and so makes much of the rounding of a few.
    differing = torch.cat([(one[key] - two[key]).abs().ravel() for key in one])
    assert (differing > 1e-3).float().mean() < 0.01
    scores = [[event.value for event in events_of(tmp_path / name).Scalars("dice/mean")] for name in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], abs=0.02)

    cases = evaluate(blocks, tmp_path / "two", split="validation")
    assert len({row["subject"] for row in cases}) == 3
    assert metrics_of(tmp_path / "two")["dice_mean"] == pytest.approx(max(scores[1]), abs=1e-4)


# ---- lists of a server -------------------------------------------------------------------------------------------


def served(organs: Path, trained: Path, root: Path, **changes: Any) -> None:
    """A training as MONAI Label calls it: in a bundle with weights, with lists of images and label maps alone."""
    shutil.copytree(CONFIGS, root / "configs", dirs_exist_ok=True)
    shutil.copytree(trained / "models", root / "models", dirs_exist_ok=True)
    items = [{"image": str(item["image"]), "label": str(item["label"])} for item in read_segmentation(organs).training]
    loader = {
        "_target_": "CheckpointLoader", "load_path": str(model(root)), "load_dict": {"model": "$@network"},
        "strict": False,
    }  # fmt: skip
    given = {
        "bundle_root": str(root), "train#trainer#max_epochs": 1, "train#dataset#data": items[:3],
        "validate#dataset#data": items[3:], "device": "cpu",
        "train#handlers": [loader, *read(CONFIGS / "train.json")["train"]["handlers"]],
        "iterations_per_epoch": 2, "batch_size": 2, "num_workers": 0,
    }  # fmt: skip
    run_config(root / "configs" / "train.json", **{**given, **changes})


def test_lists_of_a_server_train_the_served_weights_on(organs: Path, trained: Path, tmp_path: Path) -> None:
    served(organs, trained, tmp_path, **FROZEN)
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, weights(trained)[key])
    before, after = settings(trained), settings(tmp_path)
    kept = ("class_names", "modality", "in_channels", "pixdim", "patch_size", "init_filters", "blocks_down")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert (after["num_volumes"], after["select"], after["schedule_epochs"]) == (3, "best", 1)
    assert {*after["trained_on"]} > {*before["trained_on"]}
    served(organs, trained, tmp_path)  # again, over what the first has left
    assert not same(weights(tmp_path), weights(trained))


def test_lists_of_a_server_train_a_2d_network_on(sagittal: Path, on_slices: Path, tmp_path: Path) -> None:
    served(sagittal, on_slices, tmp_path, **FROZEN)
    assert settings(tmp_path)["spatial_dims"] == 2
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, weights(on_slices)[key])


def test_without_a_list_for_validation_the_last_weights_are_kept(organs: Path, trained: Path, tmp_path: Path) -> None:
    served(organs, trained, tmp_path, **{"validate#dataset#data": []})
    assert settings(tmp_path)["select"] == "last"
    assert not same(weights(tmp_path), weights(trained))


def test_a_server_without_labelled_studies_is_told_so(organs: Path, trained: Path, tmp_path: Path) -> None:
    with refused("give studies a final label in MONAI Label"):
        served(organs, trained, tmp_path, **{"train#dataset#data": [], "validate#dataset#data": []})


@pytest.mark.parametrize(
    ("config", "knob", "message"),
    [
        ("evaluate", {"largest_only": ["heart"]}, "`largest_only` must be none, all, or among"),
        ("inference", {"pretrained": "nowhere.pt"}, r"there are no weights at .*nowhere\.pt"),
    ],
    ids=str,
)
def test_refuses_bad_knobs_before_anything_is_written(
    trained: Path, organs: Path, tmp_path: Path, config: str, knob: dict[str, Any], message: str
) -> None:
    shared = {"num_workers": 0, "pretrained": model(trained), "dataset_dir": organs, "output_dir": tmp_path / "out"}
    with refused(message):
        run_config(CONFIGS / f"{config}.json", **{**shared, **knob})
    assert not (tmp_path / "out").exists()


def test_broken_files_of_any_split_are_found_before_training_or_left_out(
    blocks: Path, on_blocks: Path, tmp_path: Path
) -> None:
    items = read(blocks / "dataset.json")["training"]
    folder = edited(blocks, tmp_path, training=items[:2], validation=items[2:4], test=items[4:])
    strange = shutil.copytree(on_blocks / "models", tmp_path / "strange") / "model.pt"  # which has seen nobody
    write(strange.with_suffix(".json"), {**read(strange.with_suffix(".json")), "trained_on": []})
    for name, runs in {"labels/3.nii.gz": [train], "labels/5.nii.gz": [train, evaluate]}.items():
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        for run in runs:
            with refused(f"got 1 of 2 that cannot:(.|\n)*{name} must be an intact image"):
                run(folder, tmp_path / "out", pretrained=strange if run is evaluate else None, **SMALL)
        assert not list(tmp_path.glob("out/checkpoints/*"))
        scored = evaluate(folder, tmp_path / "kept", pretrained=strange, split="all", on_corrupt="skip")
        assert {*scored_subjects(folder, scored)} == {f"s{index}" for index in range(6) if f"{index}.nii" not in name}
        (folder / name).write_bytes(content)


@pytest.mark.slow
def test_a_smoke_run_on_coarse_voxels_learns(tmp_path: Path) -> None:
    coarse = {"pixdim": [10, 10, 10], "patch_size": [16, 16, 16], "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
    result = command_line(CONFIGS / "train.json", output_dir=tmp_path, max_epochs=10, **coarse)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Smoke run on generated phantoms" in result.stdout + result.stderr
    scores = [event.value for event in events_of(tmp_path).Scalars("dice/mean")]
    assert scores[-1] > scores[0] + 0.05
    for config in ("evaluate", "inference"):
        assert command_line(CONFIGS / f"{config}.json", output_dir=tmp_path).returncode == 0
    found = metrics_of(tmp_path)
    assert found["dice_mean"] > 0.4
    for large in ("liver", "spleen", "right_kidney", "left_kidney", "stomach", "aorta", "inferior_vena_cava"):
        assert found[f"dice_{large}"] > 0.5, large
