import argparse
import logging
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from export_weights import main as export_weights
from helpers import small_segresnet
from monai.networks.nets import SegResNet, SwinUNETR
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dissect_monai.networks.encoders import build_encoder, encoder_of, feature_maps, stem_and_stages
from dissect_monai.networks.published import publish
from dissect_monai.networks.segmentation import EncoderDecoder, build_segmentation
from dissect_monai.networks.weights import load_weights, read_settings, save_weights

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
State = dict[str, Tensor]

# ---- files of others: their keys and shapes, and what their networks compute, written down anew ---------------------


def norm(state: State, name: str, width: int) -> None:
    draw = torch.rand(4, width) + 0.5
    for key, values in zip(("weight", "bias", "running_mean", "running_var"), draw, strict=True):
        state[f"{name}.{key}"] = values.clone()
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def kernel(state: State, name: str, out: int, into: int, side: int, dims: int) -> None:
    state[f"{name}.weight"] = torch.randn(out, into, *[side] * dims) / (into * side**dims) ** 0.5


def resnet_file(blocks: Sequence[int], dims: int = 2, channels: int = 3, bottleneck: bool = False) -> State:
    """Of torchvision and timm; in 3-D of MedicalNet, whose ResNet-18 and 34 have shortcuts without convolution."""
    torch.manual_seed(0)
    state: State = {}
    kernel(state, "conv1", 64, channels, 7, dims)
    norm(state, "bn1", 64)
    width = 64
    for stage, number in enumerate(blocks, start=1):
        for block in range(number):
            name, inner = f"layer{stage}.{block}", 32 * 2**stage
            last = 4 * inner if bottleneck else inner
            sides = (1, 3, 1) if bottleneck else (3, 3)
            for i, side in enumerate(sides, start=1):
                kernel(
                    state, f"{name}.conv{i}", last if i == len(sides) else inner, width if i == 1 else inner, side, dims
                )
                norm(state, f"{name}.bn{i}", last if i == len(sides) else inner)
            if block == 0 and width != last and not (dims == 3 and sum(blocks) in (8, 16) and not bottleneck):
                kernel(state, f"{name}.downsample.0", last, width, 1, dims)
                norm(state, f"{name}.downsample.1", last)
            width = last
    return state | {"fc.weight": torch.randn(5, width), "fc.bias": torch.randn(5)}


def densenet_file(channels: int = 3) -> State:
    torch.manual_seed(0)
    state: State = {}
    kernel(state, "features.conv0", 64, channels, 7, 2)
    norm(state, "features.norm0", 64)
    width = 64
    for block, layers in enumerate((6, 12, 24, 16), start=1):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            norm(state, f"{name}.norm1", width)
            kernel(state, f"{name}.conv1", 128, width, 1, 2)
            norm(state, f"{name}.norm2", 128)
            kernel(state, f"{name}.conv2", 32, 128, 3, 2)
            width += 32
        if block < 4:
            norm(state, f"features.transition{block}.norm", width)
            kernel(state, f"features.transition{block}.conv", width // 2, width, 1, 2)
            width //= 2
    norm(state, "features.norm5", width)
    return state | {"classifier.weight": torch.randn(5, width), "classifier.bias": torch.randn(5)}


def normed(x: Tensor, state: State, name: str) -> Tensor:
    return F.batch_norm(x, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))


