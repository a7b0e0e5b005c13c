"""What the demos end with."""

from __future__ import annotations

import re
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


def test_the_demo_ends_with_first_and_last_values_and_scores_on_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in demo_table.STEPS:
        log(tmp_path / step.bundle, {tag: [0.25, 0.5, 0.75] for tag in step.measures})
        scores = "".join(f"{name},0.625\n" for name in step.tested)
        (tmp_path / step.bundle / "eval" / "metrics.csv").write_text(scores)
    demo_table.chain(str(tmp_path))
    head, *lines = (re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert head == ["bundle", "weights of", "measure", "first", "last", "pictures"]
    assert lines[1] == [
        "cxr_classify",
        "pretrain_vq_ssl",
        "AUROC, validation",
        "0.250",
        "0.750",
        f"{tmp_path}/cxr_classify/eval/report.html",
    ]
    assert lines[-1] == ["", "Dice of the liver, test", "0.625"]


def test_the_demo_ends_with_what_pretraining_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(tmp_path, {"knn_auroc_stages": [0.5, 0.625, 0.75]})
    head = "source,features,probe,question,finding,auroc"
    lines = [
        f"{source},stages,linear,findings,macro,0.{digits}" for source, digits in (("pretrained", 8), ("random", 7))
    ]
    (tmp_path / "eval" / "findings.csv").write_text("\n".join([head, *lines]))
    demo_table.gain(str(tmp_path))
    _, knn, linear = (re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert knn[1:] == ["0.500", "0.750"]
    assert linear[1:] == ["0.700", "0.800"]
