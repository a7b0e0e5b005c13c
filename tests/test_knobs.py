from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow, run

from dissect_monai.knobs import RULES, is_true, refuse_bad_knobs, refuse_unknown_overrides
from dissect_monai.preflight import bad_input

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI's, about trust
CONFIG = {
    "imports": [
        "$from pathlib import Path",
        "$from dissect_monai import knobs",
        "$from dissect_monai import preflight",
    ],
    "root": "$preflight.bundle_root('tiny')",
    "learning_rate": 0.1,
    "data": "$1 / 0",
    "loss_name": "DiceLoss",
    "loss": {"_target_": "@loss_name", "sigmoid": True, "weight": "@data"},
    "network": {"_target_": "monai.networks.nets.resnet10", "widen_factor": 0.5},
    "metric_name": {"_target_": "monai.metrics.DiceMetric", "reduction": "mean"},
    "train": {"trainer": {"max_epochs": 1}, "handlers": [{"_target_": "StatsHandler", "iteration_log": False}]},
    "initialize": ["$knobs.check_knobs()"],
    "run": ["$Path('ran').write_text(str(Path(@root).resolve()))"],
}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle, run from the folder above `bundles`."""
    folder = tmp_path / "bundles" / "tiny"
    write(folder / "configs" / "train.json", CONFIG)
    write(folder / "configs" / "metadata.json", {"version": "0.1.0"})
    monkeypatch.chdir(tmp_path)
    return folder


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run_bundle(bundle: Path, **overrides: Any) -> None:
    run(config_file=str(bundle / "configs" / "train.json"), **overrides)


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        yield
    cause = bad_input(raised.value)
    assert cause is not None, raised.value
    assert re.search(message, str(cause)), cause


# ---- overrides ---------------------------------------------------------------------------------------------------


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
def test_overrides_that_name_something_pass(bundle: Path, overrides: dict[str, Any]) -> None:
    run_bundle(bundle, **overrides)
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
def test_overrides_that_name_nothing_are_refused(bundle: Path, typo: str, meant: str) -> None:
    with refused(f"there is no --{typo} to override; did you mean --{meant}"):
        run_bundle(bundle, **{typo: 1})
    assert not Path("ran").exists()


def test_overrides_in_an_args_file_are_checked_too(bundle: Path) -> None:
    config_file = str(bundle / "configs" / "train.json")
    good = write(Path("good.json"), {"config_file": config_file, "learning_rate": 1, "run_id": "run"})
    run(args_file=str(good))
    assert Path("ran").exists()
    bad = write(Path("bad.json"), {"config_file": config_file, "lerning_rate": 1})
    with refused("there is no --lerning_rate to override; did you mean --learning_rate"):
        run(args_file=str(bad))


def test_overrides_may_name_what_a_second_config_adds(bundle: Path) -> None:
    more = write(bundle / "configs" / "more.json", {"world_size": 1})
    run(config_file=[str(bundle / "configs" / "train.json"), str(more)], world_size=2)
    assert Path("ran").exists()


def test_callers_of_the_python_api_may_add_ids(bundle: Path) -> None:
    workflow = ConfigWorkflow(str(bundle / "configs" / "train.json"), extra=1)
    workflow.initialize()
    workflow.run()
    assert Path("ran").exists()
    refuse_unknown_overrides()


# ---- values ------------------------------------------------------------------------------------------------------

BAD = {
    "stages": [4, [], [0], [2, 2], ["4"], "all"],
    "learning_rate": ["abc", 0, -1, True, None],
    "num_workers": ["x", -1, 1.5],
    "label_fraction": ["ten", 0, 1.1],
    "dataset_dir": [2024, "", " ", [], ["a", 3]],
    "output_dir": [None, 7, ""],
    "embedding_dim": ["x", 0],
    "seed": ["abc", -1],
    "warmup_epochs": [-1, "x"],
    "reconstruction_weight": ["false", False, -0.1],
    "spatial_dims": [4, "2"],
    "encoder": ["resnet19", 18, None],
    "device": ["gpu", "cuda:99", 1.5],
    "num_folds": [1, -2, "five"],
    "amp": ["yes", 1, None],
    "momentum": [1.1, "high"],
    "fusion": ["sum", ["add"], {"a": 1}],
    "findings": [3, [], [1]],
    "max_epochs": [0, "1e3", True],
}
GOOD = {
    "stages": [[2, 3, 4], [4], (1,)],
    "learning_rate": [1e-3, 1],
    "label_fraction": [1, 0.01],
    "dataset_dir": [None, "a", ["a", "b"]],
    "pretrained": [None, "model.pt"],
    "device": ["cpu"],
    "num_folds": [0, 5],
    "amp": [True, "false", "True"],
    "findings": [None, "Mass", ["Mass", "No finding"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_the_name_of_the_knob(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`--{name}` must be .*, got {re.escape(repr(value))}"):
        refuse_bad_knobs(ConfigParser({name: value}))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_a_good_value_passes(name: str, value: Any) -> None:
    refuse_bad_knobs(ConfigParser({name: value}))


def test_a_knob_may_be_an_expression() -> None:
    refuse_bad_knobs(ConfigParser({"max_epochs": "$2 * 3", "batch_size": "@max_epochs"}))
    with pytest.raises(ValueError, match="`--batch_size` must be a whole number of at least 1, got 0"):
        refuse_bad_knobs(ConfigParser({"max_epochs": "$2 - 2 + 5", "batch_size": "$@max_epochs - 5"}))


def test_the_running_bundle_is_held_to_the_rules(bundle: Path) -> None:
    with refused("`--learning_rate` must be a number over 0, got 'fast'"):
        run_bundle(bundle, learning_rate="fast")
    assert not Path("ran").exists()


def test_every_rule_says_what_it_wants() -> None:
    assert all(rule.says for rule in RULES.values())


@pytest.mark.parametrize(
    ("given", "meant"), [(True, True), (False, False), ("true", True), ("True", True), ("false", False)]
)
def test_a_switch_is_true_or_false(given: bool | str, meant: bool) -> None:
    assert is_true(given) is meant


@pytest.mark.parametrize("given", ["yes", "1", "", 1, None])
def test_a_switch_is_nothing_else(given: Any) -> None:
    with pytest.raises(ValueError, match="a switch must be true or false, got"):
        is_true(given)
