"""Archives of bundles: what they hold, what they refuse, and that nothing else is needed to run them."""

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import package_bundle
import pytest
import torch
from helpers import BUNDLES, ROOT, Recipe, Recipes, committed_copy, git, read, same, write
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    download,
    load,
    onnx_export,
    verify_metadata,
    verify_net_in_out,
)
from package_bundle import card_problems, changelog_problems, commands, main, package

import dissect_monai

NAMES = [path.name for path in BUNDLES]
every_bundle = pytest.mark.parametrize("bundle", NAMES)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return committed_copy(tmp_path / "repository")


@pytest.fixture
def bundle(repository: Path) -> Path:
    """One of them with weights in it."""
    bundle = repository / "bundles" / "seg_finetune_btcv"
    write(bundle / "models" / "model.json", {"in_channels": 1})
    (bundle / "models" / "model.pt").write_bytes(b"weights")
    (bundle / "codes").mkdir()
    (bundle / "codes" / "codebooks.pt").write_bytes(b"codes")
    (bundle / "eval").mkdir()
    (bundle / "eval" / "metrics.csv").write_text("dice,1")
    return bundle


def test_holds_bundle_package_and_weights_in_one_folder_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    path = package(bundle, bundle, tmp_path / "dist")
    assert path.name == "seg_finetune_btcv_v0.2.0.zip"
    with zipfile.ZipFile(path) as archive:
        names = {Path(name) for name in archive.namelist()}
        assert archive.read("seg_finetune_btcv/models/model.pt") == b"weights"
    assert {name.parts[0] for name in names} == {bundle.name}
    inside = {name.relative_to(bundle.name).as_posix() for name in names}
    own = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dissect_monai").rglob("*.*")
        if path.parent.name != "__pycache__"
    }
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


