"""How a run ends on the command line: in five lines what it found, what it left, and what comes next."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from dissect_monai.common import Interval
from dissect_monai.data.datalists import Datalist
from dissect_monai.networks.encoders import SEGRESNET
from dissect_monai.networks.weights import read_settings

NOT_SCORED = "nothing could be scored, for lack of positives or negatives"
REPEATED = (  # by the next command
    "dataset_dir", "output_dir", "bundle_root", "task", "group", "modality", "on_corrupt", "num_workers", "device",
)  # fmt: skip
OF_PUBLISHED = ("in_channels", "pretrained_norm")  # which no model.json says to the next command


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

    The config has run; its file or files and the overrides are as they were typed.
    """
    built = parser.ref_resolver.resolved_content
    engines = [built.get(name) for name in ("validate::evaluator", "evaluator", "train::trainer")]
    results = [each.state.result for each in engines if isinstance(each, Engine) and hasattr(each.state, "result")]
    trained = isinstance(engines[2], Engine)
    if not trained and not results:
        return ""
    text, names = results[0] if results else Result("no epoch was trained")
    weights = Path(parser.get_parsed_content("model_path" if trained else "pretrained"))
    log_dir = Path(parser.get_parsed_content("log_dir", default=weights.parent.parent / "eval"))
    moved = {"bundle_root", "output_dir"} & typed.keys()
    root = "" if moved else parser.get_parsed_content("bundle_root", default="")
    folder, python = os.path.dirname(ensure_tuple(config_file)[0]), quote(sys.orig_argv[0])

    def shown(path: Path) -> str:
        """As it was typed; what is in the bundle's folder by default is said from where that was typed."""
        if not moved and path.is_absolute() and path.is_relative_to(root):
            return quote(os.path.normpath(Path(folder, "..", path.relative_to(root))))
        return quote("./" * (str(path)[0] in "$%@-") + str(path))  # as which MONAI and Fire read no path

    files = [shown(log_dir / name) for name in (*names, "domains.csv") if (log_dir / name).is_file()]
    events = [each for each in (log_dir, weights.parent.parent / "eval") if any(each.glob("*tfevents*"))]
    exist = weights.is_file()
    file, knobs = _next(parser, folder, typed, weights, trained, shown) if exist else ("", "")
    later = "the next command makes them" if file.endswith("evaluate.json") else "none"
    lines = {
        "Result": text,
        "Weights": shown(weights) if exist else "none were written",
        "Report" if "report.html" in names else "Tables": ", ".join(files) or later,
        "TensorBoard": f"{python} -m tensorboard.main --logdir {shown(events[0])}" if events else "no events were left",
        "Next": f"{python} -m monai.bundle run --config_file {quote(file)}{knobs}" if file else "none",
    }
    return "\n" + "".join(f"{name + ':':13}{text}\n" for name, text in lines.items())


def _next(
    parser: ConfigParser, folder: str, typed: Mapping[str, Any], weights: Path, trained: bool, shown: Callable[..., str]
) -> tuple[str, str]:
    """Config file and knobs of what comes next: of this bundle, or of that which takes the weights if it is there."""
    settings, datalist = read_settings(weights), parser.get_parsed_content("datalist", default=None)
    images, data = "patch_size" not in settings, datalist if isinstance(datalist, Datalist) else Datalist([], [], [])
    repeated = REPEATED if weights.with_suffix(".json").is_file() else (*REPEATED, *OF_PUBLISHED)
    given = {name: typed[name] for name in repeated if typed.get(name) is not None}
    knobs = {name: quote(value if isinstance(value, str) else json.dumps(value)) for name, value in given.items()}
    other, config = "", "inference"
    segments = "class_names" in settings
    unjudged = not images and not segments and settings.get("encoder", SEGRESNET) != SEGRESNET  # by any evaluation
    if trained and settings.get("encoder") == SEGRESNET and not segments:  # which is judged like that of HSSL
        other, config = "hssl_multidomain", "evaluate"
    elif trained and not unjudged and (all(data.labelled()[:3]) if images else data.validation or data.test):
        config = "evaluate"
    elif (unjudged or not trained) and not segments and "label_names" not in settings:
        other, config = "cxr_classify" if images else "seg_finetune_btcv", "train"
    file = os.path.normpath(Path(folder, "..", "..", other, "configs", f"{config}.json"))
    mapped = [item["origin"][0] for item in data.training if isinstance(item.get("label"), str) and "origin" in item]
    if other and os.path.isfile(file) and (images or config == "evaluate" or mapped):
        if config == "train":  # of one folder, and with its own names of modalities
            knobs.pop("modality", None)
            knobs |= {"spatial_dims": "3"} if images and settings.get("spatial_dims") == 3 else {}
            knobs |= {"dataset_dir": quote(mapped[0])} if len(ensure_tuple(typed.get("dataset_dir"))) > 1 else {}
        knobs.pop("bundle_root", None)
        knobs |= {"output_dir": quote(os.path.join(typed["output_dir"], other))} if "output_dir" in knobs else {}
    else:
        file = "" if unjudged else str(Path(folder, "inference.json" if other else f"{config}.json"))
    known = ConfigParser.load_config_file(file) if os.path.isfile(file) else {}
    knobs = {name: word for name, word in {**knobs, "pretrained": shown(weights)}.items() if name in known}
    words = (f" --{name}{'=' if word[0] == '-' else ' '}{word}" for name, word in knobs.items())
    return file if known else "", "".join(words)
