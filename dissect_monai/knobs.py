"""What a knob may be: no misspelt one passes, and no bad value gets as far as the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from math import inf
from types import FrameType
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import run as bundle_run
from monai.networks import nets
from monai.utils import ensure_tuple

# What an override may add to a component although its config does not show it.
COMPONENT_KEYS = ("_disabled_", "_desc_", "_requires_", "_mode_")
ENCODERS = tuple(f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200) if hasattr(nets, f"resnet{depth}"))


class Rule(NamedTuple):
    """What the value of a knob must be."""

    says: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(low: int) -> Rule:
    return Rule(f"a whole number of at least {low}", lambda value: type(value) is int and value >= low)


def _number(low: float, high: float = inf) -> Rule:
    upper = "" if high == inf else f" and at most {high:g}"
    return Rule(f"a number of at least {low:g}{upper}", lambda value: _is_number(value) and low <= value <= high)


def _positive(high: float = inf) -> Rule:
    upper = "" if high == inf else f" and at most {high:g}"
    return Rule(f"a number over 0{upper}", lambda value: _is_number(value) and 0 < value <= high)


def _one_of(*values: Any) -> Rule:
    return Rule(f"one of {', '.join(map(str, values))}", lambda value: value in values)


def _optional(rule: Rule) -> Rule:
    return Rule(f"{rule.says}, or None", lambda value: value is None or rule.holds(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_device(value: Any) -> bool:
    torch.empty(0, device=value)  # raises what is wrong with it
    return True


TEXT = Rule("a text", _is_text)
PATH = Rule("a path (a name of digits needs ./ before it)", _is_text)
PATHS = Rule(
    "a path (a name of digits needs ./ before it) or a list of them",
    lambda value: len(ensure_tuple(value)) > 0 and all(map(_is_text, ensure_tuple(value))),
)
TEXTS = Rule("a text or a list of them", PATHS.holds)
SWITCH = Rule("true or false", lambda value: isinstance(value, bool) or str(value).lower() in ("true", "false"))
STAGES = Rule(
    "a list of different stages from 1 to 4, such as '[2, 3, 4]'",
    lambda value: (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and len(set(value)) == len(value)
        and all(type(stage) is int and 1 <= stage <= 4 for stage in value)
    ),
)

# By the names that all bundles use; a config is held to the rules of the knobs that it has.
RULES = {
    "amp": SWITCH,
    "baselines": SWITCH,
    "batch_size": _whole(1),
    "class_balance": _one_of("none", "weighted"),
    "cache_dir": _optional(PATH),
    "calibration": _optional(PATH),
    "checkpoint": _optional(PATH),
    "ckpt_interval": _whole(1),
    "codes": SWITCH,
    "commitment_weight": _number(0),
    "compile": SWITCH,
    "continuous_weight": _number(0),
    "dataset_dir": _optional(PATHS),
    "decay": Rule("a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1),
    "device": Rule("a device that this machine has, such as cpu or cuda:0", _is_device),
    "discrete_weight": _number(0),
    "embedding_dim": _whole(1),
    "encoder": _one_of(*ENCODERS),
    "findings": _optional(TEXTS),
    "fusion": _one_of("add", "attention", "concat", "replace"),
    "hidden_dim": _whole(1),
    "image_size": _whole(16),
    "label_fraction": _positive(1),
    "layer_decay": _positive(1),
    "learning_rate": _positive(),
    "log_interval": _whole(1),
    "max_epochs": _whole(1),
    "metric": _one_of("cosine", "euclidean"),
    "mode": _one_of("linear_probe", "finetune", "scratch"),
    "momentum": _number(0, 1),
    "num_embeddings": _whole(2),
    "num_folds": Rule("0 (off) or a whole number of at least 3", lambda value: value == 0 or _whole(3).holds(value)),
    "num_samples": _whole(1),
    "num_worst": _whole(0),
    "num_workers": _whole(0),
    "on_corrupt": _one_of("raise", "skip"),
    "optimizer_name": _one_of("adamw", "lars"),
    "output_dir": PATH,
    "output_format": _one_of("csv", "npz"),
    "overlays": _one_of("none", "top", "all"),
    "patience": _whole(1),
    "pretrained": _optional(PATH),
    "reconstruction_weight": _number(0),
    "resume": SWITCH,
    "resume_from": _optional(PATH),
    "schedule_epochs": _whole(1),
    "seed": _whole(0),
    "shortcut": _optional(TEXT),
    "spatial_dims": _one_of(2, 3),
    "stages": STAGES,
    "temperature_scaling": SWITCH,
    "val_interval": _whole(1),
    "warmup_epochs": _whole(0),
    "weight_decay": _number(0),
}


def is_true(value: bool | str) -> bool:
    """A switch as the command line gives it: `--resume true` arrives as text.

    Raises:
        ValueError: if it is neither true nor false.
    """
    if not SWITCH.holds(value):
        raise ValueError(f"a switch must be {SWITCH.says}, got {value!r}.")
    return str(value).lower() == "true"


def check_knobs() -> None:
    """Refuse misspelt overrides and bad knobs of the bundle that runs, before anything else is built.

    Raises:
        ValueError: naming the knob, what it must be and what it is.
    """
    refuse_unknown_overrides()
    workflow = running_workflow()
    if workflow is not None:
        refuse_bad_knobs(workflow.parser)


def refuse_bad_knobs(parser: ConfigParser) -> None:
    """Hold every knob of a config for which there is a rule to it.

    Raises:
        ValueError: naming the knob, what it must be and what it is.
    """
    for name, rule in RULES.items():
        if name not in parser:
            continue
        value = parser.get_parsed_content(name)
        try:
            holds = rule.holds(value)
        except (TypeError, RuntimeError, AssertionError) as error:  # as torch reports devices, and `in` odd types
            raise ValueError(f"`--{name}` must be {rule.says}, got {value!r}: {error}") from error
        if not holds:
            raise ValueError(f"`--{name}` must be {rule.says}, got {value!r}.")
    if "schedule_epochs" in parser:
        _refuse_bad_schedule(
            *(parser.get_parsed_content(name) for name in ("max_epochs", "schedule_epochs", "warmup_epochs"))
        )


def _refuse_bad_schedule(max_epochs: int, schedule_epochs: int, warmup_epochs: int) -> None:
    if schedule_epochs < max_epochs:
        raise ValueError(
            f"`--schedule_epochs` must be at least --max_epochs, got {schedule_epochs} and {max_epochs}: past its end "
            "the learning rate would rise again."
        )
    if warmup_epochs >= schedule_epochs:
        raise ValueError(
            f"`--warmup_epochs` must be fewer than the {schedule_epochs} of the schedule, got {warmup_epochs}."
        )


def refuse_unknown_overrides() -> None:
    """Refuse an override of `monai.bundle run` that names nothing in the config files; MONAI would ignore it.

    An argument that a component's class takes may be added even if the config does not show it.

    Raises:
        ValueError: naming the override and the nearest id.
    """
    arguments = run_arguments()
    if arguments is None:
        return  # built through the Python API, whose callers (MONAI Label, FL) may add ids of their own
    config_file, overrides = arguments
    parser = ConfigParser()
    parser.read_config(ensure_tuple(config_file))
    known = [identifier for identifier in _ids(parser.config) if not identifier.startswith("_")]
    for identifier, value in overrides.items():
        name = str(identifier).replace("#", "::")
        if name.startswith("_meta_"):
            continue
        if name not in parser and not _is_argument(parser, name):
            near = get_close_matches(name, [*known, *_arguments(parser, name)], n=1, cutoff=0)
            raise ValueError(f"there is no --{identifier} to override; did you mean --{near[0].replace('::', '#')}?")
        parser[name] = value


def running_workflow() -> ConfigWorkflow | None:
    """The workflow whose config this code is called from, if any."""
    for frame in _callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
    return None


def run_arguments() -> tuple[Any, dict[str, Any]] | None:
    """Config files and overrides of the `monai.bundle.run` that this code runs under: MONAI hands them to nobody."""
    frame = next((frame for frame in _callers() if frame.f_code is bundle_run.__code__), None)
    if frame is None:
        return None
    arguments = frame.f_locals
    given = dict(arguments["override"])
    if arguments["args_file"]:
        given = {**ConfigParser.load_config_file(arguments["args_file"]), **given}
    config_file = arguments["config_file"] or given["config_file"]
    signatures = inspect.signature(bundle_run), inspect.signature(ConfigWorkflow)
    options = {"workflow_name", *signatures[0].parameters, *signatures[1].parameters}
    return config_file, {name: value for name, value in given.items() if name not in options}


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _ids(config: Any, prefix: str = "") -> list[str]:
    if isinstance(config, Mapping):
        entries = list(config.items())
    elif isinstance(config, list):
        entries = list(enumerate(config))
    else:
        return []
    return [each for key, value in entries for each in (f"{prefix}{key}", *_ids(value, f"{prefix}{key}::"))]


def _is_argument(parser: ConfigParser, name: str) -> bool:
    parent, _, key = name.rpartition("::")
    arguments = _arguments(parser, name)
    if key in COMPONENT_KEYS or f"{parent}::{key}" in arguments:
        return bool(arguments)
    # Where anything is taken (MONAI's resnet18), a near miss of what the config gives is a typing error.
    given = [str(each) for each in parser.get(parent) or ()] if arguments else []
    return f"{parent}::**" in arguments and not get_close_matches(key, given, cutoff=0.8)


def _arguments(parser: ConfigParser, name: str) -> list[str]:
    """Ids of what the component that an id is below could be given, with ** for anything."""
    parent = name.rpartition("::")[0]
    component = parser.get(parent) if parent and parent in parser else None
    if not isinstance(component, Mapping) or "_target_" not in component:
        return []
    target = component["_target_"]
    if str(target).startswith("@"):
        target = parser.get_parsed_content(target[1:])
    # Without its arguments, which may refer to data and networks that nobody wants to build for this.
    callable_only = ConfigParser({"component": {"_target_": target, "_mode_": "callable"}})
    parameters = inspect.signature(callable_only.get_parsed_content("component")).parameters.values()
    return [f"{parent}::{'**' if each.kind is each.VAR_KEYWORD else each.name}" for each in parameters]
