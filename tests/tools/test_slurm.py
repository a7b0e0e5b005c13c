"""Jobs of scripts/slurm on a real Slurm of two nodes, see `make slurm`."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Recipes, checkpoint, same, tiny_knobs, two_processes, weights, write

pytestmark = [pytest.mark.slurm, pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="see `make slurm`")]
NUM_EPOCHS = 6


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")


def slurm(*words: str, cwd: Path = ROOT) -> str:
    return subprocess.run(words, check=True, capture_output=True, encoding="utf-8", cwd=cwd).stdout.strip()


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


def fact(job: str, name: str = "JobState") -> str:
    return slurm("scontrol", "show", "job", job).partition(f"{name}=")[2].split()[0]


def end_node(name: str, job: str) -> None:
    """Kill a node's daemon and all that it runs of a job, in an order in which none can tell of the others' end."""
    marks, tasks, steps = {f"SLURMD_NODENAME={name}".encode(), f"SLURM_JOB_ID={job}".encode()}, [], set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if marks <= {*(process / "environ").read_bytes().split(b"\0")}:
                tasks.append(int(process.name))
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    steps.add(int(parent))
    assert steps
    daemon = Path(os.environ["SLURM_CONF"]).with_name(f"slurmd-{name}.pid")
    for pid in [int(daemon.read_text()), *steps, *tasks]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def local(recipe_of: Recipes, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Knobs, and the folder of a training by two processes without Slurm."""
    recipe, folder = recipe_of("pretrain_vq_ssl"), tmp_path_factory.mktemp("local")
    knobs = {**recipe.knobs, "batch_size": 4, "max_epochs": NUM_EPOCHS, "val_interval": NUM_EPOCHS}
    configs = [*recipe.configs, recipe.configs[0].with_name("multi_gpu_train.json")]
    result = two_processes(*configs, cwd=folder, **knobs, output_dir=folder / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    return knobs, folder / "out"


@pytest.mark.parametrize("fate", ["none", "requeued", "n1 ends", "n2 ends"])
def test_two_nodes_are_two_processes_whatever_happens_to_them(
    local: tuple[dict[str, Any], Path], tmp_path: Path, fate: str
) -> None:
    knobs, expected = local
    log, out = tmp_path / "job.log", tmp_path / "out"
    job = submit(log, {**knobs, "output_dir": out}, **({"SCRATCH": str(tmp_path)} if fate == "none" else {}))
    if fate != "none":
        first = out / "checkpoints" / "checkpoint_epoch=1.pt"
        wait_for(lambda: first.exists() or fact(job) in ENDS, log)
        if fate == "requeued":
            slurm("scontrol", "requeue", job)
        else:
            end_node(fate[:2], job)
            wait_for(lambda: fact(job, "Restarts") == "1" or fact(job) in ENDS, log)
            slurm("slurmd", "-N", fate[:2])  # the machine is back
    wait_for(lambda: fact(job) in ENDS, log)
    assert fact(job) == "COMPLETED", log.read_text(errors="replace")[-3000:]
    assert ("Going on from" in log.read_text(errors="replace")) is (fate != "none")
    assert same(weights(out), weights(expected))
    assert same(checkpoint(out, NUM_EPOCHS)["optimizer"], checkpoint(expected, NUM_EPOCHS)["optimizer"])


def test_a_study_by_an_array_of_jobs_has_the_table_of_one_call(dataset_dir: Path, tmp_path: Path) -> None:
    clone, log, data = tmp_path / "clone", tmp_path / "job.log", f"{{data}}/{dataset_dir.name}"
    slurm("git", "clone", "--quiet", "--shared", str(ROOT), str(clone))  # whose table may change
    shared = {**tiny_knobs("cxr_classify"), "dataset_dir": data}
    evaluation = {"dataset_dir": data, "pretrained": "{folder}/models/model.pt", "num_workers": 0, "num_samples": 20}
    study = {
        "bundle": "cxr_classify", "dataset": "phantoms", "hardware": "a CPU", "seeds": [0, 1], "training": shared,
        "recipes": {"fast": {}, "slow": {"learning_rate": 0.001}}, "variants_change": "training",
        "variants": {"all": {}}, "evaluation": evaluation,
    }  # fmt: skip
    words = [str(write(tmp_path / "study.json", study)), "--data", str(dataset_dir.parent)]
    table = clone / "results" / "results.csv"
    before = len(table.read_text().splitlines()) - 1
    environment = f"ALL,PYTHON={sys.executable},PYTHONPATH={clone},OMP_NUM_THREADS=1"
    job = ["sbatch", "--parsable", "--output", str(log), "--open-mode", "append", "--export", environment]
    script = ["scripts/slurm/study.sbatch", *words, "--runs", str(tmp_path / "array")]
    array = slurm(*job, "--array", "0-3", *script, cwd=clone)
    last = slurm(*job, "--dependency", f"afterok:{array}", *script, cwd=clone)
    wait_for(lambda: fact(last) in ENDS or fact(last, "Reason") == "DependencyNeverSatisfied", log)
    assert fact(last) == "COMPLETED", log.read_text()
    command = [sys.executable, "scripts/run_experiments.py", *words, "--runs", str(tmp_path / "serial"), "--jobs", "2"]
    subprocess.run(command, check=True, cwd=clone, env={**os.environ, "PYTHONPATH": str(clone)})
    with open(table, newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)][before:]
    half = len(rows) // 2
    assert half > 0
    assert rows[:half] == rows[half:]
