"""Published weights go the whole way: what the file was trained with is stored, and every config builds the same."""

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Recipe, Recipes, metrics_of, refused, settings, table, weights
from monai.bundle import ConfigParser

from dissect_monai import build_encoder, load_codes, prepare_images
from dissect_monai.networks.published import publish

pytestmark = pytest.mark.usefixtures("_in_root")
SAID = {"encoder": "resnet10", "in_channels": 3, "pretrained_norm": "imagenet", "resnet_shortcuts": "unbiased"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet in torchvision's layout, as MoCo writes it."""
    torch.manual_seed(0)
    state = publish(build_encoder("resnet10", in_channels=3, resnet_shortcuts="unbiased"))
    path = tmp_path_factory.mktemp("others") / "moco_r10.pth.tar"
    torch.save({"state_dict": {f"module.encoder_q.{key}": value for key, value in state.items()}, "epoch": 1}, path)
    return path


def without(recipe: Recipe, *names: str) -> Recipe:
    """The recipe without some of its knobs, which others share."""
    own = copy(recipe)
    own.knobs = {name: value for name, value in recipe.knobs.items() if name not in names}
    return own


def saw(recipe: Any, config: str, model: Path, image: Path) -> torch.Tensor:
    """What the network that a config builds gives, of images as that config makes them."""
    parser = ConfigParser()
    parser.read_config(recipe.bundle / "configs" / f"{config}.json")
    parser.update({"pretrained": str(model), "bundle_root": str(recipe.bundle), "device": "cpu"})
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(model, weights_only=True))
    batch = {"image": parser.get_parsed_content("preprocessing")({"image": str(image)})["image"][None]}
    with torch.no_grad():
        return network(prepare_images(batch, "cpu")[0])


def test_a_classifier_starts_from_published_weights_and_every_config_builds_it(
    recipe_of: Recipes, published: Path, tmp_path: Path
) -> None:
    cxr = without(recipe_of("cxr_classify"), "encoder")  # which is left to the file
    start = {"pretrained": published, "in_channels": 3, "pretrained_norm": "imagenet"}
    cxr.train(tmp_path, **start, mode="linear_probe")
    said, model = settings(tmp_path), tmp_path / "models" / "model.pt"
    assert {key: said[key] for key in SAID} == SAID
    file = torch.load(published)["state_dict"]
    assert torch.equal(weights(tmp_path)["conv1.weight"], file["module.encoder_q.conv1.weight"])
    cxr.run("evaluate", tmp_path, pretrained=model, num_samples=5)
    cxr.run("inference", tmp_path, pretrained=model)
    (first, *_) = table(tmp_path / "eval" / "probabilities.csv")
    image = Path(cxr.knobs["dataset_dir"]) / first["image"]
    assert torch.equal(*(saw(cxr, config, model, image) for config in ("evaluate", "inference")))
    with refused("`--pretrained_norm` must be none without published weights"):
        cxr.train(tmp_path / "other", pretrained=model, pretrained_norm="none")
    with refused("`--pretrained_norm` must be none without published weights"):
        cxr.train(tmp_path / "other", pretrained_norm="imagenet")


def test_pretraining_goes_on_from_published_weights_and_its_codes_and_probes_see_the_same(
    recipe_of: Recipes, published: Path, tmp_path: Path
) -> None:
    ssl = without(recipe_of("pretrain_vq_ssl"), "encoder")
    start = {"pretrained": published, "in_channels": 3, "pretrained_norm": "imagenet", "learning_rate": 1e-12}
    ssl.train(tmp_path, **start, weight_decay=0)
    model = tmp_path / "models" / "model.pt"
    assert {key: settings(tmp_path)[key] for key in SAID} == SAID
    file = torch.load(published)["state_dict"]
    for key in ("conv1.weight", "layer4.0.conv2.weight"):
        torch.testing.assert_close(weights(tmp_path)[key], file[f"module.encoder_q.{key}"])
    assert load_codes(tmp_path).encoder.conv1.norm == "imagenet"
    ssl.run("evaluate", tmp_path, pretrained=model, num_samples=5, baselines=False)
    ssl.run("inference", tmp_path, pretrained=model, output_format="npz")
    with np.load(tmp_path / "eval" / "embeddings.npz") as file:
        assert np.isfinite(file["embedding"]).all()
    # Published weights are judged as they are, too.
    ssl.run("evaluate", tmp_path / "file", num_samples=5, baselines=False, image_size=32, **{
        key: start[key] for key in ("pretrained", "in_channels", "pretrained_norm")
    })  # fmt: skip
    assert 0 <= metrics_of(tmp_path / "file")["pretrained_last_linear_auroc_macro"] <= 1


def test_slices_are_pretrained_on_and_segmented_from_published_weights(
    recipe_of: Recipes, published: Path, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"pixdim": [12, 12], "patch_size": [64, 64], "batch_size": 4}
    shape = ("blocks_down", "blocks_up", "init_filters")
    volumes, seg = (without(recipe_of(name), *shape) for name in ("pretrain_vq_ssl_volumes", "seg_finetune_btcv"))
    start = {"pretrained": published, "pretrained_norm": "imagenet", "in_channels": 1}
    with refused("`--pretrained` must be weights for 3-D images, got some for 2-D ones: set `--spatial_dims` to 2"):
        volumes.train(tmp_path / "volumes", **start)
    volumes.train(tmp_path / "volumes", **start, **sizes, spatial_dims=2)
    assert {key: settings(tmp_path / "volumes")[key] for key in SAID} == {**SAID, "in_channels": 1}
    assert settings(tmp_path / "volumes")["spatial_dims"] == 2
    del start["in_channels"]
    seg.train(tmp_path / "seg", **start, **sizes)
    said = settings(tmp_path / "seg")
    assert {key: said[key] for key in SAID} == {**SAID, "in_channels": 1}
    seg.run("evaluate", tmp_path / "seg", pretrained=tmp_path / "seg" / "models" / "model.pt")
    assert metrics_of(tmp_path / "seg")
