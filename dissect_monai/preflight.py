"""What a run checks before it starts: one clear line instead of a traceback, and no misspelt knob passes."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any, TypeVar

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import run as bundle_run
from monai.networks import nets
from monai.utils import ensure_tuple

from dissect_monai.data import SPLITS, Datalist

logger = logging.getLogger(__name__)
T = TypeVar("T")
# What an override may add to a component although its config does not show it.
COMPONENT_KEYS = ("_disabled_", "_desc_", "_requires_", "_mode_")


def checked(function: Callable[..., T], **kwargs: Any) -> T:
    """Call `function`; bad input ends the process with its one-line message and exit status 1.

    MONAI wraps what a config raises into a chain of tracebacks; `SystemExit` passes it unchanged.

    Args:
        function: anything that refuses bad input by `ValueError`, `OSError` or `ImportError`.
        kwargs: its arguments.
    """
    try:
        return function(**kwargs)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


def explain_errors() -> None:
    """Let `monai.bundle run` end with one line where this package refuses its input deep inside MONAI's calls.

    Only for errors that this package or the file system raises; all others keep their traceback, as do callers of the
    Python API.
    """
    if _run_arguments() is None:
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        frames = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(cause.__traceback__)]
        if isinstance(cause, OSError) or (frames and frames[-1].startswith("dissect_monai.")):
            sys.stderr.write(f"error: {cause}\n")
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain


def is_true(value: bool | str) -> bool:
    """A switch as the command line gives it: `--resume true` arrives as text.

    Raises:
        SystemExit: if it is neither true nor false.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise SystemExit(f"error: a switch must be true or false, got {value!r}.")


def bundle_root(name: str) -> str:
    """Folder of the bundle that runs: that of its config file, the current one, or `bundles/<name>` below it.

    Args:
        name: name of the bundle's folder.

    Raises:
        SystemExit: if none of the three holds configs/metadata.json.
    """
    workflows = [frame.f_locals["self"] for frame in _callers() if "self" in frame.f_locals]
    roots = [each.config_root_path for each in workflows if isinstance(each, ConfigWorkflow)]
    for folder in (*(Path(root).absolute().parent for root in roots), Path(), Path("bundles", name)):
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise SystemExit(f"error: cannot find the bundle {name} from {Path.cwd()}: add --bundle_root <its folder>.")


def announce(smoke: bool, data_dir: object) -> None:
    """Say in one line what the run trains on.

    Args:
        smoke: whether it runs on generated phantoms.
        data_dir: folder or folders of the images.
    """
    if smoke:
        logger.warning("Smoke run on generated phantoms in %s; give --dataset_dir to train on your images.", data_dir)
    else:
        logger.info("Training on the images in %s.", data_dir)


def refuse_unknown_overrides() -> None:
    """Refuse an override of `monai.bundle run` that names nothing in the config files; MONAI would ignore it.

    An argument that a component's class takes may be added even if the config does not show it.

    Raises:
        ValueError: naming the override and the nearest id.
    """
    arguments = _run_arguments()
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
            near = get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"there is no --{identifier} to override; did you mean --{near[0].replace('::', '#')}?")
        parser[name] = value


def _run_arguments() -> tuple[Any, dict[str, Any]] | None:
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
    if not isinstance(config, Mapping):
        return []
    found = []
    for key, value in config.items():
        found.append(f"{prefix}{key}")
        found += _ids(value, f"{prefix}{key}::")
    return found


def _is_argument(parser: ConfigParser, name: str) -> bool:
    parent, _, key = name.rpartition("::")
    component = parser.get(parent) if parent and parent in parser else None
    if not isinstance(component, Mapping) or "_target_" not in component:
        return False
    if key in COMPONENT_KEYS:
        return True
    target = component["_target_"]
    if str(target).startswith("@"):
        target = parser.get_parsed_content(target[1:])
    # Without its arguments, which may refer to data and networks that nobody wants to build for this.
    callable_only = ConfigParser({"component": {"_target_": target, "_mode_": "callable"}})
    parameters = inspect.signature(callable_only.get_parsed_content("component")).parameters
    return key in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def refuse_bad_knobs(encoder: str, **counts: object) -> None:
    """Refuse an encoder that MONAI lacks, and counts that are no positive whole numbers.

    Raises:
        ValueError: naming the knob.
    """
    encoders = [name for name in dir(nets) if name.startswith("resnet") and name != "resnet"]
    if encoder not in encoders:
        raise ValueError(f"`encoder` must be one of {', '.join(sorted(encoders))}, got {encoder!r}.")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.")


def refuse_small_data(dataset: Sized, batch_size: int, world_size: int = 1) -> None:
    """Refuse a training set that does not fill one batch per process.

    Raises:
        ValueError: saying how many images there are and what to do.
    """
    if batch_size < 2:
        raise ValueError(f"`batch_size` must be at least 2 for batch normalisation, got {batch_size}.")
    if len(dataset) < batch_size * world_size:
        raise ValueError(
            f"`training` holds {len(dataset)} images, fewer than one batch of {batch_size} on {world_size} "
            "process(es): lower --batch_size."
        )


def refuse_unlabelled(datalist: Datalist) -> None:
    """Refuse an evaluation without labels.

    Raises:
        ValueError: naming the splits without labelled items.
    """
    empty = [split for split in SPLITS if not getattr(datalist, split)]
    if empty:
        raise ValueError(
            f"evaluation needs labelled images in training, validation and test; {', '.join(empty)} has none. "
            "Give --dataset_dir a folder whose dataset.json has the three lists with a `label` per item."
        )
