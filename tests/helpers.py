"""What the tests of several bundles share."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import monai.bundle.__main__
import numpy as np
import pytest
import torch
from filelock import FileLock
from ignite.engine import Engine
from monai.bundle import ConfigParser, run
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import SegResNet, resnet10
from monai.transforms import Compose
from monai.utils import optional_import
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dissect_monai.bundle import bad_input, with_dashes

sitk, _ = optional_import("SimpleITK")
ROOT = Path(__file__).resolve().parent.parent
STANDARD_CONFIGS = ("metadata", "train", "evaluate", "inference")  # of a bundle; all others override its train.json
BUNDLES = sorted(path for path in ROOT.glob("bundles/*") if path.is_dir())
RECIPES = {bundle.name: [bundle / "configs" / "train.json"] for bundle in BUNDLES} | {
    f"{config.parts[-3]}_{config.stem}": [config.with_name("train.json"), config]
    for config in sorted(ROOT.glob("bundles/*/configs/*.json"))
    if config.stem not in (*STANDARD_CONFIGS, "multi_gpu_train", "on_device", "paper")
}
TASKS = ("abdomen_ct", "head_ct", "head_mr")  # of two groups
TINY = {  # knobs of the recipes, for a training of a second
    "encoder": "resnet10", "image_size": 32, "num_embeddings": 16, "embedding_dim": 16, "hidden_dim": 16,
    "pixdim": [12, 12, 12], "patch_size": [16, 16, 16], "blocks_down": [1, 1, 1], "blocks_up": [1, 1],
    "init_filters": 8, "mask_size": 4, "iterations_per_epoch": 2, "batch_size": 8, "max_epochs": 1,
    "warmup_epochs": 0, "learning_rate": 0.01, "val_interval": 1, "log_interval": 1, "num_workers": 0, "amp": False,
}  # fmt: skip

TINY_BUNDLE = {  # its data cannot be built: what is refused is refused before
    "imports": ["$from pathlib import Path", "$from dissect_monai import bundle"],
    "root": "$bundle.bundle_root('tiny')",
    "learning_rate": 0.1,
    "data": "$1 / 0",
    "loss_name": "DiceLoss",
    "loss": {"_target_": "@loss_name", "sigmoid": True, "weight": "@data"},
    "network": {"_target_": "monai.networks.nets.resnet10", "widen_factor": 0.5},
    "metric_name": {"_target_": "monai.metrics.DiceMetric", "reduction": "mean"},
    "train": {"trainer": {"max_epochs": 1}, "handlers": [{"_target_": "StatsHandler", "iteration_log": False}]},
    "initialize": ["$bundle.begin()"],
    "run": ["$Path('ran').write_text(str(Path(@root).resolve()))"],
}


def tiny_knobs(recipe: str) -> dict[str, Any]:
    """Those of `TINY` that a recipe has."""
    known = {key for config in RECIPES[recipe] for key in read(config)}
    knobs: dict[str, Any] = {key: value for key, value in TINY.items() if key in known}
    if "patch_size" in known:
        knobs["batch_size"] //= 2
        for key in ("encoder", "image_size"):
            knobs.pop(key, None)
    return knobs


class Recipe:
    """A bundle's train.json, with a config for other data over it if there is one: its training, in small."""

    def __init__(self, name: str, xrays: Path, volumes: Sequence[Path], folder: Path) -> None:
        self.name, self.configs = name, RECIPES[name]
        self.bundle = self.configs[0].parent.parent
        self.knobs = tiny_knobs(name)
        data = xrays if "image_size" in self.knobs else volumes[0] if self.bundle.name.startswith("seg") else volumes
        self.knobs["dataset_dir"] = str(data) if isinstance(data, Path) else [str(each) for each in data]
        self._finished = folder / name

    def train(self, output_dir: Path, **knobs: Any) -> None:
        """`monai.bundle run` in this process."""
        run_config(self.configs, **{**self.knobs, "output_dir": output_dir, **knobs})

    def run(self, config: str, output_dir: Path, **knobs: Any) -> None:
        """Another config of the bundle, with the weights of the finished training."""
        shared = {"dataset_dir": self.knobs["dataset_dir"], "num_workers": 0}
        if "pretrained" not in knobs:  # for a test may have changed the knobs with which it would be trained
            shared["pretrained"] = self.model
        run_config(self.bundle / "configs" / f"{config}.json", **{**shared, "output_dir": output_dir, **knobs})

    @property
    def finished(self) -> Path:
        """Output folder of a training of two epochs, which the first that asks for it makes for all processes."""
        with FileLock(f"{self._finished}.lock"):
            if not self._finished.with_suffix(".done").exists():
                self.train(self._finished, max_epochs=2)
                self._finished.with_suffix(".done").touch()
        return self._finished

    @property
    def model(self) -> Path:
        """The weights that it has left."""
        return self.finished / "models" / "model.pt"


