"""Every bundle is found, not listed: its files, its properties, its commands, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    STANDARD_CONFIGS,
    TINY,
    command_line,
    network_state,
    read,
    refused,
    run_config,
    two_processes,
    write,
)
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    load,
    onnx_export,
    run,
    verify_metadata,
    verify_net_in_out,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dissect_monai
from dissect_monai.handlers.checkpoints import newest_checkpoint

pytestmark = pytest.mark.usefixtures("_in_root")
BUNDLES = sorted(path for path in ROOT.glob("bundles/*") if path.is_dir())
CONFIGS = sorted(ROOT.glob("bundles/*/configs/*.json"))
OVERRIDES = [path for path in CONFIGS if path.stem not in STANDARD_CONFIGS]
PRETRAIN = ROOT / "bundles" / "pretrain_vq_ssl" / "configs"
TINY = {**TINY, "hidden_dim": 32, "num_embeddings": 16, "embedding_dim": 16, "val_interval": 100}

every_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")


@pytest.fixture(scope="session")
def trained(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run of two epochs."""
    output_dir = tmp_path_factory.mktemp("trained")
    train(dataset_dir, output_dir, max_epochs=2, schedule_epochs=4, val_interval=2)
    return output_dir


def train(dataset_dir: Any, output_dir: Path, **knobs: Any) -> None:
    run_config(PRETRAIN / "train.json", **{**TINY, **knobs, "dataset_dir": dataset_dir, "output_dir": output_dir})


