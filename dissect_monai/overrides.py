"""What a run of `monai.bundle` was called with: no misspelt override passes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import run as bundle_run
from monai.utils import ensure_tuple

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
            raise ValueError(f"--{identifier} has no meaning with {_names(config_file)}: leave it out.")
        if name not in parser and not _is_argument(parser, name):
            near = get_close_matches(name, [*known, *_arguments(parser, name)], n=1, cutoff=0)
            raise ValueError(f"there is no --{identifier} to override; did you mean --{near[0].replace('::', '#')}?")
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