def resnet_forward(x: Tensor, state: State) -> Tensor:
    dims = x.ndim - 2
    conv: Callable[..., Tensor] = F.conv2d if dims == 2 else F.conv3d
    x = normed(conv(x, state["conv1.weight"], stride=2, padding=3), state, "bn1").relu()
    x = (F.max_pool2d if dims == 2 else F.max_pool3d)(x, 3, 2, 1)
    for name in dict.fromkeys(key.rsplit(".", 2)[0] for key in state if re.match(r"layer\d\.\d+\.conv1", key)):
        stride = 2 if name[5] != "1" and name.endswith(".0") else 1
        y, last = x, 3 if f"{name}.conv3.weight" in state else 2
        for i in range(1, last + 1):
            weight = state[f"{name}.conv{i}.weight"]
            step = stride if i == last - 1 else 1
            y = normed(conv(y, weight, stride=step, padding=weight.shape[-1] // 2), state, f"{name}.bn{i}")
            y = y.relu() if i < last else y
        if f"{name}.downsample.0.weight" in state:
            x = normed(conv(x, state[f"{name}.downsample.0.weight"], stride=stride), state, f"{name}.downsample.1")
        elif stride == 2:
            x = torch.cat([x[(..., *[slice(None, None, 2)] * dims)], torch.zeros_like(y[:, x.shape[1] :])], 1)
        x = (x + y).relu()
    return x.flatten(2).mean(2)


def densenet_forward(x: Tensor, state: State) -> Tensor:
    x = normed(F.conv2d(x, state["features.conv0.weight"], stride=2, padding=3), state, "features.norm0").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for block, layers in enumerate((6, 12, 24, 16), start=1):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            y = F.conv2d(normed(x, state, f"{name}.norm1").relu(), state[f"{name}.conv1.weight"])
            y = F.conv2d(normed(y, state, f"{name}.norm2").relu(), state[f"{name}.conv2.weight"], padding=1)
            x = torch.cat([x, y], 1)
        if block < 4:
            name = f"features.transition{block}"
            x = F.avg_pool2d(F.conv2d(normed(x, state, f"{name}.norm").relu(), state[f"{name}.conv.weight"]), 2)
    return normed(x, state, "features.norm5").relu().flatten(2).mean(2)


def saved(state: Any, folder: Path, name: str = "others.pth") -> Path:
    path = folder / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def loaded(path: Path, **changes: Any) -> nn.Module:
    """The encoder of a file, built as the settings say."""
    return load_weights(encoder_of({**read_settings(path), **changes}), path).eval()


def of_reference(state: State, images: Tensor) -> Tensor:
    return (resnet_forward if "conv1.weight" in state else densenet_forward)(images, state)


FILES = {
    "resnet18": lambda channels=3: resnet_file([2, 2, 2, 2], channels=channels),
    "resnet50": lambda channels=3: resnet_file([3, 4, 6, 3], channels=channels, bottleneck=True),
    "densenet121": densenet_file,
}
every_network = pytest.mark.parametrize("name", list(FILES))


# ---- in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "suffix"), [*((name, ".pth") for name in FILES), ("resnet18", ".safetensors")])
def test_a_published_network_gives_the_same_features_with_three_channels(
    name: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, images = FILES[name](), torch.rand(2, 1, 64, 64)
    path = saved(state, tmp_path, f"others{suffix}")
    with caplog.at_level(logging.INFO), torch.no_grad():
        network = loaded(path, in_channels=3, pretrained_norm="imagenet")
        expected = of_reference(state, (images.expand(-1, 3, -1, -1) - MEAN) / STD)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    assert read_settings(path)["encoder"] == name
    head = "classifier" if name == "densenet121" else "fc"
    (line,) = caplog.messages
    assert line.startswith(f"Loaded {len(state) - 2} of {len(state)} tensors of {path}, a ")
    said = f"({name}), without {head} (2); images normalised as imagenet; parts left as they were: none."
    assert line.endswith(("torchvision or timm " + said, "torchvision, timm or MedicalNet " + said))


@every_network
def test_one_channel_gives_the_same_away_from_the_borders(name: str, tmp_path: Path) -> None:
    path, images = saved(FILES[name](), tmp_path), torch.rand(1, 1, 64, 64)
    one, three = (loaded(path, in_channels=channels, pretrained_norm="imagenet") for channels in (1, 3))
    with torch.no_grad():
        found, expected = (stem_and_stages(network, images)[0][..., 2:-2, 2:-2] for network in (one, three))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        if name == "resnet18":  # of zeros beside normalised images the mean of three channels sees a little more
            torch.testing.assert_close(one(images), three(images), rtol=0, atol=0.1)


def test_without_norms_that_differ_the_first_convolution_is_the_sum_of_three(tmp_path: Path) -> None:
    state, images = FILES["resnet18"](), torch.rand(1, 1, 64, 64)
    path = saved(state, tmp_path)
    for norm_of in ("none", "radimagenet"):
        network = loaded(path, pretrained_norm=norm_of)
        torch.testing.assert_close(network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
        assert torch.equal(network.bn1.running_mean, state["bn1.running_mean"])
        with torch.no_grad():  # zeros are padded to the normalised image, so it is exact everywhere
            scaled = images * 2 - 1 if norm_of == "radimagenet" else images
            expected = resnet_forward(scaled.expand(-1, 3, -1, -1), state)
            torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


def test_normalisation_and_repetition_are_part_of_what_is_exported() -> None:
    network, images = (
        build_encoder("resnet10", in_channels=3, pretrained_norm="imagenet").eval(),
        torch.rand(1, 1, 32, 32),
    )
    script = torch.jit.script(network)
    with torch.no_grad():
        assert torch.equal(script(images), network(images))
        assert torch.equal(script(images.expand(-1, 3, -1, -1)), network(images))
    assert {*network.state_dict()} == {*build_encoder("resnet10").state_dict()}


def sequential(state: State) -> State:
    """As RadImageNet's files: `backbone` is an nn.Sequential of the children."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7, "features": 0}
    parts = [(key.partition("."), value) for key, value in state.items()]
    return {f"backbone.{numbers[first]}.{rest}": value for (first, _, rest), value in parts if first in numbers}


def dotted(state: State) -> State:
    """As torchvision's first files, without the count of batches."""
    spelled = {re.sub(r"(denselayer\d+\.[a-z]+)(\d)", r"\1.\2", key): value for key, value in state.items()}
    return {key: value for key, value in spelled.items() if "num_batches" not in key}


@pytest.mark.parametrize(
    ("name", "write"), [("resnet18", sequential), ("densenet121", sequential), ("densenet121", dotted)]
)
def test_other_spellings_of_the_keys(name: str, write: Callable[[State], State], tmp_path: Path) -> None:
    state, images = FILES[name](), torch.rand(1, 3, 64, 64)
    path = saved(write(state), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(path, in_channels=3)(images), of_reference(state, images), rtol=1e-4, atol=1e-4
        )


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


SMALL = resnet_file([1, 1, 1, 1])
OTHER = {key: torch.zeros_like(value) for key, value in SMALL.items()}
PROJECTED = {key: value for key, value in SMALL.items() if "fc" not in key} | {"fc.0.weight": torch.ones(3, 3)}


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ({"state_dict": under("module.", SMALL), "epoch": 3}, "state_dict.module.fc (2)"),
        ({"model": under("model.", SMALL), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
         "model.model.fc (2), optimizer (1)"),
        (under("backbone.", SMALL) | {"projection_head.weight": torch.ones(1)}, "backbone.fc (2), projection_head (1)"),
        ({"state_dict": under("module.encoder_q.", PROJECTED) | under("module.encoder_k.", OTHER)
          | {"module.queue": torch.ones(2)}},
         "state_dict.module.encoder_q.fc (1), state_dict.module.encoder_k (74), state_dict.module.queue (1)"),
        ({"student": under("module.backbone.", OTHER),
          "teacher": under("backbone.", PROJECTED) | under("head.", OTHER)},
         "student (74), teacher.backbone.fc (1), teacher.head (74)"),
        (under("encoder.", SMALL), "encoder.fc (2)"),
        ({"state_dict": under("module.momentum_encoder.", OTHER) | under("module.base_encoder.", PROJECTED)},
         "state_dict.module.momentum_encoder (74), state_dict.module.base_encoder.fc (1)"),
        (under("backbone.", PROJECTED) | under("backbone_momentum.", OTHER),
         "backbone.fc (1), backbone_momentum (74)"),
    ],
)  # fmt: skip
def test_prefixes_are_found_and_all_that_is_left_is_named(
    content: Any, left: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(content, tmp_path)
    with caplog.at_level(logging.INFO):
        network = loaded(path, in_channels=3)
    assert torch.equal(network.layer4[0].conv2.weight, SMALL["layer4.0.conv2.weight"])
    assert "Loaded 72 of " in caplog.text
    assert f"(resnet10), without {left};" in caplog.text


@pytest.mark.parametrize(("blocks", "bottleneck"), [([1, 1, 1, 1], False), ([2, 2, 2, 2], False), ([3, 4, 6, 3], True)])
def test_a_resnet_of_medicalnet_gives_what_it_gives_in_monai(
    blocks: list[int], bottleneck: bool, tmp_path: Path
) -> None:
    state = resnet_file(blocks, 3, 1, bottleneck)
    kernels = {key: value for key, value in state.items() if not key.startswith("fc")}
    path = saved({"state_dict": under("module.", kernels | {"conv_seg.0.weight": torch.ones(2)})}, tmp_path)
    images = torch.rand(1, 1, 32, 32, 32)
    network = loaded(path)
    with torch.no_grad():
        torch.testing.assert_close(network(images), resnet_forward(images, state), rtol=1e-4, atol=1e-4)


SPELL_SWIN: dict[str, Callable[[str], str]] = {
    "module.": lambda key: key.replace("linear", "fc"),
    "encoder.": lambda key: re.sub(r"^(layers\d\.0)\.", r"\1.0.", key),
    "swinViT.": lambda key: key,
}


@pytest.mark.parametrize("prefix", list(SPELL_SWIN))
def test_weights_of_a_swin_unetr_are_taken_as_monai_takes_them(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = build_encoder("swin", 3).state_dict()
    content = {f"{prefix}{SPELL_SWIN[prefix](key)}": value for key, value in state.items()}
    path = saved({"state_dict": content | {f"{prefix}norm.weight": torch.ones(768)}}, tmp_path)
    network, images = loaded(path), torch.rand(1, 1, 32, 32, 32)
    monai = SwinUNETR(1, 2, feature_size=48).eval()
    if prefix == "module.":
        monai.load_from(torch.load(path))
    else:
        monai.swinViT.load_state_dict(state)
    with torch.no_grad():
        for found, expected in zip(feature_maps(network, images), monai.swinViT(images)[1:], strict=True):
            assert torch.equal(found, expected)


def test_published_weights_start_a_segmentation_with_the_decoder_as_it_was(tmp_path: Path) -> None:
    path = saved(SMALL, tmp_path)
    network = build_segmentation("resnet10", 2, 1, 3, resnet_shortcuts="unbiased")
    before = {key: value.clone() for key, value in network.state_dict().items() if not key.startswith("encoder.")}
    load_weights(network, path, ["a", "b"], transfer=True)
    assert isinstance(network, EncoderDecoder)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(network.encoder.layer4[0].conv2.weight, SMALL["layer4.0.conv2.weight"])


def test_of_a_segresnet_of_other_outputs_the_last_layer_is_left_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = SegResNet(3, 8, blocks_down=(1, 1, 2), blocks_up=(2, 1)).state_dict()
    path = saved(under("module.", whole), tmp_path)
    said = read_settings(path)
    assert said == {"encoder": "SegResNet", "layout": "SegResNet of MONAI", "spatial_dims": 3, "init_filters": 8,
                    "blocks_down": [1, 1, 2], "blocks_up": [2, 1]}  # fmt: skip
    shape = {name: said[name] for name in ("spatial_dims", "init_filters", "blocks_down", "blocks_up")}
    network = SegResNet(**shape, out_channels=4)
    with caplog.at_level(logging.INFO):
        load_weights(network, path, ["a", "b", "c"], transfer=True)
    assert torch.equal(network.up_layers[0][1].conv1.conv.weight, whole["up_layers.0.1.conv1.conv.weight"])
    assert caplog.messages[0].startswith(f"Loaded {len(whole) - 2} of {len(whole)} tensors of ")
    assert "without conv_final.2 (2); images not normalised; parts left as they were: conv_final.2." in caplog.text
    with pytest.raises(ValueError, match=r"set `init_filters` to 8, `blocks_down` to \[1, 1, 2\], `blocks_up`"):
        load_weights(SegResNet(3), path)


# ---- what is refused ---------------------------------------------------------------------------------------------


def without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (under("a.", SMALL) | under("b.", SMALL), r"must hold one encoder, got 2, a\., b\."),
        (resnet_file([3, 3, 3, 3]), r"got a ResNet of \[3, 3, 3, 3\] basic blocks"),
        (
            SMALL | {"layer1.0.se.fc1.weight": torch.ones(3)},
            r"1 unexpected \(layer1\.0\.se\.fc1\.weight\)\. The file is cut, or",
        ),
        (without(SMALL, "bn1.running_var", "layer2.0.conv2.weight"), r"2 missing \(bn1\.running_var, layer2"),
        (SMALL | {"conv1.weight": torch.ones(64, 1, 7, 7)}, r"conv1\.weight is \[64, 1, 7, 7\] in the file, \[64, 3,"),
        (SMALL | {"bn1.bias": torch.full((64,), torch.nan)}, r"must be finite, got NaN or infinity in 1 of"),
        (under("trunk.", {"stem.weight": torch.ones(1)}), r"there is no others\.json beside .*none"),
        (resnet_file([1, 1, 1, 1], 3, 3), r"of another shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_shape(content: State, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loaded(saved(content, tmp_path), in_channels=3, spatial_dims=2)


@pytest.mark.parametrize(
    "network", [small_segresnet(2), build_encoder("densenet121"), build_segmentation("swin", 2, 1, 2)]
)
def test_another_kind_of_network_is_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold weights of a \w+, got a ResNet of .*set `encoder` to resnet10"):
        load_weights(network, saved(SMALL, tmp_path))


def test_a_file_with_objects_is_refused_with_two_lines_that_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {"teacher": under("backbone.", SMALL), "student": under("module.backbone.", OTHER),
            "optimizer": {"param_groups": [{"lr": 0.1}]}, "args": argparse.Namespace(lr=1)}  # fmt: skip
    module = nn.Sequential()
    for content, name in (
        (full, "argparse.Namespace"),
        (build_encoder("resnet10", resnet_shortcuts="unbiased"), "monai"),
        ({"epoch": 1, "nets": {"model": build_encoder("resnet10", resnet_shortcuts="unbiased")}}, "monai"),
    ):
        path = saved(content, tmp_path)
        with pytest.raises(ValueError, match=rf"must hold tensors alone, got {name}.*trust") as refused:
            load_weights(module, path)
        _, *lines = str(refused.value).splitlines()
        monkeypatch.chdir(tmp_path)
        assert len(lines) == 2
        exec("\n".join(map(str.strip, lines)), {})
        assert read_settings(tmp_path / "plain.pt")["encoder"] == "resnet10"


def test_a_damaged_file_of_safetensors_is_refused(tmp_path: Path) -> None:
    path = saved(SMALL, tmp_path, "others.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"others\.safetensors is damaged or no file of safetensors.*: copy it again"):
        read_settings(path)
    path = tmp_path / "text.pth"
    path.write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth cannot be loaded, it is damaged or no file of .*: copy it again"):
        read_settings(path)


@pytest.mark.parametrize(
    "odd",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.eye(3), 1, 0, torch.qint8),
    ],
)
def test_sparse_and_quantized_tensors_are_refused_by_name(odd: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold dense tensors, got sparse or quantized ones, model\.conv1"):
        read_settings(saved({"model": SMALL | {"conv1.weight": odd}}, tmp_path))


def test_weights_and_checkpoints_of_a_bundle_need_their_own_json(tmp_path: Path) -> None:
    for name in ("resnet10", "densenet121", "swin"):
        state = build_encoder(name).state_dict()
        for content in (state, {"network": state, "trainer": {}, "settings": {}}):
            with pytest.raises(FileNotFoundError, match=r"there is no others\.json beside"):
                read_settings(saved(content, tmp_path))


# ---- out ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, name: str, **arguments: Any) -> tuple[nn.Module, Path]:
    """A network of a bundle, all of whose tensors are random, and its file."""
    torch.manual_seed(1)
    network = build_encoder(name, **arguments).eval()
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running" in key else torch.randn_like(value) * 0.1)
    settings = {"encoder": name, **{key: value for key, value in arguments.items() if key != "num_classes"}}
    if classes := arguments.get("num_classes"):
        settings["label_names"] = [f"finding {i}" for i in range(classes)]
    save_weights(network, folder / "model.pt", settings)
    return network, folder / "model.pt"


@pytest.mark.parametrize(
    ("name", "channels", "norm_of"),
    [*product(["resnet18"], [1, 3], ["none", "imagenet"]), ("densenet121", 1, "imagenet")],
)
def test_exported_weights_give_the_same_features_elsewhere(
    name: str, channels: int, norm_of: str, tmp_path: Path
) -> None:
    network, path = trained(tmp_path, name, in_channels=channels, pretrained_norm=norm_of, num_classes=2)
    out, images = tmp_path / "sub" / "out.safetensors", torch.rand(1, 1, 64, 64)
    export_weights(str(path), str(out))
    with safe_open(out, "pt") as file:
        state, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    mean, std = (torch.tensor(eval(header[key])).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert {*state} == {*FILES[name]()}
    head = "classifier" if name == "densenet121" else "fc"
    with torch.no_grad():
        features = of_reference(state, (images.expand(-1, 3, -1, -1) - mean) / std)
        logits = F.linear(features, state[f"{head}.weight"], state[f"{head}.bias"])
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)


@every_network
def test_a_round_trip_changes_no_bit(name: str, tmp_path: Path) -> None:
    state = FILES[name]()
    path = saved(state, tmp_path)
    there = publish(loaded(path, in_channels=3))
    assert {*there} == {key for key in state if not key.startswith(("fc", "classifier"))}
    assert all(torch.equal(value, state[key]) for key, value in there.items())


def test_one_channel_comes_back_bit_for_bit(tmp_path: Path) -> None:
    network, _ = trained(tmp_path, "resnet18", resnet_shortcuts="unbiased")
    back = loaded(saved(publish(network, 3), tmp_path))
    for key, value in network.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key


def test_a_swin_transformer_goes_into_a_swin_unetr(tmp_path: Path) -> None:
    network, path = trained(tmp_path, "swin", spatial_dims=3)
    export_weights(str(path), str(tmp_path / "out.pt"))
    whole = SwinUNETR(1, 2, feature_size=48).eval()
    result = whole.load_state_dict(torch.load(tmp_path / "out.pt"), strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if key.startswith("swinViT.")]
    images = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        for found, expected in zip(whole.swinViT(images)[1:], feature_maps(network, images), strict=True):
            assert torch.equal(found, expected)


def test_the_encoder_of_a_segmentation_is_exported(tmp_path: Path) -> None:
    network = build_segmentation("resnet10", 2, 1, 3)
    save_weights(network, tmp_path / "model.pt", {"encoder": "resnet10", "spatial_dims": 2, "class_names": ["a", "b"]})
    export_weights(str(tmp_path / "model.pt"), str(tmp_path / "out.pth"), in_channels=1)
    state = torch.load(tmp_path / "out.pth")
    assert torch.equal(state["layer4.0.conv2.weight"], network.encoder.layer4[0].conv2.weight)
    assert {*state} == {*SMALL} - {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SegResNet", {}, "a SegResNetEncoder is of MONAI alone"),
        ("hssl", {}, r"`weights` must be of an encoder, .* MONAI's SegResNet loads them"),
        ("efficientnet-b0", {}, "a EfficientNetBN is of MONAI alone"),
        ("resnet10", {"output": "out.onnx"}, r"`output` must end with \.safetensors, \.pt or \.pth"),
        ("resnet10", {"in_channels": 2}, r"must be 1, as the network has, or 3 of 1, got 2"),
        ("resnet10", {"weights": "nowhere.pt"}, r"must be a models/model\.pt with its model\.json"),
    ],
)
def test_what_cannot_be_exported_is_refused(name: str, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, path = trained(tmp_path, "resnet10" if name == "hssl" else name)
    if name == "hssl":
        save_weights(small_segresnet(2), path, {"tasks": ["abdomen"]})
    with pytest.raises(SystemExit, match=message):
        export_weights(**{"weights": str(path), "output": str(tmp_path / "out.pt"), **arguments})
    assert not [*tmp_path.rglob("out*")]
