"""Every command of every README, page of the docs and Makefile runs, found by parsing: on small data."""

import ast
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from documented import RUNS, lines
from export_weights import main as export_weights
from helpers import ROOT, Recipe, Recipes, edited, read, small_segresnet, started, tiny_knobs

from dissect_monai import build_encoder, write_xray_phantoms
from dissect_monai.networks.weights import save_weights

ELSEWHERE = {  # commands that do not run here, by how they begin, and why
    r"make ": "makes an environment over the network; .ci/run calls lint, type, docs, test and label, and the bundles' "
    "lines of the others run here",
    r"source |export |SITE=|cp |ln |cd dist |cd DIR|sha256sum |unzip |mkdir |rm -r ": "prepares another command",
    r"(\.\S*/)?python3? (-m venv|ci/|-m monailabel)|pip |git clone|\.venv/bin/pre-commit": "needs the network, or "
    "MONAI Label (make label)",
    r"docker ": "needs Docker",
    r"torchrun |TRAIN=": "needs several GPUs; tests/bundles run every recipe in two processes",
    r"sbatch |ID=": "needs Slurm (make slurm)",
    r"python scripts/(?!gpu/|package_bundle)": "run by tests/scripts/test_documented_scripts.py",
    r"\S*python3? scripts/gpu/": "downloads, or takes minutes; tests/scripts/test_gpu_run.py rehearses both",
    r"python scripts/package_bundle.py": "packs what is committed; tests/tools/test_package_bundle.py does in a copy",
    r"python benchmarks/|python -m monai\.bundle trt_export": "takes long, or needs a GPU",
    r"python -m monai\.bundle push_to_hf_hub": "sends something over the network",
    r"python -X dev": "shows a part of a command",
    r"python tests/tools/chaos\.py|python -c .import dissect_monai": "takes hours, or shows a version or an import",
    r"(\.venv/bin/)?(tensorboard|python -m pytest)": "is a server, or part of this suite",
    r"--task ": "shows a part of a command",
    r"python -c .*write_xray_phantoms": "makes the data of the next command, and so does the test of that",
    r"python -m monai\.bundle download": "is run with an archive by tests/tools/test_package_bundle.py",
    r"python3 -m monai\.bundle run .*on_device": "needs a GPU; the page of the bundle has it for any device",
}
DATA = {"cxr_classify": "pretrain_vq_ssl", "seg_finetune_btcv": "hssl_multidomain"}  # whose weights it starts from
BLOCKS = ("init_filters", "blocks_down", "blocks_up")
QUICK = {"num_samples": 5, "num_workers": 0, "patches_per_volume": 1}


class Command(NamedTuple):
    """A command of `monai.bundle`, its folders called as on all pages."""

    words: tuple[str, ...]
    bundle: str
    trained: bool  # whether a training of its page has written to its output folder

    @property
    def config(self) -> str:
        return self.words[self.words.index("--config_file") + 1]

    @property
    def is_training(self) -> bool:
        return "train.json" in self.config


def commands() -> list[Command]:
    """All that run here, of those that differ in nothing but their output folder the one that names it."""
    found: dict[tuple[str, ...], Command] = {}
    for line, pages in lines().items():
        if line.startswith(RUNS) and not any(re.match(rule, line) for rule in ELSEWHERE):
            for page in pages:
                command = command_of(line, page)
                key = (command.bundle, *(word for word in command.words if word not in ("--output_dir", "OUT")))
                found[key] = max(found.get(key, command), command, key=lambda each: ("OUT" in each.words, each.trained))
    return [*found.values()]


def command_of(line: str, page: Path) -> Command:
    words = shlex.split(re.sub(r"\[(--[^]]*)\]", r"\1", line))[3:]  # what may be left out is there
    configs = re.findall(r"(?:bundles/(\w+)/)?configs/(\w+\.json)", words[words.index("--config_file") + 1])
    of_page = [bundle.parent.name for bundle in ROOT.glob("bundles/*/docs") if bundle.parent.name in str(page)]
    having = [each.name for each in sorted(ROOT.glob("bundles/*")) if (each / "configs" / configs[-1][1]).is_file()]
    bundle = next(name for name in (configs[0][0], *of_page, *having) if name in having)
    trains = [other for other in lines() if "train.json" in other and page in lines()[other]]
    if "--output_dir" in words:
        out = words.index("--output_dir") + 1
        trained = any(f"--output_dir {words[out]}" in other for other in trains)
        words[out] = "OUT"
    else:
        trained = False
    words = [re.sub(r"^[\w/]+/models/model.pt", "PRE/models/model.pt", word) for word in words]
    words = [re.sub(r"bundles/\w+/configs", "configs", word) for word in words]
    words = [re.sub(r"^runs/\S+/(xrays|abdomen_ct)$", "DIR", word) for word in words]
    return Command(tuple(words), bundle, trained)


def test_every_command_runs_or_is_known_to_run_elsewhere() -> None:
    unknown = [line for line in lines() if not line.startswith(RUNS)]
    assert [line for line in unknown if not any(re.match(rule, line) for rule in ELSEWHERE)] == []
    unused = [rule for rule in ELSEWHERE if not any(re.match(rule, line) for line in lines())]
    assert unused == []
    assert len(commands()) > 30


