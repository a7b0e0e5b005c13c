"""The benchmarks as a part of scripts/gpu/run.py: each limit that one names becomes a row, all output is logged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from rows import Rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GATE = re.compile(r"^(holds|MISSED|measured): (.+) (\S+) ([<>]=) (\S+)$", re.MULTILINE)


def main(out: str, work: str, device: str, small: bool, **_: object) -> bool:
    """Run all, the short ones first; whether all have come to their end."""
    step, ct = ["--loader-only", *(["--batch", "4", "--image-size", "64"] if small else [])], Path(work, "data/ct_btcv")
    runs: dict[str, list[str]] = {"quantizer.py": [], "contrast.py": [], "augment.py": []}
    runs["segmentation.py"] = ["--data", str(ct)] if ct.is_dir() and not small else []
    runs |= {"step.py resnet50": [*step, "--encoder", "resnet50"], "step.py resnet18": step}
    results, well = Rows(Path(out, "benches.json")), True
    for name, options in runs.items():
        command = [sys.executable, str(BENCHMARKS / name.split()[0]), "--device", device, *options]
        ended = subprocess.run([*command, "--rounds", "1" if small else "3"], stdout=subprocess.PIPE, text=True)
        print(f"---- {name}\n{ended.stdout}", flush=True)
        gates = GATE.findall(ended.stdout)
        for verdict, what, value, sign, limit in gates:
            holds = None if verdict == "measured" else verdict == "holds"
            results.add(f"{name}: {what} {sign} {limit}", float(value), holds)
        if ended.returncode and not gates:  # else a limit was missed
            results.add(name, f"exit status {ended.returncode}", False)
            well = False
    return well


if __name__ == "__main__":
    sys.exit(not main(**json.loads(sys.argv[1])))
