"""Every encoder goes the whole way: pretraining, codes, probes, fine-tuning, Grad-CAM, export."""

import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from export_weights import main as export_weights
from helpers import Recipes, checkpoint, metrics_of, refused, same, settings, table, weights
from monai.networks.nets import SwinUNETR
from monai.networks.utils import convert_to_onnx, convert_to_torchscript

from dissect_monai import adamw, build_encoder, build_segmentation, load_codes
from dissect_monai.networks.encoders import ENCODERS, feature_maps, pool, stage_names, stem_and_stages
from dissect_monai.visualize.classifier import saliency_maps

pytestmark = pytest.mark.usefixtures("_in_root")
OTHERS = ("densenet121", "efficientnet-b0", "swin", "SegResNet")
every_encoder = pytest.mark.parametrize("encoder", ["resnet10", *OTHERS])
every_dimension = pytest.mark.parametrize("spatial_dims", [2, 3])


@every_dimension
@every_encoder
def test_four_stages_halve_the_image_and_the_last_is_what_is_classified(encoder: str, spatial_dims: int) -> None:
    torch.manual_seed(0)
    network, images = build_encoder(encoder, spatial_dims, 2).eval(), torch.rand(1, 2, *[32] * spatial_dims)
    with torch.no_grad():
        maps = feature_maps(network, images)
        torch.testing.assert_close(pool(maps[-1]), network(images))
    first = 32 if encoder == "SegResNet" else 8
    assert [each.shape[2:] for each in maps] == [torch.Size([first // 2**n] * spatial_dims) for n in range(4)]
    assert len(stage_names(network)) == 4
    assert {*stage_names(network)} <= {name for name, _ in network.named_modules()}


@every_encoder
def test_every_parameter_of_an_encoder_learns_with_a_decoder_and_without(encoder: str) -> None:
    images = torch.rand(2, 1, 64, 64)
    for network in (build_encoder(encoder, num_classes=2), build_segmentation(encoder, 2, 1, 2)):
        network(images).sum().backward()
        assert all(each.grad is not None for each in network.parameters())  # as several processes need


@every_dimension
def test_the_swin_transformer_is_that_of_a_swin_unetr(spatial_dims: int) -> None:
    ours, whole = build_encoder("swin", spatial_dims), SwinUNETR(1, 2, feature_size=48, spatial_dims=spatial_dims)
    whole.swinViT.load_state_dict(ours.state_dict())
    images = torch.rand(1, 1, *[32] * spatial_dims)
    with torch.no_grad():
        for found, reference in zip(stem_and_stages(ours.eval(), images), whole.swinViT.eval()(images), strict=True):
            assert torch.equal(found, reference)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", OTHERS)
def test_pretrains_resumes_and_is_probed_fine_tuned_and_explained(
    recipe_of: Recipes, tmp_path: Path, encoder: str
) -> None:
    ssl, cxr = recipe_of("pretrain_vq_ssl"), recipe_of("cxr_classify")
    for knob in ("encoder", "image_size"):
        del cxr.knobs[knob]  # left to the JSON beside the weights
    out, knobs = tmp_path / "out", {"encoder": encoder, "stages": [3, 4], "learning_rate": 0.001}
    ssl.train(out, **knobs, max_epochs=2)
    straight = checkpoint(out, 2)
    (out / "checkpoints" / "checkpoint_epoch=2.pt").unlink()
    ssl.train(out, **knobs, max_epochs=2, resume=True)
    assert same(checkpoint(out, 2), straight)
    model = out / "models" / "model.pt"
    assert settings(out)["encoder"] == encoder
    build_encoder(encoder).load_state_dict(torch.load(model, weights_only=True))
    side = 8 if encoder == "SegResNet" else 2
    codes = load_codes(out).encode(torch.rand(2, 1, 32, 32))
    assert [each.shape for each in codes] == [(2, side, side), (2, side // 2, side // 2)]

    ssl.run("evaluate", tmp_path / "probe", pretrained=model, num_samples=5, baselines=False)
    assert 0 <= metrics_of(tmp_path / "probe")["pretrained_last_linear_auroc_macro"] <= 1
    for mode in ("linear_probe", "finetune"):
        cxr.train(tmp_path / mode, pretrained=model, mode=mode)
        assert settings(tmp_path / mode)["encoder"] == encoder
    before, probed, tuned = weights(out), weights(tmp_path / "linear_probe"), weights(tmp_path / "finetune")
    assert same({key: probed[key] for key in before}, before)
    assert not same({key: tuned[key] for key in before}, before)
    found, few = tmp_path / "finetune" / "models" / "model.pt", tmp_path / "few"
    few.mkdir()
    for path in sorted(Path(cxr.knobs["dataset_dir"], "images").iterdir())[:4]:
        shutil.copy(path, few)
    cxr.run("inference", tmp_path / "explained", pretrained=found, dataset_dir=few, overlays="top")
    rows = table(tmp_path / "explained" / "eval" / "probabilities.csv")
    assert len(list((tmp_path / "explained").rglob("*.png"))) == len(rows) == 4


@pytest.mark.parametrize("encoder", OTHERS)
def test_grad_cam_finds_what_raises_the_logit(encoder: str) -> None:
    torch.manual_seed(0)
    network, images = build_encoder(encoder, num_classes=2).eval(), torch.rand(2, 1, 64, 64)
    stock = deepcopy(network.state_dict())
    maps = saliency_maps(network, images, 1)
    assert maps.shape == images.shape
    assert maps.amin() >= 0
    assert maps.amax() == 1
    assert same(dict(network.state_dict()), dict(stock))


@pytest.mark.parametrize("encoder", OTHERS)
def test_the_learning_rate_falls_with_the_depth(encoder: str) -> None:
    network = build_encoder(encoder, num_classes=2)
    rates = {id(each): group["lr"] for group in adamw(network, 1.0, 0.0, 0.5).param_groups for each in group["params"]}
    named = dict(network.named_modules())
    depths = [{rates[id(each)] for each in named[name].parameters()} for name in stage_names(network)]
    assert depths == [{0.5**depth} for depth in (4, 3, 2, 1)]
    assert min(rates.values()) == 0.5**5
    assert max(rates.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "dims", "segments"),
    [
        *(pytest.param(encoder, 2, False, id=encoder) for encoder in OTHERS),
        pytest.param("resnet10", 2, True, id="with a decoder"),
        pytest.param("swin", 3, False, id="swin in 3-D", marks=pytest.mark.long),
    ],
)
def test_what_is_exported_gives_what_the_network_gives(encoder: str, dims: int, segments: bool, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    network = build_segmentation(encoder, dims, 1, 2) if segments else build_encoder(encoder, dims, num_classes=2)
    images = torch.rand(1, 1, *[32] * dims)
    with torch.no_grad():
        expected = network.eval()(images)
    traced = segments or encoder == "swin"  # TorchScript knows neither our stages nor einops
    script = convert_to_torchscript(network, use_trace=traced, inputs=[images] if traced else None)
    torch.testing.assert_close(script(images), expected, rtol=0, atol=1e-4)
    convert_to_onnx(network, [images], filename=str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


OWN = """
from torch import nn
class Net(nn.Module):
    def __init__(self, encoder, spatial_dims, in_channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(in_channels, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)
    def encode(self, images):
        maps = [self.first(images)]
        maps.append(self.second(maps[0].relu()))
        return maps[-1], maps
    def forward(self, images):
        return self.encode(images)[0].mean((2, 3))
"""


def test_a_class_of_ones_own_is_named_on_the_command_line_at_every_use(
    recipe_of: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    ssl, own = recipe_of("pretrain_vq_ssl"), {"network_def#_target_": "own.Net"}
    ssl.train(tmp_path / "out", stages=[1, 2], **own)
    model = tmp_path / "out" / "models" / "model.pt"
    ssl.run("inference", tmp_path / "found", pretrained=model, **own)
    assert "own" not in model.with_suffix(".json").read_text()
    with refused(r"do not fit the ResNet: .* missing"):
        ssl.run("inference", tmp_path / "other", pretrained=model)


CLASSIFIER = """
class Classifier(Net):
    def __init__(self, encoder, spatial_dims, in_channels, num_classes):
        super().__init__(encoder, spatial_dims, in_channels)
        self.fc = nn.Linear(8, num_classes)
    def forward(self, images):
        return self.fc(super().forward(images))
"""


def test_a_classifier_of_ones_own_is_evaluated_without_saliency(
    recipe_of: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_classifier.py").write_text(OWN + CLASSIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    cxr, own = recipe_of("cxr_classify"), {"network_def#_target_": "own_classifier.Classifier"}
    cxr.train(tmp_path / "out", **own)
    model = tmp_path / "out" / "models" / "model.pt"
    cxr.run("evaluate", tmp_path / "out", pretrained=model, num_samples=5, **own)
    assert "No saliency: the stages of this network" in (tmp_path / "out" / "eval" / "report.html").read_text(
        encoding="utf-8"
    )
    cxr.run("inference", tmp_path / "found", pretrained=model, overlays="all", **own)
    assert "".join(capfd.readouterr()).count("There is no saliency of Classifier") == 2
    assert not [*tmp_path.rglob("overlays/*")]
    with pytest.raises(SystemExit, match=r"error: .*model\.pt must hold a resnet10, .* class of your own"):
        export_weights(str(model), str(tmp_path / "out.safetensors"))


def test_an_encoder_that_halves_more_often_than_the_image_can_be_is_refused(recipe_of: Recipes, tmp_path: Path) -> None:
    with refused("`--image_size` must be at least 32 with `--encoder` densenet121"):
        recipe_of("pretrain_vq_ssl").train(tmp_path / "out", encoder="densenet121", image_size=24)
    assert not (tmp_path / "out").exists()


def test_swin_says_that_it_needs_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dissect_monai.networks.encoders.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`encoder` swin needs einops: pip install einops"):
        build_encoder("swin")
    with pytest.raises(ValueError, match=rf"`encoder` must be one of {', '.join(ENCODERS)}, got 'vit'"):
        build_encoder("vit")