def test_every_target_and_every_option_of_a_script_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines():
        for target in re.findall(r"(?:^|&& )make(?: \w+=\S+)* ([a-z][\w-]*)", line):
            assert target in targets, line
        if found := re.match(r"(?:\S*/)?python3? (scripts/(?:gpu/)?\w+\.py)", line):
            assert {*re.findall(r" --(\w+)", line)} <= {"help"} | options_of(found[1]), line


@cache
def options_of(script: str) -> set[str]:
    """Names of arguments of its functions, of which fire makes options, and options of argparse."""
    files = [ROOT / script, *(ROOT / "scripts" / "datalists").glob("*.py")][: None if "datalist" in script else 1]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = {text.removeprefix("--") for text in texts if text.startswith("--")}
    return named | {node.arg for node in nodes if isinstance(node, ast.arg)}


def is_export(command: Command) -> bool:
    return command.words[0].endswith("_export")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(each, marks=[pytest.mark.long] * is_export(each), id=f"{each.bundle}: {' '.join(each.words)}")
        for each in commands()
    ],
)
def test_a_documented_command_runs(command: Command, recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of(command.bundle + "_volumes" * ("volumes.json" in command.config))
    bundle = tmp_path / command.bundle
    shutil.copytree(recipe.bundle / "configs", bundle / "configs")
    resumes = "--resume" in command.words
    if command.trained and (resumes or not command.is_training):
        shutil.copytree(recipe.finished, bundle / "OUT")
    elif not command.is_training:  # an archive brings its weights along
        shutil.copytree(recipe.finished, bundle, dirs_exist_ok=True)
    words = [*with_folders(command, recipe, recipe_of, bundle), *smaller(command, recipe, resumes)]
    result = started(["monai.bundle", *words], bundle)
    assert result.returncode == 0, result.stderr[-3000:]
    if command.is_training:
        folder = "OUT" if "OUT" in words else "volumes" if "volumes.json" in command.config else "."
        assert (bundle / folder / "models" / "model.pt").is_file()
    if command.words[0] == "onnx_export" and "image_size" in recipe.knobs:
        session = pytest.importorskip("onnxruntime").InferenceSession(bundle / "model.onnx")
        for size in (32, 64):  # any, although nobody has named one
            assert session.run(None, {session.get_inputs()[0].name: np.zeros((1, 1, size, size), np.float32)})


def with_folders(command: Command, recipe: Recipe, recipe_of: Recipes, bundle: Path) -> list[str]:
    """The words with folders that exist, where they name those of a reader."""
    volumes = [Path(each) for each in recipe_of("hssl_multidomain").knobs["dataset_dir"]]
    if "'A'" in " ".join(command.words):
        own = dict.fromkeys(("task", "group", "modality")) if "--task" in command.words else {}
        for name, folder in zip("ABC", volumes, strict=True):
            shutil.copytree(edited(folder, bundle, **own), bundle / name)
    data = recipe.knobs["dataset_dir"]
    data = data[0] if isinstance(data, list) else data
    if "/tmp/lungs" in command.words:
        write_xray_phantoms(bundle / "lungs", 12, 4, 4, masks=True)
    places = {
        "/tmp/lungs": str(bundle / "lungs"),
        "DIR": data,
        "FOLDER_OR_FILE": f"{data}/images",
        "0.05": "0.5",  # of few subjects
        "128": "32",  # pixels
        "25": "5",  # iterations
    }
    if "FILE" in command.words:
        places["FILE"] = str(published_weights(command.bundle, bundle / "published.pth"))
    elif "--pretrained" in command.words:
        places["PRE/models/model.pt"] = str(recipe_of(DATA[command.bundle]).model)
    return [places.get(word, word) for word in command.words]


def published_weights(bundle: str, path: Path) -> Path:
    """A file as others publish it: a ResNet-18 of torchvision or, for volumes, a SegResNet in a wrapper."""
    if bundle == "seg_finetune_btcv":
        network = small_segresnet(3, in_channels=1)
        torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, path)
        return path
    torch.manual_seed(0)
    network = build_encoder("resnet18", 2)
    save_weights(network, path.with_name("resnet18.pt"), {"encoder": "resnet18", "spatial_dims": 2})
    export_weights(str(path.with_name("resnet18.pt")), str(path))
    return path


def smaller(command: Command, recipe: Recipe, resumes: bool) -> list[str]:
    """Knobs for a run of a second, of those that the config has and the command does not give."""
    files = re.findall(r"configs/(\w+\.json)", command.config)
    known = {name: value for file in files for name, value in read(recipe.bundle / "configs" / file).items()}
    knobs: dict[str, Any] = {}
    if command.is_training:
        knobs |= tiny_knobs(recipe.name) | ({"max_epochs": 2} if resumes else {})
    elif not is_export(command):
        knobs |= QUICK
    if "--dataset_dir" not in command.words and not is_export(command):  # else phantoms, larger ones
        on_phantoms = command.is_training and "--pretrained" not in command.words
        knobs["data_dir" if on_phantoms else "dataset_dir"] = recipe.knobs["dataset_dir"]
    if "--spatial_dims" in command.words:
        knobs |= {name: knobs[name][:2] for name in ("pixdim", "patch_size") if name in knobs}
    if "FILE" in command.words:  # whose shape it is
        knobs = {name: knob for name, knob in knobs.items() if name not in ("encoder", *BLOCKS)}
    given = {word.removeprefix("--") for word in command.words}
    return [f"--{name}={value}" for name, value in knobs.items() if name in known and name not in given]
