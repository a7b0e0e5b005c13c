"""The benchmarks as a part of scripts/gpu/run.py: each limit that one names becomes a row, its whole output is logged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from results import Results

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def main(out: Path, data: Path, device: str, small: bool) -> bool:
    """Run all, those of the recipes first; whether all have come to their end."""
    step = ["--batch", "4", "--image-size", "64", "--loader"] if small else []
    runs = {"step.py, resnet18": step, "step.py, resnet50": [*step, "--encoder", "resnet50"]}
    runs["segmentation.py"] = ["--data", str(data / "ct_btcv")] if (data / "ct_btcv").is_dir() else []
    runs |= {"quantizer.py": [], "contrast.py": [], "augment.py": []}
    results, well = Results(out / "benches.json"), True
    for name, options in runs.items():
        command = [sys.executable, str(BENCHMARKS / name.split(",")[0]), "--device", device, *options]
        ended = subprocess.run([*command, "--rounds", "1" if small else "3"], stdout=subprocess.PIPE, text=True)
        print(f"---- {name}\n{ended.stdout}", flush=True)
        gates = re.findall(r"^(holds|MISSED): (.+)$", ended.stdout, re.MULTILINE)
        for verdict, gate in gates:
            results.add(f"{name}: {gate}", verdict, verdict == "holds")
        if ended.returncode and not gates:
            results.add(name, "failed", False)
            well = False
    return well
