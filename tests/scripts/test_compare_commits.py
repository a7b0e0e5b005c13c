import gzip
import json
from collections.abc import Callable
from pathlib import Path

import compare_commits
import numpy as np
import pytest
import torch
from helpers import ROOT
from torch.utils.tensorboard import SummaryWriter

NAN = float("nan")


def leave_outputs(commit: Path) -> Path:
    """What a run leaves, of every kind that is read."""
    folder = commit / "outputs" / "run"
    (folder / "models").mkdir(parents=True)
    torch.save({"weight": torch.tensor([1.0, NAN, 0.0]), "epoch": 2}, folder / "models" / "model.pt")
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


def report(folder: Path) -> list[str]:
    return list(compare_commits.report([folder / "a", folder / "b"]))


def test_equal_outputs_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    leave_outputs(tmp_path / "a")
    leave_outputs(tmp_path / "b")
    assert report(tmp_path) == []
    names = ["a.nii.gz", "a.png", "events", "metrics.csv", "models/model.json", "models/model.pt", "scores.npz"]
    assert [*compare_commits.list_outputs(tmp_path / "a")] == [f"run/{name}" for name in names]


def save(run: Path, **values: object) -> None:
    torch.save(values, run / "models" / "model.pt")


def log(run: Path) -> None:
    with SummaryWriter(str(run), filename_suffix=".later") as writer:
        writer.add_scalar("loss", 0.75, 2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: (run / "metrics.csv").write_text("subject,dice\na,0.75\nb,1e-3\n"), "csv: 1 of 3 values, /2"),
        (lambda run: (run / "metrics.csv").write_text("subject,dice\n"), "metrics.csv: 2 values in one commit alone"),
        (lambda run: save(run, weight=torch.tensor([1.5, NAN, 0.0]), epoch=2), "pt: 1 of 2 values, /weight by 0.5"),
        (lambda run: save(run, weight=torch.tensor([1.0, 2.0, 0.0]), epoch=2), "pt: 1 of 2 values, /weight by inf"),
        (lambda run: save(run, weight=torch.tensor([1.0, NAN, 0.0]).double(), epoch=2), "1 of 2 values, /weight by 0"),
        (lambda run: save(run, weight=torch.tensor([1.0, NAN, 0.0])[None], epoch=2), "1 of 2 values, /weight by inf"),
        (lambda run: save(run, weight=torch.tensor([1.0, NAN, -0.0]), epoch=2), "1 of 2 values, /weight by 0"),
        (lambda run: save(run, weight="1.0", epoch=2), "1 of 2 values, /weight by inf"),
        (lambda run: save(run, epoch=3), "1 values in one commit alone, such as /weight; 1 of 1 values, /epoch by 1"),
        (lambda run: (run / "a.nii.gz").write_bytes(gzip.compress(b"other")), "gz: 1 of 1 values, the content by"),
        (log, "events: 1 of 1 values, /loss by inf"),
    ],
)  # fmt: skip
def test_says_what_differs(tmp_path: Path, change: Callable[[Path], object], expected: str) -> None:
    leave_outputs(tmp_path / "a")
    change(leave_outputs(tmp_path / "b"))
    (line,) = report(tmp_path)
    assert line.startswith("different: run/")
    assert expected in line


def test_says_which_commit_has_a_file_alone(tmp_path: Path) -> None:
    leave_outputs(tmp_path / "a")
    (leave_outputs(tmp_path / "b") / "metrics.csv").rename(tmp_path / "b" / "outputs" / "table.csv")
    assert report(tmp_path) == ["only in A: run/metrics.csv", "only in B: table.csv"]


def test_refuses_commits_without_outputs(tmp_path: Path) -> None:
    (leave_outputs(tmp_path / "a") / "0.done").touch()
    (tmp_path / "b" / "outputs" / "run").mkdir(parents=True)
    (tmp_path / "b" / "outputs" / "run" / "0.done").touch()
    with pytest.raises(SystemExit, match=r"b/outputs must hold what the runs left, got no file. Remove it"):
        report(tmp_path)


@pytest.mark.parametrize("call", [call for calls in compare_commits.RUNS.values() for call in calls])
def test_runs_configs_that_exist(call: str) -> None:
    configs, *_ = call.split()
    for config in configs.split("+"):
        bundle, name = config.split("/")
        assert (ROOT / "bundles" / bundle / "configs" / f"{name}.json").is_file()
