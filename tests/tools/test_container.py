"""The Dockerfile: its steps, in a fresh virtual environment in place of a container."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers import ROOT, Recipes, committed_copy

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = [tuple(line.split(maxsplit=1)) for line in DOCKERFILE.splitlines() if line and line[0] not in "# "]


def steps(name: str) -> list[str]:
    return [rest for step, rest in STEPS if step == name]


def shell(command: str, cwd: Path, **variables: str) -> None:
    result = subprocess.run(
        ["bash", "-c", command], cwd=cwd, capture_output=True, encoding="utf-8", timeout=600, check=False,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PYTHONPATH": "", **variables},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_base_is_an_argument_and_the_user_no_root() -> None:
    assert STEPS[0][1].startswith("BASE=")
    assert steps("FROM") == ["${BASE}"]
    assert steps("USER")[-1] not in ("root", "0")
    assert [step for step, _ in STEPS][-2:] == ["USER", "CMD"]


@pytest.mark.parametrize(
    "path", ["bundles/a/models/model.pt", "bundles/a/phantoms/1.png", "data/1.dcm", ".venv/bin/pip"]
)
def test_no_data_and_no_weights_are_sent_to_the_builder(path: str) -> None:
    first, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    patterns = [line.removeprefix("!") for line in kept]
    assert not any(fnmatch(path, pattern) or fnmatch(path, f"{pattern}/*") for pattern in patterns)
    assert any(fnmatch("bundles/a/configs/train.json", f"{pattern}/*") for pattern in patterns)


@pytest.mark.slow
def test_its_steps_install_the_wheel_and_its_command_trains(recipe_of: Recipes, tmp_path: Path) -> None:
    source = committed_copy(tmp_path / "source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    build = "-m pip --quiet wheel . --no-build-isolation --wheel-dir dist"
    shell(f"{sys.executable} {build}", source)
    places = {"/tmp/": f"{tmp_path}/in/", "/opt/venv": f"{tmp_path}/venv", "/out": f"{tmp_path}/out"}
    home = tmp_path / "home"
    for folder in (home, tmp_path / "in", tmp_path / "out"):
        folder.mkdir()

    def placed(text: str) -> str:
        return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)

    for copied in steps("COPY"):
        files, _, target = placed(copied).rpartition(" ")
        shell(f"cp -r {files} {home / target}", source)  # an absolute target stays as it is
    (install,) = [each for each in steps("RUN") if "pip install" in each]
    create, install = placed(install).split(" && ")
    shell(create, home)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # In place of a network: the packages of these tests, but not the package itself.
    (packages / "tested.pth").write_text(sysconfig.get_paths()["purelib"])
    shell(install, home)
    (variables,) = steps("ENV")
    name, _, path = placed(variables).partition("=")
    command = json.loads(placed(steps("CMD")[0]))
    knobs = [part for knob, value in recipe_of("pretrain_vq_ssl").knobs.items() for part in (f"--{knob}", str(value))]
    found = path.replace("$PATH", os.environ["PATH"])
    shell(
        f"python -c 'import dissect_monai as d; assert d.__file__.startswith(\"{tmp_path}/venv\")'",
        home,
        **{name: found},
    )
    shell(shlex.join([*command, *knobs]), home, OMP_NUM_THREADS="1", **{name: found})
    assert (tmp_path / "out" / "models" / "model.pt").is_file()
