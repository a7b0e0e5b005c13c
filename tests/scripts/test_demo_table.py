"""What the demos end with."""

import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import demo_table
import pytest
from torch.utils.tensorboard import SummaryWriter


def log(folder: Path, curves: Mapping[str, list[float]]) -> None:
    with SummaryWriter(folder / "eval") as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values, 1):
                writer.add_scalar(tag, value, step)


def test_the_demo_ends_with_what_was_learnt_and_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bundle in {measure.bundle for measure in demo_table.MEASURES}:
        own = [measure.name for measure in demo_table.MEASURES if measure.bundle == bundle]
        log(tmp_path / bundle, {name: [0.25, 0.5, 0.75] for name in own})
        (tmp_path / bundle / "eval" / "metrics.csv").write_text("".join(f"{name},0.625\n" for name in own))
    monkeypatch.setattr(sys, "argv", ["demo_table.py", str(tmp_path)])  # as the Makefile calls it
    runpy.run_path(demo_table.__file__, run_name="__main__")
    head, *lines = (re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert head == ["bundle", "weights of", "measure", "first", "last"]
    assert lines[1] == ["cxr_classify", "pretrain_vq_ssl", "AUROC, validation", "0.250", "0.750"]
    assert lines[-1] == ["", "Dice of the liver, test", "0.625"]
