"""What a run of a bundle needs from the command line and from torchrun, and nothing else."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import fire
import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import run as bundle_run
from monai.utils import ensure_tuple
from torch.nn.parallel import DistributedDataParallel

from dissect_monai.common import InputError, Item, MissingPackageError, of_all_processes, world_size
from dissect_monai.data.datalists import SPLITS, Datalist
from dissect_monai.data.datasets import items_of
from dissect_monai.data.sampling import refuse_small
from dissect_monai.data.splits import datalist_digest, refuse_untrainable, subject_digest
from dissect_monai.handlers.checkpoints import checkpoints_in, newest_checkpoint
from dissect_monai.handlers.probes import check_probe_data, refuse_unlabelled
from dissect_monai.knobs import RULES, SETTINGS, check_knobs, is_disabled

logger = logging.getLogger(__name__)
# What MONAI itself reads beside `--tracking`.
TRACKING_OPTIONS = ("experiment_name", "run_name", "save_execute_config", "tracking_uri")
# What an override may add to a component although its config does not show it.
COMPONENT_KEYS = ("_disabled_", "_desc_", "_requires_", "_mode_")


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
        if name in parser and is_disabled(parser[name]):
            files = " and ".join(Path(file).name for file in ensure_tuple(config_file))
            raise InputError(f"--{identifier} has no meaning with {files}: leave it out.")
        if name not in parser and not _is_argument(parser, name):
            near = get_close_matches(name, [*known, *_arguments(parser, name)], n=1, cutoff=0)
            raise InputError(f"there is no --{identifier} to override; did you mean --{near[0].replace('::', '#')}?")
        parser[name] = value


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


# ---- before the first step -----------------------------------------------------------------------------------------


def run_settings(
    volumes: Any = None, validation: Sequence[Item] = (), pretraining: Mapping[str, Any] | None = None, **facts: Any
) -> dict[str, Any]:
    """What the weights of the running bundle depend on: its knobs, in their order, and what is given here.

    It is written beside the weights, for evaluation and inference, and a run that goes on must have the same.

    Args:
        volumes: training data set of volumes, whose data list gives a digest, `data`.
        validation: items on which the weights of a segmentation are chosen; their digest is `validation_data`.
        pretraining: settings of the weights that a segmentation starts from; the subjects that it is `trained_on` are
            added to theirs.
        facts: what no knob says, such as the number of images; they come before a knob of the same name.
    """
    items = [] if volumes is None else items_of(volumes)
    if volumes is not None:
        facts["data"] = datalist_digest(items)
    if pretraining is not None:
        facts["validation_data"] = datalist_digest(validation)
        facts["trained_on"] = sorted({*pretraining.get("trained_on", ()), *map(subject_digest, items)})
    workflow = running_workflow()
    config = {} if workflow is None else workflow.parser.config
    names = [name for name, knob in config.items() if name in SETTINGS and not is_disabled(knob)]
    return {**{name: workflow.parser.get_parsed_content(name) for name in names if workflow}, **facts}


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


def given_items() -> tuple[list[Any], list[Any]] | None:
    """The items for training and validation that a server gives the running workflow, as MONAI Label does, or None.

    They stand in the config in place of what the bundle lists itself, in `train#dataset#data` and
    `validate#dataset#data`; without the latter there are none for validation.
    """
    workflow = running_workflow()
    names = ("train::dataset::data", "validate::dataset::data")
    training, validation = (None if workflow is None else workflow.parser.get(name) for name in names)
    if not isinstance(training, list):
        return None
    return training, validation if isinstance(validation, list) else []


def checkpoint_to_resume(resume: Any, ckpt_dir: str | Path) -> str | None:
    """The newest checkpoint if a run is to go on from it, else None; in all processes that which the first one sees.

    Args:
        resume: true; false; or "auto", which goes on if there is a checkpoint and begins otherwise, for runs that are
            started again by what supervises them, with the arguments that they had.
        ckpt_dir: folder of the checkpoints.

    Raises:
        FileNotFoundError: if `resume` is true and there is none.
    """
    if str(resume).lower() == "false":
        return None
    newest: list[str] = of_all_processes([str(path) for path in checkpoints_in(ckpt_dir)[-1:]])[0]
    if not newest and str(resume).lower() == "true":
        return newest_checkpoint(ckpt_dir)  # says what is missing
    return newest[0] if newest else None


def check_training(
    smoke: bool,
    data_dir: object,
    output_dir: str | Path,
    resume_from: str | None,
    datalist: Datalist | None = None,
    batch_size: int | None = None,
    needed: Sequence[str] = (),
    select: str | None = None,
) -> None:
    """Check what a training learns from, say in one line which images it uses, and make the folders that it writes to.

    Args:
        smoke: whether it runs on generated phantoms, and may write over an earlier run.
        data_dir: folder or folders of the images; None if the caller of the run lists them.
        output_dir: where the run is to write, in `checkpoints`, `eval` and `models`.
        resume_from: checkpoint from which it goes on, or None.
        datalist: what it trains on, to be checked with the arguments that follow.
        batch_size: images of a batch, of which every process must have one.
        needed: splits that must have labels.
        select: "best" if the weights of a segmentation are chosen by validation, else "last".

    Raises:
        InputError: if the output folder cannot be written, or holds the checkpoints of another run, or the data leave
            nothing to learn.
    """
    if datalist is not None and select is not None:
        refuse_untrainable(datalist.training, datalist.validation, select)
    if datalist is not None and needed:
        refuse_unlabelled(datalist, splits=needed)
    if datalist is not None and batch_size is not None:
        refuse_small(datalist.training, batch_size, world_size())
    ckpt_dir = Path(output_dir, "checkpoints")
    if resume_from is None and not smoke and data_dir is not None and checkpoints_in(ckpt_dir):
        raise InputError(
            f"{ckpt_dir} holds the checkpoints of another run: go on with it (`resume` true), or give another "
            "`output_dir`."
        )
    _make_folders(smoke, data_dir, output_dir, ("checkpoints", "eval", "models"))


def check_output(
    smoke: bool,
    data_dir: Any,
    output_dir: str | Path,
    datalist: Datalist | None = None,
    needed: Sequence[str] = SPLITS,
    findings: str | Sequence[str] | None = None,
    pretrained: str | Path | None = None,
) -> None:
    """Say in one line which images a run uses, and make the folder that it writes to.

    Args:
        smoke: whether it runs on generated phantoms.
        data_dir: folder or folders of the images; None if the caller of the run lists them.
        output_dir: where the run is to write, in `eval`.
        datalist: what an evaluation scores, which must leave something to measure.
        needed: splits of images that must have labels.
        findings: those that it scores; None for all.
        pretrained: weights of a network for volumes; None for images.

    Raises:
        InputError: if the output folder cannot be written, or there is nothing to measure.
    """
    if datalist is not None and pretrained is not None:
        check_probe_data(datalist, data_dir)
    elif datalist is not None:
        refuse_unlabelled(datalist, findings, needed)
    _make_folders(smoke, data_dir, output_dir, ("eval",))


def _make_folders(smoke: bool, data_dir: object, output_dir: str | Path, folders: Sequence[str]) -> None:
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
    lists = [parser.get(name) for name in ("train::handlers", "validate::handlers", "handlers")]
    found = [
        (handlers, index)
        for handlers in lists
        if isinstance(handlers, list)
        for index, handler in enumerate(handlers)
        if isinstance(handler, Mapping) and str(handler.get("_target_")).endswith("MLFlowHandler")
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
