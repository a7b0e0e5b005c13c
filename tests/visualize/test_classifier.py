import io
import re
from copy import deepcopy
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import small_resnet
from monai.visualize import GradCAM
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from dissect_monai.visualize.classifier import (
    COLORS,
    NUM_BINS,
    curves_figure,
    figure_to_png,
    figure_to_tensor,
    named_curve,
    overlay,
    panels_as_svg,
    saliency_maps,
    text_strip,
    whole_image,
)


def test_curves_are_those_of_sklearn_over_known_labels_in_one_colour_a_finding() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random((60, 10))
    labels = (rng.random(probabilities.shape) < probabilities).astype(float)
    labels[::7, 1], labels[:, 2], labels[:, 3], probabilities[0, 4] = np.nan, 1, np.nan, np.nan
    figure = curves_figure(labels, probabilities, list("abcdefghij"))
    roc, reliability = ([line for line in axes.get_lines() if len(line.get_xdata()) > 2] for axes in figure.axes)
    assert [line.get_label() for line in roc] == list("abfghij")  # the others lack a class or a score
    known = ~np.isnan(labels[:, 1])
    label, probability = labels[known, 1], probabilities[known, 1]
    np.testing.assert_allclose(roc[1].get_data(), roc_curve(label, probability)[:2])
    expected = calibration_curve(label, probability, n_bins=NUM_BINS)[::-1]
    np.testing.assert_allclose(reliability[1].get_data(), expected)
    for lines in (roc, reliability):
        assert [line.get_color() for line in lines[1:5]] == [COLORS[1], COLORS[5], COLORS[6], COLORS[0]]


@pytest.mark.parametrize("num_findings", [1, 30])
def test_a_figure_is_1500_pixels_wide_and_the_same_as_png_and_as_tensor(num_findings: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, num_findings)).astype(float)
    arguments = labels, rng.random(labels.shape), [f"finding {index}" for index in range(num_findings)]
    picture, png = (convert(curves_figure(*arguments)) for convert in (figure_to_tensor, figure_to_png))
    assert picture.shape[::2] == (3, 1500)
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    np.testing.assert_array_equal((picture * 255).round().byte().permute(1, 2, 0), pixels)


def test_panels_follow_the_colours_of_a_page_and_names_have_the_line_of_their_curve() -> None:
    rng = np.random.default_rng(0)
    labels, names = rng.integers(0, 2, (60, 30)).astype(float), [f"<{index}> $x_" for index in range(30)]
    panels = [each.decode() for each in panels_as_svg(curves_figure(labels, rng.random(labels.shape), names))]
    drawn = [ElementTree.fromstring(each) for each in panels]
    texts = [[text for node in each.iter() if (text := (node.text or "").strip())] for each in drawn]
    assert "True positive rate (sensitivity)" in texts[0]
    assert "Predicted probability" in texts[1]
    assert "True positive rate (sensitivity)" not in texts[1]
    assert all("currentColor" in each and "#000000" not in each and "$x_" not in each for each in panels)
    ids = [node.get("id") for each in drawn for node in each.iter() if node.get("id")]
    assert len(ids) == len({*ids})
    lines = [re.findall('stroke="(.*?)" stroke-dasharray="(.*?)"', named_curve(name, 0)) for name in names[:1]]
    assert lines == [[(COLORS[0], "none")]]
    found = [named_curve(name, index) for index, name in enumerate(names)]
    assert len({each.partition("/>")[0] for each in found}) == 30
    assert found[6].endswith("</svg>&lt;6&gt; $x_")
    assert 'stroke="currentColor"' in found[6]  # black


