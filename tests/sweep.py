"""Tries every key of every config of every bundle with values of every kind, each in a process of its own.

    python tests/sweep.py                 # all of them
    python tests/sweep.py --every 50      # one in 50
    python tests/sweep.py --only train/device

A value may be taken, which ends with status 0 (a training, once it has done a step), or be refused by one line,
`error: ...`, with a status other than 0, and leave no file and no empty folder, except for the table of the data sets
where a component that no rule knows fails in the first step. All else is printed, and fails. (An inference
that can read no image leaves a table that says why; no value here leads to that.)
"""

import gc
import inspect
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, NamedTuple

import fire
import matplotlib.figure  # noqa: F401
import monai.bundle.__main__
import monai.engines
import sklearn.linear_model  # noqa: F401
import torch._dynamo  # which the optimisers import
import torch.utils.tensorboard  # noqa: F401
from helpers import BUNDLES, RECIPES, TASKS, read, tiny_knobs

from dissect_monai.knobs import DERIVED, RULES, is_disabled
from dissect_monai.phantoms.volumes import write_volume_phantoms
from dissect_monai.phantoms.xray import write_xray_phantoms

VALUES = (
    *("0", "1", "5", "-1", "1000000000000", "-1000000000000", "1e12", "0.5", "-0.5", "1e-300", "nan", "inf"),
    *("true", "false", "None", "", "text", "ünï", "cpu", "a file.txt", "no/such/file.pt", "@nothing", "$1/0"),
    *("[]", "[1]", "[0.5,0.5,0.5]", "[16,16,16]", "[-1,-1,-1]", "[1000000000000]", "[None]", "['a','b']"),
    *("[1000000000000,1000000000000,1000000000000]", "{}", "{'a':'b'}"),
    *("@", "@itself", "{'_target_':'torch.nn.Linear'}", "{'_disabled_':True}", "{'_mode_':'debug'}"),
)
WORDS = {"nan", "inf", "true", "false", "text", "cpu"}  # the same to a key that takes any word
STEPS = {"imports", "initialize", "run", "finalize", "checks"}
LIMIT = 30  # seconds of CPU, after which a run counts as one that works
MEMORY = 6 * 2**30
QUICK = {"num_samples": 5, "num_folds": 0, "baselines": False, "patches_per_volume": 1, "report": False}


class Case(NamedTuple):
    """A run with one key."""

    recipe: str
    config: str
    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.recipe}/{self.config} --{self.key} {self.value!r}"


def keys_of(recipe: str, config: str) -> dict[str, Any]:
    """The keys of a config, and what they are."""
    files = RECIPES[recipe] if config == "train" else [RECIPES[recipe][0].with_name(f"{config}.json")]
    merged = {name.lstrip("+"): value for file in files for name, value in read(file).items()}
    return {name: value for name, value in merged.items() if not is_disabled(value) and name not in STEPS}


def cases() -> Iterator[Case]:
    """All kinds of values that the rule of a key takes, one of those that it refuses; one where there is no rule.

    And ids that do not exist.
    """
    turns = count()
    for recipe in RECIPES:
        configs = ("train", "evaluate", "inference") if recipe in {bundle.name for bundle in BUNDLES} else ("train",)
        for config in configs:
            for key in keys_of(recipe, config):
                taken = [value for value in VALUES if is_taken(key, value)]
                refused = [value for value in VALUES if value not in taken]
                words = [value for value in taken if value in WORDS]
                if len(words) == len(WORDS):
                    taken = [value for value in taken if value not in WORDS]
                    taken.append(words[next(turns) % len(words)])
                if refused:
                    taken.append(refused[next(turns) % len(refused)])
                yield from (Case(recipe, config, key, value) for value in taken)
            engine = "train#trainer" if config == "train" else "evaluator"
            for key in ("xqzw", "devise", f"{engine}#xqzw", f"{engine}#max_epoch", "network_def#0"):
                yield Case(recipe, config, key, VALUES[next(turns) % len(VALUES)])


def is_taken(key: str, value: str) -> bool:
    parsed = fire.parser.DefaultParseValue(value)
    rule = {**DERIVED, **RULES}.get(key)
    is_expression = isinstance(parsed, str) and parsed[:1] in ("@", "%", "$")
    return not is_expression and rule is not None and rule.holds(parsed)


