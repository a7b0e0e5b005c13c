"""Every knob is tried with values of every kind, by tests/sweep.py: each is taken, or refused in one line."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT


def sweep(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(ROOT / "tests" / "sweep.py"), *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_one_of_many_values_is_taken_or_refused_in_one_line() -> None:
    said = sweep("--every", "307")
    assert "training, refused" in said
    assert "evaluation and inference" in said


@pytest.mark.long
def test_all_values_are_taken_or_refused_in_one_line() -> None:
    assert "training, taken" in sweep()
