"""What a run needs from its command line: knobs, errors in one line, output folders, processes, tracking."""

import ast
import errno
import logging
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, TINY_BUNDLE, Recipes, command_line, forked, refused, run_bundle, run_config, started, write
from monai.bundle import ConfigParser, run
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dissect_monai.bundle import (
    OF_DECOLLATED,
    TRACKING_OPTIONS,
    _without_trace,
    bad_input,
    begin,
    bundle_root,
    check_output,
    check_training,
    checkpoint_to_resume,
    destroy_group,
    given_items,
    process_device,
    refuse_phantoms,
    run_arguments,
    trained_weights,
)
from dissect_monai.common import InputError
from dissect_monai.knobs import check_knobs
from dissect_monai.writing import disk_fault

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI's, about trust

# ---- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {"learning_rate": 0.2},
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
        ("train::trainer::max_epoch", "train#trainer#max_epochs"),
        ("loss#sigmoids", "loss#sigmoid"),
        ("metric_name#reductoin", "metric_name#reduction"),
        ("train#handlers#0#iteration_lg", "train#handlers#0#iteration_log"),
    ],
)
def test_overrides_that_name_nothing_are_refused(tiny_bundle: Path, typo: str, meant: str) -> None:
    with refused(f"there is no --{typo} to override; did you mean --{meant}"):
        run_bundle(tiny_bundle, **{typo: 1})
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss#sigmoid", "foo", "must be True or False, got 'foo'"),
        ("loss#weight", "foo", "must be a number over 0, got 'foo'"),
        ("train#trainer#max_epochs", "foo", "must be a number, or a list of them, got 'foo'"),
        ("network", 5, "must be a component, as .*, got 5"),
        ("train#handlers#0", [1], "must be a component, as"),
        ("loss_name", "$@nothing + 1", "refers to @nothing, which is not in the config"),
    ],
)
def test_a_value_of_another_kind_than_what_stands_there_is_refused(
    tiny_bundle: Path, name: str, value: Any, message: str
) -> None:
    config = {**TINY_BUNDLE, "loss": {"_target_": "DiceLoss", "sigmoid": True, "weight": "@learning_rate"}}
    write(tiny_bundle / "configs" / "train.json", config)
    with refused(f"^--{name} {message}"):
        run_bundle(tiny_bundle, **{name: value})
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_tasks", 1, "follows from the data, the weights and other arguments, and cannot be given: leave it out"),
        ("resume_from", {"_disabled_": True}, "takes no component"),
        ("seed", "$1 / 0", "must be a whole number of at least 0, got '.*', which cannot be evaluated: division by"),
        ("seed", "@seed", "must be a whole number of at least 0, got '@seed', which cannot be evaluated: .*circular"),
    ],
)
def test_what_cannot_be_given_is_refused(tiny_bundle: Path, name: str, value: Any, message: str) -> None:
    config = {**TINY_BUNDLE, "num_tasks": "$len(@data)", "seed": 0, "resume_from": TINY_BUNDLE["network"]}
    write(tiny_bundle / "configs" / "train.json", config)
    with refused(f"^(--{name}|`--?{name}`) {message}"):
        run_bundle(tiny_bundle, **{name: value})
    assert not Path("ran").exists()


@pytest.mark.parametrize("typo", ["xqzw", "loss#alpha", "train#trainer#xqzw"])
def test_a_word_that_is_like_no_id_gets_no_suggestion(tiny_bundle: Path, typo: str) -> None:
    with refused(f"there is no --{typo} to override[.]$"):
        run_bundle(tiny_bundle, **{typo: 1})


def test_a_misspelt_knob_is_pointed_to_the_page_that_explains_all(tiny_bundle: Path) -> None:
    page = tiny_bundle / "docs" / "knobs.md"
    page.parent.mkdir()
    page.touch()
    with refused(f"did you mean --learning_rate[?] {page} explains every knob"):
        run_bundle(tiny_bundle, learning_rat=1)


def test_overrides_in_an_args_file_are_checked_too(tiny_bundle: Path) -> None:
    config_file = str(tiny_bundle / "configs" / "train.json")
    good = write(Path("good.json"), {"config_file": config_file, "learning_rate": 1, "run_id": "run"})
    run_config(args_file=good)
    assert Path("ran").exists()
    bad = write(Path("bad.json"), {"config_file": config_file, "lerning_rate": 1})
    with refused("there is no --lerning_rate to override; did you mean --learning_rate"):
        run_config(args_file=bad)