Recipes = Callable[[str], Recipe]  # by name
OTHERS = multiprocessing.get_context("forkserver")  # processes that have imported what the tests import
OTHERS.set_forkserver_preload(["monai.bundle", "monai.engines", "torch.utils.tensorboard", "dissect_monai"])


def run_config(config: Any = None, **knobs: Any) -> None:
    """`python -m monai.bundle run` in this process: of a config file, of several, or of an `args_file`."""
    files = [config] if isinstance(config, (str, Path)) else [*(config or [])]
    given = {"config_file": [*map(str, files)]} if files else {}
    given |= {name: _plain(value) for name, value in knobs.items()}
    with patch.object(sys, "argv", [monai.bundle.__main__.__file__, "run", *_arguments(given)]):
        run(**given)


def _arguments(knobs: dict[str, Any]) -> list[str]:
    return [part for name, value in knobs.items() for part in (f"--{name}", str(value))]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class Ended(NamedTuple):
    """What processes have left."""

    returncode: int  # of the first that failed, else 0
    stdout: str
    stderr: str


@cache
def fork_server() -> subprocess.Popen[str]:
    """It ends with the tests, which hold its input."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, pipe = [sys.executable, str(Path(__file__).with_name("forks.py"))], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", env=environment)


def command_line(
    config: str | Path | Sequence[Path], cwd: Path = ROOT, after: Sequence[str] = (), **knobs: Any
) -> Ended:
    """`monai.bundle run` in a process of its own, `after` being words behind all others."""
    files = str(config) if isinstance(config, str | Path) else str([str(each) for each in config])
    return forked(files, cwd, [{}], after=after, **knobs)


def two_processes(*configs: Path, cwd: Path, meanwhile: Any = None, **knobs: Any) -> Ended:
    """`monai.bundle run` of a training by two processes, as torchrun starts them; `meanwhile` gets their ids."""
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**ranks, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return forked(str([str(config) for config in configs]), cwd, environments, meanwhile, **knobs)


def forked(
    files: str,
    cwd: Path,
    environments: list[dict[str, str]],
    meanwhile: Any = None,
    after: Sequence[str] = (),
    **knobs: Any,
) -> Ended:
    """`monai.bundle run` in a process for each environment."""
    arguments = ["monai.bundle", "run", *_arguments({"config_file": files, **knobs}), *after]
    return started(arguments, cwd, environments, meanwhile)


def started(
    arguments: list[str], cwd: Path, environments: Sequence[dict[str, str]] = ({},), meanwhile: Any = None
) -> Ended:
    """A command of `monai.bundle` in a process for each environment."""
    shared, server = {"arguments": arguments, "cwd": str(cwd.resolve())}, fork_server()
    with TemporaryDirectory() as folder:
        logs = [(f"{folder}/stdout{index}", f"{folder}/stderr{index}") for index in range(len(environments))]
        processes = [
            {**shared, "environment": environment, "stdout": out, "stderr": error}
            for environment, (out, error) in zip(environments, logs, strict=True)
        ]
        server.stdin.write(json.dumps(processes) + "\n")
        server.stdin.flush()
        pids = json.loads(server.stdout.readline())
        try:
            if meanwhile is not None:
                meanwhile(pids)
        finally:
            statuses = json.loads(server.stdout.readline())
        texts = ("".join(Path(path).read_text(errors="replace") for path in paths) for paths in zip(*logs, strict=True))
        return Ended(next(filter(None, statuses), 0), *texts)


@contextmanager
def as_process(rank: int, world_size: int = 2) -> Iterator[None]:
    """For code that looks up its rank and the number of processes, and does not speak to the others."""
    facts = {"is_initialized": True, "get_rank": rank, "get_world_size": world_size}
    with patch.multiple("torch.distributed", **{name: lambda value=value: value for name, value in facts.items()}):
        yield


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """What makes the host wait for a GPU is an error."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def refused(message: str) -> Iterator[None]:
    """The run ends with an error that the command line shortens to one message."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        yield
    cause = bad_input(raised.value)
    assert cause is not None, raised.value
    # As the Python API says it, or as the command line does.
    assert any(re.search(message, text) for text in (str(cause), with_dashes(str(cause)))), cause


def evaluated(network: nn.Module, loader: Any, *handlers: Any, **arguments: Any) -> SupervisedEvaluator:
    """An evaluator that has run once, its log silent."""
    arguments = {"decollate": False, **arguments}
    evaluator = SupervisedEvaluator("cpu", loader, network, val_handlers=list(handlers), **arguments)
    evaluator.logger.setLevel(logging.CRITICAL)
    evaluator.run()
    return evaluator


def small_resnet(seed: int = 0, **changes: Any) -> Any:
    """A stock ResNet-10 with few channels: an encoder or, with `num_classes`, a classifier."""
    torch.manual_seed(seed)
    shape = {"spatial_dims": 2, "n_input_channels": 1, "conv1_t_stride": 2, "widen_factor": 0.125}
    return resnet10(**shape | {"feed_forward": "num_classes" in changes} | changes)


def small_segresnet(spatial_dims: int = 2, **changes: Any) -> SegResNet:
    """A SegResNet of three levels with few channels."""
    torch.manual_seed(0)
    shape = {"init_filters": 8, "out_channels": 3, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    return SegResNet(spatial_dims, **shape | changes)


def counting_engine(max_epochs: int = 4) -> Engine:
    engine = Engine(lambda engine, batch: {"loss": torch.ones((), requires_grad=True)})
    engine.state.device = torch.device("cpu")
    engine.state.max_epochs = max_epochs
    engine.state.epoch_length = 3
    return engine


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(output_dir: Path) -> dict[str, float]:
    lines = (output_dir / "eval" / "metrics.csv").read_text().splitlines()
    return {name: float(value) for name, value in (line.split(",") for line in lines)}


def events_of(output_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(output_dir / "eval"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def tags_of(output_dir: Path) -> set[str]:
    tags = events_of(output_dir).Tags()
    return {*tags["scalars"], *tags["images"]}


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(output_dir / "models" / "model.pt", weights_only=True)


def settings(output_dir: Path) -> dict[str, Any]:
    return read(output_dir / "models" / "model.json")


def checkpoint(output_dir: Path, epoch: int) -> dict[str, Any]:
    return torch.load(output_dir / "checkpoints" / f"checkpoint_epoch={epoch}.pt", weights_only=True)


def same(first: Any, second: Any) -> bool:
    """Bit for bit, in nested containers, too."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def edited(folder: str | Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a data set whose dataset.json says something else; None removes a key."""
    copy = tmp_path / f"edited_{Path(folder).name}"
    shutil.copytree(folder, copy)
    spec = {**read(copy / "dataset.json"), **changes}
    write(copy / "dataset.json", {key: value for key, value in spec.items() if value is not None})
    return copy


