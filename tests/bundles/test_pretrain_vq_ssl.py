"""The bundle of vector-quantised pretraining on images: what it shows, takes, refuses, judges and embeds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from helpers import (
    ROOT,
    Recipe,
    Recipes,
    checkpoint,
    command_line,
    events_of,
    metrics_of,
    read,
    refused,
    run_config,
    same,
    table,
    tags_of,
    two_processes,
    write,
)
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = ROOT / "bundles" / "pretrain_vq_ssl" / "configs"
WIDTH = 512  # of the embedding of a ResNet-10


@pytest.fixture
def bundle(recipe_of: Recipes) -> Recipe:
    return recipe_of("pretrain_vq_ssl")


# ---- training ----------------------------------------------------------------------------------------------------


def test_images_on_the_device_give_the_same_weights(bundle: Recipe, tmp_path: Path) -> None:
    configs = [CONFIGS / "train.json", CONFIGS / "on_device.json"]
    run_config(configs, **{**bundle.knobs, "output_dir": tmp_path, "max_epochs": 1, "schedule_epochs": 2})
    assert same(checkpoint(tmp_path, 1)["network"], checkpoint(bundle.finished, 1)["network"])


def test_byol_is_the_same_config_with_the_discrete_weights_at_zero(bundle: Recipe, tmp_path: Path) -> None:
    none = {"discrete_weight": 0, "commitment_weight": 0, "reconstruction_weight": 0}
    bundle.train(tmp_path, objective="byol", continuous_weight=1, **none)
    assert "schedule/target_momentum" in tags_of(tmp_path)
    assert not any(key.startswith("decoder") for key in checkpoint(tmp_path, 1)["network"])


def test_the_form_of_the_paper_is_an_override(bundle: Recipe, tmp_path: Path) -> None:
    files = [str(CONFIGS / "train.json"), str(CONFIGS / "paper.json")]
    config = ConfigParser()
    config.read_config(files)
    assert (config["objective"], config["fusion"], config["num_embeddings"]) == ("byol", "attention", 1024)
    run_config(files, **{**bundle.knobs, "output_dir": tmp_path})
    settings = read(tmp_path / "models" / "model.json")
    assert (settings["objective"], settings["fusion"], settings["reconstruction_weight"]) == ("byol", "attention", 1)


def test_runs_with_the_overrides_of_monai_label(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    images = [{"image": str(path)} for path in sorted((dataset_dir / "images").glob("training*.png"))]
    knobs = {**bundle.knobs, "device": "cpu", "output_dir": str(tmp_path)}
    knobs |= {"train#dataset#data": images, "train#trainer#max_epochs": 1, "train#handlers": []}
    workflow = ConfigWorkflow(str(CONFIGS / "train.json"), workflow_type="train", logging_file=False, **knobs)
    workflow.initialize()
    workflow.run()
    assert len(workflow.parser.get_parsed_content("train#dataset")) == 24
    assert workflow.parser.get_parsed_content("network") is not None


def test_shards_are_read_by_one_process_each(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    datalist = read(dataset_dir / "dataset.json")
    items = [{**item, "image": str(dataset_dir / item["image"])} for item in datalist["training"][1:]]
    write(tmp_path / "set" / "dataset.json", {**datalist, "training": items, "validation": [], "test": []})
    facts = "[sorted(item['image'] for item in @train#dataset.data), @train#trainer.state.iteration]"
    saving = f"$torch.save({facts}, @output_dir + '/rank' + str(@rank) + '.pth')"
    configs = CONFIGS / "train.json", CONFIGS / "multi_gpu_train.json", write(tmp_path / "a.json", {"+run": [saving]})
    knobs = {**bundle.knobs, "batch_size": 4, "shard": True, "dataset_dir": tmp_path / "set"}
    knobs |= {"cache_dir": tmp_path / "cache", "output_dir": tmp_path / "out", "max_epochs": 2}
    result = two_processes(*configs, cwd=tmp_path, **knobs)
    assert result.returncode == 0, result.stderr[-3000:]
    (first, steps), (second, same_steps) = (torch.load(tmp_path / "out" / f"rank{rank}.pth") for rank in (0, 1))
    assert (len(first), len(second)) == (12, 11)  # of 23
    assert not {*first} & {*second}
    assert steps == same_steps == 4
    assert checkpoint(tmp_path / "out", 2)["settings"]["num_images"] == 11
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 23


def test_volumes_are_pretrained_on_judged_and_embedded(bundle: Recipe, tmp_path: Path) -> None:
    rng, items = np.random.default_rng(0), {}
    for split, count in (("training", 8), ("validation", 4), ("test", 4)):
        names = [f"{split}{index}.{('nii.gz', 'mha')[index % 2]}" for index in range(count)]
        for name in names:
            sitk.WriteImage(sitk.GetImageFromArray(rng.normal(size=(20, 24, 22)).astype(np.float32)), tmp_path / name)
        items[split] = [{"image": name, "label": [index // 2 % 2]} for index, name in enumerate(names)]
    write(tmp_path / "dataset.json", items)
    out = tmp_path / "out"
    bundle.train(out, dataset_dir=tmp_path, spatial_dims=3, batch_size=4)
    shared = {"dataset_dir": tmp_path, "pretrained": out / "models" / "model.pt"}
    bundle.run("evaluate", out, num_samples=5, **shared)
    bundle.run("inference", out, output_format="npz", codes=True, **shared)
    with np.load(out / "eval" / "embeddings.npz") as file:
        assert file["embedding"].shape == (16, WIDTH)
        assert file["codes_stage2"].shape == (16, 4, 4, 4)


def test_folders_of_mixed_formats_without_labels_are_enough(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    (folder / "nested").mkdir(parents=True)
    for index in range(2):
        pixels = (rng.random((40, 36)) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
        Image.fromarray(pixels).save(folder / "nested" / f"{index}.png")
        sitk.WriteImage(sitk.GetImageFromArray(pixels[None].astype(np.int16)), folder / "nested" / f"{index}.dcm")
        sitk.WriteImage(sitk.GetImageFromArray(pixels.astype(np.float32)), folder / f"{index}.nii.gz")
    bundle.train(tmp_path / "out", dataset_dir=[str(dataset_dir), str(folder)])
    assert checkpoint(tmp_path / "out", 1)["settings"]["num_images"] == 24 + 8


def test_evaluation_writes_metrics_per_finding_with_intervals(bundle: Recipe, tmp_path: Path) -> None:
    bundle.run("evaluate", tmp_path, num_samples=20, shortcut="view")
    rows = table(tmp_path / "eval" / "findings.csv")
    assert {row["source"] for row in rows} == {"pretrained", "random", "pixels"}
    assert {row["probe"] for row in rows} == {"linear", "knn"}
    assert all(float(row["auroc_low"]) <= float(row["auroc"]) <= float(row["auroc_high"]) for row in rows)
    assert 0 <= metrics_of(tmp_path)["pretrained_last_linear_auroc_macro"] <= 1


def test_evaluation_leaves_out_what_it_cannot_read(bundle: Recipe, dataset_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(dataset_dir, folder)
    for split in ("training", "test"):
        broken = sorted((folder / "images").glob(f"{split}*.png"))[2]
        broken.write_bytes(broken.read_bytes()[:60])
    knobs = {"dataset_dir": folder, "num_samples": 5, "baselines": False}
    with refused("cannot"):
        bundle.run("evaluate", tmp_path, **knobs)
    bundle.run("evaluate", tmp_path, on_corrupt="skip", **knobs)
    with np.load(tmp_path / "eval" / "scores.npz") as file:
        assert len(file["labels/findings"]) == 15


def test_inference_writes_one_embedding_per_image_with_or_without_codes(bundle: Recipe, tmp_path: Path) -> None:
    bundle.run("inference", tmp_path, output_format="csv")
    rows = table(tmp_path / "eval" / "embeddings.csv")
    embeddings = [[float(value) for name, value in row.items() if name not in ("image", "error")] for row in rows]
    assert np.shape(embeddings) == (56, WIDTH)
    found = []
    for batch_size in (16, 40):
        bundle.run("inference", tmp_path, output_format="npz", codes=True, batch_size=batch_size)
        with np.load(tmp_path / "eval" / "embeddings.npz") as file:
            np.testing.assert_allclose(file["embedding"], embeddings, rtol=1e-4, atol=1e-4)
            found.append(file["codes_stage2"])
            histograms = [np.bincount(each.ravel(), minlength=16) for each in file["codes_stage2"]]
            np.testing.assert_array_equal(file["histogram_stage2"], histograms)
    assert found[0].shape == (56, 4, 4)
    assert found[0].max() < 16
    assert (found[0] != found[1]).mean() < 0.01


@pytest.mark.slow
def test_the_first_command_pretrains_on_phantoms_and_raises_the_auroc(tmp_path: Path) -> None:
    def listing() -> set[str]:
        skipped = (".git", ".venv", "__pycache__", "runs", ".pytest_cache", ".mypy_cache", ".ruff_cache")
        return {str(path) for path in ROOT.rglob("*") if not any(part in skipped for part in path.parts)}

    before = listing()
    result = command_line(CONFIGS / "train.json", output_dir=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert listing() == before
    assert "Smoke run on generated phantoms" in result.stdout + result.stderr
    for name in ("knn_auroc/mean", "knn_auroc/stages"):
        untrained, *_, pretrained = (event.value for event in events_of(tmp_path).Scalars(name))
        assert pretrained > untrained + 0.015
    assert command_line(CONFIGS / "evaluate.json", output_dir=tmp_path).returncode == 0
    rows = {tuple(row.values())[:4]: row for row in table(tmp_path / "eval" / "differences.csv")}
    assert float(rows["findings", "last", "knn", "random"]["difference"]) > 0
    assert all(float(rows["findings", "stages", probe, "random"]["low"]) > 0 for probe in ("knn", "linear"))