def test_overrides_name_what_a_second_config_adds_and_not_what_it_takes_away(tiny_bundle: Path) -> None:
    first = tiny_bundle / "configs" / "train.json"
    more = write(tiny_bundle / "configs" / "more.json", {"world_size": 1, "learning_rate": {"_disabled_": True}})
    with refused(r"--learning_rate has no meaning with train\.json and more\.json: leave it out"):
        run_config([first, more], learning_rate=0.2)
    assert not Path("ran").exists()
    run_config([first, more], world_size=2)
    assert Path("ran").exists()


def test_arguments_of_another_program_are_not_read(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["server.py", "run", "--lerning_rate", "1"])
    hook = sys.excepthook
    run(config_file=str(tiny_bundle / "configs" / "train.json"))
    assert Path("ran").exists()
    assert sys.excepthook is hook


def test_without_a_workflow_no_list_is_given_and_nothing_is_checked() -> None:
    assert given_items() is None
    begin()


# ---- knobs -------------------------------------------------------------------------------------------------------

BAD = {
    "stages": [4, [], [0], ["4"], "all"], "learning_rate": ["abc", 0, -1, True, None], "num_workers": ["x", -1, 1.5],
    "label_fraction": ["ten", 0, 1.1], "dataset_dir": [2024, "", " ", [], ["a", 3]], "output_dir": [None, 7, ""],
    "reconstruction_weight": ["false", False, -0.1], "spatial_dims": [4, "2"], "encoder": ["resnet19", 18, None],
    "device": ["gpu", "cuda:99", 1.5], "num_folds": [1, -2, "five"], "num_embeddings": [1, [1, 2], [], "many"],
    "amp": ["yes", 1, None], "momentum": [1.1, "high"], "fusion": ["sum", ["add"], {"a": 1}], "findings": [3, [], [1]],
    "max_epochs": [0, "1e3", True], "task": ["", [3], {"a": 1}, 7], "validation_fraction": [1, -0.1, "half"],
    "pixdim": [1.5, [1], [1, 1, 0], ["1", 1], [1, 1, 1001]], "patch_size": [96, [96] * 4, [96, 96, 4], [96, 96, 9.5]],
    "a_min": ["low", None, float("nan")], "init_filters": [4, 12, 8.0], "blocks_down": [[], [0, 1], 4],
    "resume": ["maybe", 3], "sampling_temperature": [2, -0.5], "structures": [6, []], "fold": [-1, "first"],
    "largest_only": [3], "slice_axis": ["z", 2, None],
}  # fmt: skip
GOOD = {
    "stages": [[2, 3, 4], [4], (1,)], "dataset_dir": [None, "a", ["a", "b"]], "num_folds": [0, 5],
    "amp": [True, "false", "True"], "findings": [None, "Mass", ["Mass", "No finding"]],
    "task": [None, "abdomen", ["abdomen", None], {"ct": "abdomen"}], "pixdim": [[1.5, 1.5, 2], (1, 1)],
    "slice_axis": ["auto", "sagittal"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_the_name_of_the_knob(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be .*, got {re.escape(repr(value))}"):
        check_knobs(ConfigParser({name: value}))


@pytest.mark.parametrize(
    ("name", "value"), [("log_dir", 5), ("ckpt_dir", ""), ("data_dir", None), ("num_channels", None), ("rank", -1)]
)
def test_a_key_that_others_make_is_held_to_a_rule_where_it_is_given(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^--{name} must be .*, got"):
        check_knobs(ConfigParser({name: value}))
    check_knobs(ConfigParser({name: "$@seed / 0", "seed": 1}))  # which is worked out when it is needed


def test_a_knob_may_be_an_expression() -> None:
    check_knobs(ConfigParser({"max_epochs": "$2 * 3", "batch_size": "@max_epochs"}))
    with pytest.raises(InputError, match="`batch_size` must be a whole number of at least 1, got 0"):
        check_knobs(ConfigParser({"max_epochs": "$2 - 2 + 5", "batch_size": "$@max_epochs - 5"}))


def test_a_switch_given_as_a_text_becomes_true_or_false() -> None:
    parser = ConfigParser({"amp": "false", "compile": "True", "shard": True, "on": "$@amp or @compile"})
    check_knobs(parser)
    assert [parser.get_parsed_content(name) for name in ("amp", "compile", "shard", "on")] == [False, True, True, True]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"hidden_dim": 10**12}, "of at least 1, and at most 1000000, got 1000000000000"),
        ({"patch_size": [16, 16, 10**12]}, "of at least 8, and at most 4096, got"),
        ({"mode": "probe"}, "one of .*got 'probe'; did you mean linear_probe[?]"),
        ({"max_epochs": "$1 / 0"}, "got '[$]1 / 0', which cannot be evaluated: division by zero"),
        ({"settings": "$1 / 0", "pretrained": [1], "seed": "$@settings"}, "`pretrained` must be a path"),
        ({"resume_from": 5}, "`resume_from` must be a path"),
        ({"learning_rate": 10**400}, "`learning_rate` must be a number over 0"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_is_near(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_knobs(ConfigParser(knobs))


@pytest.mark.parametrize("device", [0, True, None, [], "meta", "cuda:99", "gpu"])
def test_a_device_is_one_that_computes(device: Any) -> None:
    with pytest.raises(InputError, match="`device` must be a device that this machine has"):
        check_knobs(ConfigParser({"device": device}))
    check_knobs(ConfigParser({"device": torch.device("cpu")}))


TRAINED = {"train": {"trainer": {"max_epochs": 2}}}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"a_min": 5, "a_max": 5}, "`a_min` must be below `a_max`, got 5 and 5"),
        ({"patch_size": [16, 12, 8], "spatial_dims": 3, "blocks_down": [1] * 4}, "multiples of 2 .* 12, 8"),
        ({"patch_size": [16, 16, 8], "spatial_dims": 2}, r"`patch_size` must have 2 values, .*, got \[16, 16, 8\]"),
        ({"slice_axis": "coronal", "spatial_dims": 3}, "`slice_axis` needs `spatial_dims` 2, got"),
        ({"pixdim": [1, 1], "spatial_dims": 3}, r"`pixdim` must have 3 values, as many as .*, got \[1, 1\]"),
        (
            {"pretraining": {"spatial_dims": 2}, "spatial_dims": 3, "pixdim": [1, 1]},
            "must be weights for 3-D images, got some for 2-D ones: set `spatial_dims` to 2, or give other weights",
        ),
        ({"blocks_down": [1, 1, 1], "blocks_up": [1, 1, 1]}, r"one value fewer than .*, got \[1, 1, 1\]"),
        ({"batch_size": 7, "sampling_temperature": 0.5}, "`batch_size` must be even, .*, got 7"),
        ({**TRAINED, "schedule_epochs": 1, "warmup_epochs": 0}, "`schedule_epochs` must be at least"),
        ({**TRAINED, "val_interval": 3, "select": "best"}, "`val_interval` must be at most `max_epochs`"),
        ({"mask_size": 16, "patch_size": [16, 16, 16], "spatial_dims": 3}, "`mask_size` must be smaller than"),
        ({"mode": "finetune", "pretrained": None}, "`mode` finetune needs weights: set `pretrained`"),
        ({"mode": "scratch", "pretrained": "model.pt"}, "`mode` scratch starts from no weights, got"),
    ],
)
def test_knobs_that_do_not_fit_each_other_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_knobs(ConfigParser(knobs))


