"""Allowed values of the top-level keys of configs, and what they must be to each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from dissect_monai.common import PLANES, InputError, bad_input, root_cause
from dissect_monai.handlers.savers import OVERLAYS
from dissect_monai.losses.joint_embedding import OBJECTIVES
from dissect_monai.losses.multilabel import BALANCES
from dissect_monai.networks.encoders import ENCODERS, NORMS, RESNETS, SEGRESNET, SHORTCUTS
from dissect_monai.networks.optimizers import MODES
from dissect_monai.networks.vqssl import FUSIONS
from dissect_monai.networks.weights import refuse_bad_mode

MOST = 1e300  # so large a number is not meant, and an integer may be too large to be a float


class Rule(NamedTuple):
    """What the value of a knob must be."""

    says: str
    holds: Callable[[Any], bool]
    most: float = inf  # of each number; said only of one that is larger
    values: tuple[Any, ...] = ()  # that are allowed, of which the nearest is named

    def refusal(self, value: Any) -> str:
        """What it must be, and what was got."""
        numbers = [each for each in ensure_tuple(value) if _is_number(each)]
        bound = f", and at most {self.most}" if max(numbers, default=0) > self.most else ""
        near = get_close_matches(str(value), [each for each in self.values if isinstance(each, str)], n=1, cutoff=0.5)
        got = "True or no value" if value is True else _shown(value)
        return f"{self.says}{bound}, got {got}" + (f"; did you mean {near[0]}?" if near else ".")


def _shown(value: Any) -> str:
    """A value in one line of at most 100 characters."""
    text = re.sub(r"\s*\n\s*", " ", str(value).rstrip(".") if isinstance(value, Exception) else repr(value))
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(says: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(f"a number{says}", lambda value: _is_number(value) and holds(value))


def _whole(low: int, high: int = 10**6) -> Rule:
    return Rule(f"a whole number of at least {low}", lambda value: type(value) is int and low <= value <= high, high)


def _one_of(*values: Any) -> Rule:
    return Rule(f"one of {', '.join(map(str, values))}", lambda value: value in values, values=values)


def _optional(rule: Rule) -> Rule:
    return rule._replace(says=f"{rule.says}, or None", holds=lambda value: value is None or rule.holds(value))


def _list_of(rule: Rule, *lengths: int) -> Rule:
    def holds(value: Any) -> bool:
        is_list = isinstance(value, (list, tuple)) and len(value) > 0 and (not lengths or len(value) in lengths)
        return is_list and all(map(rule.holds, value))

    size = f" of {' or '.join(map(str, lengths))}" if lengths else ""
    return Rule(f"a list{size}, each value {rule.says}", holds, rule.most)


def _is_per_folder(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, Mapping) else value
    return _is_text(value) or (isinstance(values, list) and all(each is None or _is_text(each) for each in values))


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, (str, torch.device)) and torch.zeros(1, device=value).tolist() == [0]
    except (RuntimeError, AssertionError):  # NotImplementedError of `meta` is one
        return False


def _is_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_text, value)))


def _is_path(value: Any) -> bool:
    return (_is_text(value) or isinstance(value, Path)) and "\0" not in str(value)


TEXT = Rule("a text", _is_text)
PATH = Rule("a path (a name of digits needs ./ before it)", _is_path)
PATHS = Rule(
    "a path (a name of digits needs ./ before it) or a list of them", lambda value: _is_path(value) or _is_texts(value)
)
OPTIONAL_PATH = _optional(PATH)
TEXTS = Rule("a text or a list of them", _is_texts)
SWITCH = Rule("true or false", lambda value: str(value).lower() in ("true", "false"))
PER_FOLDER = Rule(
    "a text, a list with one for each channel, or a mapping of folders to texts, such as \"{'NAME': 'abdomen'}\"",
    _is_per_folder,
)
AT_LEAST_0 = _number(" of at least 0", lambda value: value >= 0)
FROM_0_TO_1 = _number(" of at least 0 and at most 1", lambda value: 0 <= value <= 1)
FRACTION = _number(" of at least 0 and below 1", lambda value: 0 <= value < 1)
EMBEDDINGS = Rule(
    f"{_whole(2).says}, or a list with one for each stage",
    lambda value: _whole(2).holds(value) or _list_of(_whole(2)).holds(value),
    _whole(2).most,
)

# Names that all bundles use; a config is held to the rules of the knobs that it has. First those on which the weights
# depend, then those that a run which goes on may change.
_RULES: list[tuple[Rule, str, str]] = [
    (SWITCH, "amp shard", "baselines codes compile on_device report temperature_scaling"),
    (_number(" from -100000 to 100000", lambda value: abs(value) <= 1e5), "a_max a_min", ""),
    (_whole(0), "deep_supervision dense_level freeze_epochs warmup_epochs", ""),
    (_whole(0, 2**32 - 1), "seed split_seed", "patches_seed"),
    (_whole(0, 1024), "", "num_workers"),
    (_whole(1), "batch_size hidden_dim iterations_per_epoch mask_size schedule_epochs", ""),
    (_whole(1), "num_samples patches_per_volume", "ckpt_interval log_interval max_epochs patience val_interval"),
    (_whole(2), "embedding_dim", ""),
    (EMBEDDINGS, "num_embeddings", ""),
    (_whole(16, 4096), "image_size", ""),
    (_optional(_whole(1, 1024)), "in_channels", ""),
    (Rule("a multiple of 8", lambda value: _whole(8).holds(value) and value % 8 == 0, 10**6), "init_filters", ""),
    (Rule("0 (off) or a whole number of at least 3", lambda v: v == 0 or _whole(3).holds(v), 10**6), "num_folds", ""),
    (_optional(_whole(0)), "fold", ""),
    (AT_LEAST_0, "ce_weight classification_weight commitment_weight continuous_weight cross_weight dense_weight", ""),
    (AT_LEAST_0, "discrete_weight group_weight image_weight reconstruction_weight task_weight weight_decay", ""),
    (AT_LEAST_0, "position_weight", "tolerance"),
    (FROM_0_TO_1, "mask_fraction sampling_temperature", ""),
    (_optional(FROM_0_TO_1), "momentum", ""),
    (_number(" over 0", lambda value: value > 0), "learning_rate", ""),
    (_number(" of at least 0.0001", lambda value: value >= 1e-4), "temperature", ""),
    (_number(" over 0 and at most 1", lambda value: 0 < value <= 1), "label_fraction layer_decay", ""),
    (FRACTION, "decay validation_fraction", "overlap"),
    (_list_of(_whole(1)), "blocks_down blocks_up stages", ""),
    (_list_of(_whole(8, 4096), 2, 3), "patch_size", ""),
    (_list_of(_number(" over 0 and at most 1000", lambda value: 0 < value <= 1000), 2, 3), "pixdim", ""),
    (PATH, "", "bundle_root output_dir"),
    (OPTIONAL_PATH, "", "cache_dir calibration pretrained resume_from"),
    (_optional(PATHS), "", "dataset_dir"),
    (_optional(TEXT), "", "shortcut"),
    (TEXTS, "", "largest_only"),
    (_optional(TEXTS), "findings structures", ""),
    (_optional(PER_FOLDER), "group modality task", ""),
    (_one_of(2, 3), "spatial_dims", ""),
    (_one_of("auto", *PLANES), "slice_axis", ""),
    (_one_of(*BALANCES), "class_balance", ""),
    (_one_of(*ENCODERS), "encoder", ""),
    (_one_of(*SHORTCUTS), "resnet_shortcuts", ""),
    (_one_of(*NORMS), "pretrained_norm", ""),
    (_one_of(*FUSIONS), "fusion", ""),
    (_one_of("cosine", "euclidean"), "metric", ""),
    (_one_of(*MODES), "mode", ""),
    (_one_of(*OBJECTIVES), "objective", ""),
    (_one_of("raise", "skip"), "", "on_corrupt"),
    (_one_of("csv", "npz"), "", "output_format"),
    (_one_of(*OVERLAYS), "", "overlays"),
    (_one_of("best", "last"), "select", ""),
    (_one_of("auto", "validation", "test", "all"), "", "split"),
    (Rule("true, false or auto", lambda value: str(value).lower() in ("true", "false", "auto")), "", "resume"),
    (Rule("a device that this machine has, such as cpu or cuda:0", _is_device), "", "device"),
]
RULES = {name: rule for rule, settings, others in _RULES for name in f"{settings} {others}".split()}
SETTINGS = {name for _, settings, _ in _RULES for name in settings.split()}

# Of keys that a config has in other forms, where they are given as they are.
DERIVED = {
    **dict.fromkeys(("ckpt_dir", "log_dir", "model_path", "phantoms"), PATH),
    "data_dir": PATHS, "num_channels": _whole(1, 1024), "rank": _whole(0), "world_size": _whole(1),
}  # fmt: skip

# What the command line cannot change where a config works it out from the data, the weights or other knobs.
WORKED_OUT = {
    "class_names", "crop_size", "default_modality", "group_names", "is_3d", "is_probe", "label_names", "num_channels",
    "num_classes", "num_groups", "num_iterations", "num_tasks", "on_cuda", "smoke", "start_from", "task_names",
}  # fmt: skip

PATH_KNOBS = {name for name, rule in (RULES | DERIVED).items() if rule in (PATH, OPTIONAL_PATH)}

# What decides how much memory a run takes.
SIZES = (
    "batch_size", "image_size", "patch_size", "pixdim", "hidden_dim", "embedding_dim", "num_embeddings", "init_filters",
    "blocks_down", "dense_level", "iterations_per_epoch", "patches_per_volume", "num_samples",
)  # fmt: skip

# Knobs, what must hold of them in a config that has them all, and what is said if it does not.
_FITS: list[tuple[str, Callable[..., bool], str]] = [
    ("train::trainer::max_epochs schedule_epochs", lambda epochs, schedule: epochs <= schedule,
     "`schedule_epochs` must be at least `max_epochs`, got {1} and {0}: past its end the learning rate would rise "
     "again."),
    ("schedule_epochs warmup_epochs", lambda schedule, warmup: warmup < schedule,
     "`warmup_epochs` must be fewer than the {0} of the schedule, got {1}."),
    ("train::trainer::max_epochs val_interval select",
     lambda epochs, interval, select: select != "best" or interval <= epochs,
     "`val_interval` must be at most `max_epochs` where `select` is best, got {1} and {0}: no weights would ever be "
     "chosen."),
    ("train::trainer::max_epochs val_interval mode", lambda epochs, interval, mode: interval <= epochs,
     "`val_interval` must be at most `max_epochs`, got {1} and {0}: no weights would ever be chosen."),
    ("pretraining spatial_dims", lambda pretraining, dims: pretraining.get("spatial_dims", dims) >= dims,
     "`pretrained` must be weights for {1}-D images, got some for {0[spatial_dims]}-D ones: set `spatial_dims` to "
     "{0[spatial_dims]}, or give other weights."),
    ("pretraining spatial_dims", lambda pretraining, dims: pretraining.get("spatial_dims", dims) <= dims,
     "`pretrained` must be weights for {1}-D images, got some for volumes: give other weights, or, if the data are "
     "volumes, `spatial_dims` 3."),
    ("pretraining pretrained_norm",
     lambda pretraining, norm: norm == pretraining.get("pretrained_norm", norm if "layout" in pretraining else "none"),
     "`pretrained_norm` must be none without published weights, and else as in the JSON beside `pretrained`, got {1}: "
     "leave it out."),
    ("pixdim spatial_dims", lambda pixdim, dims: len(pixdim) == dims,
     "`pixdim` must have {1} values, as many as `spatial_dims`, got {0}."),
    ("patch_size spatial_dims", lambda size, dims: len(size) == dims,
     "`patch_size` must have {1} values, as many as `spatial_dims`, got {0}."),
    ("slice_axis spatial_dims", lambda plane, dims: plane == "auto" or dims == 2,
     "`slice_axis` needs `spatial_dims` 2, got {0} and {1}: set `spatial_dims` to 2, or leave `slice_axis` out."),
    ("a_min a_max", lambda low, high: low < high, "`a_min` must be below `a_max`, got {0} and {1}."),
    ("patch_size blocks_down",
     lambda size, blocks: not any(each % 2 ** (len(blocks) - 1) for each in size),
     "`patch_size` must be multiples of 2 for each level of `blocks_down` but the first, got {0} for {1}."),
    ("blocks_down blocks_up", lambda down, up: len(up) == len(down) - 1,
     "`blocks_up` must have one value fewer than `blocks_down`, got {1} and {0}."),
    ("encoder patch_size batch_size",
     lambda encoder, size, batch_size: encoder == SEGRESNET or batch_size > 1 or max(size) > 32,
     "`batch_size` must be at least 2 with `encoder` {0} and `patch_size` {1}, got {2}: its batch norms need more than "
     "one value."),
    ("encoder image_size", lambda encoder, size: size >= 32 or encoder in (*RESNETS, "swin", SEGRESNET),
     "`image_size` must be at least 32 with `encoder` {0}, got {1}."),
    ("mask_size patch_size", lambda mask, size: mask < min(size),
     "`mask_size` must be smaller than the sides of `patch_size`, else all is masked or nothing, got {0} for {1}."),
    ("batch_size sampling_temperature", lambda batch_size, _: batch_size % 2 == 0,
     "`batch_size` must be even, as two volumes of a task are drawn together, got {0}."),
]  # fmt: skip


def check_knobs(parser: ConfigParser) -> None:
    """Hold every key of a config for which there is a rule to it, and then those that must fit each other.

    A switch that the command line gave as a text becomes true or false in the config.

    Raises:
        InputError: naming the knob, what it must be and what it is.
    """
    switches = {}
    config = parser.config or {}  # nobody asks it for a name that is near, as `name in parser` does
    knobs = [name for name in RULES if name in config and not _is_component(config[name])]
    known = {name: str(config[name]) for name in DERIVED if name in config}
    known = {name: text for name, text in known.items() if not text.startswith("$dist.")}  # when processes have met
    knobs += [name for name, text in known.items() if "@" not in text or text[1:] in RULES]
    # First those that are given as they are, on which others depend.
    for name in sorted(knobs, key=lambda name: str(config[name])[:1] in ("$", "@")):
        if is_disabled(config[name]):
            continue
        rule, shown = (RULES | DERIVED)[name], f"`{name}`" if name in RULES else f"--{name}"
        try:
            value = parser.get_parsed_content(name)
        except Exception as error:
            if bad_input(error):
                raise
            why = f"{_shown(config[name])}, which cannot be evaluated: {_shown(root_cause(error))}"
            raise InputError(f"{shown} must be {rule.says}, got {why}.") from error
        if not rule.holds(value):
            raise InputError(f"{shown} must be {rule.refusal(value)}")
        if rule is SWITCH and isinstance(value, str):
            switches[name] = value.lower() == "true"
    for names, holds, says in _FITS:
        if all(name in parser and not is_disabled(parser[name]) for name in names.split()):
            values = [parser.get_parsed_content(name) for name in names.split()]
            if not holds(*values):
                raise InputError(says.format(*values))
    if "mode" in parser and "pretrained" in parser:
        refuse_bad_mode(parser.get_parsed_content("mode"), parser.get_parsed_content("pretrained"))
    if switches:
        parser.update(switches)
        parser.parse(reset=True)


def _is_component(knob: Any) -> bool:
    """Whether a knob is found by a component of the config, which is asked when it is needed."""
    return isinstance(knob, Mapping) and "_target_" in knob


def refuse_component(name: str, was: Any, value: Any) -> None:
    """Refuse a component, or what switches one, as the value of a knob: it would be held to no rule.

    A knob that a component finds may get another component.
    """
    is_component = isinstance(value, Mapping) and any(str(key).startswith("_") for key in value)
    if name in RULES.keys() | DERIVED.keys() and is_component and not (_is_component(was) and _is_component(value)):
        raise InputError(f"--{name} takes no component, got {_shown(value)}.")


def refuse_other_kind(name: str, was: Any, value: Any) -> bool:
    """Refuse a value of another kind than what a config has there, if it is known, and say whether it is.

    It is that of the knob to which it refers, a number, a switch or a component; None and expressions may be anywhere.
    """
    if value is None or (isinstance(value, str) and value[:1] in ("@", "$", "%")):
        return False
    rule = RULES.get(was[1:]) if isinstance(was, str) and was[:1] == "@" else None
    if rule is SWITCH or isinstance(was, bool):
        rule = Rule("True or False", lambda value: isinstance(value, bool))
    elif isinstance(was, (int, float)):
        rule = Rule("a number, or a list of them", lambda value: all(map(_is_number, ensure_tuple(value))))
    elif _is_component(was):
        says = "a component, as {'_target_': NAME}, or what gives one, a reference (@NAME) or an expression ($...)"
        rule = Rule(says, lambda value: isinstance(value, Mapping))
    elif isinstance(value, bool):  # which a number may switch off
        return False
    if rule is not None and not rule.holds(value):
        raise InputError(f"--{name} must be {rule.refusal(value)}")
    return rule is not None and not isinstance(value, Mapping)


def is_disabled(knob: Any) -> bool:
    """Whether a config has taken a knob away."""
    return bool(knob == {"_disabled_": True})
