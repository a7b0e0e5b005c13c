"""How a run ends on the command line: in five lines what it found, what it left, and what comes next."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from dissect_monai.common import Interval
from dissect_monai.data.datalists import SPLITS, Datalist
from dissect_monai.networks.weights import read_settings

REPEATED = (
    "dataset_dir",
    "output_dir",
    "bundle_root",
    "task",
    "group",
    "modality",
    "on_corrupt",
    "num_workers",
    "device",
)


class Result(NamedTuple):
    """What a validation or an evaluation leaves as `engine.state.result`, to be said at the end."""

    text: str
    files: Sequence[str] = ()  # report or tables in the `log_dir` of the run, the most telling first


def with_interval(name: str, interval: Interval) -> str:
    """A number with its 95 % interval, if there is one: "AUROC 0.740 (95 % interval 0.723 to 0.762)"."""
    ends = "" if isnan(interval.low) else f" (95 % interval {interval.low:.3f} to {interval.high:.3f})"
    return f"{name} {interval.value:.3f}{ends}"


def last_lines(parser: ConfigParser, config_file: Any, typed: Mapping[str, Any]) -> str:
    """Result, weights, report, TensorBoard and next command of a training or an evaluation; nothing of other runs.

    Args:
        parser: the config of the run, when it has run.
        config_file: its file or files, as they were typed.
        typed: overrides of the command line and of its `args_file`.
    """
    built = parser.ref_resolver.resolved_content
    engines = [built.get(name) for name in ("train::trainer", "validate::evaluator", "evaluator")]
    results = [each.state.result for each in engines if isinstance(each, Engine) and hasattr(each.state, "result")]
    trainer = engines[0] if isinstance(engines[0], Engine) else None
    if trainer is None and not results:
        return ""
    result = results[0] if results else Result(_loss(trainer.state.output))
    weights = Path(parser.get_parsed_content("pretrained" if trainer is None else "model_path"))
    log_dir = Path(parser.get_parsed_content("log_dir", default=weights.parent.parent / "eval"))
    root = parser.get_parsed_content("bundle_root", default="")
    folder, python = os.path.dirname(ensure_tuple(config_file)[0]), quoted(sys.orig_argv[0])

    def shown(path: Path) -> str:
        """As it was typed; what is in the bundle's folder by default is said from where that was typed."""
        by_default = (
            path.is_absolute() and path.is_relative_to(root) and not {"bundle_root", "output_dir"} & typed.keys()
        )
        return quoted(os.path.normpath(Path(folder, "..", path.relative_to(root))) if by_default else str(path))

    files = [shown(log_dir / name) for name in (*result.files, "domains.csv") if (log_dir / name).is_file()]
    events = [each for each in (log_dir, weights.parent.parent / "eval") if any(each.glob("*tfevents*"))]
    file, knobs = _next(parser, folder, typed, weights, trainer is not None, shown)
    words = [f"--{name} {word}" for name, word in knobs.items() if word]
    lines = {
        "Result": result.text,
        "Weights": shown(weights),
        "Report" if "report.html" in result.files else "Tables": ", ".join(files) or "the next command makes them",
        "TensorBoard": f"{python} -m tensorboard.main --logdir {shown(events[0])}"
        if events
        else "no events beside the weights",
        "Next": " ".join([python, "-m monai.bundle run --config_file", quoted(file), *words]) if file else "none",
    }
    return "\n" + "".join(f"{name + ':':13}{text}\n" for name, text in lines.items())


def _loss(output: Any) -> str:
    known = isinstance(output, Mapping) and "loss" in output
    return f"loss {float(output['loss']):.3f} in the last step, no validation" if known else "nothing was left to train"


def _next(
    parser: ConfigParser, folder: str, typed: Mapping[str, Any], weights: Path, trained: bool, shown: Callable[..., str]
) -> tuple[str, dict[str, str]]:
    """Config file and knobs of what comes next: of this bundle, or of that which takes the weights if it is there."""
    settings = read_settings(weights)
    other, config = "", "inference"
    if trained and settings.get("encoder") == "SegResNet":  # of volumes, which are judged like those of HSSL
        other, config = "hssl_multidomain", "evaluate"
    elif trained and _can_be_judged(parser.get_parsed_content("datalist", default=None), "patch_size" in settings):
        config = "evaluate"
    elif not trained and not {"label_names", "class_names"} & settings.keys():
        other, config = "seg_finetune_btcv" if "patch_size" in settings else "cxr_classify", "train"
    knobs = {name: _word(name, typed) for name in REPEATED}
    data = _with_label_maps(typed) if other.startswith("seg") else knobs["dataset_dir"]
    file = os.path.normpath(Path(folder, "..", "..", other, "configs", f"{config}.json"))
    if other and os.path.isfile(file) and bool(data) == bool(knobs["dataset_dir"]):
        output_dir = knobs["output_dir"] and quoted(os.path.join(str(typed["output_dir"]), other))
        knobs |= {"dataset_dir": data, "output_dir": output_dir, "bundle_root": "", "pretrained": shown(weights)}
        knobs |= {"modality": ""} if config == "train" else {}
    else:
        file = str(Path(folder, "inference.json" if other else f"{config}.json"))
        if os.path.abspath(weights) != os.path.abspath(
            Path(parser.get_parsed_content("output_dir"), "models/model.pt")
        ):
            knobs["pretrained"] = shown(weights)
    known = ConfigParser.load_config_file(file) if os.path.isfile(file) else {}
    return file if known else "", {name: word for name, word in knobs.items() if name in known}


def _can_be_judged(datalist: Any, are_volumes: bool) -> bool:
    if not isinstance(datalist, Datalist):
        return True
    return bool(datalist.validation or datalist.test) if are_volumes else all(datalist.labelled()[: len(SPLITS)])


def _with_label_maps(typed: Mapping[str, Any]) -> str:
    """The first folder of the data whose dataset.json names structures."""
    folders = ensure_tuple(typed.get("dataset_dir") or ())
    for folder in folders:
        listed = Path(folder, "dataset.json")
        if listed.is_file() and json.loads(listed.read_text(encoding="utf-8")).get("labels"):
            return _word("dataset_dir", typed) if len(folders) == 1 else quoted(str(folder))
    return ""


def _word(name: str, typed: Mapping[str, Any]) -> str:
    """A value as it was typed, or nothing."""
    for index, word in enumerate(sys.argv):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            return quoted(value if equals else sys.argv[index + 1])
    return quoted(str(typed[name])) if typed.get(name) is not None else ""


def quoted(word: str) -> str:
    """A word for a shell, in double quotes where single ones stand in it."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
