"""What `--tracking mlflow` of `monai.bundle run` needs to show a run of these bundles."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from operator import itemgetter
from typing import Any

from dissect_monai.overrides import running_workflow

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
        completed["output_transform"] = "$dissect_monai.tracking.loss_of"
        if has_settings:
            completed.setdefault("experiment_param", "$dissect_monai.tracking.parameters(@settings)")
    return completed


loss_of = itemgetter("loss")


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a run as parameters of MLflow: texts, without the long ones."""
    texts = {name: str(value) for name, value in settings.items()}
    return {name: text for name, text in texts.items() if len(text) <= LONGEST_PARAMETER}