def targets(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from targets(value)


# ---- files -------------------------------------------------------------------------------------------------------


@every_bundle
def test_has_the_files_that_the_zoo_demands(bundle: Path) -> None:
    for name in (
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "docs/README.md",
        "docs/data_license.txt",
    ):
        assert (bundle / name).is_file(), name
    metadata = read(bundle / "configs" / "metadata.json")
    assert metadata["version"] in metadata["changelog"]


@every_config
def test_targets_of_ours_are_public(config: Path) -> None:
    parsed = read(config)
    ours = {name for name in targets(parsed) if name.startswith("dissect_monai.")}
    ours |= set(re.findall(r"dissect_monai\.\w+", config.read_text(encoding="utf-8")))
    for name in ours:
        assert hasattr(dissect_monai, name.removeprefix("dissect_monai.")), name


@every_config
def test_names_no_absolute_path(config: Path) -> None:
    text = config.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert "environ" not in text


def image_steps(preprocessing: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that change the images alone."""
    others = ("SelectItemsd", "dissect_monai.ForegroundIndicesd")
    return [step for step in preprocessing["transforms"] if step["keys"] == "image" and step["_target_"] not in others]


@every_bundle
def test_network_and_preprocessing_are_the_same_in_all_configs(bundle: Path) -> None:
    configs = {name: read(bundle / "configs" / f"{name}.json") for name in ("train", "evaluate", "inference")}
    networks = [config["network_def"] for config in configs.values()]
    assert networks[0] == networks[1] == networks[2]
    train, evaluate, inference = (
        image_steps(config.get("train", config)["preprocessing"]) for config in configs.values()
    )
    assert len(train) >= 4
    assert evaluate == train
    assert inference[: len(train)] == train


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_overrides_change_what_exists_or_use_what_they_add(override: Path) -> None:
    trained, text = ConfigParser(read(override.with_name("train.json"))), override.read_text(encoding="utf-8")
    for name in read(override):
        key = name.removeprefix("+")
        assert key in trained or f"@{key}" in text, name


def test_several_gpus_are_used_in_the_same_way_by_all_bundles() -> None:
    overrides = {path.read_bytes() for path in ROOT.glob("bundles/*/configs/multi_gpu_train.json")}
    assert len(overrides) == 1


# ---- MONAI's own checks ------------------------------------------------------------------------------------------


@every_bundle
@pytest.mark.parametrize(("config", "kind"), [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_no_required_property_is_missing(bundle: Path, config: str, kind: str, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        str(bundle / "configs" / f"{config}.json"), workflow_type=kind, logging_file=False, output_dir=str(tmp_path)
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@every_bundle
def test_metadata_and_network_pass_the_verify_commands(bundle: Path) -> None:
    configs = bundle / "configs"
    schema = ROOT / "tests" / "meta_schema_20240725.json"
    verify_metadata(meta_file=str(configs / "metadata.json"), filepath=str(schema))
    verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
    )


def test_exports_agree_with_the_network(trained: Path, tmp_path: Path) -> None:
    import onnxruntime

    files = {"meta_file": str(PRETRAIN / "metadata.json"), "config_file": str(PRETRAIN / "inference.json")}
    weights = str(trained / "models" / "model.pt")
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=weights, **files)
    onnx_export("network_def", filepath=str(tmp_path / "model.onnx"), ckpt_file=weights, **files)
    parser = ConfigParser()
    parser.read_config(files["config_file"])
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    images = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(images), expected, rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    exported = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(exported, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_load_takes_encoder_and_weights_of_the_run(trained: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "pretrain_vq_ssl"
    shutil.copytree(PRETRAIN, bundle / "configs")
    shutil.copytree(trained / "models", bundle / "models")
    settings = read(bundle / "models" / "model.json")
    assert settings["encoder"] == "resnet18"
    assert settings["image_size"] == 32
    saved = torch.load(bundle / "models" / "model.pt", weights_only=True)
    loaded = load("pretrain_vq_ssl", bundle_dir=str(tmp_path), source="monaihosting").state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


# ---- training ----------------------------------------------------------------------------------------------------


def test_training_leaves_weights_checkpoints_and_events_and_nothing_else(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["checkpoints", "eval", "models"]
    assert sorted(path.name for path in (trained / "models").iterdir()) == ["model.json", "model.pt"]
    parser = ConfigParser()
    parser.read_config(str(PRETRAIN / "train.json"))
    parser.get_parsed_content("network_def").load_state_dict(
        torch.load(trained / "models" / "model.pt", weights_only=True)
    )


def test_tensorboard_shows_terms_rates_codes_collapse_and_pictures(trained: Path) -> None:
    events = EventAccumulator(str(trained / "eval"), size_guidance={"images": 0})
    events.Reload()
    scalars, images = set(events.Tags()["scalars"]), set(events.Tags()["images"])
    assert {"loss/continuous", "loss/discrete", "loss/commitment", "loss/reconstruction", "loss/total"} <= scalars
    assert {"schedule/learning_rate", "schedule/target_momentum"} <= scalars
    assert {"collapse/effective_rank", "collapse/feature_std", "knn_auroc"} <= scalars
    assert any(name.startswith("codes/perplexity") for name in scalars)
    assert {"views", "reconstruction"} <= images
    assert any(name.startswith("codes") for name in images)


def test_writes_nothing_else_into_the_repository(dataset_dir: Path, tmp_path: Path) -> None:
    def listing() -> set[str]:
        skipped = (".git", ".venv", "__pycache__", "runs", ".pytest_cache", ".mypy_cache", ".ruff_cache")
        return {str(path) for path in ROOT.rglob("*") if not any(part in skipped for part in path.parts)}

    before = listing()
    result = command_line(PRETRAIN / "train.json", dataset_dir=dataset_dir, output_dir=tmp_path, **TINY)
    assert result.returncode == 0, result.stderr[-2000:]
    assert listing() == before


def test_two_epochs_and_two_more_are_bit_for_bit_four(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    resumed, straight = tmp_path / "resumed", tmp_path / "straight"
    shutil.copytree(trained, resumed)
    train(dataset_dir, resumed, max_epochs=4, resume=True)
    train(dataset_dir, straight, max_epochs=4)
    first, second = network_state(resumed / "checkpoints"), network_state(straight / "checkpoints")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"num_embeddings": 32}, r"of a run with num_embeddings 16 \(now 32\)"),
        ({"max_epochs": 6}, r"of a run with schedule_epochs 4 \(now 6\)"),
        ({"learning_rate": 0.5, "seed": 9}, r"learning_rate 0\.001 \(now 0\.5\), seed 0 \(now 9\)"),
        ({"reconstruction_weight": 0}, r"reconstruction_weight 1\.0 \(now 0\)"),
        ({"batch_size": 6}, r"iterations an epoch 3 \(now 4\), batch_size 8 \(now 6\)"),
        ({"max_epochs": 1, "schedule_epochs": 4}, "has done 2 epochs, more than --max_epochs 1"),
    ],
)
def test_refuses_to_resume_another_run(
    trained: Path, dataset_dir: Path, tmp_path: Path, knob: dict[str, Any], message: str
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    with refused(message):
        train(dataset_dir, tmp_path / "out", **{"max_epochs": 4, "resume": True, **knob})


def test_a_used_folder_is_not_overwritten(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    with refused("holds the checkpoints of another run: go on with it by --resume true"):
        train(dataset_dir, tmp_path / "out")
    assert (tmp_path / "out" / "checkpoints" / "checkpoint_epoch=2.pt").is_file()


def test_a_damaged_checkpoint_is_named_with_what_to_do(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    newest = Path(newest_checkpoint(tmp_path / "out" / "checkpoints"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with refused(r"checkpoint_epoch=2\.pt cannot be loaded, .* give an older one by --resume_from"):
        train(dataset_dir, tmp_path / "out", max_epochs=4, resume=True)


def test_an_output_that_cannot_be_written_is_refused_at_once(dataset_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("`--output_dir` must be a folder that can be written, got .*file"):
        train(dataset_dir, tmp_path / "file")


def test_a_killed_run_leaves_a_checkpoint_to_resume_from(dataset_dir: Path, tmp_path: Path) -> None:
    knobs = {**TINY, "max_epochs": 500, "dataset_dir": dataset_dir, "output_dir": tmp_path}
    arguments = [part for name, value in knobs.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(PRETRAIN / "train.json"), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("checkpoints/checkpoint_epoch=*.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = torch.load(newest_checkpoint(tmp_path / "checkpoints"), weights_only=True)["trainer"]["iteration"] // 3
    train(dataset_dir, tmp_path, max_epochs=last + 1, schedule_epochs=500, resume=True)
    assert (tmp_path / "checkpoints" / f"checkpoint_epoch={last + 1}.pt").is_file()


def test_byol_is_the_same_config_with_the_discrete_weights_at_zero(dataset_dir: Path, tmp_path: Path) -> None:
    train(dataset_dir, tmp_path, discrete_weight=0, commitment_weight=0, reconstruction_weight=0, continuous_weight=1)
    assert not any(key.startswith("decoder") for key in network_state(tmp_path / "checkpoints"))


@pytest.mark.parametrize(
    "knobs",
    [
        {"fusion": "concat", "metric": "euclidean"},
        {"stages": [4]},
        {"amp": "true", "device": "cpu"},  # as the command line gives them
        {"cache_dir": "$@output_dir + '/cache'", "num_workers": 2},
    ],
    ids=str,
)
def test_knobs_change_the_run(dataset_dir: Path, tmp_path: Path, knobs: dict[str, Any]) -> None:
    train(dataset_dir, tmp_path, **knobs)
    assert (tmp_path / "models" / "model.pt").is_file()


def test_a_compiled_run_leaves_the_plain_weights(dataset_dir: Path, tmp_path: Path) -> None:
    train(dataset_dir, tmp_path, compile=True, **{"train#trainer#compile_kwargs": {"backend": "eager"}})
    parser = ConfigParser()
    parser.read_config(str(PRETRAIN / "inference.json"))
    parser["pretrained"] = str(tmp_path / "models" / "model.pt")
    dissect_monai.load_weights(parser.get_parsed_content("network_def"), tmp_path / "models" / "model.pt")


def test_volumes_are_pretrained_on_judged_and_embedded(tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    rng, items = np.random.default_rng(0), {}
    for split, count in (("training", 8), ("validation", 4), ("test", 4)):
        names = [f"{split}{index}.{('nii.gz', 'mha')[index % 2]}" for index in range(count)]
        for name in names:
            sitk.WriteImage(sitk.GetImageFromArray(rng.normal(size=(20, 24, 22)).astype(np.float32)), tmp_path / name)
        items[split] = [{"image": name, "label": [index // 2 % 2]} for index, name in enumerate(names)]
    (tmp_path / "dataset.json").write_text(json.dumps(items), encoding="utf-8")
    out = tmp_path / "out"
    train(tmp_path, out, spatial_dims=3, encoder="resnet10", batch_size=4, val_interval=1)
    shared = {"dataset_dir": str(tmp_path), "output_dir": str(out), "num_workers": 0}
    run(config_file=str(PRETRAIN / "evaluate.json"), num_samples=5, **shared)
    run(config_file=str(PRETRAIN / "inference.json"), output_format="npz", codes=True, **shared)
    with np.load(out / "eval" / "embeddings.npz") as file:
        assert file["embedding"].shape == (16, 512)
        assert file["codes_stage2"].shape == (16, 4, 4, 4)


def test_a_folder_of_mixed_formats_is_enough(tmp_path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813
    from PIL import Image

    rng, folder = np.random.default_rng(0), tmp_path / "images"
    (folder / "nested").mkdir(parents=True)
    for index in range(4):
        pixels = (rng.random((40, 36)) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
        Image.fromarray(pixels).save(folder / "nested" / f"{index}.png")
        sitk.WriteImage(sitk.GetImageFromArray(pixels[None].astype(np.int16)), folder / "nested" / f"{index}.dcm")
        sitk.WriteImage(sitk.GetImageFromArray(pixels.astype(np.float32)), folder / f"{index}.nii.gz")
    train(folder, tmp_path / "out")
    assert (tmp_path / "out" / "models" / "model.pt").is_file()


def test_runs_with_the_overrides_of_monai_label(dataset_dir: Path, tmp_path: Path) -> None:
    images = [{"image": str(path)} for path in sorted((dataset_dir / "images").glob("training*.png"))]
    workflow = ConfigWorkflow(
        str(PRETRAIN / "train.json"),
        workflow_type="train",
        logging_file=False,
        **{**TINY, "device": "cpu", "output_dir": str(tmp_path), "dataset_dir": str(dataset_dir)},
        **{"train#dataset#data": images, "train#trainer#max_epochs": 1, "train#handlers": []},
    )
    workflow.initialize()
    workflow.run()
    assert len(workflow.parser.get_parsed_content("train#dataset")) == 24
    assert workflow.parser.get_parsed_content("network") is not None


def test_pretrained_weights_start_the_encoder(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    weights = trained / "models" / "model.pt"
    train(dataset_dir, tmp_path, pretrained=weights, learning_rate=1e-12, weight_decay=0)
    before, after = (torch.load(path, weights_only=True) for path in (weights, tmp_path / "models" / "model.pt"))
    torch.testing.assert_close(after["conv1.weight"], before["conv1.weight"])


def test_two_processes_hold_one_network_and_can_be_resumed(dataset_dir: Path, tmp_path: Path) -> None:
    saving = "$torch.save(@ssl_network.state_dict(), @output_dir + '/rank' + str(@rank) + '.pth')"
    configs = PRETRAIN / "train.json", PRETRAIN / "multi_gpu_train.json", write(tmp_path / "a.json", {"+run": [saving]})
    knobs = {**TINY, "batch_size": 4, "schedule_epochs": 3, "dataset_dir": dataset_dir, "output_dir": tmp_path / "out"}
    result = two_processes(*configs, cwd=tmp_path, **{**knobs, "max_epochs": 2})
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / "out" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    # Running statistics of BatchNorm are each rank's own until DDP hands out those of rank 0 at the next step.
    assert all("running_" in key for key in differing), differing
    assert len(list(tmp_path.glob("out/eval/events*"))) == 1
    resumed = two_processes(*configs, cwd=tmp_path, **{**knobs, "max_epochs": 3, "resume": True})
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoints" / "checkpoint_epoch=3.pt").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "out"}  # other ranks write nothing


def test_shards_are_read_by_one_process_each(dataset_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"  # of 23 images: the processes have 12 and 11
    shutil.copytree(dataset_dir, folder)
    datalist = read(dataset_dir / "dataset.json")
    write(folder / "dataset.json", {**datalist, "training": datalist["training"][1:]})
    facts = "[sorted(item['image'] for item in @train#dataset.data), @train#trainer.state.iteration]"
    saving = f"$torch.save({facts}, @output_dir + '/rank' + str(@rank) + '.pth')"
    configs = PRETRAIN / "train.json", PRETRAIN / "multi_gpu_train.json", write(tmp_path / "a.json", {"+run": [saving]})
    knobs = {**TINY, "batch_size": 4, "schedule_epochs": 2, "shard": True, "dataset_dir": folder}
    knobs |= {"cache_dir": tmp_path / "cache", "output_dir": tmp_path / "out"}
    for epochs, resume in ((1, "false"), (2, "auto")):
        result = two_processes(*configs, cwd=tmp_path, **{**knobs, "max_epochs": epochs, "resume": resume})
        assert result.returncode == 0, result.stderr[-3000:]
    (first, steps), (second, same_steps) = (torch.load(tmp_path / "out" / f"rank{rank}.pth") for rank in (0, 1))
    assert (len(first), len(second)) == (12, 11)
    assert not {*first} & {*second}
    assert steps == same_steps == 4
    saved = torch.load(newest_checkpoint(tmp_path / "out" / "checkpoints"), weights_only=True)
    assert saved["settings"]["num_images"] == 11
    assert len(list((tmp_path / "cache").glob("*.pt"))) >= 23


# ---- evaluation and inference ------------------------------------------------------------------------------------


def test_evaluation_writes_metrics_per_finding_with_intervals(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    run(
        config_file=str(PRETRAIN / "evaluate.json"),
        dataset_dir=str(dataset_dir),
        output_dir=str(tmp_path),
        pretrained=str(trained / "models" / "model.pt"),
        num_samples=20,
        num_workers=0,
        shortcut="view",
    )
    with open(tmp_path / "eval" / "findings.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} == {"pretrained", "random", "pixels"}
    assert {row["probe"] for row in rows} == {"linear", "knn"}
    assert all(float(row["auroc_low"]) <= float(row["auroc"]) <= float(row["auroc_high"]) for row in rows)
    metrics = dict(line.split(",") for line in (tmp_path / "eval" / "metrics.csv").read_text().splitlines())
    assert 0 <= float(metrics["pretrained_last_linear_auroc_macro"]) <= 1


@pytest.mark.parametrize(("output_format", "codes"), [("csv", False), ("npz", True)])
def test_inference_writes_one_embedding_per_image(
    trained: Path, dataset_dir: Path, tmp_path: Path, output_format: str, codes: bool
) -> None:
    run(
        config_file=str(PRETRAIN / "inference.json"),
        dataset_dir=str(dataset_dir),
        output_dir=str(tmp_path),
        pretrained=str(trained / "models" / "model.pt"),
        checkpoint=newest_checkpoint(trained / "checkpoints"),
        num_workers=0,
        output_format=output_format,
        codes=codes,
    )
    path = tmp_path / "eval" / f"embeddings.{output_format}"
    if output_format == "csv":
        rows = list(csv.reader(path.open(encoding="utf-8")))
        assert len(rows) == 1 + 56
        assert len(rows[0]) == 2 + 512
        return
    with np.load(path) as file:
        assert file["embedding"].shape == (56, 512)
        assert file["codes_stage2"].shape == (56, 4, 4)
        assert file["codes_stage2"].max() < 16


def test_evaluation_leaves_out_what_it_cannot_read(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(dataset_dir, folder)
    for split in ("training", "test"):
        broken = sorted((folder / "images").glob(f"{split}*.png"))[2]
        broken.write_bytes(broken.read_bytes()[:60])
    knobs = {"dataset_dir": str(folder), "output_dir": str(tmp_path), "num_workers": 0, "num_samples": 5}
    knobs |= {"pretrained": str(trained / "models" / "model.pt"), "baselines": False}
    with refused("cannot"):
        run(config_file=str(PRETRAIN / "evaluate.json"), **knobs)
    run(config_file=str(PRETRAIN / "evaluate.json"), on_corrupt="skip", **knobs)
    with np.load(tmp_path / "eval" / "scores.npz") as file:
        assert len(file["labels/findings"]) == 15


def test_inference_names_what_it_cannot_read_and_does_the_rest(
    trained: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset_dir / "images", tmp_path / "images")
    broken = sorted((tmp_path / "images").glob("*.png"))[5]
    broken.write_bytes(b"broken")
    knobs = {"dataset_dir": tmp_path / "images", "output_dir": tmp_path, "num_workers": 0}
    result = command_line(PRETRAIN / "inference.json", pretrained=trained / "models" / "model.pt", **knobs)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: 1 of 56 images could not be read")
    rows = list(csv.reader((tmp_path / "eval" / "embeddings.csv").open(encoding="utf-8")))
    assert len(rows) == 1 + 56
    assert [row[0] for row in rows[1:] if row[1]] == [str(broken)]
    assert {len(row) for row in rows} == {2, 2 + 512}


@pytest.mark.slow
def test_the_first_command_pretrains_on_phantoms_and_raises_the_auroc(tmp_path: Path) -> None:
    shared = {"output_dir": tmp_path}
    result = command_line(PRETRAIN / "train.json", **shared)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Smoke run on generated phantoms" in result.stdout + result.stderr
    events = EventAccumulator(str(tmp_path / "eval"))
    events.Reload()
    for name in ("knn_auroc", "knn_auroc_stages"):
        untrained, *_, pretrained = (event.value for event in events.Scalars(name))
        assert pretrained > untrained + 0.015
    assert command_line(PRETRAIN / "evaluate.json", **shared).returncode == 0
    with open(tmp_path / "eval" / "differences.csv", encoding="utf-8") as file:
        rows = {(row["task"], row["features"], row["probe"], row["baseline"]): row for row in csv.DictReader(file)}
    assert float(rows["findings", "last", "knn", "random"]["difference"]) > 0
    assert all(float(rows["findings", "stages", probe, "random"]["low"]) > 0 for probe in ("knn", "linear"))


# ---- where it runs from, and bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["root", "bundle", "elsewhere"])
def test_finds_itself_from_any_directory(place: str, tmp_path: Path) -> None:
    cwd = {"root": ROOT, "bundle": PRETRAIN.parent, "elsewhere": tmp_path}[place]
    config = {"root": PRETRAIN.relative_to(ROOT), "bundle": Path("configs"), "elsewhere": PRETRAIN}[place]
    result = command_line(
        config / "train.json",
        cwd=cwd,
        dataset_dir=tmp_path / "missing",
        run="['$print(chr(10) + str(@bundle_root))']",
        finalize="[]",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (cwd / result.stdout.splitlines()[-1] / "configs" / "metadata.json").samefile(PRETRAIN / "metadata.json")


def _dataset(folder: Path, text: str | None = None, **splits: Any) -> Path:
    folder.mkdir()
    (folder / "dataset.json").write_text(text if text is not None else json.dumps(splits), encoding="utf-8")
    for items in splits.values():
        for item in items:
            if item["image"] != "gone.png":
                from PIL import Image

                Image.fromarray(np.full((32, 32), 128, np.uint8)).save(folder / item["image"])
    return folder


def bad_inputs(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    empty = tmp_path / "empty"
    empty.mkdir()
    same = [{"image": "a.png", "subject": "7"}], [{"image": "b.png", "subject": "7"}]
    return {
        "missing folder": (tmp_path / "nowhere", "nowhere"),
        "empty folder": (empty, "empty"),
        "broken json": (_dataset(tmp_path / "broken", text="{"), r"dataset\.json"),
        "missing file": (_dataset(tmp_path / "lacks", training=[{"image": "gone.png"}]), r"gone\.png"),
        "leaking subject": (_dataset(tmp_path / "leaks", training=same[0], validation=same[1]), "7"),
    }


@pytest.mark.parametrize("case", ["missing folder", "empty folder", "broken json", "missing file", "leaking subject"])
def test_refuses_bad_data_before_training(case: str, tmp_path: Path) -> None:
    dataset_dir, message = bad_inputs(tmp_path)[case]
    with refused(message):
        train(dataset_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"max_epoch": 3}, "--max_epoch .*max_epochs"),
        ({"train#trainer#max_epoch": 3}, "max_epochs"),
        ({"resume": True}, "checkpoint"),
        ({"resume": "maybe"}, "true or false"),
        ({"pretrained": "nowhere.pt"}, r"nowhere\.pt"),
        ({"batch_size": 4096}, "4096"),
        ({"max_epochs": 4, "schedule_epochs": 2}, "`--schedule_epochs` must be at least --max_epochs, got 2 and 4"),
        ({"warmup_epochs": 1}, "`--warmup_epochs` must be fewer than the 1 of the schedule, got 1"),
        ({"train#augment#rotatio": 5}, "train#augment#rotation"),
        ({"train#augment#rotation": "lots"}, r"`rotation` must be a number in \[0, 180\], got 'lots'"),
        ({"train#handlers#0#sead": 1}, "train#handlers#0#seed"),
        ({"network_def#conv1_t_strid": 1}, "network_def#conv1_t_stride"),
    ],
)
def test_refuses_bad_knobs_before_training(
    dataset_dir: Path, tmp_path: Path, knob: dict[str, Any], message: str
) -> None:
    with refused(message):
        train(dataset_dir, tmp_path / "out", **knob)
    assert not (tmp_path / "out" / "models").exists()


def test_bad_input_ends_with_one_line_and_a_status(tmp_path: Path) -> None:
    result = command_line(PRETRAIN / "train.json", dataset_dir=tmp_path / "nowhere", output_dir=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_a_corrupt_image_is_fatal_by_default_and_skipped_by_a_knob(dataset_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(dataset_dir / "images", folder)
    broken = sorted(folder.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    with refused(re.escape(broken.name)):
        train(folder, tmp_path / "fatal")
    train(folder, tmp_path / "skipped", on_corrupt="skip")
    assert (tmp_path / "skipped" / "models" / "model.pt").is_file()


def test_trains_on_a_list_of_folders_without_labels(dataset_dir: Path, tmp_path: Path) -> None:
    nested = tmp_path / "more" / "deeper"
    shutil.copytree(dataset_dir / "images", nested)
    train([str(dataset_dir), str(tmp_path / "more")], tmp_path / "out", batch_size=16)
    assert (tmp_path / "out" / "models" / "model.pt").is_file()
