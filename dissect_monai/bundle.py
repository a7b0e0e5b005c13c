"""What a run of a bundle needs from the command line and from torchrun, and nothing else."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from difflib import get_close_matches
from importlib.util import find_spec
from math import inf, isfinite
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, NamedTuple

import fire
import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import run as bundle_run
from monai.networks import nets
from monai.utils import ensure_tuple
from torch.nn.parallel import DistributedDataParallel

from dissect_monai.common import InputError, MissingPackageError
from dissect_monai.handlers.checkpoints import checkpoints_in, newest_checkpoint
from dissect_monai.handlers.savers import OVERLAYS
from dissect_monai.losses.joint_embedding import OBJECTIVES
from dissect_monai.losses.multilabel import BALANCES
from dissect_monai.networks.weights import MODES, refuse_bad_mode

logger = logging.getLogger(__name__)
# What MONAI itself reads beside `--tracking`.
TRACKING_OPTIONS = ("experiment_name", "run_name", "save_execute_config", "tracking_uri")
# What an override may add to a component although its config does not show it.
COMPONENT_KEYS = ("_disabled_", "_desc_", "_requires_", "_mode_")
ENCODERS = tuple(f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200) if hasattr(nets, f"resnet{depth}"))


# ---- the command line ----------------------------------------------------------------------------------------------


def begin(seed: int | None = None) -> None:
    """First step of a run: errors in one line, MLflow's handlers completed, every knob checked, torch seeded.

    Args:
        seed: of torch; None leaves it.

    Raises:
        InputError: naming a misspelt override and the nearest id, or a knob with a bad value.
    """
    if _is_command_line():
        sys.excepthook = _explain
    workflow = running_workflow()
    if workflow is not None:
        _complete_tracking(workflow.parser)
        if _is_command_line():
            refuse_unknown_overrides(*run_arguments())
        check_knobs(workflow.parser)
    if seed is not None:
        torch.manual_seed(seed)


def _is_command_line() -> bool:
    """Whether this process is `python -m monai.bundle run`, and not a server or a script that has loaded a bundle."""
    return Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py") and sys.argv[1:2] == ["run"]


def run_arguments() -> tuple[Any, dict[str, Any]]:
    """Config files and overrides of the command line and of its `--args_file`, as fire reads them."""
    given: dict[str, Any] = fire.Fire(lambda *_, **named: named, command=sys.argv[2:], serialize=lambda _: None)
    if given.get("args_file"):
        given = {**ConfigParser.load_config_file(given["args_file"]), **given}
    options = {
        "workflow_name",
        *inspect.signature(bundle_run).parameters,
        *inspect.signature(ConfigWorkflow).parameters,
    }
    options |= {*TRACKING_OPTIONS} if given.get("tracking") else set()
    return given["config_file"], {name: value for name, value in given.items() if name not in options}


def running_workflow() -> ConfigWorkflow | None:
    """The workflow whose config this code is called from, if any.

    MONAI hands a workflow neither to the expressions of its config nor to anybody else. This is the one place that
    looks for it among the callers: for the config's folder, its knobs, and the lists that MONAI Label puts into it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
        frame = frame.f_back
    return None


def refuse_unknown_overrides(config_file: Any, overrides: Mapping[str, Any]) -> None:
    """Refuse an override that names nothing in the config files; MONAI would ignore it.

    An argument that a component's class takes may be added even if the config does not show it. A knob that is
    {"_disabled_": true} has been taken away by one of the files.

    Raises:
        InputError: naming the override and the nearest id.
    """
    parser = ConfigParser()
    parser.read_config(ensure_tuple(config_file))
    known = [identifier for identifier in _ids(parser.config) if not identifier.startswith("_")]
    for identifier, value in overrides.items():
        name = str(identifier).replace("#", "::")
        if name.startswith("_meta_"):
            continue
        if name in parser and _is_disabled(parser[name]):
            files = " and ".join(Path(file).name for file in ensure_tuple(config_file))
            raise InputError(f"--{identifier} has no meaning with {files}: leave it out.")
        if name not in parser and not _is_argument(parser, name):
            near = get_close_matches(name, [*known, *_arguments(parser, name)], n=1, cutoff=0)
            raise InputError(f"there is no --{identifier} to override; did you mean --{near[0].replace('::', '#')}?")
        parser[name] = value


