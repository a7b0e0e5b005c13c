"""Two nodes, of which one loses a worker: torchrun starts all workers again, and the run goes on from a checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Recipes, free_port

NUM_EPOCHS = 10


def start_node(bundle: str, port: int, log: Path, knobs: dict[str, Any]) -> subprocess.Popen[bytes]:
    """One agent of torchrun with one worker; the agents meet at the port."""
    configs = ROOT / "bundles" / bundle / "configs"
    files = [str(configs / name) for name in ("train.json", "multi_gpu_train.json")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "1",
        "--monitor_interval", "0.2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}",
        "--rdzv_id", bundle, "-m", "monai.bundle", "run", "--config_file", str(files),
    ]  # fmt: skip
    command += [part for name, value in knobs.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "wb") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def wait_until(holds: Callable[[], Any], nodes: list[subprocess.Popen[bytes]], logs: list[Path]) -> Any:
    for _ in range(3000):
        if found := holds():
            return found
        stopped = [log for node, log in zip(nodes, logs, strict=True) if node.poll() not in (None, 0)]
        assert not stopped, stopped[0].read_text(errors="replace")[-3000:]
        time.sleep(0.1)
    raise AssertionError("waited for five minutes")


def worker_of(node: subprocess.Popen[bytes]) -> int | None:
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    return int(children[0]) if children else None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc, as Linux has it")
def test_a_run_outlives_a_worker_of_one_of_two_nodes(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of("hssl_multidomain")  # the test of all bundles does it without torchrun
    knobs = {**recipe.knobs, "output_dir": tmp_path / "output", "resume": "auto"}
    knobs |= {"max_epochs": NUM_EPOCHS, "val_interval": NUM_EPOCHS}
    checkpoints = tmp_path / "output" / "checkpoints"
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    port = free_port()
    nodes = [start_node(recipe.name, port, log, knobs) for log in logs]
    try:
        wait_until((checkpoints / "checkpoint_epoch=1.pt").is_file, nodes, logs)
        worker = wait_until(lambda: worker_of(nodes[1]), nodes, logs)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: all(node.poll() == 0 for node in nodes), nodes, logs)
    finally:
        for node in nodes:
            if node.poll() is None:
                node.terminate()  # the agent ends its worker, which is no child of ours
                node.wait(60)
    said = "".join(log.read_text(errors="replace") for log in logs)
    (epoch,) = re.findall(r"Going on from \S+, after epoch (\d)\.", said)  # the first process alone says so
    assert 1 <= int(epoch) < NUM_EPOCHS
    assert (checkpoints / f"checkpoint_epoch={NUM_EPOCHS}.pt").is_file()
    assert (tmp_path / "output" / "models" / "model.pt").is_file()
