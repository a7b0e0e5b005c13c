import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_resnet
from monai.networks.nets import SegResNet, resnet10, resnet18
from torch import Tensor, nn

from dissect_monai.networks.encoders import SegResNetEncoder
from dissect_monai.networks.segmentation import EncoderDecoder
from dissect_monai.networks.weights import load_weights, read_settings, save_weights

NAN = float("nan")
ORGANS = ["spleen", "liver"]
CLASSES = len(ORGANS) + 1
LAST = {"conv_final.2.conv.weight", "conv_final.2.conv.bias"}

# ---- files -------------------------------------------------------------------------------------------------------


def test_a_kill_while_writing_leaves_the_former_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former = nn.Linear(1, 1)
    save_weights(former, tmp_path / "model.pt", {"encoder": "resnet18"})
    flush, flushed = os.fsync, []

    def killed_at_the_settings(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 1:
            raise KeyboardInterrupt
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", killed_at_the_settings)
    with pytest.raises(KeyboardInterrupt):
        save_weights(nn.Linear(1, 1), tmp_path / "model.pt", {"encoder": "resnet50"})
    assert read_settings(tmp_path / "model.pt") == {"encoder": "resnet18"}
    assert torch.equal(torch.load(tmp_path / "model.pt")["weight"], former.weight)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.json"}


def test_without_weights_there_are_no_settings_and_nothing_is_loaded(tmp_path: Path) -> None:
    assert read_settings(None) == read_settings(tmp_path / "model.pt") == {}
    network = nn.Linear(1, 1)
    before = network.weight.clone()
    assert load_weights(network, None) is network
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"there is no model\.json beside"), ("{", "must be JSON"), ("[]", "must hold a JSON object, got a list")],
)
def test_weights_without_readable_settings_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    torch.save(segresnet().state_dict(), tmp_path / "model.pt")
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_weights(segresnet(), tmp_path / "model.pt", ORGANS, transfer=True)


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*model\.pt: train first"):
        load_weights(nn.Linear(1, 1), path)
    torch.save(segresnet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model\.pt cannot be loaded, it is damaged or no file of torch\.save"):
        load_weights(nn.Linear(1, 1), path)


def test_names_no_more_than_five_weights(tmp_path: Path) -> None:
    torch.save(resnet18(spatial_dims=2, feed_forward=False).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"unexpected \(([\w.]+, ){5}\.\.\.\)\. Is it the same `encoder`"):
        load_weights(resnet10(spatial_dims=2, n_input_channels=3, feed_forward=False), tmp_path / "model.pt")


# ---- classifiers -------------------------------------------------------------------------------------------------


def classifier(**arguments: Any) -> nn.Module:
    return small_resnet(**{"num_classes": 3, **arguments})


def test_a_classifier_starts_from_an_encoder_with_its_own_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {key: value + 1 for key, value in classifier(feed_forward=False).state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    network = classifier()
    head = network.fc.weight.clone()
    with caplog.at_level(logging.INFO):
        load_weights(network, tmp_path / "model.pt", transfer=True)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items() if "fc." not in key)
    assert torch.equal(network.fc.weight, head)
    assert f"Loaded {len(state)} of {len(state)} tensors of" in caplog.text
    assert caplog.records[-1].message.endswith("left as they were: fc.")


def test_findings_must_be_those_of_the_weights(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "model.pt", {"label_names": ["Nodule", "Mass", "Edema"]})
    load_weights(classifier(), tmp_path / "model.pt", ["Nodule", "Mass", "Edema"])
    named = r"`label_names` must be those of .*model\.json, Nodule, Mass, Edema, got Mass, Nodule, Edema"
    with pytest.raises(ValueError, match=named):
        load_weights(classifier(), tmp_path / "model.pt", ["Mass", "Nodule", "Edema"])


# ---- SegResNets --------------------------------------------------------------------------------------------------


def segresnet(seed: int = 0, **changes: Any) -> SegResNet:
    """All tensors are random, those of norms, too."""
    torch.manual_seed(seed)
    arguments = {"spatial_dims": 2, "init_filters": 8, "out_channels": 1, "blocks_down": (1, 1), "blocks_up": (1,)}
    network = SegResNet(**arguments | changes)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def saved(folder: Path, state: nn.Module | Mapping[Any, Any], **settings: Any) -> Path:
    """A file of weights, and one of its settings."""
    path = folder / "model.pt"
    save_weights(segresnet(), path, {"spatial_dims": 2, **settings})
    torch.save(state.state_dict() if isinstance(state, nn.Module) else state, path)
    return path


def encoder_of(network: SegResNet) -> dict[str, Tensor]:
    return SegResNetEncoder(network).state_dict()


def taken_over(network: SegResNet, other: SegResNet, untouched: SegResNet) -> set[str]:
    """Keys whose values come from another network, the rest being as in one that was left alone."""
    theirs, own = other.state_dict(), untouched.state_dict()
    equal = {key for key, value in network.state_dict().items() if torch.equal(value, theirs.get(key, torch.empty(0)))}
    for key, value in network.state_dict().items():
        assert key in equal or torch.equal(value, own[key]), key
    return equal


@pytest.mark.parametrize("names", [None, ORGANS])
def test_loads_an_encoder_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str] | None) -> None:
    network, untouched = segresnet(1, out_channels=CLASSES), segresnet(1, out_channels=CLASSES)
    encoder = encoder_of(segresnet(0))
    path = saved(tmp_path, encoder)
    with caplog.at_level(logging.INFO):
        assert load_weights(network, path, names, transfer=names is not None) is network
    assert taken_over(network, segresnet(0), untouched) == set(encoder)
    number = len(encoder)
    assert caplog.records[-1].message == (
        f"Loaded {number} of {number} tensors of {path}; parts left as they were: up_layers, up_samples, conv_final."
    )


