"""What a run of a bundle needs from the command line and from torchrun."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from difflib import get_close_matches
from dis import opname
from importlib.util import find_spec
from math import inf, isfinite
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import run as bundle_run
from monai.networks import nets
from monai.utils import ensure_tuple
from torch.nn.parallel import DistributedDataParallel

from dissect_monai.common import InputError
from dissect_monai.handlers.checkpoints import checkpoints_in, newest_checkpoint
from dissect_monai.handlers.predictions import OVERLAYS
from dissect_monai.losses.multilabel import BALANCES
from dissect_monai.networks.weights import MODES

# What MONAI itself reads beside `--tracking`.
TRACKING_OPTIONS = ("experiment_name", "run_name", "save_execute_config", "tracking_uri")
# What an override may add to a component although its config does not show it.
COMPONENT_KEYS = ("_disabled_", "_desc_", "_requires_", "_mode_")


def refuse_unknown_overrides() -> None:
    """Refuse an override of `monai.bundle run` that names nothing in the config files; MONAI would ignore it.

    An argument that a component's class takes may be added even if the config does not show it. A knob that is
    {"_disabled_": true} has been taken away by one of the files.

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
        if name in parser and is_disabled(parser[name]):
            raise InputError(f"--{identifier} has no meaning with {_names(config_file)}: leave it out.")
        if name not in parser and not _is_argument(parser, name):
            near = get_close_matches(name, [*known, *_arguments(parser, name)], n=1, cutoff=0)
            raise InputError(f"there is no --{identifier} to override; did you mean --{near[0].replace('::', '#')}?")
        parser[name] = value


def is_disabled(knob: Any) -> bool:
    """Whether a config file has taken a knob of another one away, by {"_disabled_": true} in its place."""
    return knob == {"_disabled_": True}


def running_workflow() -> ConfigWorkflow | None:
    """The workflow whose config this code is called from, if any."""
    for frame in _callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
    return None


def given_items(name: str) -> list[Any] | None:
    """The data list that the running workflow was given in place of its own, as MONAI Label gives one, or None.

    Args:
        name: id of the list in the config, such as "train#dataset#data".
    """
    workflow = running_workflow()
    items = None if workflow is None else workflow.parser.get(name.replace("#", "::"))
    return items if isinstance(items, list) else None


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
    options |= {*TRACKING_OPTIONS} if arguments["tracking"] or given.get("tracking") else set()
    return config_file, {name: value for name, value in given.items() if name not in options}


def _names(config_file: Any) -> str:
    return " and ".join(Path(file).name for file in ensure_tuple(config_file))


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
        raise InputError(f"{f'`{name}`' if name else 'a switch'} must be {SWITCH.says}, got {value!r}.")
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
            raise InputError(f"`--{name}` must be {rule.says}, got {value!r}: {error}") from error
        if not holds:
            raise InputError(f"`--{name}` must be {rule.says}, got {value!r}.")
    for names, refuse in TOGETHER.items():
        if all(name in parser for name in names):
            refuse(*map(parser.get_parsed_content, names))


def _refuse_bad_schedule(max_epochs: int, schedule_epochs: int, warmup_epochs: int) -> None:
    if schedule_epochs < max_epochs:
        raise InputError(
            f"`--schedule_epochs` must be at least --max_epochs, got {schedule_epochs} and {max_epochs}: past its end "
            "the learning rate would rise again."
        )
    if warmup_epochs >= schedule_epochs:
        raise InputError(
            f"`--warmup_epochs` must be fewer than the {schedule_epochs} of the schedule, got {warmup_epochs}."
        )


def _refuse_bad_window(a_min: float, a_max: float) -> None:
    if a_min >= a_max:
        raise InputError(f"`--a_min` must be below --a_max, got {a_min} and {a_max}.")


