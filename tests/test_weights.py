from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SegResNet, resnet10, resnet18
from torch import nn

from dissect_monai.weights import (
    has_decoder,
    load_encoder,
    load_segresnet,
    read_settings,
    save_atomically,
    save_weights,
)

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


# ---- SegResNets --------------------------------------------------------------------------------------------------


def segresnet(seed: int = 0, **changes: Any) -> SegResNet:
    torch.manual_seed(seed)
    arguments = {"spatial_dims": 2, "init_filters": 8, "out_channels": 1, "blocks_down": (1, 1), "blocks_up": (1,)}
    return SegResNet(**arguments | changes)


def encoder_of(network: SegResNet) -> dict[str, torch.Tensor]:
    return {key: value for key, value in network.state_dict().items() if key.startswith(("convInit.", "down_layers."))}


def equal_keys(one: SegResNet, other: SegResNet) -> set[str]:
    """Parts of two networks that agree; those of constants, such as norms, agree untrained."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return {key.split(".")[0] for key, value in one.state_dict().items()} - {
        key.split(".")[0] for (key, value), theirs in pairs if not torch.equal(value, theirs)
    }


def test_loads_a_whole_segresnet(tmp_path: Path) -> None:
    saved, fresh = segresnet(0), segresnet(1)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    assert has_decoder(tmp_path / "model.pt")
    assert load_segresnet(fresh, tmp_path / "model.pt") is fresh
    assert equal_keys(fresh, saved) == {"convInit", "down_layers", "up_layers", "up_samples", "conv_final"}


def test_loads_the_encoder_of_a_segresnet_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, fresh, untouched = segresnet(0), segresnet(1, out_channels=4), segresnet(1, out_channels=4)
    torch.save(encoder_of(saved), tmp_path / "model.pt")
    with caplog.at_level(logging.INFO):
        assert load_segresnet(fresh, tmp_path / "model.pt") is fresh
    assert not has_decoder(tmp_path / "model.pt")
    assert has_decoder(tmp_path / "none.pt")
    assert equal_keys(fresh, segresnet(0, out_channels=4)) >= {"convInit", "down_layers"}
    assert equal_keys(fresh, untouched) == {"up_layers", "up_samples", "conv_final"}
    first, second = (record.message for record in caplog.records)
    assert first.startswith(f"Loaded all {len(encoder_of(saved))} tensors of")
    assert second == (
        "They are of an encoder alone: up_layers, up_samples, conv_final of the network were left as they were."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"other": torch.ones(1)},
            r"the SegResNet: 1 unexpected \(other\)\. Is it a SegResNet of the same spatial_dims",
        ),
        ({"convInit.conv.weight": None}, r"the SegResNet: 1 missing \(convInit\.conv\.weight\)"),
        ({"conv_final.2.conv.bias": None}, r"the SegResNet: 1 missing \(conv_final\.2\.conv\.bias\)"),
        ({"convInit.conv.weight": torch.ones(2)}, r"1 of another shape \(convInit\.conv\.weight\)"),
        ({"convInit.conv.weight": 3}, r"1 not a tensor \(convInit\.conv\.weight\)"),
        ({"conv_final.2.conv.bias": torch.tensor([float("nan")])}, "must be finite, got NaN or infinity in 1 of"),
    ],
)
def test_weights_that_do_not_fit_a_segresnet_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {key: value for key, value in {**segresnet(0).state_dict(), **change}.items() if value is not None}
    torch.save(state, tmp_path / "model.pt")
    network = segresnet(1)
    with pytest.raises(ValueError, match=message):
        load_segresnet(network, tmp_path / "model.pt")
    assert "convInit" not in equal_keys(network, segresnet(0))


@pytest.mark.parametrize("part", ["convInit.", "down_layers."])
def test_a_part_of_an_encoder_is_refused(tmp_path: Path, part: str) -> None:
    torch.save({k: v for k, v in encoder_of(segresnet()).items() if not k.startswith(part)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"do not fit the SegResNet: \d+ missing \({part}"):
        load_segresnet(segresnet(), tmp_path / "model.pt")


def test_no_weights_at_all_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="do not fit the SegResNet"):
        load_segresnet(segresnet(), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        load_segresnet(segresnet(), tmp_path / "none.pt")