@pytest.mark.parametrize("part", ["convInit.", "down_layers.", ""])
def test_a_part_of_an_encoder_is_refused(tmp_path: Path, part: str) -> None:
    path = saved(tmp_path, {key: value for key, value in encoder_of(segresnet()).items() if not key.startswith(part)})
    with pytest.raises(ValueError, match=rf"do not fit the SegResNet: \d+ missing \({part}"):
        load_weights(segresnet(), path)


@pytest.mark.parametrize(
    ("outputs", "class_names", "whole"),
    [
        (CLASSES, ORGANS, True),
        (CLASSES, ["spleen", "aorta"], False),
        (CLASSES, ORGANS[::-1], False),
        (CLASSES, None, False),
        (1, None, False),  # a reconstruction
    ],
)
def test_the_last_layer_comes_only_from_a_segmentation_of_the_same_structures(
    tmp_path: Path, outputs: int, class_names: list[str] | None, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other, network = segresnet(0, out_channels=outputs), segresnet(1, out_channels=CLASSES)
    path = saved(tmp_path, other, **({} if class_names is None else {"class_names": class_names}))
    with caplog.at_level(logging.INFO):
        assert load_weights(network, path, ORGANS, transfer=True) is network
    keys = set(network.state_dict())
    assert taken_over(network, other, segresnet(1, out_channels=CLASSES)) == (keys if whole else keys - LAST)
    loaded, left = (len(keys), "none") if whole else (len(keys) - 2, "conv_final.2")
    assert caplog.records[-1].message == (
        f"Loaded {loaded} of {len(keys)} tensors of {path}; parts left as they were: {left}."
    )


def test_a_last_layer_that_is_not_taken_may_be_broken_or_missing(tmp_path: Path) -> None:
    state = segresnet(0).state_dict()
    state["conv_final.2.conv.bias"] = torch.tensor([NAN])
    del state["conv_final.2.conv.weight"]
    network = segresnet(1, out_channels=CLASSES)
    load_weights(network, saved(tmp_path, state), ORGANS, transfer=True)
    assert torch.equal(network.convInit.conv.weight, state["convInit.conv.weight"])


@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_samples.0.0.conv.weight": None}, r"the SegResNet: 1 missing \(up_samples\.0\.0\.conv\.weight\)"),
        ({"other": torch.ones(1)}, r"1 unexpected \(other\)\. Is it a SegResNet of the same spatial_dims"),
        ({"convInit.conv.weight": torch.ones(2)}, r"1 of another shape \(convInit\.conv\.weight\)"),
        ({"convInit.conv.weight": torch.full((8, 1, 3, 3), NAN)}, "must be finite, got NaN or infinity in 1 of"),
        ({"convInit.conv.weight": [1.0]}, r"1 of another shape \(convInit\.conv\.weight\)"),
        ({7: torch.ones(1)}, r"1 unexpected \(7\)"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    tmp_path: Path, change: dict[Any, Any], message: str, transfer: bool
) -> None:
    state = {**segresnet(0, out_channels=CLASSES).state_dict(), **change}
    path = saved(tmp_path, {key: value for key, value in state.items() if value is not None})
    network = segresnet(1, out_channels=CLASSES)
    with pytest.raises(ValueError, match=message):
        load_weights(network, path, ORGANS if transfer else None, transfer)
    untouched = segresnet(1, out_channels=CLASSES).state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("names", [None, ORGANS])
def test_weights_for_slices_cannot_start_a_network_of_volumes(tmp_path: Path, names: list[str] | None) -> None:
    message = r"model\.pt must hold weights for 3-D images, got some for 2-D ones: set `spatial_dims` to 2, or"
    with pytest.raises(ValueError, match=message):
        load_weights(segresnet(1, spatial_dims=3), saved(tmp_path, segresnet(0)), names, transfer=bool(names))


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        (segresnet(), {}, "must be weights of a segmentation, got some without `class_names`"),
        (segresnet(), {"class_names": ["spleen", "aorta"]}, "`class_names` must be those of .* spleen, aorta, got"),
        (encoder_of(segresnet()), {"class_names": ORGANS}, r"do not fit the SegResNet: \d+ missing"),
    ],
)
def test_other_segmentations_are_refused(tmp_path: Path, state: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(segresnet(), saved(tmp_path, state, **settings), ORGANS)


# ---- encoders with a decoder -------------------------------------------------------------------------------------


def with_decoder(seed: int) -> EncoderDecoder:
    torch.manual_seed(seed)
    return EncoderDecoder(small_resnet(seed), 2, 1, CLASSES)


def keys_taken(network: nn.Module, other: Mapping[str, Tensor]) -> set[str]:
    return {key for key, value in network.state_dict().items() if key in other and torch.equal(value, other[key])}


@pytest.mark.parametrize("class_names", [None, ORGANS, ["spleen", "aorta"]])
def test_an_encoder_that_was_pretrained_or_a_segmentation_starts_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, class_names: list[str] | None
) -> None:
    source: nn.Module = with_decoder(0).encoder if class_names is None else with_decoder(0)
    state = {key: value + 1 for key, value in source.state_dict().items()}  # norms, too
    path = saved(tmp_path, state, encoder="resnet10", **({"class_names": class_names} if class_names else {}))
    network = with_decoder(1)
    with caplog.at_level(logging.INFO):
        load_weights(network, path, ORGANS, transfer=True)
    whole, parts = {key: value + 1 for key, value in with_decoder(0).state_dict().items()}, network.state_dict().keys()
    left = {None: ("decoder.", "head."), "spleen, aorta": ("head.",)}.get(class_names and ", ".join(class_names), ())
    taken = {key for key in parts if not key.startswith(left)}
    assert keys_taken(network, whole) == taken
    names = ", ".join(part.rstrip(".") for part in left) or "none"
    assert f"Loaded {len(taken)} of {len(state)} tensors of {path}; parts left as they were: {names}." in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (small_resnet(num_classes=2), r"2 unexpected .*They are of a trained classifier: give the encoder"),
        (small_resnet(n_input_channels=3), r"take images of 3 channel\(s\), not 1: set `in_channels` to 3"),
        (segresnet(0), r"do not fit the EncoderDecoder: \d+ missing"),
    ],
)
def test_other_weights_do_not_start_an_encoder_with_a_decoder(tmp_path: Path, source: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(with_decoder(1), saved(tmp_path, source), ORGANS, transfer=True)


def test_weights_of_patches_are_not_of_whole_images(tmp_path: Path) -> None:
    path = saved(tmp_path, segresnet(0), patch_size=[32, 32, 32])
    assert read_settings(path)["patch_size"] == [32, 32, 32]
    with pytest.raises(ValueError, match=r"must be of whole images, got weights of patches of volumes, as model\.json"):
        read_settings(path, patches=False)
