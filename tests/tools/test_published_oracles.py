"""Published networks against torchvision and timm themselves; `make label` installs them apart and runs this."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from export_weights import main as export_weights

from dissect_monai.networks.encoders import NORMS, build_encoder, encoder_of, stem_and_stages
from dissect_monai.networks.weights import load_weights, read_settings, save_weights

pytestmark = pytest.mark.label
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
NAMES = (*RESNETS, "densenet121")
ORACLE = """
import json, sys
from pathlib import Path
import timm, torch, torchvision
from safetensors.torch import load_file
from torch import nn

def stem(network, images):
    if hasattr(network, "conv1"):
        return network.bn1(network.conv1(images)).relu()
    return network.features.norm0(network.features.conv0(images)).relu()

for folder, library, name, channels in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    options = {"in_chans": channels} if library == "timm" else {}
    network = (timm.create_model if library == "timm" else torchvision.models.get_model)(name, **options).eval()
    out, head = Path(folder), "classifier" if name == "densenet121" else "fc"
    if (out / "weights.safetensors").exists():
        setattr(network, head, nn.Identity())
        network.load_state_dict(load_file(out / "weights.safetensors"))
    else:
        for key, value in network.state_dict().items():
            if "running" in key:
                value.copy_(torch.rand_like(value) + 0.5)
        torch.save(network.state_dict(), out / "weights.pth")
        setattr(network, head, nn.Identity())
    images = torch.load(out / "images.pt")
    with torch.no_grad():
        torch.save([network(images), stem(network, images)], out / "outputs.pt")
"""


def ask(jobs: list[tuple[str, str, str, int]]) -> None:
    """Have torchvision and timm make weights, or use those that are there, and compute outputs."""
    assert "LABEL_PYTHON" in os.environ, "LABEL_PYTHON must be the Python that has torchvision: run `make label`"
    subprocess.run([os.environ["LABEL_PYTHON"], "-c", ORACLE, json.dumps(jobs)], check=True)


def written(folder: Path, images: torch.Tensor, norm: str) -> Path:
    folder.mkdir(parents=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in NORMS[norm])
    torch.save((images.expand(-1, 3, -1, -1) - mean) / std, folder / "images.pt")
    return folder


IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
CASES = [(library, name) for library in ("torchvision", "timm") for name in NAMES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    ask([(str(written(folder / library / name, IMAGES, "imagenet")), library, name, 3) for library, name in CASES])
    return folder


@pytest.mark.parametrize(("library", "name"), CASES)
def test_weights_of_others_give_their_outputs(made: Path, library: str, name: str) -> None:
    path = made / library / name / "weights.pth"
    features, stem = torch.load(path.with_name("outputs.pt"))
    said = read_settings(path)
    assert said["encoder"] == name
    one, three = (
        load_weights(encoder_of({**said, "in_channels": channels, "pretrained_norm": "imagenet"}), path).eval()
        for channels in (1, 3)
    )
    with torch.no_grad():
        torch.testing.assert_close(three(IMAGES), features, rtol=1e-4, atol=1e-4)
        inside = stem_and_stages(one, IMAGES)[0][..., 2:-2, 2:-2]
        torch.testing.assert_close(inside, stem[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-4)


def test_our_weights_give_the_same_outputs_there(tmp_path: Path) -> None:
    jobs, expected = [], []
    cases: list[tuple[str, str, dict[str, Any], int]] = [
        ("torchvision", "resnet18", {"pretrained_norm": "none"}, 3),
        ("torchvision", "resnet50", {"pretrained_norm": "imagenet", "in_channels": 3}, 3),
        ("torchvision", "densenet121", {"pretrained_norm": "radimagenet"}, 3),
        ("timm", "resnet34", {"pretrained_norm": "radimagenet"}, 3),
        ("timm", "resnet18", {"pretrained_norm": "none"}, 1),
        ("timm", "densenet121", {"pretrained_norm": "imagenet", "in_channels": 3}, 3),
    ]
    for index, (library, name, arguments, channels) in enumerate(cases):
        torch.manual_seed(index)
        network = build_encoder(name, **arguments).eval()
        for key, value in network.state_dict().items():
            if "running" in key or key.endswith("bias"):
                value.copy_(torch.rand_like(value) + 0.5)
        folder = written(tmp_path / str(index), IMAGES, arguments["pretrained_norm"])
        if channels == 1:
            torch.save(IMAGES, folder / "images.pt")
        save_weights(network, folder / "model.pt", {"encoder": name, **arguments})
        export_weights(str(folder / "model.pt"), str(folder / "weights.safetensors"), channels)
        jobs.append((str(folder), library, name, channels))
        with torch.no_grad():
            expected.append(network(IMAGES))
    ask(jobs)
    for job, features in zip(jobs, expected, strict=True):
        scale = 1e-4 * max(1, features.abs().max().item())  # random weights have features of any size
        torch.testing.assert_close(torch.load(Path(job[0], "outputs.pt"))[0], features, rtol=0, atol=scale)
