from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SegResNet, resnet10, resnet18
from torch import nn

from dissect_monai.networks.encoders import SegResNetEncoder
from dissect_monai.networks.weights import (
    has_decoder,
    load_encoder,
    load_segmentation,
    load_segresnet,
    read_settings,
    save_weights,
    transfer_segresnet,
)
from dissect_monai.writing import save_atomically

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


# ---- the start of a segmentation ---------------------------------------------------------------------------------

ORGANS = ["spleen", "liver"]
CLASSES = len(ORGANS) + 1


def saved(folder: Path, network: SegResNet, **settings: Any) -> Path:
    save_weights(network, folder / "model.pt", {"spatial_dims": 2, **settings})
    return folder / "model.pt"


def saved_state(folder: Path, state: dict[Any, Any], **settings: Any) -> Path:
    path = saved(folder, segresnet(), **settings)
    torch.save(state, path)
    return path


def taken_over(network: SegResNet, other: SegResNet, untouched: SegResNet) -> set[str]:
    """Keys whose values come from another network, the rest being as in one that was left alone."""
    theirs, own = other.state_dict(), untouched.state_dict()
    equal = {key for key, value in network.state_dict().items() if torch.equal(value, theirs.get(key, torch.empty(0)))}
    for key, value in network.state_dict().items():
        assert key in equal or torch.equal(value, own[key]), key
    return equal


def test_all_but_the_last_layer_of_a_reconstruction_starts_a_segmentation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained, network = segresnet(0, out_channels=1), segresnet(1, out_channels=CLASSES)
    with caplog.at_level(logging.INFO):
        assert transfer_segresnet(network, saved(tmp_path, pretrained), ORGANS) is network
    last = {"conv_final.2.conv.weight", "conv_final.2.conv.bias"}
    taken = taken_over(network, pretrained, segresnet(1, out_channels=CLASSES))
    keys = set(network.state_dict())
    assert taken == keys - last
    assert caplog.records[-1].message == (
        f"Loaded {len(keys) - 2} of {len(keys)} tensors of {tmp_path / 'model.pt'} into {len(keys) - 2} of {len(keys)} "
        "of the network; left as they were: conv_final.2."
    )


def test_an_encoder_alone_starts_a_segmentation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, network = encoder_of(segresnet(0)), segresnet(1, out_channels=CLASSES)
    with caplog.at_level(logging.INFO):
        transfer_segresnet(network, saved_state(tmp_path, encoder, class_names=ORGANS), ORGANS)
    taken = taken_over(network, segresnet(0, out_channels=CLASSES), segresnet(1, out_channels=CLASSES))
    constant = {key for key in taken - set(encoder) if not key.startswith("conv_final.2")}  # norms agree untrained
    assert taken - constant == set(encoder)
    assert all(".norm" in key or key.startswith("conv_final.0") for key in constant)
    number = len(encoder)
    assert f"Loaded {number} of {number} tensors of" in caplog.text
    assert f"into {number} of {len(network.state_dict())} of the network; left as they were: up_layers" in caplog.text
    assert caplog.records[-1].message.endswith("left as they were: up_layers, up_samples, conv_final.")


