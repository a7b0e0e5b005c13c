from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import resnet10, resnet18
from torch import nn

from dissect_monai.weights import load_encoder, read_settings, save_atomically, save_weights

# ---- files -------------------------------------------------------------------------------------------------------


def test_a_kill_in_the_middle_of_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_epoch=1.pt"
    save_atomically({"weight": torch.ones(2)}, path)

    def killed(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"weight": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path)["weight"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_settings_reach_the_disk_or_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(nn.Linear(1, 1), tmp_path / "model.pt", {"encoder": "resnet18"})
    flush, flushed = os.fsync, []

    def fail_at_the_settings(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 1:
            raise OSError("the disk is full")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail_at_the_settings)
    with pytest.raises(OSError, match="the disk is full"):
        save_weights(nn.Linear(1, 1), tmp_path / "model.pt", {"encoder": "resnet50"})
    assert read_settings(tmp_path / "model.pt") == {"encoder": "resnet18"}
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.json"}


def test_without_weights_there_are_no_settings(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "model.pt") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"there is no model\.json beside"), ("{", "must be JSON"), ("[]", "must hold a JSON object, got a list")],
)
def test_weights_without_readable_settings_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "model.pt").touch()
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_settings(tmp_path / "model.pt")


# ---- encoders ----------------------------------------------------------------------------------------------------


def test_loads_every_weight_of_an_encoder(tmp_path: Path) -> None:
    saved, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    assert load_encoder(fresh, tmp_path / "model.pt") is fresh
    assert torch.equal(fresh.weight, saved.weight)


def test_says_that_there_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*model\.pt: train first"):
        load_encoder(nn.Linear(1, 1), tmp_path / "model.pt")


def test_names_the_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3, 3), "scale": torch.ones(1)}, tmp_path / "model.pt")
    encoder = nn.Linear(2, 2)
    before = encoder.weight.clone()
    named = r"the Linear: 1 missing \(bias\); 1 unexpected \(scale\); 1 of another shape \(weight\)"
    with pytest.raises(ValueError, match=named):
        load_encoder(encoder, tmp_path / "model.pt")
    assert torch.equal(encoder.weight, before)


def test_names_no_more_than_five_weights(tmp_path: Path) -> None:
    torch.save(resnet18(spatial_dims=2, feed_forward=False).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"unexpected \(([\w.]+, ){4}[\w.]+\)\. Is it the same encoder"):
        load_encoder(resnet10(spatial_dims=2, n_input_channels=3, feed_forward=False), tmp_path / "model.pt")


def test_names_what_is_no_tensor(tmp_path: Path) -> None:
    torch.save({"weight": [[1.0, 2.0], [3.0, 4.0]], "bias": torch.ones(2), 7: "note"}, tmp_path / "model.pt")
    named = r"the Linear: 1 unexpected \(7\); 1 not a tensor \(weight\)"
    with pytest.raises(ValueError, match=named):
        load_encoder(nn.Linear(2, 2), tmp_path / "model.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    saved = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    with torch.no_grad():
        for layer in saved[1:]:
            layer.weight[1, 0] = value
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    encoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    before = encoder[0].weight.clone()
    named = r"NaN or infinity in 6 of 14 tensors \(([1-5]\.weight(, )?){5}\): train again or take an older checkpoint"
    with pytest.raises(ValueError, match=named):
        load_encoder(encoder, tmp_path / "model.pt")
    assert torch.equal(encoder[0].weight, before)
