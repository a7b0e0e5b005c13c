"""Check that two commits compute the same: run all bundles in both, and compare what the runs leave, bit for bit.

    python scripts/compare_commits.py COMMIT [COMMIT] --data_dir DIR [--output_dir runs/compare]

Each commit is checked out in a git worktree of its own and runs there in one thread on the CPU: on phantoms with all
defaults, and for two epochs on DIR/cxr_nih64, mr_chaos, ct_btcv and mr_hippocampus with other knobs. Finished runs are
kept, so the same commit twice just runs it. The exit status is 1 if any file differs. Logs and the event files of
TensorBoard, which hold times, are not compared.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from fire.decorators import SetParseFn

ROOT = Path(__file__).resolve().parent.parent
VQ, CLASSIFY, HSSL, SEG = "pretrain_vq_ssl", "cxr_classify", "hssl_multidomain", "seg_finetune_btcv"
XRAYS = "--num_workers 0 --dataset_dir {data}/cxr_nih64"
VOLUMES = "--num_workers 0 --dataset_dir ['{data}/mr_chaos','{data}/ct_btcv','{data}/mr_hippocampus']"
LABELLED = "--num_workers 0 --dataset_dir {data}/mr_chaos"
EPOCHS = "--max_epochs 2 --val_interval 1 --log_interval 2"
PATCHES = "--iterations_per_epoch 8 --pixdim [4,4,5] --patch_size [32,32,16] --init_filters 8 --hidden_dim 64"
PRETRAINED = "--pretrained ../outputs/{}/models/model.pt"

# Folder of the outputs → calls of `monai.bundle run` that write there: the config, or two joined by +, and the knobs.
RUNS = {
    "phantoms_vq": [f"{VQ}/train", f"{VQ}/evaluate", f"{VQ}/inference"],
    "phantoms_classify": [f"{CLASSIFY}/train", f"{CLASSIFY}/evaluate", f"{CLASSIFY}/inference"],
    "phantoms_hssl": [f"{HSSL}/train", f"{HSSL}/evaluate", f"{HSSL}/inference"],
    "phantoms_seg": [f"{SEG}/train", f"{SEG}/evaluate", f"{SEG}/inference"],
    "phantoms_vq_volumes": [f"{VQ}/train+{VQ}/volumes", f"{HSSL}/evaluate"],
    "xrays_vq": [
        f"{VQ}/train {XRAYS} {EPOCHS} --encoder resnet18 --image_size 64 --num_embeddings 64 --hidden_dim 256 "
        "--metric euclidean --fusion attention",
        f"{VQ}/evaluate {XRAYS} --shortcut view --num_folds 3",
        f"{VQ}/inference {XRAYS} --output_format npz --codes true",
    ],
    "xrays_classify": [
        f"{CLASSIFY}/train {XRAYS} {EPOCHS} {PRETRAINED.format('xrays_vq')} --label_fraction 0.5 "
        "--class_balance weighted",
        f"{CLASSIFY}/evaluate {XRAYS} --temperature_scaling true",
        f"{CLASSIFY}/inference {XRAYS} --calibration ../outputs/xrays_classify/eval/calibration.json --overlays top",
    ],
    "xrays_probe": [
        f"{CLASSIFY}/train {XRAYS} {EPOCHS} {PRETRAINED.format('xrays_vq')} --mode linear_probe",
        f"{CLASSIFY}/evaluate {XRAYS}",
    ],
    "volumes_hssl": [
        f"{HSSL}/train {VOLUMES} {EPOCHS} {PATCHES} --mask_size 4 --dense_weight 1",
        f"{HSSL}/evaluate {VOLUMES} --patches_per_volume 2",
        f"{HSSL}/inference {LABELLED}",
    ],
    "volumes_vq": [
        f"{VQ}/train+{VQ}/volumes {VOLUMES} {EPOCHS} {PATCHES} --num_embeddings 64",
        f"{HSSL}/evaluate {VOLUMES} --patches_per_volume 2",
    ],
    "volumes_seg": [
        f"{SEG}/train {LABELLED} {EPOCHS} {PRETRAINED.format('volumes_hssl')} --iterations_per_epoch 8 "
        "--freeze_epochs 1 --deep_supervision 1 --fold 0 --label_fraction 0.5",
        f"{SEG}/evaluate {LABELLED} --largest_only all",
        f"{SEG}/inference {LABELLED}",
    ],
}


def git(*arguments: str) -> str:
    """What a git command prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def run_commit(commit: str, data: Path, folder: Path) -> None:
    """Run what is missing of a commit, in folder/code, and leave the outputs in folder/outputs."""
    code = folder / "code"
    if not code.exists():
        git("worktree", "add", "--force", "--detach", str(code), commit)
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    where = [sys.executable, "-c", "import dissect_monai; print(dissect_monai.__file__)"]
    package = Path(subprocess.check_output(where, cwd=code, env=environment, text=True).strip())
    if not package.is_relative_to(code):
        raise SystemExit(f"error: the package of {commit} must be imported from {code}, got {package}.")
    for name, calls in RUNS.items():
        output = folder / "outputs" / name
        if (output / "runs.done").exists():
            continue
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        with open(output / "runs.log", "w", encoding="utf-8") as log:
            for call in calls:
                print(f"{folder.name} {name} {call.split()[0]}", flush=True)
                if subprocess.run(
                    command(call, name, data), cwd=code, env=environment, stdout=log, stderr=log
                ).returncode:
                    raise SystemExit(f"error: {call.split()[0]} of {name} failed in {commit}, see {log.name}.")
        (output / "runs.done").touch()