class Sees(nn.Module):
    """Logit 0 answers to bright squares, logit 1 to dark ones, logit 2 to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.AvgPool2d(4)
        self.fc = nn.Linear(1, 3, bias=False)
        nn.init.zeros_(self.fc.weight)
        self.fc.weight.data[:2, 0] = torch.tensor([1.0, -1.0])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer4(images).flatten(2).mean(2))


def squares(x: int, y: int) -> Tensor:
    images = torch.zeros(1, 1, 32, 32)
    images[..., x : x + 4, y : y + 4] = 1
    return images


@pytest.mark.parametrize("shape", [(3, 1, 48, 40), (1, 1, 16, 16, 24)])
def test_maps_have_the_size_of_the_images_and_are_in_0_to_1(shape: tuple[int, ...]) -> None:
    network = small_resnet(spatial_dims=len(shape) - 2, num_classes=3)
    maps = saliency_maps(network, torch.rand(shape), finding=1)
    assert maps.shape == shape
    assert type(maps) is Tensor
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert not maps.requires_grad


def by_monai(network: nn.Module, images: Tensor, finding: int, stage: int) -> Tensor:
    """Grad-CAM of one stage, divided by the largest value of each map."""
    camera = GradCAM(deepcopy(network), f"layer{stage}", postprocessing=lambda maps: maps)
    maps = camera(images.requires_grad_(), class_idx=finding).detach()
    return maps / maps.amax((1, 2, 3), keepdim=True).clamp_min(1e-30)


@pytest.mark.parametrize(("side", "stage"), [(112, 4), (96, 3), (48, 2), (20, 1), (8, 1)])
def test_looks_at_the_last_stage_that_has_four_places_a_side(side: int, stage: int) -> None:
    network = small_resnet(num_classes=1, widen_factor=0.25)
    images = torch.rand(2, 1, side, side + 32)
    maps = saliency_maps(network, images, finding=0)
    torch.testing.assert_close(maps, by_monai(network, images, 0, stage))
    assert not any(torch.allclose(maps, by_monai(network, images, 0, other)) for other in {1, 2, 3, 4} - {stage})


def test_no_map_is_empty_where_the_features_raise_the_logit() -> None:
    network = small_resnet(num_classes=4, widen_factor=0.25).eval()
    images = torch.rand(24, 1, 48, 48) * torch.rand(24, 1, 1, 1)
    raised = (network(images) - network.fc.bias) > 0
    fine_alone = 0
    for finding in range(4):
        filled = saliency_maps(network, images, finding).flatten(1).any(1)
        fine_alone += int(by_monai(network, images, finding, stage=2).flatten(1).any(1).sum())
        assert filled[raised[:, finding]].all()
    assert raised.any()
    assert not raised.all()
    assert fine_alone < raised.sum()


def test_peaks_where_the_finding_is_and_in_each_image_at_its_own_place() -> None:
    maps = saliency_maps(Sees(), torch.cat([squares(4, 24), squares(20, 8)]), finding=0)
    for each, (x, y) in zip(maps, [(4, 24), (20, 8)], strict=True):
        peak = np.unravel_index(int(each[0].argmax()), (32, 32))
        assert x <= peak[0] < x + 4
        assert y <= peak[1] < y + 4
        assert each.max() == 1
        assert each[0, 31, 0] == 0


@pytest.mark.parametrize("finding", [1, 2])
def test_what_speaks_against_a_finding_or_of_nothing_is_not_salient(finding: int) -> None:
    assert torch.equal(saliency_maps(Sees(), squares(4, 4), finding), torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("frozen", [False, True])
def test_leaves_the_network_as_it_was(frozen: bool) -> None:
    network = small_resnet(num_classes=3).train()
    network.requires_grad_(not frozen)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        first, second = (saliency_maps(network, images, finding=0) for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert not images.requires_grad


def drawn(image: Tensor, saliency: Tensor, **more: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(overlay(image, saliency, **more)))).astype(int)


def test_an_overlay_is_upright_and_shows_the_image_where_nothing_is_salient() -> None:
    image, saliency = torch.rand(2, 8, 6) * 3 - 1, torch.zeros(1, 8, 6)
    picture = drawn(image, saliency)
    grey = (255 * image[0].double().clamp(0, 1)).round().int().T  # x to the right
    np.testing.assert_array_equal(picture, grey[..., None].expand(6, 8, 3))
    saliency[0, 0, 5] = 5  # clipped
    changed = (drawn(image, saliency) != picture).any(-1)
    assert changed[5, 0]
    assert changed.sum() == 1


def test_a_caption_and_a_legend_stand_above_an_overlay() -> None:
    image, saliency = torch.rand(1, 512, 300), torch.rand(1, 7, 5)
    plain = drawn(image, saliency)
    assert plain.shape == (300, 512, 3)  # saliency is spread over the image
    picture = drawn(image, saliency, caption="Effusion: probability 0.831, threshold 0.412")
    np.testing.assert_array_equal(picture[-300:], plain)
    legend = picture[-305]
    assert (legend[0] == legend[0, 0]).all()  # grey: no effect
    assert np.ptp(legend[-1]) > 30  # the colour of the strongest, over grey
    assert picture[:20].max() == 255  # the text
    assert not np.array_equal(picture, drawn(image, saliency, caption="Effusion: probability 0.831, threshold 0.413"))


def test_a_long_caption_is_wrapped_and_cut_nowhere() -> None:
    narrow, wide = (np.asarray(text_strip("probability and threshold of an effusion", width)) for width in (120, 600))
    assert narrow.shape[0] > 2 * wide.shape[0]
    for strip in (narrow, wide):
        assert strip[:, [0, -1]].max() == strip[[0, -1]].max() == 0
    assert (narrow > 0).sum() == pytest.approx((wide > 0).sum(), rel=0.15)


@pytest.mark.parametrize(
    ("size", "shown"), [((60, 40), (512, 341)), ((700, 600), (700, 600)), ((3000, 1500), (1024, 512))]
)
def test_the_image_of_a_file_is_shown_whole_and_scaled_to_fit(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    Image.fromarray((1000 + 7 * columns + rows).astype(np.uint16)).save(tmp_path / "film.png")
    image = whole_image(tmp_path / "film.png")
    assert image.shape == (1, *shown)
    assert (image.min(), image.max()) == (0, 1)
    assert (image.diff(dim=1) >= 0).all()  # as x grows
