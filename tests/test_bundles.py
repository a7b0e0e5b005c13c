"""Every bundle is found, not listed: its files, its properties, its commands, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import os
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
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, onnx_export, run, verify_metadata, verify_net_in_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dissect_monai
from dissect_monai.handlers import newest_checkpoint
from dissect_monai.synthetic import write_xray_phantoms

ROOT = Path(__file__).resolve().parent.parent
BUNDLES = sorted(path for path in ROOT.glob("bundles/*") if path.is_dir())
CONFIGS = sorted(ROOT.glob("bundles/*/configs/*.json"))
PRETRAIN = ROOT / "bundles" / "pretrain_vq_ssl" / "configs"
TINY = {
    "encoder": "resnet18",
    "image_size": 32,
    "batch_size": 8,
    "hidden_dim": 32,
    "num_embeddings": 16,
    "embedding_dim": 16,
    "max_epochs": 1,
    "warmup_epochs": 0,
    "num_workers": 0,
    "log_interval": 1,
    "amp": False,
    "val_interval": 100,
}

every_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xray_phantoms(tmp_path_factory.mktemp("phantoms") / "set", 24, 16, 16, image_size=32)


@pytest.fixture(scope="session")
def trained(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run of two epochs."""
    output_dir = tmp_path_factory.mktemp("trained")
    train(dataset_dir, output_dir, max_epochs=2, schedule_epochs=4, val_interval=2)
    return output_dir


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def train(dataset_dir: Any, output_dir: Path, **knobs: Any) -> None:
    given = {**TINY, **knobs, "dataset_dir": dataset_dir, "output_dir": output_dir}
    run(config_file=str(PRETRAIN / "train.json"), **{name: _plain(value) for name, value in given.items()})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def command_line(config: str | Path, cwd: Path = ROOT, launcher: tuple[str, ...] = (), **knobs: Any) -> Any:
    arguments = [part for name, value in knobs.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, *(launcher or ("-m",)), "monai.bundle", "run", "--config_file", str(config), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, env=environment)


def targets(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from targets(value)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def network_state(ckpt_dir: Path) -> dict[str, Any]:
    return torch.load(newest_checkpoint(ckpt_dir), weights_only=True)["network"]


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


@every_bundle
def test_network_and_preprocessing_are_the_same_in_all_configs(bundle: Path) -> None:
    configs = {name: read(bundle / "configs" / f"{name}.json") for name in ("train", "evaluate", "inference")}
    networks = [config["network_def"] for config in configs.values()]
    assert networks[0] == networks[1] == networks[2]
    steps = configs["train"]["train"]["preprocessing"]["transforms"]
    for name in ("evaluate", "inference"):
        assert configs[name]["preprocessing"]["transforms"][: len(steps)] == steps


@every_bundle
def test_overrides_change_what_exists_or_use_what_they_add(bundle: Path) -> None:
    train_ids, override = read(bundle / "configs" / "train.json"), read(bundle / "configs" / "multi_gpu_train.json")
    for name in override:
        key = name.removeprefix("+")
        assert key in train_ids or f"@{key}" in json.dumps(override), name


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


# ---- training ----------------------------------------------------------------------------------------------------


def test_training_leaves_weights_checkpoints_and_events_and_nothing_else(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["checkpoints", "eval", "models"]
    assert [path.name for path in (trained / "models").iterdir()] == ["model.pt"]
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
    train(dataset_dir, tmp_path, max_epochs=last + 1, resume=True)
    assert (tmp_path / "checkpoints" / f"checkpoint_epoch={last + 1}.pt").is_file()


def test_byol_is_the_same_config_with_the_discrete_weights_at_zero(dataset_dir: Path, tmp_path: Path) -> None:
    train(dataset_dir, tmp_path, discrete_weight=0, commitment_weight=0, reconstruction_weight=0, continuous_weight=1)
    assert not any(key.startswith("decoder") for key in network_state(tmp_path / "checkpoints"))


@pytest.mark.parametrize(
    "knobs", [{"fusion": "concat", "metric": "euclidean"}, {"optimizer_name": "lars", "stages": [4]}]
)
def test_knobs_change_the_run(dataset_dir: Path, tmp_path: Path, knobs: dict[str, Any]) -> None:
    train(dataset_dir, tmp_path, **knobs)
    assert (tmp_path / "models" / "model.pt").is_file()


def test_pretrained_weights_start_the_encoder(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    weights = trained / "models" / "model.pt"
    train(dataset_dir, tmp_path, pretrained=weights, learning_rate=1e-12, weight_decay=0)
    before, after = (torch.load(path, weights_only=True) for path in (weights, tmp_path / "models" / "model.pt"))
    torch.testing.assert_close(after["conv1.weight"], before["conv1.weight"])


def test_two_processes_hold_one_network(dataset_dir: Path, tmp_path: Path) -> None:
    saved = "$torch.save(@ssl_network.state_dict(), @output_dir + '/rank' + str(@rank) + '.pth')"
    result = command_line(
        f"['{PRETRAIN / 'train.json'}','{PRETRAIN / 'multi_gpu_train.json'}']",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"),
        **{**TINY, "batch_size": 4, "max_epochs": 2},
        dataset_dir=dataset_dir,
        output_dir=tmp_path,
        finalize=json.dumps([saved, "$dist.destroy_process_group()"]),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    # Running statistics of BatchNorm are each rank's own until DDP hands out those of rank 0 at the next step.
    assert all("running_" in key for key in differing), differing
    assert len(list(tmp_path.glob("eval/events*"))) == 1


# ---- evaluation and inference ------------------------------------------------------------------------------------


def test_evaluation_writes_metrics_per_finding_with_intervals(trained: Path, dataset_dir: Path, tmp_path: Path) -> None:
    run(
        config_file=str(PRETRAIN / "evaluate.json"),
        dataset_dir=str(dataset_dir),
        output_dir=str(tmp_path),
        pretrained=str(trained / "models" / "model.pt"),
        encoder="resnet18",
        image_size=32,
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
        encoder="resnet18",
        image_size=32,
        num_workers=0,
        output_format=output_format,
        codes=codes,
    )
    path = tmp_path / "eval" / f"embeddings.{output_format}"
    if output_format == "csv":
        rows = list(csv.reader(path.open(encoding="utf-8")))
        assert len(rows) == 1 + 56
        assert len(rows[0]) == 1 + 512
        return
    with np.load(path) as file:
        assert file["embedding"].shape == (56, 512)
        assert file["codes_stage2"].shape == (56, 4, 4)
        assert file["codes_stage2"].max() < 16


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
    with pytest.raises(SystemExit, match=message) as stop:
        train(dataset_dir, tmp_path / "out")
    assert "\n" not in str(stop.value)
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
    ],
)
def test_refuses_bad_knobs_before_training(
    dataset_dir: Path, tmp_path: Path, knob: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
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
    with pytest.raises(SystemExit, match=broken.name):
        train(folder, tmp_path / "fatal")
    train(folder, tmp_path / "skipped", on_corrupt="skip")
    assert (tmp_path / "skipped" / "models" / "model.pt").is_file()


def test_trains_on_a_list_of_folders_without_labels(dataset_dir: Path, tmp_path: Path) -> None:
    nested = tmp_path / "more" / "deeper"
    shutil.copytree(dataset_dir / "images", nested)
    train([str(dataset_dir), str(tmp_path / "more")], tmp_path / "out", batch_size=16)
    assert (tmp_path / "out" / "models" / "model.pt").is_file()