@pytest.mark.parametrize(
    ("class_names", "whole"),
    [(ORGANS, True), (["spleen", "aorta"], False), (ORGANS[::-1], False), (None, False), (["tumour"] * 2, False)],
)
def test_the_last_layer_comes_only_from_a_segmentation_of_the_same_structures(
    tmp_path: Path, class_names: list[str] | None, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other, network = segresnet(0, out_channels=CLASSES), segresnet(1, out_channels=CLASSES)
    settings = {} if class_names is None else {"class_names": class_names}
    with caplog.at_level(logging.INFO):
        transfer_segresnet(network, saved(tmp_path, other, **settings), ORGANS)
    taken = taken_over(network, other, segresnet(1, out_channels=CLASSES))
    assert ("conv_final.2.conv.weight" in taken) == ("conv_final.2.conv.bias" in taken) == whole
    assert len(taken) == len(network.state_dict()) - (0 if whole else 2)
    assert caplog.records[-1].message.endswith(
        "left as they were: none." if whole else "left as they were: conv_final.2."
    )


def test_a_last_layer_that_is_not_taken_may_be_broken_or_missing(tmp_path: Path) -> None:
    state = segresnet(0).state_dict()
    state["conv_final.2.conv.bias"] = torch.tensor([float("nan")])
    del state["conv_final.2.conv.weight"]
    network = segresnet(1, out_channels=CLASSES)
    transfer_segresnet(network, saved_state(tmp_path, state), ORGANS)
    assert torch.equal(network.convInit.conv.weight, state["convInit.conv.weight"])


REFUSED_CHANGES = [
    ({"up_samples.0.0.conv.weight": None}, r"the SegResNet: 1 missing \(up_samples\.0\.0\.conv\.weight\)"),
    ({"other": torch.ones(1)}, r"1 unexpected \(other\)\. Is it a SegResNet of the same spatial_dims"),
    ({"convInit.conv.weight": torch.ones(8, 2, 3, 3)}, r"1 of another shape \(convInit\.conv\.weight\)"),
    ({"convInit.conv.weight": torch.full((8, 1, 3, 3), float("nan"))}, "must be finite, got NaN or infinity in 1 of"),
    ({"convInit.conv.weight": [1.0]}, r"1 not a tensor \(convInit\.conv\.weight\)"),
    ({7: torch.ones(1)}, r"1 unexpected \(7\)"),
]


@pytest.mark.parametrize("same_classes", [False, True])
@pytest.mark.parametrize(("change", "message"), REFUSED_CHANGES)
def test_weights_that_cannot_start_a_segmentation_are_refused_and_change_nothing(
    tmp_path: Path, change: dict[Any, Any], message: str, same_classes: bool
) -> None:
    state = {**segresnet(0, out_channels=CLASSES).state_dict(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    path = saved_state(tmp_path, state, **({"class_names": ORGANS} if same_classes else {}))
    network = segresnet(1, out_channels=CLASSES)
    with pytest.raises(ValueError, match=message):
        transfer_segresnet(network, path, ORGANS)
    untouched = segresnet(1, out_channels=CLASSES).state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in network.state_dict().items())


def test_a_last_layer_of_the_same_structures_must_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, segresnet(0, out_channels=5), class_names=ORGANS)
    with pytest.raises(
        ValueError, match=r"2 of another shape \(conv_final\.2\.conv\.weight, conv_final\.2\.conv\.bias\)"
    ):
        transfer_segresnet(segresnet(1, out_channels=CLASSES), path, ORGANS)


def test_a_truncated_file_cannot_start_a_segmentation(tmp_path: Path) -> None:
    path = saved(tmp_path, segresnet())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model\.pt cannot be loaded, it is damaged or no file of torch\.save"):
        transfer_segresnet(segresnet(), path, ORGANS)


def test_weights_for_slices_cannot_start_a_segmentation_of_volumes(tmp_path: Path) -> None:
    path = saved(tmp_path, segresnet(0))
    network = segresnet(1, spatial_dims=3)
    with pytest.raises(ValueError, match=r"model\.pt must hold weights for 3-D images, got some for 2-D ones"):
        transfer_segresnet(network, path, ORGANS)


def test_weights_without_json_or_none_at_all_cannot_start_a_segmentation(tmp_path: Path) -> None:
    torch.save(segresnet().state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        FileNotFoundError, match=r"there is no model\.json beside .*model\.pt to say how it was trained"
    ):
        transfer_segresnet(segresnet(), tmp_path / "model.pt", ORGANS)
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*none\.pt"):
        transfer_segresnet(segresnet(), tmp_path / "none.pt", ORGANS)


def test_a_segmentation_is_loaded_with_its_classes_alone(tmp_path: Path) -> None:
    network, path = SegResNet(3, 8, 1, 3), tmp_path / "model.pt"
    save_weights(network, path, {"class_names": ["liver", "spleen"]})
    other = load_segmentation(SegResNet(3, 8, 1, 3), path)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in network.state_dict().items())
    save_weights(network, path, {"init_filters": 8})
    with pytest.raises(ValueError, match="must be weights of a segmentation, got some without `class_names`"):
        load_segmentation(SegResNet(3, 8, 1, 3), path)


def test_an_encoder_is_no_segmentation(tmp_path: Path) -> None:
    network, path = SegResNet(3, 8, 1, 3), tmp_path / "model.pt"
    save_weights(SegResNetEncoder(network), path, {"class_names": ["liver", "spleen"]})
    with pytest.raises(ValueError, match=r"do not fit the SegResNet: \d+ missing"):
        load_segmentation(network, path)