@pytest.mark.parametrize(
    "knobs",
    [
        *({name: value} for name, values in GOOD.items() for value in values),
        {"patch_size": [16, 8], "pixdim": [1, 1], "spatial_dims": 2, "blocks_down": [1] * 4},
        {"pretraining": {}, "spatial_dims": 2},
        {"batch_size": 7},
        {"a_min": 5},
        {"encoder": {"_disabled_": True}},
        {"mode": "linear_probe", "pretrained": None},  # of random features
    ],
)
def test_good_values_pass_and_are_compared_where_all_are_used(knobs: dict[str, Any]) -> None:
    check_knobs(ConfigParser(knobs))


def test_settings_are_the_knobs_on_which_weights_depend(tiny_bundle: Path) -> None:
    config = {
        **TINY_BUNDLE, "batch_size": "$2 * 4", "num_workers": 3, "encoder": {"_disabled_": True}, "modality": None,
        "run": ["$Path('settings').write_text(str(bundle.run_settings(num_images=5, modality='CT')))"],
    }  # fmt: skip
    write(tiny_bundle / "configs" / "train.json", config)
    run_bundle(tiny_bundle)
    expected = {"learning_rate": 0.1, "batch_size": 8, "modality": "CT", "num_images": 5}
    assert Path("settings").read_text() == str(expected)


