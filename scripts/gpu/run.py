"""Everything that needs a GPU, from one clone and one pack, without a network: tests, benches and real budgets.

    python3 scripts/gpu/run.py [--pack runs/gpu_pack] [--out runs/gpu] [--parts tests,benches,pretraining,...]

Parts run in the order of their worth, each in a process of its own with a time limit, and write what they find at once
to OUT/PART.json and OUT/log.txt; one that fails or is stopped leaves the others alone. In the end there is a table, and
the exit status is 1 if a part has failed. All else that is written goes to --work. It needs a python3 with PyTorch;
packages come from the pack's wheels, if there is one. `--device cpu --budget small` is the rehearsal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "scripts" / "gpu"
# Seconds of each part on an H100.
LIMITS = {"tests": 120, "benches": 130, "pretraining": 155, "segmentation": 125, "slices": 540}
REHEARSAL = 1800  # of each part in the rehearsal
CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
FACTS = """
import importlib.metadata as m, json, os, platform, sys, torch
names = "torch monai pytorch-ignite numpy scipy scikit-learn nibabel kornia vector-quantize-pytorch pytest".split()
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()}
facts = {"python": platform.python_version(), "cores": os.cpu_count(), "cuda": torch.version.cuda}
facts["device"] = torch.cuda.get_device_name() if sys.argv[1] == "cuda" and torch.cuda.is_available() else None
print(json.dumps({**facts, "packages": {name: found.get(name) for name in names}}))
"""


class Ended(NamedTuple):
    """How a part has ended."""

    part: str
    says: str  # "ok", or what went wrong
    seconds: float


def read_pack(pack: Path) -> dict[str, Any] | None:
    """The manifest, after a look at every file; None without a pack."""
    path = pack / "manifest.json"
    if not path.is_file():
        print(f"There is no pack in {pack}: the packages must be installed, and what needs its images is left out.")
        return None
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        file = pack / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            sys.exit(f"error: {file} is not what {path} says: carry the pack over again.")
    for name, reason in manifest["left_out"].items():
        print(f"The pack lacks {name}: {reason}.")
    return manifest


def unpack(pack: Path, work: Path) -> None:
    """Wheels to WORK/site, data sets to WORK/data; what an earlier run has unpacked of the same pack stays."""
    manifest, unpacked = (pack / "manifest.json").read_bytes(), work / "unpacked.json"
    if unpacked.is_file() and unpacked.read_bytes() == manifest:
        return
    for folder in ("site", "data"):
        shutil.rmtree(work / folder, ignore_errors=True)
    if wheels := sorted(map(str, (pack / "wheels").glob("*.whl"))):
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(work / "site"), *wheels]
        if subprocess.run(command, check=False).returncode:
            sys.exit("error: the wheels of the pack cannot be installed, as pip says above: is it for this Python?")
    for path in sorted(pack.glob("*.zip")):
        with ZipFile(path) as archive:
            archive.extractall(work / "data")
    unpacked.write_bytes(manifest)


def environment(work: Path, device: str) -> dict[str, str]:
    """Of all parts: this clone first, then the wheels; caches where they can be written."""
    paths = [str(ROOT), str(work / "site"), str(GPU), str(GPU.parent), os.environ.get("PYTHONPATH", "")]
    own = {name: str(work / "cache") for name in CACHES}
    (work / "cache").mkdir(parents=True, exist_ok=True)
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    own |= {"GPU_TESTS_DEVICE": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return {**os.environ, **own}


def command_of(part: str, args: argparse.Namespace) -> list[str]:
    """What a part runs."""
    if part != "tests":
        script = GPU / ("benches.py" if part == "benches" else "studies.py")
        job: dict[str, Any] = {name: str(getattr(args, name)) for name in ("pack", "out", "work", "device")}
        job |= {"part": part, "small": args.budget == "small", "limit": args.limits[part]}
        return [sys.executable, str(script), json.dumps(job)]
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    options = ["-m", "gpu", "-p", "rows", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["--basetemp", str(args.work / "tests"), "-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    return [sys.executable, "-m", "pytest", *options, *map(str, files)]


def run_part(part: str, command: list[str], limit: float, log: Path, env: dict[str, str]) -> Ended:
    """Run a command, with all that it starts, for no longer than its limit; its output is added to the log."""
    start = time.monotonic()
    with open(log, "ab") as file:
        file.write(f"\n==== {part}: {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            status = process.wait(limit)
            says = "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            says = f"stopped after {limit:g} s"
        finally:
            with suppress(ProcessLookupError):  # what it has started may live on
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(part, says, time.monotonic() - start)


def table(ended: list[Ended], out: Path) -> str:
    """What the parts have found, a line each; of the tests those that failed or measured something."""
    lines = []
    for part, says, seconds in ended:
        path = out / f"{part}.json"
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        counts = Counter(row["value"] for row in rows) if part == "tests" else {}
        lines.append(f"{part}: {says}, {seconds:.0f} s{''.join(f', {n} {name}' for name, n in counts.items())}")
        for row in rows:
            more = {name: each for name, each in row.items() if name not in ("what", "value", "holds", "metrics")}
            if part != "tests" or row["value"] == "failed" or more.keys() > {"seconds"}:
                mark = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
                told = "  ".join(f"{name} {each}".split("\n")[0] for name, each in more.items())
                value = f"{row['value']:.4g}" if isinstance(row["value"], float) else row["value"]
                lines.append(f"  {row['what'][:80]:80} {value!s:>10} {mark:7} {told}"[:180].rstrip())
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the parts and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=ROOT / "runs" / "gpu_pack")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="what is worth keeping")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu_work", help="all else")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", choices=["full", "small"], default="full")
    parser.add_argument("--parts", help="PART or PART=SECONDS, ...; all but slices, without a pack the first two")
    args = parser.parse_args(arguments)
    has_pack = read_pack(args.pack) is not None
    asked = [each.partition("=") for each in args.parts.split(",")] if args.parts else []
    parts = [part for part, _, _ in asked] or [*LIMITS][: -1 if has_pack else 2]
    args.limits = dict(LIMITS) if args.budget == "full" else dict.fromkeys(LIMITS, REHEARSAL)
    try:
        args.limits |= {part: float(seconds) for part, _, seconds in asked if seconds}
    except ValueError:
        sys.exit(f"error: --parts must be of the form PART or PART=SECONDS, got {args.parts}.")
    if not all(0 < seconds < float("inf") for seconds in args.limits.values()):
        sys.exit(f"error: --parts must give a part more than 0 seconds, got {args.parts}.")
    if unknown := [part for part in parts if part not in LIMITS]:
        sys.exit(f"error: --parts must be of {', '.join(LIMITS)}, got {', '.join(unknown)}.")
    if not has_pack and (needy := [part for part in parts if part in [*LIMITS][2:]]):
        sys.exit(f"error: {', '.join(needy)} need(s) the images of a pack: give --pack, or leave out.")
    args.pack, args.out, args.work = (path.resolve() for path in (args.pack, args.out, args.work))
    args.out.mkdir(parents=True, exist_ok=True)
    env = environment(args.work, args.device)  # makes the folder
    if has_pack:
        unpack(args.pack, args.work)
    facts = subprocess.run([sys.executable, "-c", FACTS, args.device], env=env, capture_output=True, text=True)
    if facts.returncode:
        sys.exit(f"error: {sys.executable} cannot import PyTorch: {facts.stderr.strip().splitlines()[-1]}")
    print(facts.stdout.strip(), flush=True)
    if args.device == "cuda" and json.loads(facts.stdout)["device"] is None:
        sys.exit("error: PyTorch finds no CUDA device; --device cpu --budget small is the rehearsal.")
    (args.out / "log.txt").write_text(facts.stdout, encoding="utf-8")
    ended = []
    for part in (part for part in LIMITS if part in parts):
        (args.out / f"{part}.json").unlink(missing_ok=True)
        env["GPU_RESULTS"] = str(args.out / f"{part}.json")
        limit = args.limits[part]
        ended.append(run_part(part, command_of(part, args), limit, args.out / "log.txt", env))
        print(f"{part}: {ended[-1].says}, {ended[-1].seconds:.0f} s", flush=True)
    print(table(ended, args.out))
    sys.exit(any(each.says != "ok" for each in ended))


if __name__ == "__main__":
    main()
