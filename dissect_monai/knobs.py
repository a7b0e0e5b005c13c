"""Allowed values of the top-level keys of configs, and what they must be to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.networks import nets
from monai.utils import ensure_tuple

from dissect_monai.common import InputError
from dissect_monai.handlers.savers import OVERLAYS
from dissect_monai.losses.joint_embedding import OBJECTIVES
from dissect_monai.losses.multilabel import BALANCES
from dissect_monai.networks.optimizers import MODES
from dissect_monai.networks.weights import refuse_bad_mode

ENCODERS = tuple(f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200) if hasattr(nets, f"resnet{depth}"))


class Rule(NamedTuple):
    """What the value of a knob must be."""

    says: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _whole(low: int) -> Rule:
    return Rule(f"a whole number of at least {low}", lambda value: type(value) is int and value >= low)


def _number(low: float, high: float = inf, over: bool = False) -> Rule:
    lower = f"over {low:g}" if over else f"of at least {low:g}"
    upper = "" if high == inf else f" and at most {high:g}"
    return Rule(
        f"a number {lower}{upper}",
        lambda value: _is_number(value) and low <= value <= high and not (over and value == low),
    )


def _one_of(*values: Any) -> Rule:
    return Rule(f"one of {', '.join(map(str, values))}", lambda value: value in values)


def _optional(rule: Rule) -> Rule:
    return Rule(f"{rule.says}, or None", lambda value: value is None or rule.holds(value))


def _list_of(rule: Rule, length: int | None = None) -> Rule:
    return Rule(
        f"a list{'' if length is None else f' of {length}'}, each value {rule.says}",
        lambda value: (
            isinstance(value, (list, tuple))
            and (len(value) == length or (length is None and len(value) > 0))
            and all(map(rule.holds, value))
        ),
    )


def _is_per_folder(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, Mapping) else value
    return _is_text(value) or (isinstance(values, list) and all(each is None or _is_text(each) for each in values))


def _is_codebook_size(value: Any) -> bool:
    return _whole(2).holds(value) or _list_of(_whole(2)).holds(value)


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
NUMBER = Rule("a number", _is_number)
FRACTION = Rule("a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1)
AXES = Rule(
    "a list of different axes among 0 (right to left), 1 (back to front) and 2 (feet to head), or []",
    lambda value: isinstance(value, (list, tuple)) and {*value} <= {0, 1, 2} and len({*value}) == len(value),
)
PER_FOLDER = Rule(
    "a text, a list with one for each channel, or a mapping of folders to texts, such as \"{'NAME': 'abdomen'}\"",
    _is_per_folder,
)
STAGES = Rule(  # how many there are, the network knows
    "a list of different stages, counted from 1, such as '[2, 3, 4]'",
    lambda value: _list_of(_whole(1)).holds(value) and len(set(value)) == len(value),
)

# Names that all bundles use; a config is held to the rules of the knobs that it has. First those on which the weights
# depend, then those that a run which goes on may change.
_RULES: list[tuple[Rule, str, str]] = [
    (SWITCH, "amp shard", "baselines codes compile on_device report temperature_scaling"),
    (NUMBER, "a_max a_min", ""),
    (_whole(0), "deep_supervision freeze_epochs seed split_seed warmup_epochs", "num_workers num_worst patches_seed"),
    (_whole(1), "batch_size embedding_dim hidden_dim iterations_per_epoch mask_size schedule_epochs", ""),
    (_whole(1), "num_samples patches_per_volume", "ckpt_interval log_interval max_epochs patience val_interval"),
    (Rule(f"{_whole(2).says}, or a list with one for each stage", _is_codebook_size), "num_embeddings", ""),
    (_whole(16), "image_size", ""),
    (Rule("a multiple of 8", lambda value: _whole(8).holds(value) and value % 8 == 0), "init_filters", ""),
    (Rule("0 (off) or a whole number of at least 3", lambda v: v == 0 or _whole(3).holds(v)), "num_folds", ""),
    (_optional(_whole(0)), "fold", ""),
    (_number(0), "ce_weight classification_weight commitment_weight continuous_weight cross_weight", "tolerance"),
    (_number(0), "discrete_weight group_weight image_weight reconstruction_weight task_weight weight_decay", ""),
    (_number(0), "dense_weight", ""),
    (_number(0, 1), "mask_fraction sampling_temperature", ""),
    (_optional(_number(0, 1)), "momentum", ""),
    (_number(0, over=True), "learning_rate temperature", ""),
    (_number(0, 1, over=True), "label_fraction layer_decay", ""),
    (FRACTION, "decay validation_fraction", "overlap"),
    (_list_of(_whole(1)), "blocks_down blocks_up", ""),
    (_list_of(_whole(8), 3), "patch_size", ""),
    (_list_of(_number(0, over=True), 3), "pixdim", ""),
    (STAGES, "stages", ""),
    (AXES, "flip_axes", "test_flip_axes"),
    (PATH, "", "output_dir"),
    (_optional(PATH), "", "cache_dir calibration checkpoint pretrained"),
    (_optional(PATHS), "", "dataset_dir"),
    (_optional(TEXT), "", "shortcut"),
    (TEXTS, "", "largest_only"),
    (_optional(TEXTS), "findings structures", ""),
    (_optional(PER_FOLDER), "group modality task", ""),
    (_one_of(2, 3), "spatial_dims", ""),
    (_one_of(*BALANCES), "class_balance", ""),
    (_one_of(*ENCODERS), "encoder", ""),
    (_one_of("add", "attention", "concat", "replace"), "fusion", ""),
    (_one_of("cosine", "euclidean"), "metric", ""),
    (_one_of(*MODES), "mode", ""),
    (_one_of(*OBJECTIVES), "objective", ""),
    (_one_of("raise", "skip"), "", "on_corrupt"),
    (_one_of("csv", "npz"), "", "output_format"),
    (_one_of(*OVERLAYS), "", "overlays"),
    (_one_of("best", "last"), "select", ""),
    (_one_of("auto", "validation", "test", "all"), "", "split"),
    (Rule("true, false or auto", lambda value: str(value).lower() == "auto" or SWITCH.holds(value)), "", "resume"),
    (Rule("a device that this machine has, such as cpu or cuda:0", _is_device), "", "device"),
]
RULES = {name: rule for rule, settings, others in _RULES for name in f"{settings} {others}".split()}
SETTINGS = {name for _, settings, _ in _RULES for name in settings.split()}


def check_knobs(parser: ConfigParser) -> None:
    """Hold every knob of a config for which there is a rule to it, and then those that must fit each other.

    A switch that the command line gave as a text becomes true or false in the config.

    Raises:
        InputError: naming the knob, what it must be and what it is.
    """
    switches = {}
    for name, rule in RULES.items():
        if name not in parser or is_disabled(parser[name]):
            continue
        value = parser.get_parsed_content(name)
        try:
            holds = rule.holds(value)
        except (TypeError, RuntimeError, AssertionError) as error:  # as torch reports devices, and `in` odd types
            raise InputError(f"`{name}` must be {rule.says}, got {value!r}: {error}") from error
        if not holds:
            raise InputError(f"`{name}` must be {rule.says}, got {value!r}.")
        if rule is SWITCH and isinstance(value, str):
            switches[name] = value.lower() == "true"
    _check_fits(parser)
    if switches:
        parser.update(switches)
        parser.parse(reset=True)


class Fit(NamedTuple):
    """What several knobs must be to each other, in a config that has all of them."""

    names: tuple[str, ...]
    holds: Callable[..., bool]
    says: Callable[..., str]


MAX_EPOCHS = "train::trainer::max_epochs"
FITS = [
    Fit(
        (MAX_EPOCHS, "schedule_epochs"),
        lambda epochs, schedule: epochs <= schedule,
        lambda epochs, schedule: (
            f"`schedule_epochs` must be at least `max_epochs`, got {schedule} and {epochs}: past its end the learning "
            "rate would rise again."
        ),
    ),
    Fit(
        ("schedule_epochs", "warmup_epochs"),
        lambda schedule, warmup: warmup < schedule,
        lambda schedule, warmup: f"`warmup_epochs` must be fewer than the {schedule} of the schedule, got {warmup}.",
    ),
    Fit(
        (MAX_EPOCHS, "val_interval", "select"),
        lambda epochs, interval, select: select != "best" or interval <= epochs,
        lambda epochs, interval, _: (
            f"`val_interval` must be at most `max_epochs` where `select` is best, got {interval} and {epochs}: no "
            "weights would ever be chosen."
        ),
    ),
    Fit(
        ("a_min", "a_max"),
        lambda low, high: low < high,
        lambda low, high: f"`a_min` must be below `a_max`, got {low} and {high}.",
    ),
    Fit(
        ("patch_size", "spatial_dims", "blocks_down"),
        lambda size, dims, blocks: not any(each % 2 ** (len(blocks) - 1) for each in size[:dims]),
        lambda size, dims, blocks: (
            f"`patch_size` must be multiples of {2 ** (len(blocks) - 1)}, the stride of the {len(blocks)} levels of "
            f"`blocks_down`, got {list(size[:dims])}."
        ),
    ),
    Fit(
        ("blocks_down", "blocks_up"),
        lambda down, up: len(up) == len(down) - 1,
        lambda down, up: f"`blocks_up` must have one value fewer than the {len(down)} of `blocks_down`, got {up}.",
    ),
    Fit(
        ("mask_size", "patch_size", "spatial_dims"),
        lambda mask, size, dims: mask < min(size[:dims]),
        lambda mask, size, dims: (
            "`mask_size` must be smaller than the sides of `patch_size`, else all is masked or nothing, "
            f"got {mask} for {min(size[:dims])}."
        ),
    ),
    Fit(
        ("batch_size", "sampling_temperature"),
        lambda batch_size, _: batch_size % 2 == 0,
        lambda batch_size, _: (
            f"`batch_size` must be even, as two volumes of a task are drawn together, got {batch_size}."
        ),
    ),
]


def _check_fits(parser: ConfigParser) -> None:
    for names, holds, says in FITS:
        if all(name in parser for name in names):
            values = [parser.get_parsed_content(name) for name in names]
            if not holds(*values):
                raise InputError(says(*values))
    if "mode" in parser and "pretrained" in parser:
        refuse_bad_mode(parser.get_parsed_content("mode"), parser.get_parsed_content("pretrained"))


def is_disabled(knob: Any) -> bool:
    """Whether a config has taken a knob away."""
    return bool(knob == {"_disabled_": True})