def _refuse_bad_patch(patch_size: Sequence[int], spatial_dims: int, blocks_down: Sequence[int]) -> None:
    stride = 2 ** (len(blocks_down) - 1)
    if any(size % stride for size in patch_size[:spatial_dims]):
        raise InputError(
            f"`--patch_size` must be multiples of {stride}, the stride of the {len(blocks_down)} levels of "
            f"--blocks_down, got {list(patch_size[:spatial_dims])}."
        )


def _refuse_bad_blocks(blocks_down: Sequence[int], blocks_up: Sequence[int]) -> None:
    if len(blocks_up) != len(blocks_down) - 1:
        raise InputError(
            f"`--blocks_up` must have one value fewer than the {len(blocks_down)} of --blocks_down, got {blocks_up}."
        )


def _refuse_large_mask(mask_size: int, patch_size: Sequence[int], spatial_dims: int) -> None:
    smallest = min(patch_size[:spatial_dims])
    if mask_size >= smallest:
        raise InputError(
            "`--mask_size` must be smaller than the sides of --patch_size, else all is masked or nothing, "
            f"got {mask_size} for {smallest}."
        )


def _refuse_odd_batch(batch_size: int, _: float) -> None:
    if batch_size % 2:
        raise InputError(f"`--batch_size` must be even, as two volumes of a task are drawn together, got {batch_size}.")


