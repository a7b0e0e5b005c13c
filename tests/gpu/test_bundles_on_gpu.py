"""Every recipe on a GPU, in bfloat16: trained, validated, resumed, evaluated; its memory, and what it waits for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RECIPES, Recipe, checkpoint, metrics_of, same, weights
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from torch.profiler import ProfilerActivity, profile

from dissect_monai.phantoms.xray import write_xray_phantoms

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_in_root")]
every_recipe = pytest.mark.parametrize("name", RECIPES)
Record = Callable[[str, object], None]
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")  # of the host, in a trace


@pytest.fixture(autouse=True)
def _free_memory(device: torch.device) -> Iterator[None]:
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the tests beside this one


def train(recipe: Recipe, folder: Path, device: torch.device, **knobs: Any) -> None:
    recipe.train(folder, device=str(device), amp=True, **knobs)


@every_recipe
def test_trains_resumes_and_evaluates(
    name: str, recipe_of: Callable[[str], Recipe], device: torch.device, tmp_path: Path, record_property: Record
) -> None:
    recipe = recipe_of(name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            train(recipe, tmp_path / "whole", device, max_epochs=2)
            train(recipe, tmp_path / "parts", device, max_epochs=1, schedule_epochs=2)
            train(recipe, tmp_path / "parts", device, max_epochs=2, resume=True)
        finally:
            torch.use_deterministic_algorithms(False)
    reasons = {str(each.message).split()[0] for each in seen if "deterministic" in str(each.message)}
    exact = same(checkpoint(tmp_path / "parts", 2), checkpoint(tmp_path / "whole", 2))
    record_property("resume", "bit for bit" if exact else f"differs, by {sorted(reasons)}")
    assert exact or reasons
    assert all(value.isfinite().all() for value in weights(tmp_path / "parts").values())
    if len(recipe.configs) == 1:
        recipe.run("evaluate", tmp_path / "parts", device=str(device), pretrained=tmp_path / "parts/models/model.pt")
        assert metrics_of(tmp_path / "parts")


@pytest.mark.slow
def test_trains_compiled(recipe_of: Callable[[str], Recipe], device: torch.device, tmp_path: Path) -> None:
    options = {} if device.type == "cuda" else {"train#trainer#compile_kwargs": {"backend": "aot_eager"}}
    train(recipe_of("pretrain_vq_ssl"), tmp_path, device, compile=True, **options)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@every_recipe
def test_no_step_waits_for_the_gpu(
    name: str, recipe_of: Callable[[str], Recipe], device: torch.device, tmp_path: Path, record_property: Record
) -> None:
    recipe = recipe_of(name)
    late = {"log_interval": 1000, "val_interval": 3, "max_epochs": 3, "output_dir": str(tmp_path), "amp": True}
    knobs = {**recipe.knobs, **late, "device": str(device), "batch_size": 2}
    workflow = ConfigWorkflow(list(map(str, recipe.configs)), workflow_type="train", logging_file=False, **knobs)
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as empty:  # the profiler itself waits when it ends
        pass
    trace = profile(activities=activities)
    # In the second epoch: in the first, a segmentation looks which classes its patches show.
    number = (trainer.state.epoch_length or 2) + 2
    trainer.add_event_handler(Events.ITERATION_STARTED(once=number), trace.start)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=number), trace.stop)
    workflow.run()
    workflow.finalize()
    counts = [[event.name for event in each.events() if event.name in WAITS] for each in (trace, empty)]
    assert any(event.name.startswith("aten::") for event in trace.events())
    record_property("waits_a_step", len(counts[0]) - len(counts[1]))
    # MONAI's random transforms of volumes on the device, in a thread of their own, read where they crop.
    assert len(counts[0]) <= len(counts[1]) or name == "seg_finetune_btcv", counts


@every_recipe
def test_memory_of_the_defaults(
    name: str,
    recipe_of: Callable[[str], Recipe],
    device: torch.device,
    tmp_path: Path,
    record_property: Record,
) -> None:
    recipe = recipe_of(name)
    # Few steps on few voxels, from which patches of the default size are cut; all else is the default.
    given = {
        "dataset_dir",
        "iterations_per_epoch",
        "max_epochs",
        "val_interval",
        "num_workers",
        "warmup_epochs",
        "pixdim",
    }
    if device.type == "cuda":
        if "image_size" in recipe.knobs:
            recipe.knobs["dataset_dir"] = str(write_xray_phantoms(tmp_path / "xrays", 128, 8, 8, image_size=64))
        recipe.knobs = {key: value for key, value in recipe.knobs.items() if key in given}
        torch.cuda.reset_peak_memory_stats()
    train(recipe, tmp_path / "run", device)
    assert weights(tmp_path / "run")
    if device.type == "cuda":
        record_property("peak_gib", round(torch.cuda.max_memory_allocated() / 2**30, 2))