# ---- errors ------------------------------------------------------------------------------------------------------


def run_in_a_process(tiny_bundle: Path, expression: str, **knobs: Any) -> Any:
    config = {**TINY_BUNDLE, "seed": 0, "batch_size": 4, "run": [f"${expression}"]}
    return command_line(write(tiny_bundle / "configs" / "train.json", config), cwd=Path(), **knobs)


def test_what_the_package_refuses_ends_with_one_line_and_a_status(tiny_bundle: Path) -> None:
    result = run_in_a_process(tiny_bundle, "bundle.refuse_small(range(3), @batch_size)")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: `training` holds 3 images, fewer")
    assert result.stderr.splitlines()[-1].endswith("lower `--batch_size`.")
    assert "Traceback" not in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(tiny_bundle: Path) -> None:
    result = run_in_a_process(tiny_bundle, "bundle.refuse_small(None, 4)")  # a TypeError inside this package
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "TypeError" in result.stderr


def test_too_little_memory_is_one_line_with_the_knobs_that_set_sizes(tiny_bundle: Path) -> None:
    result = run_in_a_process(tiny_bundle, "__import__('torch').empty(10**15)")
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert re.match("error: there is not enough memory: .*allocate.* Lower what sets sizes: `--batch_size` 4[.]", line)
    assert "Traceback" not in result.stdout + result.stderr


def test_what_a_run_cannot_do_with_an_override_that_no_rule_knows_is_one_line(tiny_bundle: Path) -> None:
    config = {**TINY_BUNDLE, "names": ["a"], "run": ["$len(@names[0])"]}
    train = write(tiny_bundle / "configs" / "train.json", config)
    result = command_line(train, Path(), names=[5])
    assert result.returncode == 1
    expected = "error: the run failed with --names [5], which no rule checks: TypeError: object of type 'int' has no"
    assert result.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("level", ["info", "warning"])
def test_what_the_package_says_waits_until_all_input_is_checked(tiny_bundle: Path, level: str) -> None:
    shutil.copy(ROOT / "bundles" / "cxr_classify" / "configs" / "logging.conf", tiny_bundle / "configs")
    said = f"$__import__('logging').getLogger('dissect_monai.data').{level}('Loaded 5 of 5.')"
    for last in ("$bundle.refuse_small([], 4)", "$2"):
        train = write(tiny_bundle / "configs" / "train.json", {**TINY_BUNDLE, "run": [said, last]})
        result = command_line(train, Path())
        assert ("Loaded 5 of 5." in result.stdout) == (result.returncode == 0), result


def test_a_refused_run_leaves_no_empty_folder_and_a_file_stays(tiny_bundle: Path) -> None:
    (tiny_bundle / "eval").mkdir()
    (tiny_bundle / "eval" / "kept").touch()
    late = "$bundle.refuse_small([], 4)"
    config = {**TINY_BUNDLE, "run": ["$bundle.check_training(False, 'images', @output_dir, None)", late]}
    for output_dir in (tiny_bundle, tiny_bundle / "new" / "out"):
        train = write(tiny_bundle / "configs" / "train.json", {**config, "output_dir": str(output_dir)})
        with refused("`--training` holds no images|`training` holds no images"):
            run_config(train)
    assert sorted(path.name for path in tiny_bundle.iterdir()) == ["configs", "eval"]
    assert [path.name for path in (tiny_bundle / "eval").iterdir()] == ["kept"]


def test_only_refusals_and_the_file_system_are_bad_input() -> None:
    wrapped = RuntimeError("applying transform")
    wrapped.__cause__ = InputError("`seed` must be an integer, got x.")
    assert bad_input(wrapped) is wrapped.__cause__
    assert isinstance(bad_input(FileNotFoundError("model.pt")), FileNotFoundError)
    assert bad_input(ValueError("of numpy")) is None