@pytest.mark.parametrize(
    ("given", "kept"), [(["0" * 12] * 2, None), (["0" * 12, "1" * 16], ["1" * 16]), (["1" * 16], ["1" * 16]), ([], [])]
)
def test_digests_of_subjects_that_can_be_guessed_are_left_out(
    bundle: Path, tmp_path: Path, given: list[str], kept: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write(bundle / "models" / "model.json", {"in_channels": 1, "trained_on": given, "seed": 0})
    with zipfile.ZipFile(package(bundle, bundle, tmp_path / "dist")) as archive:
        found = archive.read("seg_finetune_btcv/models/model.json")
    expected = {"in_channels": 1, "seed": 0} | ({} if kept is None else {"trained_on": kept})
    assert json.loads(found) == expected
    assert (found == settings.read_bytes()) == (given == kept)
    assert ("in a form that can be guessed" in capsys.readouterr().err) == (given != kept)


def test_a_version_without_a_changelog_entry_is_refused(bundle: Path, tmp_path: Path) -> None:
    metadata = bundle / "configs" / "metadata.json"
    write(metadata, {**read(metadata), "version": "0.3.0"})
    git(bundle, "commit", "--quiet", "--all", "--message", "version")
    with pytest.raises(ValueError, match=r"version 0\.3\.0 of seg_finetune_btcv must have an entry in `changelog`"):
        package(bundle, bundle, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("file", ["bundles/seg_finetune_btcv/configs/train.json", "dissect_monai/data/new.py"])
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


def test_outside_a_repository_git_says_why(tmp_path: Path) -> None:
    write(tmp_path / "bundles" / "a" / "configs" / "metadata.json", {"version": "1", "changelog": {"1": "first"}})
    with pytest.raises(ValueError, match="are packaged from a git repository, and git says: fatal: not a git"):
        package(tmp_path / "bundles" / "a", tmp_path, tmp_path / "dist")


def test_a_misspelt_bundle_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no bundle cxr_clasify; did you mean cxr_classify\?"):
        main("cxr_clasify", output_dir=tmp_path / "dist")


# ---- ready to be published ---------------------------------------------------------------------------------------


@every_bundle
def test_model_cards_are_complete(bundle: str) -> None:
    assert list(card_problems(ROOT / "bundles" / bundle)) == []


def test_what_a_model_card_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("# A bundle\n\n## Train\n", encoding="utf-8")
    said = "\n".join(card_problems(tmp_path))
    for lack in ("`## Limits`", "Not a medical device", "LICENSE", "docs/data_license.txt"):
        assert lack in said
    assert "## Train" not in said


@pytest.mark.parametrize(
    ("changelog", "problem"),
    [
        ("## 1.2.0 – 2026-01-31\n", ""),
        ("## 1.2.0 – unreleased\n", "got `## 1.2.0 – unreleased`"),
        ("## 1.1.0 – 2026-01-31\n", "must have an entry for 1.2.0"),
    ],
)
def test_the_changelog_must_name_version_and_date(changelog: str, problem: str) -> None:
    found = list(changelog_problems(f"# Changelog\n\n{changelog}", "1.2.0"))
    assert len(found) == bool(problem)
    assert problem in "".join(found)


def test_package_changelog_and_citation_have_one_version() -> None:
    changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    found = changelog_problems(changelog, dissect_monai.__version__)
    assert not [problem for problem in found if "must have an entry" in problem]
    assert f"\nversion: {dissect_monai.__version__}\n" in citation


def test_all_problems_are_named_after_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def packaged(bundle: Path, weights: Path, output_dir: Path) -> Path:
        if bundle.name == "cxr_classify":
            raise FileNotFoundError("cxr_classify has no weights")
        return write(output_dir / f"{bundle.name}.zip", {})

    monkeypatch.setattr(package_bundle, "package", packaged)
    monkeypatch.setattr(package_bundle, "changelog_problems", lambda changelog, version: ["no date"])
    with pytest.raises(SystemExit, match=r"(?s)not ready to be published:.*no date.*cxr_classify has no weights"):
        package_bundle.main("release", output_dir=tmp_path)
    printed = capsys.readouterr().out
    assert "pretrain_vq_ssl.zip" in printed
    assert "cxr_classify" not in printed


def test_the_wheel_of_a_release_is_whole_and_of_the_committed_code(repository: Path, tmp_path: Path) -> None:
    version, dist = dissect_monai.__version__, tmp_path / "dist"
    wheel, source = (dist / name for name in package_bundle.distributions(version))

    def problems() -> str:
        return "\n".join(package_bundle.wheel_problems(dist, version, repository))

    assert problems().count("is missing: `make dist`") == 2
    dist.mkdir()
    source.write_bytes(b"source")
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in package_bundle.git(repository, "ls-files", "dissect_monai"):
            archive.write(repository / path, path)
    assert problems().count("has not the digest") == 2
    main("digests", output_dir=dist)
    assert problems() == ""
    (repository / "dissect_monai" / "common.py").write_text("# changed", encoding="utf-8")
    assert problems() == f"{wheel} does not hold dissect_monai as it is committed: `make dist`"


def test_the_commands_name_version_and_folder() -> None:
    version = read(ROOT / "bundles" / "cxr_classify" / "configs" / "metadata.json")["version"]
    unzip, hub, zoo, ngc = commands("cxr_classify", version, Path("dist/a.zip"))
    assert unzip == "unzip -q dist/a.zip -d unpacked"
    assert "cp -r unpacked/cxr_classify" in zoo
    assert "rm -r MODEL_ZOO/models/cxr_classify/dissect_monai" in zoo
    assert f"cxr_classify:{version} --source unpacked/cxr_classify" in ngc
    assert f"--version {version}" in hub


def pins(path: Path) -> dict[str, str]:
    """Version of each package, with nothing else in its line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


@every_bundle
def test_metadata_name_the_versions_that_are_tested(bundle: str) -> None:
    tested = pins(ROOT / "constraints.txt")
    metadata = read(ROOT / "bundles" / bundle / "configs" / "metadata.json")
    required = dict(metadata["required_packages_version"])
    assert required.pop("dissect-monai") == dissect_monai.__version__  # the wheel, which a zoo without a copy installs
    named = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
        **required,
    }
    assert {name.lower(): version for name, version in named.items()}.items() <= tested.items()


def test_monai_label_is_tested_with_the_same_versions() -> None:
    tested = pins(ROOT / "constraints.txt")
    for name in ("requirements.txt", "no_dependencies.txt"):
        shared = {each: version for each, version in pins(ROOT / "scripts" / "label" / name).items() if each in tested}
        assert shared.items() - {("jsonschema", "3.2.0"), ("pydicom", "2.4.5")} <= tested.items()


class Unpacked(NamedTuple):
    """A bundle as `download` leaves it, in a folder that was empty."""

    folder: Path
    recipe: Recipe

    @property
    def files(self) -> dict[str, str]:
        """What MONAI's commands need to know of it."""
        configs = {"meta_file": "metadata", "config_file": "inference"}
        paths = {key: str(self.folder / "configs" / f"{name}.json") for key, name in configs.items()}
        return {**paths, "bundle_root": str(self.folder)}


@pytest.fixture(scope="module", params=NAMES)
def unpacked(request: pytest.FixtureRequest, recipe_of: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    work, recipe = tmp_path_factory.mktemp(request.param), recipe_of(request.param)
    repository = committed_copy(work / "repository")
    archive = package(repository / "bundles" / recipe.name, recipe.finished, work / "dist")
    download(recipe.name, url=archive.as_uri(), bundle_dir=str(work / "empty"), progress=False)
    return Unpacked(work / "empty" / recipe.name, recipe)


def command(*arguments: str, cwd: Path) -> str:
    """A command with the installed packages, but nothing of this repository on the path."""
    result = subprocess.run(
        [sys.executable, "-S", *arguments],  # without `site`, which would add an editable install
        cwd=cwd, capture_output=True, encoding="utf-8", timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": sysconfig.get_paths()["purelib"]},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_from_the_archive_alone_a_bundle_predicts_trains_and_evaluates(unpacked: Unpacked, tmp_path: Path) -> None:
    folder, recipe = unpacked
    data, out = recipe.knobs["dataset_dir"], str(tmp_path)
    runs = [
        {"config_file": "configs/inference.json", "dataset_dir": data},
        {"config_file": "configs/train.json", **recipe.knobs, "output_dir": out},
        {"config_file": "configs/evaluate.json", "dataset_dir": data, "output_dir": out, "num_samples": 5},
    ]
    script = "import sys, json, dissect_monai; from monai.bundle import run; print(dissect_monai.__file__)\n"
    script += "for knobs in json.loads(sys.argv[1]): run(**knobs)"
    where = command("-c", script, json.dumps(runs), cwd=folder).splitlines()[0]
    assert Path(where).parent == folder / "dissect_monai"
    assert list((folder / "eval").iterdir())
    assert (tmp_path / "models" / "model.pt").is_file()
    assert (tmp_path / "eval" / "metrics.csv").is_file()


@pytest.mark.slow
def test_it_passes_what_the_model_zoo_verifies(unpacked: Unpacked) -> None:
    folder, files = unpacked.folder, unpacked.files
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt"):
        assert (folder / name).is_file(), name
    metadata = read(folder / "configs" / "metadata.json")
    assert metadata["version"] in metadata["changelog"]
    verify_metadata(meta_file=files["meta_file"], filepath=str(ROOT / "tests" / "meta_schema_20240725.json"))
    workflow = ConfigWorkflow(files["config_file"], workflow_type="infer", logging_file=False, bundle_root=str(folder))
    workflow.initialize()
    assert workflow.check_properties() == []
    verify_net_in_out("network_def", device="cpu", **files)


@pytest.mark.slow
def test_what_is_loaded_and_exported_gives_what_the_network_gives(unpacked: Unpacked, tmp_path: Path) -> None:
    import onnxruntime

    folder, files, weights = unpacked.folder, unpacked.files, unpacked.folder / "models" / "model.pt"
    parser = ConfigParser()
    parser.read_config(files["config_file"])
    parser.update({"bundle_root": files["bundle_root"], "dataset_dir": unpacked.recipe.knobs["dataset_dir"]})
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.as_tensor(parser.get_parsed_content("dataset")[0]["image"])[None]
    image = image[(..., *(slice(16) for _ in range(3)))] if image.ndim == 5 else image  # a window of a volume
    with torch.no_grad():
        expected = network(image)

    loading = {"source": "monaihosting", "workflow_type": "inference"}
    loaded = load(folder.name, bundle_dir=str(folder.parent), **loading).cpu()
    assert same(dict(loaded.state_dict()), dict(network.state_dict()))
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(weights), **files)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), expected, rtol=0, atol=1e-4)
    shape = list(image.shape)
    onnx_export(
        "network_def", filepath=str(tmp_path / "model.onnx"), ckpt_file=str(weights), input_shape=shape, **files
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(exported, expected.numpy(), rtol=0, atol=1e-4)
