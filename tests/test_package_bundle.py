"""Archives of bundles: what they hold, what they refuse, and that nothing else is needed to run them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, committed_copy, git, read, run_config, write

from dissect_monai.volume_phantoms import write_volume_phantoms

sys.path.insert(0, str(ROOT / "scripts"))
from package_bundle import main, package

BUNDLES = sorted(path.name for path in ROOT.glob("bundles/*"))
XRAYS = {"encoder": "resnet18", "image_size": 32}
VOLUMES = {"pixdim": [12, 12, 12], "patch_size": [16, 16, 16], "init_filters": 8, "iterations_per_epoch": 2}
TINY = {"batch_size": 4, "max_epochs": 1, "warmup_epochs": 0, "num_workers": 0, "amp": False}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return committed_copy(tmp_path / "repository")


@pytest.fixture
def bundle(repository: Path) -> Path:
    """One of them with weights in it."""
    bundle = repository / "bundles" / "seg_finetune_btcv"
    write(bundle / "models" / "model.json", {"in_channels": 1})
    (bundle / "models" / "model.pt").write_bytes(b"weights")
    (bundle / "eval").mkdir()
    (bundle / "eval" / "metrics.csv").write_text("dice,1")
    return bundle


def test_holds_bundle_package_and_weights_in_one_folder_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    path = package(bundle, bundle, tmp_path / "dist")
    assert path.name == "seg_finetune_btcv_v0.1.0.zip"
    with zipfile.ZipFile(path) as archive:
        names = {Path(name) for name in archive.namelist()}
        assert archive.read("seg_finetune_btcv/models/model.pt") == b"weights"
    assert {name.parts[0] for name in names} == {bundle.name}
    inside = {name.relative_to(bundle.name).as_posix() for name in names}
    own = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    modules = {f"dissect_monai/{path.name}" for path in (ROOT / "dissect_monai").glob("*.py")}
    assert inside == own - {"eval/metrics.csv"} | modules


def test_the_same_commit_and_weights_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    first = package(bundle, bundle, tmp_path / "first")
    for file in bundle.rglob("*"):
        os.utime(file, (1e9, 1e9))
    (bundle / "LICENSE").chmod(0o600)
    second = package(bundle, bundle, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()
    digest, name = second.with_name(f"{second.name}.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(second.read_bytes()).hexdigest(), second.name)


def test_a_version_without_a_changelog_entry_is_refused(bundle: Path, tmp_path: Path) -> None:
    metadata = bundle / "configs" / "metadata.json"
    write(metadata, {**read(metadata), "version": "0.2.0"})
    git(bundle, "commit", "--quiet", "--all", "--message", "version")
    with pytest.raises(ValueError, match=r"version 0\.2\.0 of seg_finetune_btcv must have an entry in `changelog`"):
        package(bundle, bundle, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("file", ["bundles/seg_finetune_btcv/configs/train.json", "dissect_monai/new.py"])
def test_what_is_not_committed_is_refused(bundle: Path, tmp_path: Path, file: str) -> None:
    with open(bundle.parent.parent / file, "a") as changed:
        changed.write("\n")
    with pytest.raises(ValueError, match=f"as they are committed, got 1 changed or new files, {file} first"):
        package(bundle, bundle, tmp_path / "dist")


@pytest.mark.parametrize("name", ["model.pt", "model.json"])
def test_weights_must_be_there_with_their_settings(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / "models" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no .*{name}: train it, or give --weights DIR"):
        package(bundle, bundle, tmp_path / "dist")


def test_a_misspelt_bundle_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no bundle cxr_clasify; did you mean cxr_classify\?"):
        main("cxr_clasify", output_dir=tmp_path / "dist")


def from_archive(*arguments: str, cwd: Path) -> str:
    """A command with the installed packages, but nothing of this repository on the path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    command = [sys.executable, "-S", *arguments]  # without `site`, which would add an editable install
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=600, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
def test_from_the_archive_alone_a_bundle_predicts_trains_and_evaluates(
    name: str, repository: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    volumes = read(ROOT / "bundles" / name / "configs" / "train.json").get("pixdim") is not None
    data: Any = str(dataset_dir)
    if volumes:
        tasks = ["abdomen_ct"] if name == "seg_finetune_btcv" else ["abdomen_ct", "head_mr"]
        data = list(map(str, write_volume_phantoms(tmp_path / "volumes", 6, 2, 2, image_size=32, tasks=tasks)))
    knobs = {**TINY, **(VOLUMES if volumes else XRAYS), "dataset_dir": data if len(data) != 1 else data[0]}
    source = ROOT / "bundles" / name / "configs" / "train.json"
    run_config(source, **knobs, output_dir=tmp_path / "weights")
    archive = package(repository / "bundles" / name, tmp_path / "weights", tmp_path / "dist")

    empty = tmp_path / "empty"
    empty.mkdir()
    from_archive(
        "-m", "monai.bundle", "download", "--name", name, "--url", archive.as_uri(), "--bundle_dir", ".", cwd=empty
    )
    folder = empty / name
    where = from_archive("-c", "import dissect_monai; print(dissect_monai.__file__)", cwd=folder)
    assert Path(where.strip()).parent == folder / "dissect_monai"
    run = ("-m", "monai.bundle", "run", "--dataset_dir", str(knobs["dataset_dir"]), "--config_file")
    from_archive(*run, "configs/inference.json", cwd=folder)
    assert list((folder / "eval").iterdir())
    trained = tmp_path / "trained"
    given = [part for knob, value in {**knobs, "output_dir": trained}.items() for part in (f"--{knob}", str(value))]
    from_archive("-m", "monai.bundle", "run", "--config_file", "configs/train.json", *given, cwd=folder)
    from_archive(*run, "configs/evaluate.json", "--output_dir", str(trained), cwd=folder)
    assert (trained / "eval" / "metrics.csv").is_file()