SLEEPING = "$Path('ready').touch() or __import__('time').sleep(600)"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_says_in_one_line_what_is_kept_and_how_to_go_on(
    tiny_bundle: Path, number: signal.Signals, status: int
) -> None:
    (tiny_bundle / "checkpoints").mkdir()
    (tiny_bundle / "checkpoints" / "checkpoint_epoch=3.pt").touch()
    config = {
        **TINY_BUNDLE, "output_dir": str(tiny_bundle), "resume_from": None,
        "ckpt_dir": str(tiny_bundle / "checkpoints"),
        "run": ["$bundle.check_training(True, 'images', @output_dir, None)", SLEEPING],
    }  # fmt: skip

    def stop(pids: list[int]) -> None:
        while not Path("ready").exists():
            time.sleep(0.01)
        os.kill(pids[0], number)

    train = write(tiny_bundle / "configs" / "train.json", config)
    result = forked(str(train), Path(), [{}], stop)
    assert result.returncode == status
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: stopped by {number.name}; ")
    assert line.endswith("checkpoint_epoch=3.pt is whole: go on from it by the same command with --resume true.")
    assert "Traceback" not in result.stderr
    assert not (tiny_bundle / "checkpoints" / ".lock").exists()


def test_a_full_disk_is_one_line_with_the_path_and_what_is_kept(tiny_bundle: Path) -> None:
    full = "$resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))"
    save = "$writing.save_atomically({'a': torch.zeros(9999)}, @output_dir + '/models/model.pt')"
    imports = [*TINY_BUNDLE["imports"], "$import resource", "$import torch", "$from dissect_monai import writing"]
    config = {**TINY_BUNDLE, "imports": imports, "output_dir": str(tiny_bundle), "run": [full, save]}
    result = command_line(write(tiny_bundle / "configs" / "train.json", config), cwd=Path())
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.match(r"error: \[Errno 27\] File too large: '.*/models/model\.pt'\. Free the disk; what stood in", last)
    assert "Traceback" not in result.stderr
    assert not [*(tiny_bundle / "models").iterdir()]


def test_a_log_shows_the_trace_of_our_own_faults_alone() -> None:
    for error, shown in ((InputError("bad"), False), (OSError(errno.ENOSPC, "full"), False), (KeyError("a"), True)):
        record = _without_trace("name", logging.ERROR, "path", 1, "said", (), (type(error), error, None))
        assert bool(record.exc_info) is shown


