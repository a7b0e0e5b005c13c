"""The five lines at the end of a run, for every way of typing its command."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, write
from ignite.engine import Engine
from monai.bundle import ConfigParser

from dissect_monai.common import Interval
from dissect_monai.data.datalists import Datalist
from dissect_monai.handlers.ending import Result, last_lines, with_interval

NAMES = ["Result", "Weights", "Report", "TensorBoard", "Next"]
KNOWS = {"label_names": ["cysts"]}
VOLUMES: dict[str, Any] = {"patch_size": [8, 8, 8]}


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the configs, from where one runs them."""
    for config in ROOT.glob("bundles/*/configs/*.json"):
        path = tmp_path / config.relative_to(ROOT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "monai.bundle", "run"])
    return tmp_path


def ended(
    config: Any, settings: dict[str, Any], typed: dict[str, Any], datalist: Any = None, **said: Any
) -> dict[str, str]:
    """The lines of a run by name, whose output folder is that which was typed, or its bundle's."""
    first = config[0] if isinstance(config, list) else config
    root = Path(first).absolute().parent.parent
    out = typed.get("output_dir", str(root))
    values = {"bundle_root": str(root), "output_dir": out, "log_dir": f"{out}/eval", "datalist": datalist}
    values |= dict.fromkeys(("model_path", "pretrained"), f"{out}/models/model.pt")
    values |= {name: value for name, value in typed.items() if name in values}
    write(Path(values["pretrained"]).with_suffix(".json"), settings)
    Path(values["pretrained"]).touch()
    parser = ConfigParser({name: value for name, value in values.items() if value is not None})
    parser.parse()
    if datalist is not None:
        parser.ref_resolver.resolved_content["datalist"] = datalist
    engine = Engine(lambda engine, batch: None)
    engine.state.result = Result(**{"text": "AUROC 0.8", **said})
    name = "train::trainer" if Path(first).stem == "train" else "evaluator"
    parser.ref_resolver.resolved_content[name] = engine
    lines = last_lines(parser, config, typed).strip().splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


ITEM = {"image": "i", "label": [1.0], "origin": ("A", "s")}
LABELLED = Datalist([ITEM], [ITEM], [ITEM])
MAPS = Datalist([{"image": "i", "origin": ("A", "s")}, {"image": "i", "label": "l", "origin": ("B", "s")}], [ITEM], [])
PRE, CLS, HSSL, SEG = (
    f"bundles/{name}/configs" for name in ("pretrain_vq_ssl", "cxr_classify", "hssl_multidomain", "seg_finetune_btcv")
)


