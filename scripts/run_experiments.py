"""Run an experiment, recipes × variants × seeds of one bundle, and append its table to results/results.csv.

    python scripts/run_experiments.py scripts/experiments/NAME.json --data DIR [--runs runs/NAME] [--jobs 1 | --only N]

Every run is a call of `monai.bundle run` in a folder of its own, where it leaves its log and, when it has finished,
done.json with the command, the commit and the seconds. Finished runs are kept, all others start anew.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import fire
from fire.decorators import SetParseFn
from study_statistics import StudyError, summarise

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results" / "results.csv"
FIELDS = ("bundle", "recipe", "dataset", "metric", "mean", "std", "n", "commit", "hardware", "date", "command")
CODE = ("dissect_monai", "bundles", "scripts")


class Study(NamedTuple):
    """A study file; its keys are these.

    Values of knobs may hold {data} and {runs} (the folders of the command line), {seed}, {folder} (of the training run)
    and {is_first} (whether the recipe is the first). The seed and `output_dir` are passed to every run. Without
    variants the recipes are trained for other studies, which name their weights as
    {runs}/../STUDY/RECIPE/seed{seed}/models/model.pt.
    """

    bundle: str
    dataset: str  # its name in results.csv
    hardware: str
    seeds: list[int]
    training: dict[str, Any]  # knobs of train.json that all runs share
    recipes: dict[str, dict[str, Any]]  # name → knobs of train.json
    variants_change: str  # "training": each variant is trained; "evaluation": one training, evaluated in each variant
    variants: dict[str, dict[str, Any]]  # name → knobs
    evaluation: dict[str, Any]  # knobs of evaluate.json that all runs share
    titles: Mapping[str, str] = {}  # variant → its title in the README
    columns: Mapping[str, str] = {}  # metric, without the variant → its title; no other is shown
    configs: Mapping[str, list[str]] = {}  # recipe → files instead of the bundle's train.json
    compare: Sequence[Sequence[str]] = ()  # pairs [A, B] of recipes for A - B; if empty, the first with all others
    training_subjects: int | None = None  # with labels, of which the `label_fraction` of a variant draws; for a figure


class Run(NamedTuple):
    """One call of `monai.bundle run`."""

    configs: tuple[Path, ...]  # from the repository's root; later ones override
    folder: Path  # its output_dir
    knobs: dict[str, Any]  # as in the study, templates unfilled
    fields: dict[str, str]  # what the templates stand for

    @property
    def config_file(self) -> str:
        """The argument that names one config, or a list of them."""
        names = [path.as_posix() for path in self.configs]
        return f"--config_file={names[0] if len(names) == 1 else json.dumps(names)}"

    def command(self) -> list[str]:
        """The call, with the templates filled."""
        knobs = {**self.knobs, "seed": self.fields["seed"], "output_dir": str(self.folder)}
        filled = [f"--{name}={filled_in(value, self.fields)}" for name, value in knobs.items()]
        return ["python", "-m", "monai.bundle", "run", self.config_file, *filled]


def read_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises:
        StudyError: if it can't be read, or a key is missing, unknown or senseless.
    """
    try:
        study = Study(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is not a study file: {error}. Its keys are {', '.join(Study._fields)}.") from error
    recipes, number, trains = study.recipes.keys(), study.training_subjects, study.variants_change == "training"
    rules = [
        (trains or study.variants_change == "evaluation", "`variants_change` must be training or evaluation"),
        (
            len({*study.seeds}) == len(study.seeds) > bool(study.variants),
            "`seeds` must hold different numbers, two or more of what is evaluated",
        ),
        (
            recipes and "/" not in "".join([*recipes, *study.variants]),
            "`recipes` and `variants` must hold names of folders, without a slash",
        ),
        (study.variants or not trains, "`variants` must name what is trained, or change evaluation to train recipes"),
        (number is None or (trains and number > 0), "`training_subjects` must be positive, where variants are trained"),
        (all(each in recipes and files for each, files in study.configs.items()), "`configs` must give recipes files"),
        (all(len({*pair} & recipes) == 2 for pair in study.compare), "`compare` must hold pairs of different recipes"),
    ]
    for holds, says in rules:
        if not holds:
            raise StudyError(f"{says}: correct {path}.")
    return study


def plan(study: Study, data: Path, runs: Path) -> list[list[Run]]:
    """The runs of a study, in chains: a training run, then the evaluations of what it trained."""
    own = Path("bundles", study.bundle, "configs")
    trains = study.variants_change == "training"
    # What each chain trains: its folder, its knobs, and the variants that it is evaluated in.
    each_variant = [(name, knobs, [name]) for name, knobs in study.variants.items()]
    trained = each_variant if trains else [("", {}, list(study.variants))]
    chains = []
    for seed, recipe, (name, knobs, variants) in product(study.seeds, study.recipes, trained):
        configs = tuple(map(Path, study.configs.get(recipe, [own / "train.json"])))
        folder = runs / recipe / f"seed{seed}" / name
        fields = {"data": str(data), "runs": str(runs), "seed": str(seed), "folder": str(folder)}
        fields["is_first"] = str(recipe == next(iter(study.recipes)))
        chain = [Run(configs, folder, {**study.training, **study.recipes[recipe], **knobs}, fields)]
        for variant in variants:
            evaluation = {**study.evaluation, **({} if trains else study.variants[variant])}
            evaluated = runs / recipe / f"seed{seed}" / variant / "evaluation"
            chain.append(Run((own / "evaluate.json",), evaluated, evaluation, fields))
        chains.append(chain)
    return chains


def filled_in(value: Any, fields: Mapping[str, str]) -> str:
    """A knob's value as the command line takes it, with its templates filled, in lists, too."""
    if isinstance(value, list):
        return json.dumps([filled_in(item, fields) if isinstance(item, str) else item for item in value])
    text = str(value)
    unknown = [name for name in re.findall(r"{(\w+)}", text) if name not in fields]
    if unknown:
        raise StudyError(f"{text!r} holds {{{unknown[0]}}}: the templates are {', '.join(fields)}.")
    return re.sub(r"{(\w+)}", lambda match: fields[match[1]], text)


def refuse_missing(run: Run) -> None:
    """Refuse a run whose configs, data or weights from another study are not there."""
    for config in run.configs:
        if not (ROOT / config).is_file():
            raise StudyError(f"{config}, by `bundle` or `configs`, must be a file in the repository, and is not there.")
    for knob, value in run.knobs.items():
        for text in value if isinstance(value, list) else [value]:
            path = filled_in(text, run.fields)
            if str(text).startswith(("{data}", "{runs}")) and not Path(path).exists():
                remedy = "give the right --data" if text.startswith("{data}") else "run the study that makes it first"
                raise StudyError(f"`{knob}` of {run.folder} is {path}, which is not there: {remedy}.")


def is_done(run: Run) -> bool:
    """Whether a run has finished; refused if it has with other knobs or configs than the study now gives it."""
    done = run.folder / "done.json"
    if not done.exists():
        return False
    record = json.loads(done.read_text(encoding="utf-8"))
    if record["knobs"] != run.knobs or run.config_file not in shlex.split(record["command"]):
        raise StudyError(
            f"{run.folder} was run with other knobs or configs than the study has now: delete it or change --runs."
        )
    return True


def execute_all(chains: Iterable[Sequence[Run]], jobs: int) -> None:
    """Run chains, `jobs` at a time; after a failure those that run still finish their chain, but no other starts."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}

    def execute_chain(chain: Sequence[Run]) -> None:
        for run in chain:
            if not is_done(run):
                execute(run, environment)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(execute_chain, chain) for chain in chains]):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def execute(run: Run, environment: Mapping[str, str]) -> None:
    """Run in an empty folder, and leave done.json there unless it fails."""
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    commit, dirty = code_state()
    log, start = run.folder / f"{run.configs[0].stem}.log", time.perf_counter()
    status = call(run.command(), log, environment)
    if status:
        raise StudyError(f"{run.folder} failed with status {status}, see {log}: {last_error(log)}")
    seconds = round(time.perf_counter() - start, 1)
    record = {"command": shlex.join(run.command()), "commit": commit, "dirty": dirty, "seconds": seconds}
    content = json.dumps({**record, "knobs": run.knobs}, indent=4)
    (run.folder / "done.json").write_text(content, encoding="utf-8")
    print(f"{log.stem} {run.folder}: {seconds} s", flush=True)


def call(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a Python command from the repository's root, its output in a log, and return its status."""
    with open(log, "w", encoding="utf-8") as file:
        arguments = [sys.executable, *command[1:]]
        return subprocess.run(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode


def last_error(log: Path) -> str:
    """The last error in a log, less those in which MONAI wraps it, or just the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*error: ", line, re.IGNORECASE) and "Failed to" not in line]
    return (errors or lines or ["no output"])[-1]


def code_state() -> tuple[str, bool]:
    """The commit of the code, and whether a tracked file differs from it."""
    try:
        commit, status = (
            subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", *CODE])
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise StudyError(f"each run records its commit, so this must be a git clone: {error}") from error
    return commit, bool(status)


def common_commit(runs: Iterable[Run]) -> str:
    """The commit of all runs, which must be one, with nothing changed."""
    states: dict[tuple[str, bool], Path] = {}  # commit and whether changed → a run of it
    for run in runs:
        done = json.loads((run.folder / "done.json").read_text(encoding="utf-8"))
        states.setdefault((done["commit"][:7], done["dirty"]), run.folder)
    (commit, dirty), *others = states
    if not others and not dirty:
        return commit
    found = "; ".join(f"{state[0]}{' with changes' * state[1]} such as {folder}" for state, folder in states.items())
    raise StudyError(
        f"no row is written, for the runs are not all of one commit ({found}). Delete those to repeat from committed "
        "code and run again."
    )


def append_rows(study: Study, rows: Iterable[Mapping[str, Any]], commit: str, command: str) -> None:
    """Append rows to results/results.csv; readers take the latest row of a bundle, data set, recipe and metric."""
    shared = {"bundle": study.bundle, "dataset": study.dataset, "hardware": study.hardware, "commit": commit}
    shared |= {"date": date.today().isoformat(), "command": command}
    with open(TABLE, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, FIELDS).writerows({**shared, **row, "mean": f"{row['mean']:.4f}"} for row in rows)


def run_study(study_file: Path, data: Path, runs: Path, jobs: int, only: int | None = None) -> None:
    """Run what is missing of a study and append its rows, or one training of it with its evaluations and no row."""
    study = read_study(study_file)
    runs.mkdir(parents=True, exist_ok=True)
    chains = plan(study, data, runs)
    if only is not None and not 0 <= only < len(chains):
        raise StudyError(f"--only must be 0 to {len(chains) - 1}, the trainings of {study_file}, got {only}.")
    every = [run for chain in chains for run in chain]
    for run in every:
        refuse_missing(run)
    print(f"{sum(map(is_done, every))} of {len(every)} runs are done", flush=True)
    if code_state()[1]:
        print(f"warning: {', '.join(CODE)} have uncommitted changes: no row of what runs now will be written")
    execute_all(chains if only is None else [chains[only]], jobs)
    if only is not None:
        return
    commit = common_commit(every)
    if not study.variants:
        print(f"{len(every)} runs are trained, of commit {commit}; no row is written, as the study has no variants")
        return
    rows: list[dict[str, Any]] = []
    for variant in study.variants:
        folders = {
            recipe: [runs / recipe / f"seed{seed}" / variant / "evaluation" for seed in study.seeds]
            for recipe in study.recipes
        }
        rows += summarise(variant, folders, study.compare, with_ap=study.variants_change == "training")
    shown = os.path.relpath(study_file, ROOT)
    append_rows(study, rows, commit, f"python scripts/run_experiments.py {shown} --data DIR")
    print(f"{len(rows)} rows appended to {TABLE}")


def main(study_file: str, data: str, runs: str | None = None, jobs: int = 1, only: int | None = None) -> None:
    """Run what is missing of a study and append its table to results/results.csv.

    Args:
        study_file: a file of scripts/experiments/; its keys are those of `Study` in this script.
        data: folder that holds the data folders.
        runs: folder for the runs, runs/NAME by default; runs/ is ignored by git.
        jobs: how many trainings run side by side. With 2 and more each has OMP_NUM_THREADS=1, because PyTorch takes all
            cores for each of them otherwise, and threads that outnumber the cores wait for each other.
        only: number of the training, from 0, that runs alone with its evaluations, such as in a job of an array; the
            table is written by a later call without it.
    """
    folder = Path(runs) if runs else ROOT / "runs" / Path(study_file).stem
    try:
        run_study(Path(study_file), Path(data).absolute(), folder.absolute(), jobs, only)
    except StudyError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    fire.Fire(SetParseFn(str, "study_file", "data", "runs")(main))  # as they are typed
