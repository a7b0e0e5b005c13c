from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import refused, run_bundle, write
from monai.bundle import ConfigWorkflow, run

from dissect_monai.bundle import given_items, refuse_unknown_overrides

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI's, about trust


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"learning_rate": 0.2},
        {"train#trainer#max_epochs": 2},
        {"train::trainer::max_epochs": 2},
        {"train#handlers#0#iteration_log": True},
        {"train#handlers#0#epoch_log": False},
        {"loss#squared_pred": True},
        {"loss#_disabled_": True},
        {"loss_name": "monai.losses.TverskyLoss", "loss#alpha": 0.3},
        {"metric_name#include_background": False},
        {"run_id": "run", "workflow_type": "infer"},
    ],
)
def test_overrides_that_name_something_pass(tiny_bundle: Path, overrides: dict[str, Any]) -> None:
    run_bundle(tiny_bundle, **overrides)
    assert Path("ran").exists()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("train#trainer#max_epoch", "train#trainer#max_epochs"),
        ("train::trainer::max_epoch", "train#trainer#max_epochs"),
        ("loss#sigmoids", "loss#sigmoid"),
        ("metric_name#reductoin", "metric_name#reduction"),
        ("loss#alpha", "loss"),  # an argument of another loss
        ("train#handlers#0#iteration_lg", "train#handlers#0#iteration_log"),
        ("network#widen_facto", "network#widen_factor"),  # resnet10 takes any keyword
    ],
)
def test_overrides_that_name_nothing_are_refused(tiny_bundle: Path, typo: str, meant: str) -> None:
    with refused(f"there is no --{typo} to override; did you mean --{meant}"):
        run_bundle(tiny_bundle, **{typo: 1})
    assert not Path("ran").exists()


def test_overrides_in_an_args_file_are_checked_too(tiny_bundle: Path) -> None:
    config_file = str(tiny_bundle / "configs" / "train.json")
    good = write(Path("good.json"), {"config_file": config_file, "learning_rate": 1, "run_id": "run"})
    run(args_file=str(good))
    assert Path("ran").exists()
    bad = write(Path("bad.json"), {"config_file": config_file, "lerning_rate": 1})
    with refused("there is no --lerning_rate to override; did you mean --learning_rate"):
        run(args_file=str(bad))


def test_overrides_may_name_what_a_second_config_adds(tiny_bundle: Path) -> None:
    more = write(tiny_bundle / "configs" / "more.json", {"world_size": 1})
    run(config_file=[str(tiny_bundle / "configs" / "train.json"), str(more)], world_size=2)
    assert Path("ran").exists()


def test_overrides_of_what_a_second_config_takes_away_are_refused(tiny_bundle: Path) -> None:
    more = write(tiny_bundle / "configs" / "more.json", {"learning_rate": {"_disabled_": True}})
    files = [str(tiny_bundle / "configs" / "train.json"), str(more)]
    with refused(r"--learning_rate has no meaning with train\.json and more\.json: leave it out"):
        run(config_file=files, learning_rate=0.2)
    assert not Path("ran").exists()
    run(config_file=files)
    assert Path("ran").exists()


def test_callers_of_the_python_api_may_add_ids(tiny_bundle: Path) -> None:
    workflow = ConfigWorkflow(str(tiny_bundle / "configs" / "train.json"), extra=1)
    workflow.initialize()
    workflow.run()
    assert Path("ran").exists()
    refuse_unknown_overrides()


def test_without_a_workflow_no_list_is_given() -> None:
    assert given_items("train#dataset#data") is None
