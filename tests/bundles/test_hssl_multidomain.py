"""The bundle of hierarchical self-supervision: what it trains, shows, refuses, judges and embeds."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TASKS,
    Recipes,
    command_line,
    edited,
    events_of,
    metrics_of,
    read,
    refused,
    run_config,
    settings,
    table,
    tiny_knobs,
    two_processes,
    weights,
    write,
)
from monai.bundle import ConfigParser

from dissect_monai.data.identity import pseudonyms
from dissect_monai.data.volume_lists import aggregate
from dissect_monai.networks.weights import load_weights

pytestmark = pytest.mark.usefixtures("_in_root")
CONFIGS = ROOT / "bundles" / "hssl_multidomain" / "configs"
TINY = tiny_knobs("hssl_multidomain")
JUDGE = {"num_workers": 0, "num_samples": 20, "patches_per_volume": 2}
NO_DRAWS = {
    "mask_fraction": 0,
    **{f"train#augment#{name}": [1, 1] for name in ("crop_scale", "crop_ratio", "gamma", "contrast")},
    **{f"train#augment#{name}": 0 for name in ("rotation", "brightness", "blur_prob")},
}
Folders = list[str]


@pytest.fixture
def folders(volume_dirs: list[Path]) -> Folders:
    return [*map(str, volume_dirs)]


@pytest.fixture
def trained(recipe_of: Recipes) -> Path:
    """Output folder of a run of two epochs."""
    return recipe_of("hssl_multidomain").finished


@pytest.fixture(scope="session")
def judged(recipe_of: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an evaluation of that run."""
    recipe, output_dir = recipe_of("hssl_multidomain"), tmp_path_factory.mktemp("judged")
    evaluate(recipe.knobs["dataset_dir"], output_dir, pretrained=recipe.model, seed=0)
    return output_dir


def train(folders: Any, output_dir: Path, **knobs: Any) -> None:
    run_config(CONFIGS / "train.json", **{**TINY, **knobs, "dataset_dir": folders, "output_dir": output_dir})


def evaluate(folders: Any, output_dir: Path, **knobs: Any) -> None:
    run_config(CONFIGS / "evaluate.json", **{**JUDGE, **knobs, "dataset_dir": folders, "output_dir": output_dir})


def embed(folders: Any, output_dir: Path, **knobs: Any) -> list[dict[str, str]]:
    shared = {"num_workers": 0, "dataset_dir": folders, "output_dir": output_dir}
    run_config(CONFIGS / "inference.json", **{**shared, **knobs})
    return table(output_dir / "eval" / "embeddings.csv")


def values(row: dict[str, str]) -> list[float]:
    return [float(value) for name, value in row.items() if re.fullmatch(r"e\d+", name)]


def test_domains_are_written_and_named_beside_the_weights(trained: Path) -> None:
    said, rows = settings(trained), table(trained / "eval" / "domains.csv")
    assert (said["tasks"], said["groups"]) == (list(TASKS), ["abdomen", "head"])
    assert [(row["task"], row["group"], row["modality"]) for row in rows] == [
        ("abdomen_ct", "abdomen", "CT"),
        ("head_ct", "head", "CT"),
        ("head_mr", "head", "MR"),
    ]
    assert {row["subjects"] for row in rows} == {"4 + 2 + 2"}
    assert all(float(row["minimum"]) < float(row["maximum"]) for row in rows)


