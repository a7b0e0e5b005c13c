"""The Dockerfile: its steps, in a fresh virtual environment in place of a container, and the wheel."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, Recipes, committed_copy

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def steps(name: str) -> list[str]:
    return [line.partition(" ")[2] for line in DOCKERFILE.splitlines() if line.startswith(f"{name} ")]


def test_the_base_is_an_argument_and_the_command_no_roots() -> None:
    assert steps("ARG")[0].startswith("BASE=")
    assert steps("FROM") == ["${BASE}"]
    assert [line.split()[0] for line in DOCKERFILE.splitlines()][-2:] == ["USER", "CMD"]
    assert steps("USER")[-1] not in ("root", "0")


@pytest.mark.slow
def test_its_steps_install_the_whole_wheel_and_its_command_trains(recipe_of: Recipes, tmp_path: Path) -> None:
    source, home, venv = committed_copy(tmp_path / "source"), tmp_path / "home", tmp_path / "venv"
    places = {
        "/tmp/": f"{tmp_path}/in/",
        "/opt/venv": str(venv),
        "/out": f"{tmp_path}/out",
        "$PATH": os.environ["PATH"],
    }
    (tmp_path / "in").mkdir()
    home.mkdir()
    variables = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}

    def run(command: str, cwd: Path = home, **more: str) -> None:
        environment = {**os.environ, **variables, **more}
        result = subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr.decode()[-3000:]

    def placed(text: str) -> str:
        return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)

    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    run(f"{sys.executable} -m pip --quiet wheel . --no-build-isolation --wheel-dir dist", source)
    (wheel,) = (source / "dist").iterdir()
    files = {str(path.relative_to(source)) for path in (source / "dissect_monai").rglob("*.*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("dissect_monai/")} == files
    for copied in map(placed, steps("COPY")):
        files, _, target = copied.rpartition(" ")
        run(f"cp -r {files} {home / target}", source)  # an absolute target stays as it is
    (installed,) = [placed(each) for each in steps("RUN") if "pip install" in each]
    create, install = installed.split(" && ")
    run(create)
    # In place of a network: the packages of these tests, without what makes the repository importable.
    (venv / sysconfig.get_path("purelib", vars={"base": str(venv)})).joinpath("tested.pth").write_text(
        sysconfig.get_path("purelib")
    )
    run(install)
    name, _, path = placed(steps("ENV")[0]).partition("=")
    knobs = [part for knob, value in recipe_of("pretrain_vq_ssl").knobs.items() for part in (f"--{knob}", str(value))]
    run(shlex.join([*json.loads(placed(steps("CMD")[0])), *knobs]), **{name: path})
    assert (tmp_path / "out" / "models" / "model.pt").is_file()
