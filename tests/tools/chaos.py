"""Kill a training at random moments, fill its disk and damage its checkpoints, and count what came of it.

    python tests/tools/chaos.py --kills 100 [--fulls 10] [--flips 20] [--bundle pretrain_vq_ssl] [--seed 0]

After each blow the same command is given again with `--resume auto`, until the run has ended; its weights must be bit
for bit those of a run that nothing has happened to. A run that does not go on by itself, or says more than a line of
why it ended, counts as a fault, and the exit status is their number. It is no test of `make test`: a blow is a start.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import RECIPES, ROOT, TASKS, same, tiny_knobs

from dissect_monai.phantoms.volumes import write_volume_phantoms
from dissect_monai.phantoms.xray import write_xray_phantoms

NUM_EPOCHS = 6


def start(bundle: str, data: Any, output_dir: Path, log: Path, limit: int | None = None) -> subprocess.Popen[bytes]:
    """The command that is given again after every blow; `limit` is the size in bytes at which no file grows."""
    knobs = {**tiny_knobs(bundle), "dataset_dir": data, "output_dir": output_dir, "resume": "auto"}
    knobs |= {"max_epochs": NUM_EPOCHS, "cache_dir": output_dir.parent / "cache"}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(RECIPES[bundle][0])]
    command += [part for name, value in knobs.items() for part in (f"--{name}", str(value))]

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # type: ignore[arg-type]

    with open(log, "wb") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        before = full if limit is not None else None
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, preexec_fn=before)


def flip(path: Path, rng: random.Random, count: int = 200) -> None:
    """Other bytes at random places."""
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def weights(output_dir: Path) -> Any:
    return torch.load(output_dir / "models" / "model.pt", weights_only=True)


def main(kills: int = 100, fulls: int = 10, flips: int = 20, bundle: str = "pretrain_vq_ssl", seed: int = 0) -> None:
    """Count kills, full disks, damaged checkpoints, runs and faults."""
    rng, counts = random.Random(seed), Counter[str]()
    blows = ["kill"] * kills + ["full"] * fulls + ["flip"] * flips
    rng.shuffle(blows)
    with TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        if bundle in ("pretrain_vq_ssl", "cxr_classify"):
            data: Any = write_xray_phantoms(folder / "data", 24, 16, 16, image_size=32)
        else:
            given = write_volume_phantoms(folder / "data", 4, 2, 2, image_size=32, tasks=TASKS)
            data = given[0] if bundle == "seg_finetune_btcv" else [str(each) for each in given]
        begun = time.monotonic()
        assert start(bundle, data, folder / "whole", log).wait() == 0, log.read_text()
        seconds = time.monotonic() - begun
        expected, sizes = weights(folder / "whole"), [*(folder / "whole" / "checkpoints").iterdir()]
        size = max(path.stat().st_size for path in sizes)
        while blows:
            out = folder / f"run{counts['runs']}"
            for _ in range(200):
                blow = blows.pop() if blows else None
                found = sorted((out / "checkpoints").glob("checkpoint_*.pt"), key=lambda path: path.stat().st_mtime_ns)
                if blow == "flip" and len(found) < 2:  # there will be one to go back to, once it has ended
                    blows.append(blow)
                    blow = None
                elif blow == "flip":
                    flip(found[-1], rng)
                run = start(bundle, data, out, log, rng.randrange(size) if blow == "full" else None)
                if blow == "kill":
                    time.sleep(rng.random() * seconds)
                    run.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                status = run.wait()
                counts[f"{blow}s" if blow else "undisturbed"] += 1
                said = log.read_text(errors="replace")
                early = said.rstrip().endswith("KeyboardInterrupt")  # while Python was still importing
                counts["interrupted before they began"] += early
                counts["tracebacks"] += "Traceback" in said and not early
                if "Traceback" in said and not early:
                    print(said[-2000:], flush=True)
                counts["went back to an older checkpoint"] += "Going back to the checkpoint before" in said
                if (status == 0 or blow is None) and blows[-1:] != ["flip"]:
                    break
            counts["runs"] += 1
            if status != 0 or not same(weights(out), expected):
                counts["faults"] += 1
                print(said[-2000:], flush=True)
            left = [path for path in out.rglob(".*") if re.search(r"\.tmp$|\.lock$", path.name)]
            counts["files left over"] += len(left)
            print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())), flush=True)
    sys.exit(counts["faults"] + counts["tracebacks"])


if __name__ == "__main__":
    fire.Fire(main)
