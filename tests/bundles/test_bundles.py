"""Every bundle, and every recipe of it, is found and not listed: its files, and the life of its trainings."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    BUNDLES,
    ROOT,
    STANDARD_CONFIGS,
    Recipe,
    Recipes,
    checkpoint,
    command_line,
    events_of,
    read,
    refused,
    run_config,
    same,
    settings,
    table,
    tags_of,
    two_processes,
    weights,
    write,
)
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export
from monai.utils import ensure_tuple

import dissect_monai

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = sorted(ROOT.glob("bundles/*/configs/*.json"))
OVERRIDES = [path for path in CONFIGS if path.stem not in STANDARD_CONFIGS]

every_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def targets(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from targets(value)


@every_config
def test_names_what_is_public_and_no_absolute_path(config: Path) -> None:
    assert config.read_bytes().isascii()  # MONAI reads it in the encoding of the machine
    text = config.read_text(encoding="utf-8")
    ours = {name for name in targets(read(config)) if name.startswith("dissect_monai.")}
    for name in ours | set(re.findall(r"dissect_monai\.\w+", text)):
        assert attrgetter(name.removeprefix("dissect_monai."))(dissect_monai), name
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
    for network in networks:
        network.pop("out_channels", None)  # training counts the classes of its data, the others those of the weights
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


def test_no_property_that_monai_requires_is_missing(recipe: Recipe, tmp_path: Path) -> None:
    workflows = [(recipe.configs, "train", recipe.knobs)]
    if len(recipe.configs) == 1:
        judge = {"dataset_dir": recipe.knobs["dataset_dir"], "pretrained": str(recipe.model)}
        workflows.append(([recipe.configs[0].with_name("evaluate.json")], "infer", judge))
    for configs, kind, knobs in workflows:
        files = [str(config) for config in configs]
        workflow = ConfigWorkflow(files, workflow_type=kind, logging_file=False, output_dir=str(tmp_path), **knobs)
        workflow.initialize()
        assert workflow.check_properties() == []


def left_by(recipe: Recipe, *others: str) -> list[str]:
    codes = ["codes"] if "num_embeddings" in recipe.knobs else []
    return sorted(["checkpoints", *codes, "eval", "models", *others])


def test_training_leaves_weights_checkpoints_and_events_and_nothing_else(recipe: Recipe) -> None:
    folder = recipe.finished
    assert names(folder) == left_by(recipe)
    assert names(folder / "models") == ["model.json", "model.pt"]
    assert names(folder / "checkpoints") == [f"checkpoint_epoch={epoch}.pt" for epoch in (1, 2)]
    assert [name.split(".")[-1] for name in names(folder / "eval") if "tfevents" not in name] in ([], ["csv"])
    said = settings(folder)
    own = {name: value for name, value in recipe.knobs.items() if name in said}
    assert {name: said[name] for name in own} == own
    assert {"encoder", "patch_size"} & {*own}


SHOWN = {  # in TensorBoard
    "cxr_classify": "loss/train auroc/mean ap/mean ece/mean auroc/cysts ap/cysts ece/cysts",
    "hssl_multidomain": "loss/image loss/task loss/group loss/classification loss/reconstruction loss/total "
    "retrieval/image retrieval/task retrieval/group batch/retrieval_image batch/retrieval_task batch/retrieval_group "
    "accuracy/task accuracy/group reconstruction_error/mean reconstruction_error/head_mr shortcut/task "
    "shortcut/task_intensity shortcut/within_group validation/collapse_effective_rank "
    "validation/collapse_centroid_similarity "
    "collapse/feature_std views",
    "pretrain_vq_ssl": "loss/continuous loss/discrete loss/commitment loss/reconstruction loss/total knn_auroc/mean "
    "schedule/learning_rate gradient/discrete collapse/effective_rank collapse/feature_std codes/perplexity_stage2 "
    "views reconstruction codes_of_stages_2_3_4",
    "pretrain_vq_ssl_volumes": "loss/continuous loss/discrete loss/commitment loss/reconstruction views reconstruction "
    "codes/perplexity_stage2 codes/usage_stage3 codes_of_stages_2_3 collapse/target_std",
    "seg_finetune_btcv": "loss/train validation/missed validation/false_positives dice/mean "
    "surface_dice/mean dice/spleen dice/left_kidney",
}


def test_tensorboard_shows_terms_scores_and_pictures(recipe: Recipe) -> None:
    tags = tags_of(recipe.finished)
    assert {*SHOWN[recipe.name].split()} <= tags
    assert all("/" in tag for tag in events_of(recipe.finished).Tags()["scalars"])  # each in a group
    assert "knn_auroc/mean" not in tags or recipe.name == "pretrain_vq_ssl"  # volumes have no labels


def test_an_epoch_and_one_more_are_bit_for_bit_two(recipe: Recipe, tmp_path: Path) -> None:
    recipe.train(tmp_path, max_epochs=1, schedule_epochs=2)
    recipe.train(tmp_path, max_epochs=2, resume=True)
    assert same(checkpoint(tmp_path, 2), checkpoint(recipe.finished, 2))
    assert same(weights(tmp_path), weights(recipe.finished))
    assert settings(tmp_path) == settings(recipe.finished)


def test_cache_loaders_and_compiler_do_not_change_the_weights(recipe: Recipe, tmp_path: Path) -> None:
    compiled = {"compile": True, "train#trainer#compile_kwargs": {"backend": "eager"}, "num_workers": 2}
    evaluated = len(recipe.configs) == 1 and "cache_dir" in read(recipe.bundle / "configs" / "evaluate.json")
    cache, found = tmp_path / "cache", []
    for name, knobs in (("first", compiled), ("second", {})):
        out = tmp_path / name
        recipe.train(out, max_epochs=1, schedule_epochs=2, cache_dir=cache, **knobs)
        assert same(checkpoint(out, 1)["network"], checkpoint(recipe.finished, 1)["network"])
        assert weights(out).keys() == weights(recipe.finished).keys()
        if evaluated:
            recipe.run("evaluate", out, num_samples=2, cache_dir=cache)
        found.append({path: path.stat().st_mtime_ns for path in cache.iterdir()})
    assert found[0] == found[1] != {}  # the second has found all images in the cache


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("pretrain_vq_ssl", {"fusion": "concat", "metric": "euclidean"}),
        ("pretrain_vq_ssl", {"stages": [4], "amp": "true", "device": "cpu"}),  # as the command line gives them
        ("pretrain_vq_ssl_volumes", {"spatial_dims": 2, "pixdim": [12, 12], "patch_size": [16, 16]}),
        ("pretrain_vq_ssl_volumes", {"blocks_down": [1, 1], "stages": [1, 2], "fusion": "attention"}),
        ("pretrain_vq_ssl_volumes", {"blocks_down": [1] * 5, "stages": [5], "discrete_weight": 0}),
        ("hssl_multidomain", {"dense_weight": 1.0, "mask_fraction": 0}),
        ("hssl_multidomain", {f"{name}_weight": 0 for name in ("image", "task", "group", "classification")}),
        ("hssl_multidomain", {"amp": "true"}),
        ("seg_finetune_btcv", {"train#patches#transforms#4#_disabled_": False}),  # mirrors
        ("seg_finetune_btcv", {"amp": "true", "device": "cpu", "ce_weight": 0}),
    ],
    ids=str,
)
def test_knobs_change_the_run(recipe_of: Recipes, tmp_path: Path, name: str, knobs: dict[str, Any]) -> None:
    recipe = recipe_of(name)
    recipe.train(tmp_path, max_epochs=1, schedule_epochs=2, **knobs)
    found, plain = (checkpoint(folder, 1)["network"] for folder in (tmp_path, recipe.finished))
    assert all(value.isfinite().all() for value in found.values())
    assert not same(found, plain)
    if "blocks_down" not in knobs:
        assert weights(tmp_path).keys() == weights(recipe.finished).keys()


def test_refuses_to_go_on_with_another_run(recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(recipe.finished, tmp_path, dirs_exist_ok=True)
    with refused(r"holds the checkpoints of another run: go on with it \(`--resume` true\)"):
        recipe.train(tmp_path)
    with refused(r"seed 0 \(now 9\).*learning_rate 0\.01 \(now 0\.5\)"):
        recipe.train(tmp_path, resume=True, max_epochs=2, seed=9, learning_rate=0.5)
    other = {"train#sampler#seed": 5} if "pixdim" in recipe.knobs else {"train#augment#rotation": 77}
    with refused(rf"of a run with {next(iter(other))} .* \(now {next(iter(other.values()))}\)"):
        recipe.train(tmp_path, resume=True, max_epochs=2, **other)
    newest = tmp_path / "checkpoints" / "checkpoint_epoch=2.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with refused(r"checkpoint_epoch=2\.pt cannot be loaded, .* give an older one as .*resume_from"):
        recipe.train(tmp_path, resume=True, max_epochs=2)
    assert same(weights(tmp_path), weights(recipe.finished))


def test_the_same_images_under_another_name_go_on_and_others_do_not(recipe: Recipe, tmp_path: Path) -> None:
    given = recipe.knobs["dataset_dir"]
    shutil.copytree(recipe.finished, tmp_path / "out")
    moved = [shutil.copytree(each, tmp_path / f"moved_{Path(each).name}") for each in ensure_tuple(given)]
    recipe.train(tmp_path / "out", dataset_dir=[*map(str, moved)], resume=True, max_epochs=2)
    assert settings(tmp_path / "out") == settings(recipe.finished)
    first, second, *_ = read(moved[0] / "dataset.json")["training"]
    for key in ("image", "label"):
        if isinstance(first.get(key), str):
            shutil.copy(moved[0] / first[key], moved[0] / second[key])
    with refused(r"is of a run with data \w+ \(now \w+\)(, validation_data .*)?: resume with the same"):
        recipe.train(tmp_path / "out", dataset_dir=[*map(str, moved)], resume=True, max_epochs=2)


def test_a_finished_run_is_extended_as_its_refusal_says_and_restores_its_weights(
    recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(recipe.finished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "models").iterdir():
        path.unlink()
    recipe.train(tmp_path, resume=True, max_epochs=2, num_workers=1, val_interval=2)
    assert same(weights(tmp_path), weights(recipe.finished))
    assert settings(tmp_path) == settings(recipe.finished)
    longer = r"To train longer, add --schedule_epochs 3, over which the learning rate is laid out then"
    with refused(rf"of a run with schedule_epochs 2 \(now 3\): .* {longer}"):
        recipe.train(tmp_path, resume=True, max_epochs=3)
    recipe.train(tmp_path, resume=True, max_epochs=3, schedule_epochs=3)
    assert names(tmp_path / "checkpoints") == [f"checkpoint_epoch={epoch}.pt" for epoch in (2, 3)]
    assert settings(tmp_path) == {**settings(recipe.finished), "schedule_epochs": 3}


@pytest.mark.parametrize("name", ["cxr_classify", "seg_finetune_btcv"])
def test_other_labels_of_the_same_images_are_another_run(name: str, recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    shutil.copytree(recipe.finished, tmp_path / "out")
    data = shutil.copytree(recipe.knobs["dataset_dir"], tmp_path / "data")
    spec = read(data / "dataset.json")
    for item in spec["training"][1:]:
        if isinstance(item["label"], str):
            drawn = nibabel.load(data / item["label"])
            voxels = np.array(drawn.dataobj)
            voxels[: len(voxels) // 2] = 0
            nibabel.save(nibabel.Nifti1Image(voxels, drawn.affine), data / item["label"])
        else:
            item["label"] = [1 - value for value in item["label"]]
    write(data / "dataset.json", spec)
    with refused(r"is of a run with data \w+ \(now \w+\)"):
        recipe.train(tmp_path / "out", dataset_dir=data, resume=True, max_epochs=2)


@every_bundle
def test_no_class_that_weights_name_is_imported(
    bundle: Path, recipe_of: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(bundle.name)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    model = tmp_path / "models" / "model.pt"
    shutil.copytree(recipe.model.parent, model.parent)
    write(model.with_suffix(".json"), {**settings(recipe.finished), "encoder": "evil.Net"})
    for config in ("evaluate", "inference"):
        with refused("must be of an encoder among resnet10, .*, got 'evil.Net'"):
            recipe.run(config, tmp_path / "out", pretrained=model)
    files = str(bundle / "configs" / "inference.json")
    with refused("got 'evil.Net': a class of your own must be named on the command line"):
        ckpt_export(
            net_id="network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(model), config_file=files,
            meta_file=str(bundle / "configs" / "metadata.json"), pretrained=str(model),
        )  # fmt: skip


@every_bundle
def test_no_phantom_gets_into_a_folder_with_results_of_real_images(
    bundle: Path, recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    shutil.copytree(recipe_of(bundle.name).finished, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for config in ("train", "evaluate", "inference"):
        with refused(r"model\.pt must be weights that were trained on phantoms .*: give `--dataset_dir`, .*output_d"):
            run_config(bundle / "configs" / f"{config}.json", output_dir=tmp_path, num_workers=0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"pretrained": "nowhere.pt"}, r"no weights at .*nowhere\.pt"),
        ({"warmup_epochs": 1}, "`--warmup_epochs` must be fewer than the 1 of the schedule, got 1"),
    ],
    ids=str,
)
def test_refuses_bad_knobs_before_training(recipe: Recipe, tmp_path: Path, knob: dict[str, Any], message: str) -> None:
    with refused(message):
        recipe.train(tmp_path / "out", **knob)
    assert not (tmp_path / "out" / "models").exists()


def test_what_cannot_be_written_or_found_is_refused_and_leaves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("the folder of --model_path must be a folder that can be written, got .*file"):
        recipe.train(tmp_path / "out", model_path=tmp_path / "file" / "model.pt")
    with refused("`--output_dir` must be a folder that can be written, got .*file"):
        recipe.train(tmp_path / "file")
    with refused("nowhere"):
        recipe.train(tmp_path / "out", dataset_dir=tmp_path / "nowhere")
    assert names(tmp_path) == ["file"]


@every_bundle
def test_nothing_is_said_of_images_and_nothing_left_before_an_error(
    bundle: Path, recipe_of: Recipes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(recipe_of(bundle.name).model.parent, tmp_path / "models")
    with refused("nowhere"):
        run_config(bundle / "configs" / "inference.json", dataset_dir=tmp_path / "nowhere", output_dir=tmp_path)
    assert "Using the images" not in "".join(capfd.readouterr())
    assert names(tmp_path) == ["models"]


def copied_data(recipe: Recipe, folder: Path) -> tuple[list[str], Path]:
    """A copy of the data, in which an image for training is cut off."""
    given = recipe.knobs["dataset_dir"]
    first, *others = [given] if isinstance(given, str) else given
    shutil.copytree(first, folder)
    broken = folder / read(folder / "dataset.json")["training"][1]["image"]
    broken.write_bytes(broken.read_bytes()[:60])
    return [str(folder), *others], broken


def test_a_broken_image_is_fatal_by_default_and_skipped_by_a_knob(recipe: Recipe, tmp_path: Path) -> None:
    data, broken = copied_data(recipe, tmp_path / "set")
    with refused(re.escape(broken.name)):
        recipe.train(tmp_path / "fatal", dataset_dir=data)
    assert not (tmp_path / "fatal" / "models" / "model.pt").exists()
    recipe.train(tmp_path / "skipped", dataset_dir=data, on_corrupt="skip")
    assert all(value.isfinite().all() for value in weights(tmp_path / "skipped").values())


@every_bundle
def test_inference_names_what_it_cannot_read_and_does_the_rest(
    bundle: Path, recipe_of: Recipes, tmp_path: Path
) -> None:
    recipe = recipe_of(bundle.name)
    (folder, *_), broken = copied_data(recipe, tmp_path / "set")
    count = len(names(Path(folder) / "images"))
    with refused(f"^1 of {count} images could not be read: "):
        recipe.run("inference", tmp_path / "out", dataset_dir=Path(folder) / "images")
    (path,) = (tmp_path / "out" / "eval").rglob("*.csv")
    rows = table(path)
    assert [row["image"] for row in rows if row["error"]] == [str(broken)]
    assert len(rows) == count
    assert all(all(row[key] for key in row if key != "error") for row in rows if not row["error"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({bundle.name for bundle in BUNDLES} - {"pretrain_vq_ssl"}))  # whose tests do
def test_an_epoch_of_the_first_command_runs_with_the_default_network_and_voxels(
    name: str, recipe_of: Recipes, tmp_path: Path
) -> None:
    config, few = ROOT / "bundles" / name / "configs" / "train.json", recipe_of(name).knobs["dataset_dir"]
    short = {"iterations_per_epoch": 6} if "iterations_per_epoch" in read(config) else {"batch_size": 8}
    result = command_line(config, output_dir=tmp_path, data_dir=few, max_epochs=1, val_interval=1, **short)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Smoke run on generated phantoms" in result.stdout + result.stderr
    assert "resuming from iteration 0" not in result.stdout
    assert (tmp_path / "models" / "model.pt").is_file()


# ---- several processes -------------------------------------------------------------------------------------------

SAVED = "$torch.save(@{}.state_dict(), @output_dir + '/rank' + str(@rank) + '.pth')"


@pytest.mark.slow
def test_two_processes_hold_one_network_and_outlive_the_loss_of_one(recipe: Recipe, tmp_path: Path) -> None:
    name = "ssl_network" if "ssl_network" in read(recipe.configs[0]) else "network_def"
    more = write(tmp_path / "more.json", {"+run": [SAVED.format(name)]})
    configs = [*recipe.configs, recipe.configs[0].with_name("multi_gpu_train.json"), more]
    taken = {**recipe.knobs, "batch_size": recipe.knobs["batch_size"] // 2, "output_dir": tmp_path / "out"}
    knobs = {name: value for name, value in taken.items() if name not in ("max_epochs", "val_interval")}
    knobs |= {"schedule_epochs": 20, "resume": "auto"}
    first = tmp_path / "out" / "checkpoints" / "checkpoint_epoch=1.pt"

    def lose_one(pids: list[int]) -> None:
        while not first.is_file() and Path(f"/proc/{pids[0]}").exists():
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGKILL)

    lost = two_processes(*configs, cwd=tmp_path, meanwhile=lose_one, **knobs, max_epochs=20, val_interval=20)
    assert lost.returncode == -signal.SIGKILL, lost.stderr
    last = max(int(path.stem.partition("=")[2]) for path in first.parent.glob("checkpoint_epoch=*.pt"))
    result = two_processes(*configs, cwd=tmp_path, **knobs, max_epochs=last + 1, val_interval=last + 1)
    assert result.returncode == 0, result.stderr[-3000:]
    said = re.findall(r"Going on from \S+, after epoch (\d+)\.", result.stdout + result.stderr)
    assert said == [str(last)]  # by one of them
    assert result.stdout.count("\nNext: ") == 1  # by the first
    assert f"checkpoint_epoch={last + 1}.pt" in names(tmp_path / "out" / "checkpoints")
    assert settings(tmp_path / "out")["world_size"] == 2
    states = [torch.load(tmp_path / "out" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    differing = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    # Running statistics of BatchNorm are each rank's own until DDP hands out those of rank 0 at the next step.
    assert all("running_" in key for key in differing), differing
    events = [name for name in names(tmp_path / "out" / "eval") if "tfevents" in name]
    assert len(events) in (1, 2)  # of the two starts; the first may have logged nothing
    assert names(tmp_path) == ["more.json", "out"]  # other ranks write nothing
    assert names(tmp_path / "out") == left_by(recipe, "rank0.pth", "rank1.pth")


@pytest.mark.slow
def test_processes_that_have_other_numbers_of_images_are_refused_with_both(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of("cxr_classify")
    more = write(tmp_path / "more.json", {"train#dataset#data": "$@datalist.training[@rank:]"})
    configs = [*recipe.configs, recipe.configs[0].with_name("multi_gpu_train.json"), more]
    result = two_processes(*configs, cwd=tmp_path, **{**recipe.knobs, "output_dir": tmp_path / "out"})
    assert result.returncode == 1
    said = r"error: all processes must have the same images and settings, got num_images 24 in the first and 23 in"
    assert len(re.findall(said, result.stderr)) >= 1
    assert "Traceback" not in result.stderr