def _is_disabled(knob: Any) -> bool:
    return knob == {"_disabled_": True}


def _ids(config: Any, prefix: str = "") -> list[str]:
    entries = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
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


# ---- errors --------------------------------------------------------------------------------------------------------


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause = bad_input(error)
    if cause is None:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.write(f"error: {with_dashes(str(cause))}\n")


def bad_input(error: BaseException | None) -> BaseException | None:
    """The error in a chain of causes that says what was wrong with the input, or None: MONAI wraps it several times."""
    while error is not None and not isinstance(error, (InputError, OSError)):
        error = error.__cause__
    return error


def with_dashes(message: str) -> str:
    """A message about arguments as one about the knobs of the same names: `seed` becomes `--seed`."""
    return re.sub(r"`(\w+)`", lambda match: f"`--{match[1]}`" if match[1] in RULES else match[0], message)


# ---- knobs ---------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What the value of a knob must be."""

    says: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
NUMBER = Rule("a number", lambda value: _is_number(value) and isfinite(value))
FRACTION = Rule("a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1)
AXES = Rule(
    "a list of different axes among 0 (right to left), 1 (back to front) and 2 (feet to head), or []",
    lambda value: isinstance(value, (list, tuple)) and {*value} <= {0, 1, 2} and len({*value}) == len(value),
)
PER_FOLDER = Rule(
    "a text, a list with one for each folder, or a mapping of folders to texts, such as \"{'NAME': 'abdomen'}\"",
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
    (
        _number(0),
        "dense_weight discrete_weight group_weight image_weight reconstruction_weight task_weight weight_decay",
        "",
    ),
    (_number(0, 1), "mask_fraction momentum sampling_temperature", ""),
    (_positive(), "learning_rate temperature", ""),
    (_positive(1), "label_fraction layer_decay", ""),
    (FRACTION, "decay validation_fraction", "overlap"),
    (_list_of(_whole(1)), "blocks_down blocks_up", ""),
    (_list_of(_whole(8), 3), "patch_size", ""),
    (_list_of(_positive(), 3), "pixdim", ""),
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


def is_true(value: bool | str, name: str) -> bool:
    """A switch as a command line gives it, where `true` is a text.

    Raises:
        InputError: if it is neither true nor false.
    """
    if not SWITCH.holds(value):
        raise InputError(f"`{name}` must be {SWITCH.says}, got {value!r}.")
    return str(value).lower() == "true"


def check_knobs(parser: ConfigParser) -> None:
    """Hold every knob of a config for which there is a rule to it, and then those that must fit each other.

    A switch that the command line gave as a text becomes true or false in the config.

    Raises:
        InputError: naming the knob, what it must be and what it is.
    """
    switches = {}
    for name, rule in RULES.items():
        if name not in parser or _is_disabled(parser[name]):
            continue
        value = parser.get_parsed_content(name)
        try:
            holds = rule.holds(value)
        except (TypeError, RuntimeError, AssertionError) as error:  # as torch reports devices, and `in` odd types
            raise InputError(f"`{name}` must be {rule.says}, got {value!r}: {error}") from error
        if not holds:
            raise InputError(f"`{name}` must be {rule.says}, got {value!r}.")
        if rule is SWITCH and isinstance(value, str):
            switches[name] = is_true(value, name)
    for names, check in TOGETHER.items():
        if all(name in parser for name in names):
            check(*map(parser.get_parsed_content, names))
    if switches:
        parser.update(switches)
        parser.parse(reset=True)


def _check_schedule(max_epochs: int, schedule_epochs: int, warmup_epochs: int) -> None:
    if schedule_epochs < max_epochs:
        raise InputError(
            f"`schedule_epochs` must be at least `max_epochs`, got {schedule_epochs} and {max_epochs}: past its end "
            "the learning rate would rise again."
        )
    if warmup_epochs >= schedule_epochs:
        raise InputError(
            f"`warmup_epochs` must be fewer than the {schedule_epochs} of the schedule, got {warmup_epochs}."
        )


def _check_selection(max_epochs: int, val_interval: int, select: str) -> None:
    if select == "best" and val_interval > max_epochs:
        raise InputError(
            f"`val_interval` must be at most `max_epochs` where `select` is best, got {val_interval} and {max_epochs}: "
            "no weights would ever be chosen."
        )


def _check_window(a_min: float, a_max: float) -> None:
    if a_min >= a_max:
        raise InputError(f"`a_min` must be below `a_max`, got {a_min} and {a_max}.")


def _check_patch(patch_size: Sequence[int], spatial_dims: int, blocks_down: Sequence[int]) -> None:
    stride = 2 ** (len(blocks_down) - 1)
    if any(size % stride for size in patch_size[:spatial_dims]):
        raise InputError(
            f"`patch_size` must be multiples of {stride}, the stride of the {len(blocks_down)} levels of "
            f"`blocks_down`, got {list(patch_size[:spatial_dims])}."
        )


def _check_blocks(blocks_down: Sequence[int], blocks_up: Sequence[int]) -> None:
    if len(blocks_up) != len(blocks_down) - 1:
        raise InputError(
            f"`blocks_up` must have one value fewer than the {len(blocks_down)} of `blocks_down`, got {blocks_up}."
        )


def _check_mask(mask_size: int, patch_size: Sequence[int], spatial_dims: int) -> None:
    smallest = min(patch_size[:spatial_dims])
    if mask_size >= smallest:
        raise InputError(
            "`mask_size` must be smaller than the sides of `patch_size`, else all is masked or nothing, "
            f"got {mask_size} for {smallest}."
        )


def _check_pairs(batch_size: int, _: float) -> None:
    if batch_size % 2:
        raise InputError(f"`batch_size` must be even, as two volumes of a task are drawn together, got {batch_size}.")


# What knobs must be to each other, in a config that has all of them.
TOGETHER: dict[tuple[str, ...], Callable[..., None]] = {
    ("train::trainer::max_epochs", "schedule_epochs", "warmup_epochs"): _check_schedule,
    ("train::trainer::max_epochs", "val_interval", "select"): _check_selection,
    ("a_min", "a_max"): _check_window,
    ("patch_size", "spatial_dims", "blocks_down"): _check_patch,
    ("blocks_down", "blocks_up"): _check_blocks,
    ("mask_size", "patch_size", "spatial_dims"): _check_mask,
    ("batch_size", "sampling_temperature"): _check_pairs,
    ("mode", "pretrained"): refuse_bad_mode,
}


def run_settings(**facts: Any) -> dict[str, Any]:
    """What the weights of the running bundle depend on: its knobs, in their order, and what is given here.

    It is written beside the weights, for evaluation and inference, and a run that goes on must have the same.

    Args:
        facts: what no knob says, such as the number of images; they come before a knob of the same name.
    """
    workflow = running_workflow()
    config = {} if workflow is None else workflow.parser.config
    names = [name for name, knob in config.items() if name in SETTINGS and not _is_disabled(knob)]
    return {**{name: workflow.parser.get_parsed_content(name) for name in names if workflow}, **facts}


# ---- before the first step -----------------------------------------------------------------------------------------


def bundle_root(name: str) -> str:
    """Folder of the bundle that runs: that of its config file, the current one, or `bundles/<name>` below it.

    Args:
        name: name of the bundle's folder.

    Raises:
        FileNotFoundError: if none of the three holds configs/metadata.json.
    """
    workflow = running_workflow()
    roots = [] if workflow is None else [Path(workflow.config_root_path).absolute().parent]
    for folder in (*roots, Path(), Path("bundles", name)):
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise FileNotFoundError(f"cannot find the bundle {name} from {Path.cwd()}: add --bundle_root <its folder>.")


def given_items(name: str) -> list[Any] | None:
    """The data list that the running workflow was given in place of its own, as MONAI Label gives one, or None.

    Args:
        name: id of the list in the config, such as "train#dataset#data".
    """
    workflow = running_workflow()
    items = None if workflow is None else workflow.parser.get(name.replace("#", "::"))
    return items if isinstance(items, list) else None


def checkpoint_to_resume(resume: Any, ckpt_dir: str | Path) -> str | None:
    """The newest checkpoint if a run is to go on from it, else None; in all processes that which the first one sees.

    Args:
        resume: true; false; or "auto", which goes on if there is a checkpoint and begins otherwise, for runs that are
            started again by what supervises them, with the arguments that they had.
        ckpt_dir: folder of the checkpoints.

    Raises:
        FileNotFoundError: if `resume` is true and there is none.
        InputError: if `resume` is none of the three.
    """
    if not RULES["resume"].holds(resume):
        raise InputError(f"`resume` must be {RULES['resume'].says}, got {resume!r}.")
    if str(resume).lower() == "false":
        return None
    newest: list[str] = broadcast_object([str(path) for path in checkpoints_in(ckpt_dir)[-1:]])
    if not newest and str(resume).lower() == "true":
        return newest_checkpoint(ckpt_dir)  # says what is missing
    return newest[0] if newest else None


def check_training(smoke: bool, data_dir: object, output_dir: str | Path, resume_from: str | None) -> None:
    """The same as `check_output` for a training, which must not overwrite the checkpoints of another run.

    Args:
        smoke: whether it runs on generated phantoms, and may write over an earlier run.
        data_dir: folder or folders of the images; None if the caller of the run lists them.
        output_dir: where the run is to write, in `checkpoints`, `eval` and `models`.
        resume_from: checkpoint from which it goes on, or None.

    Raises:
        InputError: if the output folder cannot be written, or holds the checkpoints of another run.
    """
    ckpt_dir = Path(output_dir, "checkpoints")
    if resume_from is None and not smoke and data_dir is not None and checkpoints_in(ckpt_dir):
        raise InputError(
            f"{ckpt_dir} holds the checkpoints of another run: go on with it (`resume` true), or give another "
            "`output_dir`."
        )
    check_output(smoke, data_dir, output_dir, ("checkpoints", "eval", "models"))


def check_output(smoke: bool, data_dir: object, output_dir: str | Path, folders: Sequence[str] = ("eval",)) -> None:
    """Say in one line which images a run uses, and make the folders that it writes to.

    Args:
        smoke: whether it runs on generated phantoms.
        data_dir: folder or folders of the images; None if the caller of the run lists them.
        output_dir: where the run is to write.
        folders: names of the folders below it.

    Raises:
        InputError: if the output folder cannot be written.
    """
    named = ", ".join(map(str, ensure_tuple(data_dir)))
    if smoke:
        logger.warning("Smoke run on generated phantoms in %s; give --dataset_dir to use your images.", named)
    else:
        logger.info("Using the images %s.", "that the caller lists" if data_dir is None else f"in {named}")
    for folder in (Path(output_dir, name) for name in folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"`output_dir` must be a folder that can be written, got {output_dir}: {error}") from error


def check_batches(images: Sized, batch_size: int, world_size: int = 1) -> None:
    """Refuse a training set that does not fill one batch per process.

    Raises:
        InputError: saying how many images there are and what to do.
    """
    if not len(images):
        raise InputError("`training` holds no images: list some there in dataset.json.")
    if batch_size < 2:
        raise InputError(f"`batch_size` must be at least 2 for batch normalisation, got {batch_size}.")
    if len(images) < batch_size * world_size:
        raise InputError(
            f"`training` holds {len(images)} images, fewer than one batch of {batch_size} on {world_size} "
            "process(es): lower `batch_size`."
        )


# ---- processes -----------------------------------------------------------------------------------------------------


def process_device() -> torch.device:
    """Device of this process among those that torchrun started on this machine.

    Raises:
        InputError: if torchrun did not start it.
    """
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "multi_gpu_train.json needs one process per GPU: start it by "
            "`python -m torch.distributed.run --nproc_per_node=<GPUs> -m monai.bundle run ...`."
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def broadcast_object(value: Any) -> Any:
    """What the first process calls this with, in all processes, which must all call it; `value` without a group."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def min_over_ranks(count: int) -> int:
    """The smallest count of all processes, which must all call this; `count` without a process group."""
    if not dist.is_initialized():
        return count
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return min(counts)


def destroy_group(network: DistributedDataParallel) -> None:
    """Wait until all processes of the run are done, and end what connects them, in each of them.

    Gloo's threads may still hold tensors of the last collective, and abort a process whose interpreter ends before they
    have let go. They are joined with the last reference to the group, which `network` has and gives up here.

    Args:
        network: the wrapped network, which cannot be trained any more.
    """
    device = next(network.parameters()).device
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    for holder in ("reducer", "logger", "process_group"):
        vars(network).pop(holder, None)
    dist.destroy_process_group()


# ---- `--tracking mlflow` -------------------------------------------------------------------------------------------

OF_DECOLLATED = "$monai.handlers.from_engine(['loss'], first=True)"  # how MONAI's handler reads the loss
LONGEST_PARAMETER = 500  # characters; stores of MLflow take no value of any length
loss_of = itemgetter("loss")


def _complete_tracking(parser: ConfigParser) -> None:
    """Let the handlers that MONAI adds for `--tracking mlflow` see the loss, the settings and the config of the run.

    As they come, they read the loss of decollated outputs alone, look for the config that was run below an
    `output_dir` that must be an expression, and write into the run of a process that was killed. Here every start is
    a run of its own. What a file of settings says stays.
    """
    places = [parser.get(name) for name in ("train::handlers", "validate::handlers", "handlers")]
    found = [
        (handlers, index)
        for handlers in places
        if isinstance(handlers, list)
        for index, handler in enumerate(handlers)
        if isinstance(handler, Mapping) and str(handler.get("_target_")).rpartition(".")[2] == "MLFlowHandler"
    ]
    if not found:
        return
    if find_spec("mlflow") is None:
        raise MissingPackageError(
            "`--tracking mlflow` needs MLflow: pip install mlflow (in the repository: pip install -e '.[mlflow]'), "
            "or leave it out."
        )
    for handlers, index in found:
        handlers[index] = _completed(handlers[index], "settings" in parser)
    if "run_name" in parser and parser["run_name"] is None:
        parser["run_name"] = time.strftime("run_%Y%m%d_%H%M%S")
    # MONAI wrote "<output_dir> + '/<file>'", an expression without its "$".
    path = parser.get("save_execute_config")
    if isinstance(path, str) and path.endswith(".json'"):
        parser["save_execute_config"] = "$str(@output_dir) + " + path.rpartition(" + ")[2]
    parser.parse(reset=True)


def _completed(handler: Mapping[str, Any], has_settings: bool) -> dict[str, Any]:
    """A handler with what it lacks; a copy, since MONAI's is shared by all runs of a process."""
    completed = dict(handler)
    if handler.get("output_transform") == OF_DECOLLATED:
        completed["output_transform"] = "$dissect_monai.bundle.loss_of"
        if has_settings:
            completed.setdefault("experiment_param", "$dissect_monai.bundle.parameters(@settings)")
    return completed


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a run as parameters of MLflow: texts, without the long ones."""
    texts = {name: str(value) for name, value in settings.items()}
    return {name: text for name, text in texts.items() if len(text) <= LONGEST_PARAMETER}