def test_two_processes_compute_what_one_does_with_the_joined_batch(folders: Folders, tmp_path: Path) -> None:
    # Apart from what is drawn of each view, which is each process's own.
    knobs = {**TINY, **NO_DRAWS, "iterations_per_epoch": 3, "dataset_dir": folders, "batch_size": 2}
    configs = CONFIGS / "train.json", CONFIGS / "multi_gpu_train.json"
    result = two_processes(*configs, cwd=tmp_path, **knobs, output_dir=tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    train(folders, tmp_path / "one", **{**knobs, "batch_size": 4})
    one, two = events_of(tmp_path / "one"), events_of(tmp_path / "two")
    # These are of the joined batch on every rank; with the last one, two updates have been equal.
    for name in ("loss/image", "loss/task", "loss/group"):
        expected, found = ([event.value for event in events.Scalars(name)] for events in (one, two))
        assert len(found) == 3
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_a_single_task_has_its_views_alone_to_tell_apart(folders: Folders, tmp_path: Path) -> None:
    train(folders[:1], tmp_path)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    scalars = set(events_of(tmp_path).Tags()["scalars"])
    assert "retrieval/image" in scalars
    assert not {name for name in scalars if name.startswith("shortcut")}
    assert events_of(tmp_path).Scalars("loss/classification")[-1].value == 0


def test_pretrained_weights_start_the_network(trained: Path, folders: Folders, tmp_path: Path) -> None:
    train(folders, tmp_path, pretrained=trained / "models" / "model.pt", learning_rate=1e-12, weight_decay=0)
    before, after = weights(trained), weights(tmp_path)
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_slices_are_judged_and_embedded_as_the_mean_over_slices(folders: Folders, tmp_path: Path) -> None:
    # Coronal slices no larger than a patch, so that each is one window.
    train(folders, tmp_path, spatial_dims=2, slice_axis="coronal", pixdim=[30, 30], patch_size=[16, 16])
    assert weights(tmp_path)["convInit.conv.weight"].ndim == 4
    assert {name: settings(tmp_path)[name] for name in ("spatial_dims", "slice_axis")} == {
        "spatial_dims": 2, "slice_axis": "coronal",
    }  # fmt: skip
    evaluate(folders, tmp_path, baselines=False)
    assert {row["question"] for row in table(tmp_path / "eval" / "findings.csv")} >= {"structures", "domains"}
    row = embed(folders, tmp_path)[0]
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser["pretrained"] = str(tmp_path / "models" / "model.pt")
    volume = parser.get_parsed_content("preprocessing")({"image": row["image"], "modality": "CT"})["image"]
    assert tuple(volume.shape[1:3]) == (16, 16)
    assert volume.shape[3] not in (1, 16)
    network = load_weights(parser.get_parsed_content("network_def"), tmp_path / "models" / "model.pt").eval()
    with torch.no_grad():
        bottleneck = network.encode(torch.as_tensor(volume).movedim(3, 0))[0]
    np.testing.assert_allclose(values(row), bottleneck.mean((0, 2, 3)).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [{}, {"spatial_dims": 2, "pixdim": [12, 12], "patch_size": [16, 16]}], ids=str)
def test_patches_of_a_batch_have_a_place(folders: Folders, shape: dict[str, Any]) -> None:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    parser.update({**TINY, **shape, "dataset_dir": folders})
    batch = next(iter(parser.get_parsed_content("train#dataloader")))
    assert batch["image"].shape == (4, 1, *parser.get_parsed_content("patch_size"))
    assert batch["place"].shape == (4,)
    assert 0 <= batch["place"].min() < batch["place"].max() <= 1


def test_refuses_to_go_on_with_another_modality(trained: Path, folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with refused(r"of a run with modality None \(now .*head_ct.*amp False \(now True\)"):
        train(folders, tmp_path, max_epochs=4, resume=True, amp=True, modality={"head_ct": "MR"})


def test_evaluation_judges_structures_and_shortcuts(judged: Path) -> None:
    written = {path.name for path in (judged / "eval").iterdir()}
    assert {"findings.csv", "differences.csv", "metrics.csv", "scores.npz"} <= written
    rows = table(judged / "eval" / "findings.csv")
    assert {row["question"] for row in rows} == {"structures", "domains", "domains_in_group"}
    assert {row["source"] for row in rows} == {"pretrained", "random", "intensity"}
    assert {row["probe"] for row in rows} == {"linear", "knn"}
    metrics = metrics_of(judged)
    assert any(name.startswith("pretrained_last_linear_auroc_structures_") for name in metrics)
    assert 0 <= metrics["pretrained_last_linear_auroc_domains_macro"] <= 1


def test_an_encoder_alone_is_evaluated_and_embeds_every_volume(trained: Path, folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(trained / "models", tmp_path / "models")
    state = {key: value for key, value in weights(trained).items() if key.startswith(("convInit", "down_layers"))}
    torch.save(state, tmp_path / "models" / "model.pt")
    evaluate(folders, tmp_path, baselines=False)
    assert (tmp_path / "eval" / "findings.csv").is_file()
    rows = embed(folders, tmp_path)
    assert all(np.isfinite(values(row)).all() and len(values(row)) == 32 for row in rows)
    assert len({tuple(values(row)) for row in rows}) == len(rows) == 24


def test_the_subjects_that_pretraining_held_out_are_scored_and_no_others(folders: Folders, tmp_path: Path) -> None:
    spec = read(Path(folders[0]) / "dataset.json")
    everything = [item for split in ("training", "validation", "test") for item in spec[split]]
    unsplit = [str(edited(folders[0], tmp_path, training=everything, validation=None, test=None))]
    train(unsplit, tmp_path / "some", validation_fraction=0.3, seed=4)
    evaluate(unsplit, tmp_path / "some", seed=1, baselines=False)
    with np.load(tmp_path / "some" / "eval" / "scores.npz") as file:
        tested = set(file["subjects"].tolist())
    held_out = aggregate(unsplit, validation_fraction=0.3, seed=4).validation
    assert tested == {*pseudonyms(held_out)}
    model = tmp_path / "some" / "models" / "model.json"
    write(model, {**read(model), "validation_fraction": 0})
    with refused("validation, test has none in .*abdomen_ct. Add the list `test` of other subjects"):
        evaluate(unsplit, tmp_path / "some")


def test_patches_and_their_labels_do_not_depend_on_the_seed(
    trained: Path, judged: Path, folders: Folders, tmp_path: Path
) -> None:
    evaluate(folders, tmp_path, pretrained=trained / "models" / "model.pt", seed=1, baselines=False)
    with np.load(judged / "eval" / "scores.npz") as first, np.load(tmp_path / "eval" / "scores.npz") as other:
        assert {*other} == {name for name in first if not name.startswith(("scores/random/", "scores/intensity/"))}
        for name, array in other.items():
            assert np.array_equal(array, first[name], equal_nan=array.dtype.kind == "f"), name


@pytest.mark.slow
def test_a_smoke_run_on_coarse_voxels_learns(tmp_path: Path) -> None:
    coarse = {"pixdim": [12, 12, 12], "patch_size": [16, 16, 16], "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
    result = command_line(CONFIGS / "train.json", output_dir=tmp_path, **coarse)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Smoke run on generated phantoms" in result.stdout + result.stderr
    events = events_of(tmp_path)
    for name in ("image", "task", "group", "classification", "reconstruction", "total"):
        losses = [event.value for event in events.Scalars(f"loss/{name}")]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]), name
    first, last = ({tag: events.Scalars(tag)[place].value for tag in events.Tags()["scalars"]} for place in (0, -1))
    assert last["accuracy/task"] > first["accuracy/task"] + 0.3
    assert last["reconstruction_error/mean"] < 0.7 * first["reconstruction_error/mean"]
    assert last["retrieval/task"] > first["retrieval/task"]
    domains = table(tmp_path / "eval" / "domains.csv")
    assert len({row["task"] for row in domains}) >= 4
    assert len({row["group"] for row in domains}) >= 2
    few = {"num_samples": 20, "baselines": False}
    assert command_line(CONFIGS / "evaluate.json", output_dir=tmp_path, **few).returncode == 0