def run_bundle(bundle: Path, **overrides: Any) -> None:
    run_config(bundle / "configs" / "train.json", **overrides)


def git(repository: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "-C", str(repository), *identity, *arguments], check=True, capture_output=True)


def committed_copy(root: Path) -> Path:
    """All bundles and the package, without what runs have left in them, as a repository of their own."""
    return Path(shutil.copytree(_committed().name, root))


@cache
def _committed() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()
    root = Path(folder.name)
    outputs = {"bundles": ("models", "eval", "checkpoints", "phantoms"), "dissect_monai": ("__pycache__",)}
    for name, left_out in outputs.items():
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*left_out))
    shutil.copy(ROOT / ".gitignore", root)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    return folder


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (10, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def write_films(folder: Path, labelled: Sequence[str], counts: Sequence[int]) -> None:
    """Labelled sets as judge_encoders.py has them, and cxr_adult without labels: the brightness tells the first."""
    from judge_encoders import CLASSES, NIH_FINDINGS, PAEDIATRIC

    rng = np.random.default_rng(0)
    for name in (*labelled, "cxr_adult"):
        names = CLASSES if name == PAEDIATRIC else list(NIH_FINDINGS[:-1])  # of these, two are of no film
        splits: dict[str, Any] = {}
        (folder / name).mkdir()
        for split, count in zip(SPLITS, counts, strict=True):
            splits[split] = []
            for index in range(count):
                pixels = np.clip(rng.normal(60 + 60 * (index % 3), 20, (36, 32)), 0, 255)
                pixels[:4, :4], pixels[-4:, -4:] = 0, 255  # so that scaling the intensities keeps the brightness
                pixels, path = pixels.astype(np.uint8), f"{split}{index}.png"
                Image.fromarray(pixels.astype(np.uint16) * 256 if index % 2 else pixels).save(folder / name / path)
                item = {"image": path, "subject": f"{split}{index // 2}", "view": ("AP", "PA")[index % 2]}
                item |= (
                    {"source": ("rsna", "covid")[index % 2]}
                    if name == "cxr_adult"
                    else {"label": [int(index % 3 == column) for column in range(len(names))]}
                )
                splits[split].append(item)
        write(folder / name / "dataset.json", {"label_names": names, "licence": "none", **splits})


class Writer:
    """Stands in for TensorBoard."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}  # by name and step
        self.images: dict[str, dict[int, torch.Size]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, {})[step] = value

    def add_image(self, name: str, image: torch.Tensor, step: int) -> None:
        assert image.min() >= 0
        assert image.max() <= 1
        self.images.setdefault(name, {})[step] = image.shape

    def flush(self) -> None:
        pass

    def values(self, name: str) -> torch.Tensor:
        return torch.tensor([*self.scalars[name].values()])


class Decoded(Dataset):
    """Images that come with their data list, as our data sets give them."""

    def __init__(self, items: list[dict[str, Any]], images: Any) -> None:
        super().__init__(items)
        self.images = torch.as_tensor(images)

    def _transform(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index]}


class Oracle(nn.Module):
    """Logits of the class that is the value of the image; of those in `lost`, of background."""

    def __init__(self, num_classes: int, lost: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_classes, self.lost = num_classes, lost

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        classes = images[:, 0].round().long()
        classes[torch.isin(classes, torch.tensor(self.lost, dtype=torch.long))] = 0
        return 10.0 * nn.functional.one_hot(classes, self.num_classes).movedim(-1, 1)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pick(rows: Iterable[dict[str, str]], **wanted: str) -> dict[str, str]:
    """The one row with these values."""
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


SPLITS = ("training", "validation", "test")


def make_list(*arguments: object) -> None:
    """`scripts/make_datalist.py` in this process."""
    from make_datalist import main

    main([str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, Any]:
    """What the data list of a folder says."""
    return read(folder / "dataset.json")


def sizes(folder: Path) -> list[int]:
    """Numbers of images in its splits."""
    return [len(content(folder)[split]) for split in SPLITS]


def images(items: list[dict[str, Any]]) -> list[str]:
    return [Path(item["image"]).name for item in items]


def subjects(items: list[dict[str, Any]]) -> set[str]:
    return {item["subject"] for item in items}


def in_two_processes(step: Callable[[int, Path, Any], None], folder: Path, parts: Sequence[Any]) -> None:
    """Call a function in two processes of one group, each with its rank, the folder and its part."""
    other = OTHERS.Process(target=_in_group, args=(1, step, folder, parts))
    other.start()
    _in_group(0, step, folder, parts)
    other.join()


def _in_group(rank: int, step: Callable[[int, Path, Any], None], folder: Path, parts: Sequence[Any]) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, timedelta(minutes=5), world_size=2, rank=rank)
    step(rank, folder, parts[rank])
    torch.distributed.destroy_process_group()


DIRECTION = (0.0, -1.0, 0.0, 0.8, 0.0, -0.6, 0.6, 0.0, 0.8)  # of `volume`


def volume() -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6), dtype=np.int16))
    image.SetSpacing((0.5, 0.75, 2.0))
    image.SetOrigin((-10.0, 20.0, 30.0))
    image.SetDirection(DIRECTION)
    return image


def write_series(folder: Path, image: sitk.Image) -> Path:
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = np.reshape(image.GetDirection(), (3, 3))
    for index in range(image.GetSize()[2]):
        piece = image[:, :, index]
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        values = {
            "0008|0060": "CT", "0020|000e": "1.2.3.1", "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "\\".join(str(value) for value in direction.T[:2].ravel()),
            "0018|0050": str(image.GetSpacing()[2]), "0028|1050": "0", "0028|1051": "10",
        }  # fmt: skip
        for tag, value in values.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"1_{9 - index}.dcm"))  # names against the order of the slices
        writer.Execute(piece)
    return folder


def patch_transform(spatial_dims: int = 3, pixdim: float = 1.0, size: int = 8, num_samples: int = 4) -> Any:
    """The whole chain, as the evaluation of a bundle has it."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / "hssl_multidomain" / "configs" / "evaluate.json"))
    shape: dict[str, Any] = {"spatial_dims": spatial_dims, "pixdim": [pixdim] * spatial_dims}
    shape["patch_size"] = [size] * spatial_dims
    parser.update({**shape, "a_min": -125, "a_max": 275, "patches_per_volume": num_samples})
    return Compose([parser.get_parsed_content(name) for name in ("preprocessing", "patches")])


class Page(HTMLParser):
    """Reads a page: its texts by element, its images, every attribute; fails on unbalanced elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.stack[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for element, text in self.texts if element == tag]

    def values(self, attribute: str) -> list[str | None]:
        return [value for name, value in self.attributes if name == attribute]
