import gzip
import json
from collections.abc import Callable
from pathlib import Path

import compare_commits
import numpy as np
import pytest
import torch
from helpers import ROOT

WEIGHT = torch.tensor([1.0, float("nan"), 0.0])


def leave_outputs(commit: Path) -> Path:
    """What a run leaves, of every kind that is read, and what has times in it."""
    folder = commit / "outputs" / "run"
    (folder / "models").mkdir(parents=True)
    save(folder, weight=WEIGHT, epoch=2)
    (folder / "models" / "model.json").write_text(json.dumps({"pretrained": str(folder)}), encoding="utf-8")
    (folder / "metrics.csv").write_text("subject,dice\na,0.5\nb,1e-3\n", encoding="utf-8")
    np.savez(folder / "scores.npz", names=np.array(["a", "b"]), scores=np.array([0.5, 0.25]))
    (folder / "a.nii.gz").write_bytes(gzip.compress(b"volume", mtime=len(str(commit))))
    for name in ("runs.log", "runs.done", "events.out.tfevents.1"):
        (folder / name).write_text(str(commit), encoding="utf-8")
    return folder


def save(run: Path, **values: object) -> None:
    torch.save(values, run / "models" / "model.pt")


def report(folder: Path) -> list[str]:
    return list(compare_commits.report([folder / "a", folder / "other"]))


def test_equal_outputs_are_equal_wherever_they_lie_and_whenever_they_were_made(tmp_path: Path) -> None:
    leave_outputs(tmp_path / "a")
    leave_outputs(tmp_path / "other")
    assert report(tmp_path) == []
    names = ["a.nii.gz", "metrics.csv", "models/model.json", "models/model.pt", "scores.npz"]
    assert [*compare_commits.list_outputs(tmp_path / "a")] == [f"run/{name}" for name in names]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: (run / "metrics.csv").write_text("subject,dice\na,0.75\nb,1e-3\n"), "csv: 1 of 1 values"),
        (lambda run: np.savez(run / "scores.npz", scores=np.array([0.5, 0.25])), "npz: 1 of 1 values"),
        (lambda run: (run / "a.nii.gz").write_bytes(gzip.compress(b"other")), "gz: 1 of 1 values"),
        (lambda run: save(run, weight=WEIGHT * 2, epoch=2), "pt: 1 of 2 values, such as /weight"),
        (lambda run: save(run, weight=WEIGHT.double(), epoch=2), "1 of 2 values, such as /weight"),
        (lambda run: save(run, weight=WEIGHT[None], epoch=2), "1 of 2 values, such as /weight"),
        (lambda run: save(run, weight=-(-WEIGHT + 0.0), epoch=2), "1 of 2 values, such as /weight"),  # -0.0
        (lambda run: save(run, epoch=[3]), "3 of 3 values, such as /epoch"),
    ],
)  # fmt: skip
def test_says_what_differs(tmp_path: Path, change: Callable[[Path], object], expected: str) -> None:
    leave_outputs(tmp_path / "a")
    change(leave_outputs(tmp_path / "other"))
    (line,) = report(tmp_path)
    assert line.startswith("different: run/")
    assert expected in line


def test_says_which_commit_has_a_file_alone(tmp_path: Path) -> None:
    leave_outputs(tmp_path / "a")
    (leave_outputs(tmp_path / "other") / "metrics.csv").rename(tmp_path / "other" / "outputs" / "table.csv")
    assert report(tmp_path) == ["only in A: run/metrics.csv", "only in B: table.csv"]


def test_refuses_commits_without_outputs(tmp_path: Path) -> None:
    leave_outputs(tmp_path / "a")
    (tmp_path / "other" / "outputs").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"other/outputs must hold what the runs left, got no file. Remove it"):
        report(tmp_path)


def test_runs_configs_that_exist() -> None:
    for call in (call for calls in compare_commits.RUNS.values() for call in calls):
        for config in call.split()[0].split("+"):
            bundle, name = config.split("/")
            assert (ROOT / "bundles" / bundle / "configs" / f"{name}.json").is_file()
