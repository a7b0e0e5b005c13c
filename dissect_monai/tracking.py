"""What `--tracking mlflow` of `monai.bundle run` needs to show a run of these bundles."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from dissect_monai.overrides import running_workflow

HANDLER = "MLFlowHandler"
ENGINES = ("train::handlers", "validate::handlers", "handlers")  # where MONAI adds its handler
LONGEST_PARAMETER = 500  # characters; stores of MLflow take no value of any length


def complete_tracking() -> None:
    """Let the handlers that MONAI adds for `--tracking mlflow` see the loss, the settings and the config of the run.

    As they come, they read the loss of decollated outputs alone, and look for the config that was run below an
    `output_dir` that must be an expression. Without `--tracking` nothing happens.
    """
    workflow = running_workflow()
    if workflow is None:
        return
    parser = workflow.parser
    tracked = False
    for name in ENGINES:
        handlers = parser.get(name)
        for index, handler in enumerate(handlers if isinstance(handlers, list) else []):
            if isinstance(handler, Mapping) and handler.get("_target_") == HANDLER:
                tracked = True
                handlers[index] = _completed(handler, "settings" in parser)
    if not tracked:
        return
    # MONAI wrote "<output_dir> + '/<file>'", an expression without its "$".
    path = parser.get("save_execute_config")
    if isinstance(path, str) and path.endswith(".json'"):
        parser["save_execute_config"] = "$str(@output_dir) + " + path.rpartition(" + ")[2]
    parser.parse(reset=True)


def _completed(handler: Mapping[str, Any], has_settings: bool) -> dict[str, Any]:
    """MONAI's handler, a copy: its own is shared by all runs of the process."""
    of_trainer = "output_transform" in handler
    loss = {"output_transform": "$dissect_monai.tracking.loss_of"} if of_trainer else {}
    settings = (
        {"experiment_param": "$dissect_monai.tracking.parameters(@settings)"} if of_trainer and has_settings else {}
    )
    return {**handler, **loss, **settings}


loss_of = itemgetter("loss")


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a run as parameters of MLflow: texts, without the long ones."""
    texts = {name: str(value) for name, value in settings.items()}
    return {name: text for name, text in texts.items() if len(text) <= LONGEST_PARAMETER}
