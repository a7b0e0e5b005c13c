from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "scripts"))
compare_commits = importlib.import_module("compare_commits")


def leave_outputs(commit: Path) -> Path:
    """What a run leaves, of every kind that is read."""
    folder = commit / "outputs" / "run"
    (folder / "models").mkdir(parents=True)
    torch.save({"weight": torch.tensor([1.0, float("nan")]), "epoch": 2}, folder / "models" / "model.pt")
    (folder / "models" / "model.json").write_text(json.dumps({"pretrained": str(folder)}), encoding="utf-8")
    (folder / "metrics.csv").write_text("subject,dice\na,0.5\nb,1e-3\n", encoding="utf-8")
    np.savez(folder / "scores.npz", names=np.array(["a", "b"]), scores=np.array([0.5, 0.25]))
    (folder / "a.nii.gz").write_bytes(gzip.compress(b"volume"))
    (folder / "a.png").write_bytes(b"picture")
    (folder / "0.log").write_text(str(commit), encoding="utf-8")
    for suffix in ("", ".resumed"):
        with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
            writer.add_scalar("loss", 0.5, 1)
    return folder


def lines(first: Path, second: Path) -> list[str]:
    return list(compare_commits.report([first, second]))


def test_equal_outputs_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    leave_outputs(tmp_path / "a")
    leave_outputs(tmp_path / "b")
    found = lines(tmp_path / "a", tmp_path / "b")
    names = ["*.gz", "*.png", "events", "metrics.csv", "models/model.json", "models/model.pt", "scores.npz"]
    assert found == [f"equal: run/{name}" for name in names]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda run: (run / "metrics.csv").write_text("subject,dice\na,0.75\nb,1e-3\n"),
            "metrics.csv: 1 of 1 values, the content by 0.25",
        ),
        (
            lambda run: (run / "metrics.csv").write_text("subject,dice\na,\n"),
            "metrics.csv: 1 of 1 values, the content by inf",
        ),
        (
            lambda run: torch.save(
                {"weight": torch.tensor([1.5, float("nan")]), "epoch": 2}, run / "models" / "model.pt"
            ),
            "models/model.pt: 1 of 2 values, /weight by 0.5",
        ),
        (
            lambda run: torch.save(
                {"weight": torch.tensor([1.0, float("nan")]).double(), "epoch": 2}, run / "models" / "model.pt"
            ),
            "models/model.pt: 1 of 2 values, /weight by 0",
        ),
        (
            lambda run: torch.save({"epoch": 2}, run / "models" / "model.pt"),
            "models/model.pt: 1 values in one commit alone, such as /weight",
        ),
        (
            lambda run: (run / "a.nii.gz").write_bytes(gzip.compress(b"other")),
            "*.gz: 1 of 1 values, the content by inf",
        ),
    ],
)
def test_says_what_differs(tmp_path: Path, change: Callable[[Path], object], expected: str) -> None:
    leave_outputs(tmp_path / "a")
    change(leave_outputs(tmp_path / "b"))
    assert [line for line in lines(tmp_path / "a", tmp_path / "b") if not line.startswith("equal")] == [
        f"different: run/{expected}"
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (torch.tensor(float("nan")), torch.tensor(float("nan")), True),
        (torch.tensor(1.0).expand(1), torch.ones(1), True),
        (torch.ones(2, 3).T, torch.ones(3, 2), True),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.zeros(1), -torch.zeros(1), False),
        (torch.zeros(1), torch.zeros(1, 1), False),
        (torch.zeros(1), "0", False),
    ],
)
def test_tensors_are_equal_bit_for_bit(first: torch.Tensor, second: torch.Tensor | str, expected: bool) -> None:
    assert compare_commits.is_equal(first, second) == expected


def test_says_which_commit_has_a_file_alone(tmp_path: Path) -> None:
    leave_outputs(tmp_path / "a")
    (leave_outputs(tmp_path / "b") / "metrics.csv").rename(tmp_path / "b" / "outputs" / "table.csv")
    found = lines(tmp_path / "a", tmp_path / "b")
    assert {"only in A: run/metrics.csv", "only in B: table.csv"} <= set(found)


@pytest.mark.parametrize("call", [call for calls in compare_commits.RUNS.values() for call in calls])
def test_runs_configs_that_exist(call: str) -> None:
    configs, *_ = call.split()
    for config in configs.split("+"):
        bundle, name = config.split("/")
        assert (ROOT / "bundles" / bundle / "configs" / f"{name}.json").is_file()