class Sweep:
    """Runs in a folder of its own, with data and weights that the first runs make."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "cwd" / "out"
        self.xrays = write_xray_phantoms(folder / "xrays", 24, 16, 16, image_size=32)
        self.volumes = write_volume_phantoms(folder / "volumes", 4, 2, 2, image_size=32, tasks=TASKS)
        self.weights: dict[str, Path] = {}
        inspect.stack()  # which reads every module, as MONAI does in each run
        gc.freeze()  # else each process would copy all that its collector looks at

    def knobs(self, recipe: str, config: str) -> dict[str, Any]:
        own = keys_of(recipe, config)
        data = self.xrays if "modality" not in own else [str(each) for each in self.volumes]
        if recipe.startswith("seg"):
            data = self.volumes[0]
        quick = tiny_knobs(recipe) if config == "train" else QUICK
        given = {name: value for name, value in quick.items() if name in own}
        given |= {"dataset_dir": data, "output_dir": "out"}
        if config != "train":
            given |= {"pretrained": self.trained(recipe), "num_workers": 0}
        return {name: str(value) for name, value in given.items()}

    def trained(self, recipe: str) -> Path:
        if recipe not in self.weights:
            output_dir = self.folder / recipe
            status, said = self.run(recipe, "train", {**self.knobs(recipe, "train"), "output_dir": output_dir}, None)
            assert status == 0, said
            self.weights[recipe] = output_dir / "models" / "model.pt"
        return self.weights[recipe]

    def run(self, recipe: str, config: str, knobs: dict[str, Any], steps: int | None) -> tuple[int, str]:
        """Status and output of a process, which ends after so many steps of a training."""
        files = RECIPES[recipe] if config == "train" else [RECIPES[recipe][0].with_name(f"{config}.json")]
        words = [f"--config_file={[str(file) for file in files]}", *(f"--{name}={knobs[name]}" for name in knobs)]
        cwd, log = self.folder / "cwd", self.folder / "log"
        shutil.rmtree(cwd, ignore_errors=True)
        (cwd / "out").mkdir(parents=True)
        (cwd / "out" / "kept").touch()
        (cwd / "a file.txt").touch()
        if pid := os.fork():
            _, status = os.waitpid(pid, 0)
            said = log.read_text(errors="replace")
            log.unlink()
            return os.waitstatus_to_exitcode(status), said
        os.chdir(cwd)
        for number in (1, 2):
            os.dup2(os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, 2 * LIMIT))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.argv = [monai.bundle.__main__.__file__, "run", *words]
        if steps is not None:
            stop_after_a_step()
        status = 0
        try:
            runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def fault(self, case: Case) -> str | None:
        """What is wrong with how a case ended, or None; and what it said."""
        knobs = {**self.knobs(case.recipe, case.config), case.key: case.value}
        status, said = self.run(case.recipe, case.config, knobs, 1)
        errors = re.findall(r"^error: .*", said, re.MULTILINE)
        left = {str(path.relative_to(self.folder / "cwd")) for path in (self.folder / "cwd").rglob("*")}
        self.outcome = "taken" if status in (0, -signal.SIGXCPU) else "refused"
        if "Traceback" in said:
            return f"traceback: {said.strip().splitlines()[-1]}"
        if status < 0 and self.outcome != "taken":
            return f"killed by {signal.Signals(-status).name}"
        if status > 0 and len(errors) != 1:
            return f"{len(errors)} lines of an error: {said.strip().splitlines()[-1:]}"
        if status > 0 and not said.strip().endswith(errors[0]):
            return f"says more after its error: {said.strip().splitlines()[-1]}"
        if {"out/kept", "a file.txt"} - left:
            return "lost a file"
        table = {"out/eval", "out/eval/domains.csv"} if "#" in case.key else set()
        if status > 0 and (new := left - {"out", "out/kept", "a file.txt"} - table):
            return f"was refused, and left {sorted(new)}"
        return None


def stop_after_a_step() -> None:
    step = monai.engines.SupervisedTrainer._iteration

    def first(*arguments: Any) -> None:
        step(*arguments)
        os._exit(0)

    monai.engines.SupervisedTrainer._iteration = first


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="where to begin")
    parser.add_argument("--only", default="", help="part of RECIPE/CONFIG/KEY")
    parser.add_argument("--report", type=Path, help="JSON of all that is wrong")
    given = parser.parse_args()
    of_name = (case for case in cases() if given.only in f"{case.recipe}/{case.config}/{case.key}")
    chosen = [*islice(of_name, given.first, None, given.every)]
    counts, faults = Counter[str](), {}
    seconds: dict[str, float] = dict.fromkeys((f"{case.recipe}/{case.config}" for case in chosen), 0.0)
    with TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder))
        for case in chosen:
            start = monotonic()
            fault = sweep.fault(case)
            seconds[f"{case.recipe}/{case.config}"] += monotonic() - start
            part = "training" if case.config == "train" else "evaluation and inference"
            counts[f"{part}, {'bad' if fault else sweep.outcome}"] += 1
            if fault:
                faults[str(case)] = fault
                print(f"{case}: {fault}", flush=True)
    for what, number in sorted(counts.items()):
        print(f"{what}: {number}")
    print("seconds:", {name: round(value) for name, value in seconds.items()})
    if given.report:
        given.report.write_text(json.dumps(faults, indent=1))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