def _refuse_rare_validation(max_epochs: int, val_interval: int, select: str) -> None:
    if select == "best" and val_interval > max_epochs:
        raise InputError(
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


def process_device() -> torch.device:
    """Device of this process among those that torchrun started on this machine.

    Raises:
        ValueError: if torchrun did not start it.
    """
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "multi_gpu_train.json needs one process per GPU: start it by "
            "`python -m torch.distributed.run --nproc_per_node=<GPUs> -m monai.bundle run ...`."
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def broadcast_object(value: Any) -> Any:
    """What the first process calls this with, in all processes; the value itself without a process group.

    Args:
        value: anything that can be pickled. All processes must call this.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def min_over_ranks(count: int) -> int:
    """The smallest count of all processes; the count itself without a process group.

    Args:
        count: of this process, such as the images that it could read. All processes must call this.
    """
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


logger = logging.getLogger(__name__)
BAD_INPUT = (ValueError, RuntimeError, ImportError)  # what this package raises on purpose; the rest are its faults


def explain_errors() -> None:
    """Let `monai.bundle run` end with one line where this package refuses its input deep inside MONAI's calls.

    Only for errors that this package raises on purpose or the file system reports; all others keep their traceback,
    as do callers of the Python API.
    """
    if run_arguments() is None:
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = bad_input(error)
        if cause is None:
            sys.__excepthook__(kind, error, trace)
        else:
            sys.stderr.write(f"error: {cause}\n")

    sys.excepthook = explain


def bad_input(error: BaseException | None) -> BaseException | None:
    """The error in a chain of causes that says what was wrong with the input, or None: MONAI wraps it several times."""
    while error is not None:
        if isinstance(error, OSError) or (isinstance(error, BAD_INPUT) and _is_raised_here(error.__traceback__)):
            return error
        error = error.__cause__
    return None


def _is_raised_here(trace: TracebackType | None) -> bool:
    """Whether a `raise` of this package began a traceback, and not a function that it called."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("dissect_monai."):
        return False
    # What torch or numpy raise in C has no frame of its own, but stops at a call.
    return opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


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


def log_data_source(smoke: bool, data_dir: object) -> None:
    """Say in one line which images the run uses.

    Args:
        smoke: whether it runs on generated phantoms.
        data_dir: folder or folders of the images; None if the caller of the run lists them.
    """
    folders = ", ".join(map(str, ensure_tuple(data_dir)))
    if smoke:
        logger.warning("Smoke run on generated phantoms in %s; give --dataset_dir to use your images.", folders)
    elif data_dir is None:
        logger.info("Using the images that the caller lists.")
    else:
        logger.info("Using the images in %s.", folders)


def check_writable(output_dir: str | Path, *folders: str) -> None:
    """Make the folders that a run needs, and refuse an output folder that cannot be written.

    Args:
        output_dir: where the run is to write.
        folders: names of the folders below it.

    Raises:
        ValueError: naming the output folder and what the system says.
    """
    for folder in (Path(output_dir, name) for name in folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(
                f"`--output_dir` must be a folder that can be written, got {output_dir}: {error}"
            ) from error


def refuse_overwriting(ckpt_dir: str | Path) -> None:
    """Refuse a folder that holds checkpoints of another run, which a run that starts anew would overwrite.

    Raises:
        ValueError: saying what to do.
    """
    if checkpoints_in(ckpt_dir):
        raise InputError(
            f"{ckpt_dir} holds the checkpoints of another run: go on with it by --resume true, or give another "
            "--output_dir."
        )


def checkpoint_to_resume(resume: Any, ckpt_dir: str | Path) -> str | None:
    """The newest checkpoint if a run is to go on from it, else None; in all processes that which the first one sees.

    Args:
        resume: true; false; or "auto", which goes on if there is a checkpoint and begins otherwise, for runs that are
            started again by what supervises them, with the arguments that they had.
        ckpt_dir: folder of the checkpoints.

    Raises:
        FileNotFoundError: if `resume` is true and there is none.
        ValueError: if `resume` is none of the three.
    """
    auto = str(resume).lower() == "auto"
    if not auto and not is_true(resume, "resume"):
        return None
    newest = broadcast_object([str(path) for path in checkpoints_in(ckpt_dir)[-1:]])
    if not newest and not auto:
        return newest_checkpoint(ckpt_dir)  # says what is missing
    return newest[0] if newest else None


def refuse_small_data(dataset: Sized, batch_size: int, world_size: int = 1) -> None:
    """Refuse a training set that does not fill one batch per process.

    Raises:
        ValueError: saying how many images there are and what to do.
    """
    if not len(dataset):
        raise InputError("`training` holds no images: list some there in dataset.json.")
    if batch_size < 2:
        raise InputError(f"`--batch_size` must be at least 2 for batch normalisation, got {batch_size}.")
    if len(dataset) < batch_size * world_size:
        raise InputError(
            f"`training` holds {len(dataset)} images, fewer than one batch of {batch_size} on {world_size} "
            "process(es): lower --batch_size."
        )


HANDLER = "MLFlowHandler"
HANDLERS = ("train::handlers", "validate::handlers", "handlers")  # where MONAI adds one
OF_DECOLLATED = "$monai.handlers.from_engine(['loss'], first=True)"  # how MONAI's reads the loss
LONGEST_PARAMETER = 500  # characters; stores of MLflow take no value of any length


def complete_tracking() -> None:
    """Let the handlers that MONAI adds for `--tracking mlflow` see the loss, the settings and the config of the run.

    As they come, they read the loss of decollated outputs alone, look for the config that was run below an
    `output_dir` that must be an expression, and write into the run of a process that was killed. Here every start is
    a run of its own. What a file of settings says stays, and without `--tracking` nothing happens.

    Raises:
        ImportError: if MLflow is not installed.
    """
    workflow = running_workflow()
    if workflow is None:
        return
    parser = workflow.parser
    lists = [parser.get(name) for name in HANDLERS]
    found = [
        (handlers, index)
        for handlers in lists
        if isinstance(handlers, list)
        for index, handler in enumerate(handlers)
        if isinstance(handler, Mapping) and str(handler.get("_target_")).rpartition(".")[2] == HANDLER
    ]
    if not found:
        return
    if find_spec("mlflow") is None:
        raise ImportError("`--tracking mlflow` needs MLflow: pip install mlflow, or leave it out.")
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


loss_of = itemgetter("loss")


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a run as parameters of MLflow: texts, without the long ones."""
    texts = {name: str(value) for name, value in settings.items()}
    return {name: text for name, text in texts.items() if len(text) <= LONGEST_PARAMETER}