def test_what_ends_an_engine_is_told_once(tiny_bundle: Path) -> None:
    handler = "__import__('monai.handlers').handlers.StatsHandler()"  # whose logger has an output of its own
    result = run_in_a_process(tiny_bundle, f"{handler}.exception_raised(None, bundle.InputError('bad'))")
    assert result.stderr.splitlines()[-1] == "error: bad"
    assert "Exception: bad" not in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_disk_is_found_in_what_led_to_an_error_and_nothing_else_is() -> None:
    for number, found in ((errno.ENOSPC, True), (errno.ENOENT, False)):
        error = RuntimeError("of torch")
        error.__context__ = OSError(number, "it")
        assert bool(disk_fault(error)) is found
        assert bad_input(error) is None


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "bundles/tiny", "bundles/tiny/configs", "elsewhere", "bundles/other"])
def test_finds_the_bundle_from_anywhere(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    write(tiny_bundle.parent / "other" / "configs" / "metadata.json", {})
    cwd = tiny_bundle.parent.parent / place
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    run_bundle(tiny_bundle)
    assert Path("ran").read_text() == str(tiny_bundle)


def test_finds_a_relative_bundle_and_one_without_a_config(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_root("tiny") == str(Path("bundles", "tiny"))
    with pytest.raises(FileNotFoundError, match=r"cannot find the bundle large from .*: add --bundle_root"):
        bundle_root("large")
    monkeypatch.chdir(tiny_bundle)
    assert bundle_root("tiny") == "."
    monkeypatch.chdir("configs")
    run_config(Path("train.json"))
    assert Path("ran").read_text() == str(tiny_bundle)


def test_an_output_has_its_folders_and_the_log_its_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dissect_monai")
    check_output(True, "phantoms", tmp_path / "out")
    check_training(False, ["a", "b"], tmp_path / "out", resume_from=None)
    check_output(False, None, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["checkpoints", "eval", "models"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]
    for message in ("generated phantoms in phantoms;", "images in a, b.", "images that the caller lists."):
        assert message in caplog.text


def test_a_smoke_run_goes_where_nothing_or_a_smoke_run_has_been(tmp_path: Path) -> None:
    refuse_phantoms(True, tmp_path)
    (tmp_path / "eval").mkdir()
    refuse_phantoms(True, tmp_path)
    table = tmp_path / "eval" / "label_maps" / "label_maps.csv"
    table.parent.mkdir()
    table.write_text(f"image,label_map\n{tmp_path}/phantoms/images/0.png,0\n")
    np.savez(tmp_path / "eval" / "embeddings.npz", image=[f"{tmp_path}/phantoms/images/0.png"])
    with pytest.raises(InputError, match="is of other images than phantoms, which must not take its place: give `data"):
        refuse_phantoms(True, tmp_path)  # whose phantoms are nowhere
    (tmp_path / "phantoms").mkdir()
    refuse_phantoms(True, tmp_path)
    for foreign in ("case,dice\n/data/0.nii,1\n", "image,error\n/data/0.png,\n"):
        table.write_text(foreign)
        with pytest.raises(InputError, match=r"label_maps\.csv is of other images"):
            refuse_phantoms(True, tmp_path)
    table.unlink()
    np.savez(tmp_path / "eval" / "embeddings.npz", image=["/data/0.png"])
    with pytest.raises(InputError, match=r"embeddings\.npz is of other images"):
        refuse_phantoms(True, tmp_path)


@pytest.mark.parametrize("said", [{"phantoms": False}, {}])
def test_weights_of_other_images_are_for_no_phantoms(tmp_path: Path, said: dict[str, Any]) -> None:
    model = tmp_path / "models" / "model.pt"
    write(model.with_suffix(".json"), said)
    model.touch()
    for place in ((tmp_path, None), (tmp_path / "new", model)):
        with pytest.raises(InputError, match=r"model\.pt must be weights that were trained on phantoms"):
            refuse_phantoms(True, *place)
    refuse_phantoms(False, tmp_path, model)
    write(model.with_suffix(".json"), {"phantoms": True})
    refuse_phantoms(True, tmp_path, model)


def test_weights_are_those_of_the_output_folder_else_those_of_the_bundle(tmp_path: Path) -> None:
    out, bundle = (tmp_path / name / "models" / "model.pt" for name in ("out", "bundle"))
    found = [trained_weights(tmp_path / "out", tmp_path / "bundle")]
    for path in (bundle, out):
        write(path, {})
        found.append(trained_weights(tmp_path / "out", tmp_path / "bundle"))
    assert found == [str(out), str(bundle), str(out)]


def test_a_smoke_run_says_which_weights_it_replaces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_training(True, "phantoms", tmp_path, None)
    assert "take the place" not in caplog.text
    write(tmp_path / "models" / "model.pt", {})
    check_training(True, "phantoms", tmp_path, None)
    assert f"replace the weights of the one before it: {tmp_path}/models/model.pt." in caplog.text


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    ckpt_dir = tmp_path / "checkpoints"
    check_training(False, "images", tmp_path, None)
    (ckpt_dir / "checkpoint_epoch=best.pt").touch()  # no name that a run would write
    check_training(False, "images", tmp_path, None)
    (ckpt_dir / "checkpoint_epoch=3.pt").touch()
    with pytest.raises(InputError, match=r"holds the checkpoints of another run: go on .*`resume` true.*, or give"):
        check_training(False, "images", tmp_path, None)
    check_training(False, "images", tmp_path, str(ckpt_dir / "checkpoint_epoch=3.pt"))
    check_training(True, "phantoms", tmp_path, None)  # a smoke run may be repeated
    check_training(False, None, tmp_path, None)  # and so may a training of a server


def test_a_run_goes_on_if_it_is_to_and_auto_begins_where_true_must_go_on(tmp_path: Path) -> None:
    assert checkpoint_to_resume("auto", tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint_epoch=N\.pt"):
        checkpoint_to_resume("true", tmp_path)
    newest = tmp_path / "checkpoint_epoch=3.pt"
    newest.touch()
    assert {checkpoint_to_resume(resume, tmp_path) for resume in (True, "true", "auto")} == {str(newest)}
    assert {checkpoint_to_resume(resume, tmp_path) for resume in (False, "false")} == {None}


def test_a_missing_checkpoint_is_found_before_the_data(tiny_bundle: Path) -> None:
    run = ["$bundle.check_training(True, 'images', 'out', 'nowhere.pt')", "@data"]
    train = write(tiny_bundle / "configs" / "train.json", {**TINY_BUNDLE, "run": run})
    with refused(r"there are no weights at .*nowhere\.pt"):
        run_config(train)
    assert not Path("out").exists()


def test_a_config_is_known_by_the_values_of_its_knobs_and_by_what_else_it_says(tiny_bundle: Path) -> None:
    config = {
        **TINY_BUNDLE, "batch_size": "$2 * 4", "num_workers": 3, "max_epochs": 5, "stages": [1, 2], "loss_weight": 0.5,
        "schedule_epochs": "@max_epochs", "output_dir": "out", "optimizer": {"lr": "@learning_rate", "betas": [0.9, 1]},
        "train": {"dataset": {"cache_dir": "c", "data": "$@data"}, "handlers": [{"interval": 2, "delta": 1}]},
        "run": ["$Path('config').write_text(str(bundle.config_values()))"],
    }  # fmt: skip
    run_config(write(tiny_bundle / "configs" / "train.json", config), learning_rate=0.2)
    found = ast.literal_eval(Path("config").read_text())
    for name in ("root", "data", "loss#weight", "loss#_target_", "loss#sigmoid", "metric_name#reduction"):
        assert name in found
    for name in [name for name in found if name.startswith(("root", "loss", "network", "metric"))]:
        found.pop(name)
    assert found == {
        "learning_rate": 0.2, "data": "$1 / 0", "batch_size": 8, "stages": [1, 2], "schedule_epochs": 5,
        "optimizer#lr": 0.2, "optimizer#betas#0": 0.9, "optimizer#betas#1": 1, "train#dataset#data": "$@data",
        "train#handlers#0#delta": 1,
    }  # fmt: skip


# ---- processes ---------------------------------------------------------------------------------------------------


def test_says_how_to_start_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match=r"python -m torch\.distributed\.run --nproc_per_node"):
        process_device()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert process_device().type in ("cpu", "cuda")


def gloo_threads() -> list[str]:
    return [task.name for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are only listed by Linux")
def test_no_thread_of_the_group_is_left(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    network = DistributedDataParallel(nn.Linear(2, 1))
    network(torch.ones(1, 2)).sum().backward()
    dist.all_reduce(torch.ones(1))
    assert gloo_threads()
    destroy_group(network)
    assert not dist.is_initialized()
    assert not gloo_threads()


# ---- tracking ----------------------------------------------------------------------------------------------------


def test_without_mlflow_one_line_says_what_to_install(
    recipe_of: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dissect_monai.bundle.find_spec", lambda name: None)
    monkeypatch.chdir(ROOT)
    with refused("needs MLflow: pip install"):
        recipe_of("pretrain_vq_ssl").train(tmp_path, tracking="mlflow")


def test_the_loss_is_read_otherwise_where_monai_reads_it_as_it_did() -> None:
    assert DEFAULT_MLFLOW_SETTINGS["configs"]["trainer"]["output_transform"] == OF_DECOLLATED
    assert {*TRACKING_OPTIONS} <= {*DEFAULT_MLFLOW_SETTINGS["configs"]}


# ---- words of the command line -----------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What the words of a command line are read as."""
    monkeypatch.chdir(tmp_path)

    def read(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["main", "run", *words, "--config_file", "my#bundle/train.json"])
        config_file, overrides = run_arguments()
        assert config_file == "my#bundle/train.json"
        return overrides

    return read


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("site#2", "site#2"), ("/data/site#2", "/data/site#2"), ("5#2", "5#2"), ("['a#1','b']", ["a#1", "b"]),
        ("me@host#2", "me@host#2"), ("(site)", "(site)"), ("'a#1'", "a#1"), ("{'a#1':'CT'}", {"a#1": "CT"}),
        ("$@train#dataset", "$@train#dataset"), ("[1, 2]", [1, 2]), ("a,b", ("a", "b")), ("None", None), ("-125", -125),
    ],
)  # fmt: skip
def test_a_value_is_what_was_typed(typed: Any, value: str, meant: Any) -> None:
    assert typed("--key", value, "--train#augment#rotation", "5") == {"key": meant, "train#augment#rotation": 5}
    assert typed(f"--train#key={value}") == {"train#key": meant}


def test_a_path_with_a_comma_is_one_path_if_it_exists(typed: Any) -> None:
    Path("a,b").mkdir()
    assert typed("--dataset_dir", "a,b") == {"dataset_dir": "a,b"}


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--pixdim", "[4,", "4,", "-4]"], '--pixdim "[4, 4, -4]".'),
        (["--dataset_dir=A", "B"], """--dataset_dir "A B", or as a list: --dataset_dir "['A', 'B']"."""),
        (["--task", "{'A':", "'x'}", "--seed", "1"], """--task "{'A': 'x'}"."""),
    ],
)
def test_a_value_of_several_words_is_refused_with_how_to_quote_it(typed: Any, words: list[str], remedy: str) -> None:
    name = words[0].partition("=")[0]
    with pytest.raises(
        InputError, match=f"^`{name}` must be one word, got .*: put it into quotation marks, "
    ) as raised:
        typed(*words)
    assert str(raised.value).endswith(remedy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "1", "-max_epochs", "1"], "`--seed` is followed by -max_epochs, which is no option: options begin"),
        (["--seed", "1", "task=x"], "`--seed` is followed by task=x, which is no option: options begin with two"),
        (["--dataset_dir=", "A"], "`--dataset_dir=` is followed by a blank: leave the blank out"),
    ],
)
def test_a_lost_dash_or_a_blank_after_the_sign_is_named(typed: Any, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        typed(*words)


def test_an_id_to_run_may_stand_before_the_first_option(typed: Any) -> None:
    assert typed("running", "--seed", "1") == {"seed": 1}


def test_a_step_that_is_not_there_ends_with_one_line(tiny_bundle: Path) -> None:
    config = write(tiny_bundle / "configs" / "train.json", TINY_BUNDLE)
    result = started(["monai.bundle", "run", "evaluate", "--config_file", str(config)], Path())
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: there is no step evaluate to run: leave the word out."
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("value", ["site#2", "/data/a,b#2", "['a#1','me@host#b']"])
def test_no_part_of_a_value_with_a_hash_is_lost_in_a_run(tiny_bundle: Path, value: str) -> None:
    config = {**TINY_BUNDLE, "dataset_dir": None, "dir": "$@dataset_dir", "run": ["$Path('ran').write_text(str(@dir))"]}
    train = write(tiny_bundle / "configs" / "train.json", config)
    shutil.copy(ROOT / "bundles" / "cxr_classify" / "configs" / "logging.conf", tiny_bundle / "configs")
    result = command_line(train, cwd=Path(), dataset_dir=value)
    assert result.returncode == 0, result.stderr
    shown = ast.literal_eval(value) if value[0] == "[" else value
    assert f"> dataset_dir: {shown!r}\n" in result.stdout
    assert Path("ran").read_text() == (str(ast.literal_eval(value)) if value[0] == "[" else value)


@pytest.mark.parametrize("words", [["--pixdim", "[4,", "4,", "4]"], ["--train#optimizer#lr", "1"]])
def test_what_monai_refuses_before_any_step_of_a_config_is_in_the_docs(tiny_bundle: Path, words: list[str]) -> None:
    config = write(tiny_bundle / "configs" / "train.json", {**TINY_BUNDLE, "pixdim": [1, 1, 1]})
    result = started(["monai.bundle", "run", "--config_file", str(config), *words], Path())
    last = result.stderr.splitlines()[-1].partition(": ")[2].strip("'").removesuffix(" in the config file.")
    assert last.startswith(("run ID", "query key"))
    assert last in (ROOT / "docs" / "start" / "your_data.md").read_text()


def test_two_folders_in_two_words_end_with_one_line(tiny_bundle: Path) -> None:
    config = {**TINY_BUNDLE, "dataset_dir": None}
    result = command_line(write(tiny_bundle / "configs" / "train.json", config), Path(), after=["B"], dataset_dir="A")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: `--dataset_dir` must be one word, got A B: put it into")
    assert "Traceback" not in result.stderr
