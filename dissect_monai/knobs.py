"""What a knob may be: no bad value gets as far as the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.networks import nets
from monai.utils import ensure_tuple

from dissect_monai.classification import BALANCES, MODES
from dissect_monai.overrides import is_disabled, refuse_unknown_overrides, running_workflow
from dissect_monai.predictions import OVERLAYS

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


def _list_of(rule: Rule, length: int | None = None) -> Rule:
    return Rule(
        f"a list{'' if length is None else f' of {length}'}, each value {rule.says}",
        lambda value: (
            isinstance(value, (list, tuple))
            and (len(value) == length or (length is None and len(value) > 0))
            and all(map(rule.holds, value))
        ),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_per_folder(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, Mapping) else value
    return _is_text(value) or (isinstance(values, list) and all(each is None or _is_text(each) for each in values))


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
NUMBER = Rule("a number", lambda value: _is_number(value) and isfinite(value))
FRACTION = Rule("a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1)
STAGES = Rule(  # how many there are, the network knows
    "a list of different stages, counted from 1, such as '[2, 3, 4]'",
    lambda value: _list_of(_whole(1)).holds(value) and len(set(value)) == len(value),
)
MULTIPLE_OF_8 = Rule("a multiple of 8", lambda value: _whole(8).holds(value) and value % 8 == 0)
AXES = Rule(
    "a list of different axes among 0 (right to left), 1 (back to front) and 2 (feet to head), or []",
    lambda value: isinstance(value, (list, tuple)) and {*value} <= {0, 1, 2} and len({*value}) == len(value),
)
PER_FOLDER = Rule(
    "a text, a list with one for each folder, or a mapping of folders to texts, such as \"{'NAME': 'abdomen'}\"",
    _is_per_folder,
)

# By the names that all bundles use; a config is held to the rules of the knobs that it has.
RULES = {
    "a_max": NUMBER,
    "a_min": NUMBER,
    "amp": SWITCH,
    "baselines": SWITCH,
    "batch_size": _whole(1),
    "blocks_down": _list_of(_whole(1)),
    "blocks_up": _list_of(_whole(1)),
    "cache_dir": _optional(PATH),
    "calibration": _optional(PATH),
    "ce_weight": _number(0),
    "checkpoint": _optional(PATH),
    "ckpt_interval": _whole(1),
    "class_balance": _one_of(*BALANCES),
    "classification_weight": _number(0),
    "codes": SWITCH,
    "commitment_weight": _number(0),
    "compile": SWITCH,
    "continuous_weight": _number(0),
    "dataset_dir": _optional(PATHS),
    "decay": FRACTION,
    "deep_supervision": _whole(0),
    "dense_weight": _number(0),
    "device": Rule("a device that this machine has, such as cpu or cuda:0", _is_device),
    "discrete_weight": _number(0),
    "embedding_dim": _whole(1),
    "encoder": _one_of(*ENCODERS),
    "findings": _optional(TEXTS),
    "flip_axes": AXES,
    "fold": _optional(_whole(0)),
    "freeze_epochs": _whole(0),
    "fusion": _one_of("add", "attention", "concat", "replace"),
    "group": _optional(PER_FOLDER),
    "group_weight": _number(0),
    "hidden_dim": _whole(1),
    "image_size": _whole(16),
    "image_weight": _number(0),
    "init_filters": MULTIPLE_OF_8,
    "iterations_per_epoch": _whole(1),
    "label_fraction": _positive(1),
    "layer_decay": _positive(1),
    "largest_only": TEXTS,
    "learning_rate": _positive(),
    "log_interval": _whole(1),
    "mask_fraction": _number(0, 1),
    "mask_size": _whole(1),
    "max_epochs": _whole(1),
    "metric": _one_of("cosine", "euclidean"),
    "modality": _optional(PER_FOLDER),
    "mode": _one_of(*MODES),
    "momentum": _number(0, 1),
    "num_embeddings": _whole(2),
    "num_folds": Rule("0 (off) or a whole number of at least 3", lambda value: value == 0 or _whole(3).holds(value)),
    "num_samples": _whole(1),
    "num_workers": _whole(0),
    "num_worst": _whole(0),
    "on_corrupt": _one_of("raise", "skip"),
    "on_device": SWITCH,
    "optimizer_name": _one_of("adamw", "lars"),
    "output_dir": PATH,
    "output_format": _one_of("csv", "npz"),
    "overlap": FRACTION,
    "overlays": _one_of(*OVERLAYS),
    "patch_size": _list_of(_whole(8), 3),
    "patches_per_volume": _whole(1),
    "patches_seed": _whole(0),
    "patience": _whole(1),
    "pixdim": _list_of(_positive(), 3),
    "pretrained": _optional(PATH),
    "reconstruction_weight": _number(0),
    "report": SWITCH,
    "resume": Rule(f"{SWITCH.says}, or auto", lambda value: str(value).lower() == "auto" or SWITCH.holds(value)),
    "resume_from": _optional(PATH),
    "sampling_temperature": _number(0, 1),
    "schedule_epochs": _whole(1),
    "seed": _whole(0),
    "shard": SWITCH,
    "select": _one_of("best", "last"),
    "shortcut": _optional(TEXT),
    "spatial_dims": _one_of(2, 3),
    "split": _one_of("auto", "validation", "test", "all"),
    "split_seed": _whole(0),
    "stages": STAGES,
    "structures": _optional(TEXTS),
    "task": _optional(PER_FOLDER),
    "task_weight": _number(0),
    "temperature": _positive(),
    "temperature_scaling": SWITCH,
    "test_flip_axes": AXES,
    "tolerance": _number(0),
    "val_interval": _whole(1),
    "validation_fraction": FRACTION,
    "warmup_epochs": _whole(0),
    "weight_decay": _number(0),
}


def is_true(value: bool | str, name: str = "") -> bool:
    """A switch as the command line gives it: `--resume true` arrives as text.

    Args:
        value: true or false, or one of these words.
        name: of the switch, for the message.

    Raises:
        ValueError: if it is neither true nor false.
    """
    if not SWITCH.holds(value):
        raise ValueError(f"{f'`{name}`' if name else 'a switch'} must be {SWITCH.says}, got {value!r}.")
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
    """Hold every knob of a config for which there is a rule to it, and then those that must fit each other.

    Raises:
        ValueError: naming the knob, what it must be and what it is.
    """
    for name, rule in RULES.items():
        if name not in parser or is_disabled(parser[name]):
            continue
        value = parser.get_parsed_content(name)
        try:
            holds = rule.holds(value)
        except (TypeError, RuntimeError, AssertionError) as error:  # as torch reports devices, and `in` odd types
            raise ValueError(f"`--{name}` must be {rule.says}, got {value!r}: {error}") from error
        if not holds:
            raise ValueError(f"`--{name}` must be {rule.says}, got {value!r}.")
    for names, refuse in TOGETHER.items():
        if all(name in parser for name in names):
            refuse(*map(parser.get_parsed_content, names))


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


def _refuse_bad_window(a_min: float, a_max: float) -> None:
    if a_min >= a_max:
        raise ValueError(f"`--a_min` must be below --a_max, got {a_min} and {a_max}.")


def _refuse_bad_patch(patch_size: Sequence[int], spatial_dims: int, blocks_down: Sequence[int]) -> None:
    stride = 2 ** (len(blocks_down) - 1)
    if any(size % stride for size in patch_size[:spatial_dims]):
        raise ValueError(
            f"`--patch_size` must be multiples of {stride}, the stride of the {len(blocks_down)} levels of "
            f"--blocks_down, got {list(patch_size[:spatial_dims])}."
        )


def _refuse_bad_blocks(blocks_down: Sequence[int], blocks_up: Sequence[int]) -> None:
    if len(blocks_up) != len(blocks_down) - 1:
        raise ValueError(
            f"`--blocks_up` must have one value fewer than the {len(blocks_down)} of --blocks_down, got {blocks_up}."
        )


def _refuse_large_mask(mask_size: int, patch_size: Sequence[int], spatial_dims: int) -> None:
    smallest = min(patch_size[:spatial_dims])
    if mask_size >= smallest:
        raise ValueError(
            "`--mask_size` must be smaller than the sides of --patch_size, else all is masked or nothing, "
            f"got {mask_size} for {smallest}."
        )


def _refuse_odd_batch(batch_size: int, _: float) -> None:
    if batch_size % 2:
        raise ValueError(f"`--batch_size` must be even, as two volumes of a task are drawn together, got {batch_size}.")


def _refuse_rare_validation(max_epochs: int, val_interval: int, select: str) -> None:
    if select == "best" and val_interval > max_epochs:
        raise ValueError(
            "`--val_interval` must be at most --max_epochs with --select best, else no weights are ever chosen, "
            f"got {val_interval} and {max_epochs}."
        )


# What knobs must be to each other, in a config that has all of them.
TOGETHER: dict[tuple[str, ...], Callable[..., None]] = {
    ("train::trainer::max_epochs", "schedule_epochs", "warmup_epochs"): _refuse_bad_schedule,
    ("train::trainer::max_epochs", "val_interval", "select"): _refuse_rare_validation,
    ("a_min", "a_max"): _refuse_bad_window,
    ("patch_size", "spatial_dims", "blocks_down"): _refuse_bad_patch,
    ("blocks_down", "blocks_up"): _refuse_bad_blocks,
    ("mask_size", "patch_size", "spatial_dims"): _refuse_large_mask,
    ("batch_size", "sampling_temperature"): _refuse_odd_batch,
}
