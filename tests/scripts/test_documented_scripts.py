"""Every documented command of a script runs as it stands, on generated data; a study comes to its first training."""

import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import pytest
import run_experiments
from documented import lines
from helpers import BUNDLES, ROOT, Recipes
from sources import btcv, chexpert, msd, nih, table, volume_folders, write_image

from dissect_monai import read_datalist

COMMANDS = sorted(line for line in lines() if re.match(r"python scripts/(?!gpu/|package_bundle)", line))
LISTS = [line for line in COMMANDS if "make_datalist.py" in line and "--help" not in line]
STUDIES = [line for line in COMMANDS if "run_experiments.py" in line]
JUDGED = [line for line in COMMANDS if "judge_encoders.py" in line]  # tests/scripts/test_judge_encoders.py runs them
Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder that has the scripts; returns what it prints."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return run


def words(line: str) -> list[str]:
    return shlex.split(line)[2:]


@pytest.mark.parametrize("line", LISTS)
def test_makes_a_data_list_that_training_reads(line: str, run: Run, tmp_path: Path) -> None:
    source, place = words(line)[:2]
    folder = tmp_path / place
    if source == "table":
        table(tmp_path, Effusion=[0, 1] * 10).rename(tmp_path / place)
    elif source == "folders":
        names = ("{:08d}_000", "covid_cxnet_{}") if "covid_cxnet" in line else ("p{}_0", "p{}_1")
        for index in range(20):
            write_image(folder / "a" / f"{names[0].format(index)}.png")
            write_image(folder / "b" / f"{names[1].format(index)}.png")
    elif source == "volumes":
        volume_folders(tmp_path / "both")
        (tmp_path / "both" / "images").rename(folder)
        (tmp_path / "both" / "labels").rename(tmp_path / "LABELS")
    else:
        {"nih": nih, "chexpert": chexpert, "btcv": btcv, "msd": msd}[source](folder)
    written = re.findall(r"^wrote (.*)/dataset.json$", run(line), re.MULTILINE)
    datalist = read_datalist(written[0], spatial_dims=3 if source in ("btcv", "msd", "volumes") else 2)
    assert datalist.training
    assert datalist.validation
    if "--subject_pattern" in line:
        pattern = words(line)[words(line).index("--subject_pattern") + 1]
        for item in datalist.items():
            found = re.search(pattern, Path(item["image"]).name)
            assert found is not None
            assert item["subject"] == found[1]


def test_helps_with_every_source(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = (line for line in COMMANDS if "SOURCE --help" in line)
    for source in ("", *{words(each)[0] for each in LISTS}):  # the former is a command of the README
        with pytest.raises(SystemExit, match=r"^0$"):
            run(line.replace("SOURCE", source))
        assert f"make_datalist.py {source}" in capsys.readouterr().out


def test_the_others_run(run: Run, recipe_of: Recipes, tmp_path: Path) -> None:
    (tmp_path / "CLS").symlink_to(recipe_of("cxr_classify").finished)
    for line in COMMANDS:
        if line not in (*LISTS, *STUDIES, *JUDGED) and "--help" not in line:
            assert run(line.replace("BUNDLE", BUNDLES[0].name))


class FirstTraining(Exception):  # noqa: N818
    """A study has called what trains."""


@pytest.mark.parametrize("line", STUDIES)
def test_a_study_comes_to_its_first_training(
    line: str, stand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(command: list[str], *_: object) -> int:
        raise FirstTraining(*command)

    path = ROOT / words(line)[0]
    for name in re.findall(r"\{data\}/([\w/]+)", path.read_text(encoding="utf-8")):
        (tmp_path / "DIR" / name).mkdir(parents=True, exist_ok=True)
    study = run_experiments.read_study(path)
    runs = tmp_path / words(line)[-1] if "--runs" in line else tmp_path / "runs" / path.stem
    for each in (each for chain in run_experiments.plan(study, tmp_path / "DIR", runs) for each in chain):
        for value in each.knobs.values():  # what other studies and commands make
            if str(value).startswith("{runs}"):
                place = Path(os.path.normpath(run_experiments.filled_in(value, each.fields)))
                place.mkdir(parents=True, exist_ok=True)
        each.folder.parent.mkdir(parents=True, exist_ok=True)
    for name in ("scripts", "bundles"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_experiments, "ROOT", tmp_path)
    monkeypatch.setattr(run_experiments, "call", call)
    with pytest.raises(FirstTraining) as first:
        fire.Fire(run_experiments.main, command=words(line))
    assert any("train.json" in word for word in first.value.args)
