from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow, run

from dissect_monai.data import Datalist
from dissect_monai.preflight import (
    announce,
    bundle_root,
    checked,
    is_true,
    refuse_small_data,
    refuse_unknown_overrides,
    refuse_unlabelled,
)

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI's, about trust
CONFIG = {
    "imports": ["$from pathlib import Path", "$from dissect_monai import preflight"],
    "root": "$preflight.bundle_root('tiny')",
    "learning_rate": 0.1,
    "data": "$1 / 0",
    "loss_name": "DiceLoss",
    "loss": {"_target_": "@loss_name", "sigmoid": True, "weight": "@data"},
    "metric": {"_target_": "monai.metrics.DiceMetric", "reduction": "mean"},
    "train": {"trainer": {"max_epochs": 1}, "handlers": [{"_target_": "StatsHandler", "iteration_log": False}]},
    "initialize": ["$preflight.checked(preflight.refuse_unknown_overrides)"],
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


# ---- one line instead of a traceback -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError])
def test_bad_input_ends_with_one_line_and_a_status(error: type[Exception]) -> None:
    def refuse(value: int) -> None:
        raise error(f"`value` must be 1, got {value}.")

    with pytest.raises(SystemExit) as ended:
        checked(refuse, value=2)
    # Python prints a text to stderr and makes the status 1.
    assert ended.value.code == "error: `value` must be 1, got 2."


def test_good_input_passes() -> None:
    assert checked(dict, value=2) == {"value": 2}


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        checked(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("given", "meant"), [(True, True), (False, False), ("true", True), ("True", True), ("false", False)]
)
def test_a_switch_is_true_or_false(given: bool | str, meant: bool) -> None:
    assert is_true(given) is meant


@pytest.mark.parametrize("given", ["yes", "1", "", 1, None])
def test_a_switch_is_nothing_else(given: Any) -> None:
    with pytest.raises(SystemExit, match="error: a switch must be true or false, got"):
        is_true(given)


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
        {"metric#include_background": False},
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
        ("metric#reductoin", "metric#reduction"),
        ("loss#alpha", "loss"),  # an argument of another loss
    ],
)
def test_overrides_that_name_nothing_are_refused(bundle: Path, typo: str, meant: str) -> None:
    with pytest.raises(SystemExit, match=f"error: there is no --{typo} to override; did you mean --{meant}"):
        run_bundle(bundle, **{typo: 1})
    assert not Path("ran").exists()


def test_overrides_in_an_args_file_are_checked_too(bundle: Path) -> None:
    config_file = str(bundle / "configs" / "train.json")
    good = write(Path("good.json"), {"config_file": config_file, "learning_rate": 1, "run_id": "run"})
    run(args_file=str(good))
    assert Path("ran").exists()
    bad = write(Path("bad.json"), {"config_file": config_file, "lerning_rate": 1})
    with pytest.raises(SystemExit, match="there is no --lerning_rate to override; did you mean --learning_rate"):
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


# ---- folder of the bundle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "bundles/tiny", "bundles/tiny/configs", "elsewhere", "bundles/other"])
def test_finds_the_bundle_from_anywhere(bundle: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    write(bundle.parent / "other" / "configs" / "metadata.json", {})
    cwd = bundle.parent.parent / place
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    run_bundle(bundle)
    assert Path("ran").read_text() == str(bundle)


def test_finds_a_relative_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle / "configs")
    run(config_file="train.json")
    assert Path("ran").read_text() == str(bundle)


def test_finds_the_bundle_without_a_config(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_root("tiny") == str(Path("bundles", "tiny"))
    monkeypatch.chdir(bundle)
    assert bundle_root("tiny") == "."


def test_says_that_there_is_no_bundle(bundle: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"error: cannot find the bundle large from .*: add --bundle_root <its folder>"
    ):
        bundle_root("large")


# ---- data --------------------------------------------------------------------------------------------------------


def test_says_what_the_run_trains_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dissect_monai")
    announce(smoke=True, data_dir="phantoms")
    announce(smoke=False, data_dir="images")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "Smoke run on generated phantoms in phantoms" in caplog.text
    assert "Training on the images in images" in caplog.text


def test_one_full_batch_per_process_is_enough() -> None:
    refuse_small_data(range(8), batch_size=4, world_size=2)


def test_refuses_less_than_a_batch_per_process() -> None:
    with pytest.raises(ValueError, match=r"holds 7 images, fewer than one batch of 4 on 2 process\(es\): lower"):
        refuse_small_data(range(7), batch_size=4, world_size=2)


def test_refuses_batches_of_one() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 2 for batch normalisation, got 1"):
        refuse_small_data(range(7), batch_size=1)


def test_refuses_an_evaluation_without_labels() -> None:
    item = {"image": "a.png", "label": [1.0]}
    refuse_unlabelled(Datalist([item], [item], [item], ["finding"]))
    with pytest.raises(ValueError, match="validation, test has none"):
        refuse_unlabelled(Datalist([item], [], [], ["finding"]))
