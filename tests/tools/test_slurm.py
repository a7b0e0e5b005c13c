"""Jobs of scripts/slurm on a real Slurm of two nodes, see `make slurm`."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Recipes, checkpoint, same, two_processes, weights

pytestmark = [pytest.mark.slurm, pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="see `make slurm`")]
NUM_EPOCHS = 6


def slurm(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, encoding="utf-8", cwd=ROOT).stdout.strip()


def submit(log: Path, knobs: dict[str, Any], **environment: str) -> str:
    """Id of a job of two nodes with a process each."""
    shared = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "MASTER": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in {**shared, **environment}.items())])
    words = ["sbatch", "--parsable", "--nodes", "2", "--output", str(log), "--export", exported]
    arguments = [part for name, value in knobs.items() for part in (f"--{name}", str(value))]
    return slurm(*words, "scripts/slurm/train.sbatch", "bundles/pretrain_vq_ssl", *arguments)


def wait_for(holds: Callable[[], Any], log: Path) -> None:
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def state(job: str) -> str:
    return slurm("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


@pytest.fixture(scope="module")
def local(recipe_of: Recipes, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Knobs, and the folder of a training by two processes without Slurm."""
    recipe, folder = recipe_of("pretrain_vq_ssl"), tmp_path_factory.mktemp("local")
    knobs = {**recipe.knobs, "batch_size": 4, "max_epochs": NUM_EPOCHS, "val_interval": NUM_EPOCHS}
    configs = [*recipe.configs, recipe.configs[0].with_name("multi_gpu_train.json")]
    result = two_processes(*configs, cwd=folder, **knobs, output_dir=folder / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    return knobs, folder / "out"


@pytest.mark.parametrize("fate", ["none", "requeued"])
def test_two_nodes_are_two_processes_whatever_happens_to_them(
    local: tuple[dict[str, Any], Path], tmp_path: Path, fate: str
) -> None:
    knobs, expected = local
    log, out = tmp_path / "job.log", tmp_path / "out"
    job = submit(log, {**knobs, "output_dir": out}, **({"SCRATCH": str(tmp_path)} if fate == "none" else {}))
    if fate != "none":
        first = out / "checkpoints" / "checkpoint_epoch=1.pt"
        wait_for(lambda: first.exists() or state(job) in ("FAILED", "COMPLETED"), log)
        slurm("scontrol", "requeue", job)
    wait_for(lambda: state(job) in ("FAILED", "COMPLETED", "NODE_FAIL"), log)
    assert state(job) == "COMPLETED", log.read_text(errors="replace")[-3000:]
    assert ("Going on from" in log.read_text(errors="replace")) is (fate != "none")
    assert same(weights(out), weights(expected))
    assert same(checkpoint(out, NUM_EPOCHS)["optimizer"], checkpoint(expected, NUM_EPOCHS)["optimizer"])