@pytest.mark.parametrize(
    ("config", "settings", "datalist", "typed", "following"),
    [
        (f"{PRE}/train.json", {}, LABELLED, {"dataset_dir": "D", "output_dir": "O", "max_epochs": 3},
         f"{PRE}/evaluate.json --dataset_dir D --output_dir O --pretrained O/models/model.pt"),
        (f"{PRE}/train.json", {}, Datalist([{"image": "i"}], [], []), {"dataset_dir": "my D", "device": "cpu"},
         f"{PRE}/inference.json --dataset_dir 'my D' --device cpu "
         "--pretrained bundles/pretrain_vq_ssl/models/model.pt"),
        (f"{PRE}/evaluate.json", {}, LABELLED, {"dataset_dir": "D", "output_dir": "my O"},
         f"{CLS}/train.json --dataset_dir D --output_dir 'my O/cxr_classify' --pretrained 'my O/models/model.pt'"),
        (f"{PRE}/evaluate.json", {"spatial_dims": 3}, LABELLED, {"dataset_dir": "D", "output_dir": "my O"},
         f"{CLS}/train.json --dataset_dir D --output_dir 'my O/cxr_classify' --spatial_dims 3 "
         "--pretrained 'my O/models/model.pt'"),
        ([f"{PRE}/train.json", f"{PRE}/volumes.json"], VOLUMES | {"encoder": "SegResNet"}, MAPS,
         {"dataset_dir": ["A", "B"], "output_dir": "O", "task": "abdomen"},
         f"""{HSSL}/evaluate.json --dataset_dir '["A", "B"]' --output_dir O/hssl_multidomain --task abdomen"""
         " --pretrained O/models/model.pt"),
        ([f"{PRE}/train.json", f"{PRE}/volumes.json"], VOLUMES | {"encoder": "resnet18"}, MAPS,
         {"dataset_dir": ["A", "B"], "output_dir": "O"},
         f"{SEG}/train.json --dataset_dir B --output_dir O/seg_finetune_btcv --pretrained O/models/model.pt"),
        (f"{PRE}/train.json", {}, LABELLED, {"dataset_dir": "./$x", "output_dir": "-o"},
         f"{PRE}/evaluate.json --dataset_dir './$x' --output_dir=-o --pretrained ./-o/models/model.pt"),
        (f"{CLS}/train.json", KNOWS, LABELLED, {},
         f"{CLS}/evaluate.json --pretrained bundles/cxr_classify/models/model.pt"),
        (f"{CLS}/evaluate.json", KNOWS, LABELLED, {"pretrained": "w/m.pt", "dataset_dir": "D", "output_dir": "O"},
         f"{CLS}/inference.json --dataset_dir D --output_dir O --pretrained w/m.pt"),
        (f"{HSSL}/evaluate.json", VOLUMES, MAPS, {"dataset_dir": ["A", "B"], "output_dir": "O", "modality": "MR"},
         f"{SEG}/train.json --dataset_dir B --output_dir O/seg_finetune_btcv --pretrained O/models/model.pt"),
        (f"{HSSL}/evaluate.json", VOLUMES, Datalist([{"image": "i"}], [], []), {"dataset_dir": "D", "output_dir": "O"},
         f"{HSSL}/inference.json --dataset_dir D --output_dir O --pretrained O/models/model.pt"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("standing")
def test_the_next_command_is_that_of_the_chain(
    config: Any, settings: dict[str, Any], datalist: Datalist, typed: dict[str, Any], following: str
) -> None:
    found = ended(config, settings, typed, datalist)
    assert found["Next"] == f".venv/bin/python -m monai.bundle run --config_file {following}"
    assert Path(shlex.split(found["Next"])[5]).is_file()


@pytest.mark.usefixtures("standing")
def test_what_no_model_json_says_of_published_weights_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"in_channels": 3, "pretrained_norm": "imagenet"}
    typed = {"dataset_dir": "D", "pretrained": "w/resnet.pth", **said}
    follows = f"{CLS}/train.json --dataset_dir D --pretrained w/resnet.pth"
    assert ended(f"{PRE}/evaluate.json", said, typed, LABELLED)["Next"].endswith(follows)
    monkeypatch.setattr("dissect_monai.handlers.ending.read_settings", lambda path: {"encoder": "resnet18"})
    monkeypatch.setattr(sys.modules[__name__], "write", lambda path, settings: Path(path).unlink())  # no JSON beside
    follows = follows.replace(" --pretrained", " --in_channels 3 --pretrained_norm imagenet --pretrained")
    assert ended(f"{PRE}/evaluate.json", {}, typed, LABELLED)["Next"].endswith(follows)


@pytest.mark.parametrize(
    ("inside", "config", "next_config"),
    [
        ("bundles/pretrain_vq_ssl", "configs/evaluate.json", "../cxr_classify/configs/train.json"),
        ("bundles/pretrain_vq_ssl/configs", "evaluate.json", "../../cxr_classify/configs/train.json"),
        ("bundles", "pretrain_vq_ssl/configs/evaluate.json", "cxr_classify/configs/train.json"),
    ],
)
def test_paths_are_those_from_where_one_stands(
    standing: Path, monkeypatch: pytest.MonkeyPatch, inside: str, config: str, next_config: str
) -> None:
    monkeypatch.chdir(standing / inside)
    found = ended(config, {}, {}, LABELLED)
    assert shlex.split(found["Next"])[5] == next_config
    assert not Path(found["Weights"]).is_absolute()
    assert Path(found["Weights"]).resolve() == standing / "bundles/pretrain_vq_ssl/models/model.pt"
    absolute = ended(str(Path(config).absolute()), {}, {}, LABELLED)
    assert shlex.split(absolute["Next"])[5] == str(standing / CLS / "train.json")
    assert absolute["Weights"] == str(standing / "bundles/pretrain_vq_ssl/models/model.pt")


def test_an_archive_alone_goes_on_by_itself(standing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = standing / "my archive" / "pretrain_vq_ssl"
    alone.parent.mkdir()
    (standing / "bundles" / "pretrain_vq_ssl").rename(alone)
    monkeypatch.chdir(alone)
    found = ended("configs/evaluate.json", {}, {"dataset_dir": "D"}, LABELLED)["Next"]
    assert found.endswith("configs/inference.json --dataset_dir D --pretrained models/model.pt")


def test_five_lines_say_what_was_found_and_left(standing: Path) -> None:
    typed = {"output_dir": "my O", "dataset_dir": "D"}
    for file in ("report.html", "findings.csv", "events.out.tfevents.1"):
        write(standing / "my O" / "eval" / file, {})
    found = ended(f"{CLS}/evaluate.json", KNOWS, typed, files=("report.html", "findings.csv", "other.csv"))
    assert list(found) == NAMES
    assert found["Weights"] == "'my O/models/model.pt'"
    assert found["Report"] == "'my O/eval/report.html', 'my O/eval/findings.csv'"
    assert found["TensorBoard"] == ".venv/bin/python -m tensorboard.main --logdir 'my O/eval'"


@pytest.mark.usefixtures("standing")
@pytest.mark.parametrize(
    ("settings", "datalist", "said"),
    [(KNOWS, LABELLED, "the next command makes them"), ({}, Datalist([{"image": "i"}], [], []), "none")],
)
def test_only_an_evaluation_makes_tables(settings: dict[str, Any], datalist: Datalist, said: str) -> None:
    assert ended(f"{CLS if settings else PRE}/train.json", settings, {}, datalist)["Tables"] == said


@pytest.mark.usefixtures("standing")
def test_inference_has_no_result_and_says_nothing() -> None:
    parser = ConfigParser({"output_dir": "O"})
    parser.parse()
    parser.ref_resolver.resolved_content["evaluator"] = Engine(lambda engine, batch: None)
    assert last_lines(parser, "inference.json", {}) == ""


def test_a_number_has_its_interval_if_there_is_one() -> None:
    assert with_interval("Dice", Interval(0.5, 0.25, 0.75)) == "Dice 0.500 (95 % interval 0.250 to 0.750)"
    assert with_interval("Dice", Interval(0.5, float("nan"), float("nan"))) == "Dice 0.500"
