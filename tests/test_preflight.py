from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_BUNDLE, command_line, run_bundle, write
from monai.bundle import run

from dissect_monai.bundle import (
    bad_input,
    bundle_root,
    check_writable,
    checkpoint_to_resume,
    log_data_source,
    refuse_overwriting,
    refuse_small_data,
)

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")  # MONAI's, about trust

# ---- folder of the bundle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "bundles/tiny", "bundles/tiny/configs", "elsewhere", "bundles/other"])
def test_finds_the_bundle_from_anywhere(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    write(tiny_bundle.parent / "other" / "configs" / "metadata.json", {})
    cwd = tiny_bundle.parent.parent / place
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    run_bundle(tiny_bundle)
    assert Path("ran").read_text() == str(tiny_bundle)


def test_finds_a_relative_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_bundle / "configs")
    run(config_file="train.json")
    assert Path("ran").read_text() == str(tiny_bundle)


def test_finds_the_bundle_without_a_config(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_root("tiny") == str(Path("bundles", "tiny"))
    monkeypatch.chdir(tiny_bundle)
    assert bundle_root("tiny") == "."


def test_says_that_there_is_no_bundle(tiny_bundle: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot find the bundle large from .*: add --bundle_root"):
        bundle_root("large")


# ---- data --------------------------------------------------------------------------------------------------------


def test_says_which_images_the_run_uses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dissect_monai")
    log_data_source(smoke=True, data_dir="phantoms")
    log_data_source(smoke=False, data_dir="images")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "Smoke run on generated phantoms in phantoms" in caplog.text
    assert "Using the images in images" in caplog.text


def test_one_full_batch_per_process_is_enough() -> None:
    refuse_small_data(range(8), batch_size=4, world_size=2)


def test_refuses_less_than_a_batch_per_process() -> None:
    with pytest.raises(ValueError, match=r"holds 7 images, fewer than one batch of 4 on 2 process\(es\): lower"):
        refuse_small_data(range(7), batch_size=4, world_size=2)


def test_refuses_batches_of_one() -> None:
    with pytest.raises(ValueError, match="`--batch_size` must be at least 2 for batch normalisation, got 1"):
        refuse_small_data(range(7), batch_size=1)


def test_refuses_an_empty_training_list() -> None:
    with pytest.raises(ValueError, match="`training` holds no images: list some there"):
        refuse_small_data([], batch_size=4)


# ---- output ------------------------------------------------------------------------------------------------------


def test_an_output_is_claimed_with_its_folders(tmp_path: Path) -> None:
    check_writable(tmp_path / "out", "eval", "models")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["eval", "models"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`--output_dir` must be a folder that can be written, got .*file: "):
        check_writable(tmp_path / "file", "eval")


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    refuse_overwriting(tmp_path / "nowhere")
    (tmp_path / "checkpoint_epoch=best.pt").touch()  # no name that a run would write
    refuse_overwriting(tmp_path)
    (tmp_path / "checkpoint_epoch=3.pt").touch()
    with pytest.raises(ValueError, match=r"holds the checkpoints of another run: go on .* by --resume true, or give"):
        refuse_overwriting(tmp_path)


# ---- one line instead of a traceback -----------------------------------------------------------------------------


def run_in_a_process(tiny_bundle: Path, expression: str) -> Any:
    initialize = ["$bundle.explain_errors()"]
    config = {"imports": TINY_BUNDLE["imports"], "initialize": initialize, "run": [f"${expression}"]}
    return command_line(write(tiny_bundle / "configs" / "train.json", config), cwd=Path())


def test_what_the_package_refuses_ends_with_one_line_and_a_status(tiny_bundle: Path) -> None:
    result = run_in_a_process(tiny_bundle, "bundle.refuse_small_data([], 4)")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: `training` holds no images")
    assert "Traceback" not in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(tiny_bundle: Path) -> None:
    result = run_in_a_process(tiny_bundle, "bundle.refuse_small_data(None, 4)")  # a TypeError inside this package
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "TypeError" in result.stderr


def test_what_torch_raises_inside_this_package_keeps_its_traceback(tiny_bundle: Path) -> None:
    from dissect_monai.metrics.representation import feature_std

    with pytest.raises(RuntimeError) as raised:
        feature_std(torch.zeros(2, 2, device="meta")).item()
    assert bad_input(raised.value) is None
    with pytest.raises(ValueError, match="must have shape") as refused:
        feature_std(torch.zeros(2))
    assert bad_input(refused.value) is refused.value


def test_the_message_of_a_refusal_that_has_a_cause_is_its_own() -> None:
    from monai.bundle import ConfigParser

    from dissect_monai.bundle import refuse_bad_knobs

    with pytest.raises(ValueError, match="device") as raised:
        refuse_bad_knobs(ConfigParser({"device": "abacus"}))
    assert str(bad_input(raised.value)).startswith("`--device` must be")


# ---- what a run goes on from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, "true", "auto", False, "false"])
def test_a_run_goes_on_if_it_is_to(tmp_path: Path, resume: bool | str) -> None:
    (tmp_path / "checkpoint_epoch=3.pt").touch()
    found = checkpoint_to_resume(resume, tmp_path)
    assert found == (None if resume in (False, "false") else str(tmp_path / "checkpoint_epoch=3.pt"))


def test_auto_begins_where_true_must_go_on(tmp_path: Path) -> None:
    assert checkpoint_to_resume("auto", tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint_epoch=N\.pt"):
        checkpoint_to_resume("true", tmp_path)
    with pytest.raises(ValueError, match="`resume` must be true or false"):
        checkpoint_to_resume("maybe", tmp_path)