def command(call: str, name: str, data: Path) -> list[str]:
    """The command of a call; its outputs are named from the worktree, so that they read the same for each commit."""
    configs, *knobs = call.split()
    files = ["bundles/{}/configs/{}.json".format(*each.split("/")) for each in configs.split("+")]
    knobs = [f"--config_file={json.dumps(files)}", f"--output_dir=../outputs/{name}", *knobs]
    return [sys.executable, "-m", "monai.bundle", "run", *(knob.replace("{data}", str(data)) for knob in knobs)]


def list_outputs(folder: Path) -> dict[str, Path]:
    """Files that the runs of a commit left, by name."""
    outputs = folder / "outputs"
    files = [each for each in sorted(outputs.rglob("*")) if each.is_file() and each.suffix not in (".log", ".done")]
    if not files:
        raise SystemExit(f"error: {outputs} must hold what the runs left, got no file. Remove it, and run them again.")
    return {path.relative_to(outputs).as_posix(): path for path in files if "tfevents" not in path.name}


def read_file(path: Path, folder: Path) -> dict[str, bytes]:
    """The values of a file by name, or all of it, in which the folder of the commit is left out."""
    if path.suffix == ".pt":
        return dict(leaves(torch.load(path, map_location="cpu", weights_only=True)))
    content = path.read_bytes()
    if path.suffix == ".gz":
        return {"the content": gzip.decompress(content)}  # the header has the time
    return {"the content": content.replace(str(folder).encode(), b"FOLDER")}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, bytes]]:
    """The values in a nested one, bit for bit, with their names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        yield from leaves(dict(enumerate(value)), name)
    elif isinstance(value, torch.Tensor):
        yield name, f"{value.dtype} {value.shape} ".encode() + value.numpy().tobytes()
    else:
        yield name, repr(value).encode()


def report(folders: Sequence[Path]) -> Iterator[str]:
    """A line for each file that differs between two commits, given their folders."""
    first, second = map(list_outputs, folders)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            yield f"only in {'A' if name in first else 'B'}: {name}"
            continue
        one, other = (read_file(files[name], folder) for files, folder in zip((first, second), folders, strict=True))
        every = sorted(one.keys() | other.keys())
        if differ := [each for each in every if one.get(each) != other.get(each)]:
            yield f"different: {name}: {len(differ)} of {len(every)} values, such as {differ[0]}"


def main(first: str, second: str = "HEAD", *, data_dir: str, output_dir: str | None = None) -> None:
    """Run all bundles in two commits and compare what they leave, a line for each file that differs.

    Args:
        first: a commit, A in what is printed.
        second: another, B; changes that are not committed are not seen.
        data_dir: folder that holds cxr_nih64, mr_chaos, ct_btcv and mr_hippocampus, each with a dataset.json.
        output_dir: folder for worktrees and outputs, runs/compare by default; runs/ is ignored by git.
    """
    data = Path(data_dir).absolute()
    for name in re.findall(r"{data}/(\w+)", str(RUNS)):
        if not (data / name / "dataset.json").is_file():
            raise SystemExit(f"error: `--data_dir` must hold {name}/dataset.json, got {data}.")
    parent = Path(output_dir or ROOT / "runs" / "compare").resolve()
    commits = [git("rev-parse", "--verify", f"{commit}^{{commit}}") for commit in (first, second)]
    folders = [parent / commit[:12] for commit in commits]
    for commit, folder in zip(commits, folders, strict=True):
        run_commit(commit, data, folder)
    lines = list(report(folders))
    print("\n".join(lines) or f"all {len(list_outputs(folders[0]))} files are equal")
    sys.exit(bool(lines))


if __name__ == "__main__":
    fire.Fire(SetParseFn(str)(main))
