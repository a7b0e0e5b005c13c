from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import refused, run_bundle
from monai.bundle import ConfigParser

from dissect_monai.bundle import RULES, is_true, refuse_bad_knobs

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI's, about trust
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
    "task": ["", [3], {"a": 1}, 7],
    "validation_fraction": [1, -0.1, "half"],
    "pixdim": [1.5, [1, 1], [1, 1, 0], ["1", 1, 1]],
    "patch_size": [96, [96, 96], [96, 96, 4], [96, 96, 9.5]],
    "a_min": ["low", None, float("nan")],
    "init_filters": [4, 12, 8.0],
    "blocks_down": [[], [0, 1], 4],
    "mask_fraction": [1.1, -1],
    "mask_size": [0, 1.5],
    "temperature": [0, "warm"],
    "sampling_temperature": [-0.1, 1.5],
    "iterations_per_epoch": [0, None],
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
    "task": [None, "abdomen", ["abdomen", None], {"ct": "abdomen"}],
    "pixdim": [[1.5, 1.5, 2], (1, 1, 1)],
    "patch_size": [[96, 96, 8]],
    "a_min": [-1000, 0.5],
    "init_filters": [8, 32],
    "blocks_down": [[1, 2, 2, 4]],
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


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"a_min": 5, "a_max": 5}, "`--a_min` must be below --a_max, got 5 and 5"),
        (
            {"patch_size": [16, 12, 8], "spatial_dims": 3, "blocks_down": [1] * 4},
            r"multiples of 8, .*, got \[16, 12, 8\]",
        ),
        ({"blocks_down": [1, 1, 1], "blocks_up": [1, 1, 1]}, r"one value fewer than the 3 of .*, got \[1, 1, 1\]"),
        ({"batch_size": 7, "sampling_temperature": 0.5}, "`--batch_size` must be even, .*, got 7"),
        (
            {"train": {"trainer": {"max_epochs": 3}}, "schedule_epochs": 2, "warmup_epochs": 0},
            "`--schedule_epochs` must be at least",
        ),
    ],
)
def test_knobs_that_do_not_fit_each_other_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_bad_knobs(ConfigParser(knobs))


@pytest.mark.parametrize(
    "knobs",
    [
        {"patch_size": [16, 8, 9], "spatial_dims": 2, "blocks_down": [1] * 4},  # of slices the third side is not used
        {"batch_size": 7},
        {"a_min": 5},
    ],
)
def test_knobs_are_compared_where_both_are_used(knobs: dict[str, Any]) -> None:
    refuse_bad_knobs(ConfigParser(knobs))


def test_a_disabled_knob_is_held_to_nothing() -> None:
    refuse_bad_knobs(ConfigParser({"encoder": {"_disabled_": True}}))


def test_the_running_bundle_is_held_to_the_rules(tiny_bundle: Path) -> None:
    with refused("`--learning_rate` must be a number over 0, got 'fast'"):
        run_bundle(tiny_bundle, learning_rate="fast")
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
    with pytest.raises(ValueError, match="`resume` must be true or false, got"):
        is_true(given, "resume")
