from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import resnet10
from monai.visualize import GradCAM
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from dissect_monai.metrics.classification import expected_calibration_error, reliability
from dissect_monai.visualize.classifier import (
    COLORS,
    NUM_BINS,
    embedding_map,
    figure_to_png,
    figure_to_tensor,
    overlay_png,
    reliability_plot,
    roc_plot,
    saliency_maps,
)

NAMES = ["Effusion", "Mass", "Hernia"]


def toy(num_findings: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Labels, some unknown, and probabilities; the last finding has no positives."""
    rng = np.random.default_rng(0)
    probabilities = rng.random((60, num_findings))
    labels = (rng.random(probabilities.shape) < probabilities).astype(float)
    labels[:, -1] = 0
    labels[::7] = np.nan
    return labels, probabilities


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curve(figure: Any, name: str) -> Any:
    return next(line for line in figure.axes[0].get_lines() if str(line.get_label()).startswith(name))


@pytest.mark.parametrize("plot", [roc_plot, reliability_plot])
@pytest.mark.parametrize("num_findings", [1, 30])
def test_a_figure_is_900_pixels_wide_and_the_same_as_png_and_as_tensor(plot: Any, num_findings: int) -> None:
    names = [f"finding {index}" for index in range(num_findings)]
    png, picture = (convert(plot(*toy(num_findings), names)) for convert in (figure_to_png, figure_to_tensor))
    assert picture.shape[::2] == (3, 900)
    png = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    np.testing.assert_array_equal((picture * 255).round().byte().permute(1, 2, 0), png)


def test_roc_curves_agree_with_sklearn_and_findings_are_named_best_first() -> None:
    labels, scores = toy()
    figure = roc_plot(labels, scores, NAMES)
    known = ~np.isnan(labels[:, 1])
    np.testing.assert_allclose(curve(figure, "Mass").get_data(), roc_curve(labels[known, 1], scores[known, 1])[:2])
    assert f"Mass  {roc_auc_score(labels[known, 1], scores[known, 1]):.3f}" in legend(figure)
    scores[:, 1] = np.nan_to_num(labels[:, 1])
    figure = roc_plot(labels, scores, NAMES)
    assert [entry.split()[0] for entry in legend(figure)] == ["Mass", "Effusion"]  # no hernia: it lacks a class
    assert figure.axes[0].get_title("left").startswith("ROC of 2 of 3 findings, mean AUROC")


def test_reliability_curves_agree_with_their_bins_and_the_histogram_with_the_labels() -> None:
    labels, probabilities = toy()
    figure = reliability_plot(labels, probabilities, NAMES)
    bins = reliability(labels[:, 0], probabilities[:, 0], NUM_BINS)
    np.testing.assert_allclose(curve(figure, "Effusion").get_data(), bins[:2])
    errors = [expected_calibration_error(*columns) for columns in zip(labels.T, probabilities.T, strict=True)][:2]
    entries = [f"{name}  {error:.3f}" for name, error in zip(NAMES[:2], errors, strict=True)]
    labels = labels[:, :2]
    pooled = expected_calibration_error(labels.ravel(), probabilities[:, :2].ravel())
    assert legend(figure) == [f"All pooled  {pooled:.3f}", *entries]
    assert figure.axes[0].get_title("left") == f"Reliability of 2 of 3 findings, mean ECE {np.mean(errors):.3f}"
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert texts == [f"negative ({(labels == 0).sum()})", f"positive ({(labels == 1).sum()})"]


def test_both_figures_show_the_same_findings_in_the_same_colours() -> None:
    labels, probabilities = toy(10)
    labels[:, 2], labels[:, 3], probabilities[:, 4] = 1, np.nan, np.nan
    names = list("abcdefghij")
    figures = [plot(labels, probabilities, names) for plot in (roc_plot, reliability_plot)]
    assert [{entry.split()[0] for entry in legend(figure)} for figure in figures] == [set("abfghi"), {"All", *"abfghi"}]
    for figure in figures:
        assert [curve(figure, f"{name} ").get_color() for name in "bgh"] == [COLORS[1], COLORS[6], COLORS[0]]


def test_intervals_of_the_pooled_curve_agree_with_wilsons_formula() -> None:
    figure = reliability_plot(np.array([[0.0]] * 8 + [[1.0]] * 2), np.full((10, 1), 0.55), ["Mass"])
    (interval,) = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(interval, [[0.55, 0.0567], [0.55, 0.5098]], atol=1e-4)  # of 2 in 10


@pytest.mark.parametrize("plot", [roc_plot, reliability_plot])
def test_without_labels_a_figure_is_empty(plot: Any) -> None:
    figure = plot(np.full((4, 2), np.nan), np.zeros((4, 2)), ["a", "b"])
    assert "of 0 of 2 findings" in figure.axes[0].get_title("left")
    assert not figure.legends


def mapped(figure: Any, panel: int = 0) -> dict[str, np.ndarray]:
    """The points of every entry in the legend."""
    texts = [text.get_text() for text in figure.axes[panel].get_legend().get_texts()]
    points = [np.asarray(each.get_offsets()) for each in figure.axes[panel].collections]
    return dict(zip(texts, points, strict=True))


def test_a_map_agrees_with_sklearn_in_points_and_variance() -> None:
    features = np.random.default_rng(0).normal(size=(20, 6)) * [5, 3, 1, 1, 1, 1]
    figure = embedding_map(features, ["a"] * 12 + ["b"] * 8, ["x"] * 20)
    pca = PCA(2).fit(features)
    shown = mapped(figure)
    assert list(shown) == ["a  (12)", "b  (8)"]
    np.testing.assert_allclose(np.abs(np.concatenate([*shown.values()])), np.abs(pca.transform(features)), atol=1e-9)
    axes = figure.axes[0]
    assert axes.get_xlabel() == f"Component 1 ({pca.explained_variance_ratio_[0]:.0%} of the variance)"
    assert axes.get_ylabel() == f"Component 2 ({pca.explained_variance_ratio_[1]:.0%})"


def test_a_map_has_the_tasks_on_the_left_and_the_groups_on_the_right() -> None:
    features = np.random.default_rng(0).normal(size=(9, 4))
    figure = embedding_map(features, [*"abcabcabc"], [*"xyyxyyxyy"])
    assert list(mapped(figure, 0)) == ["a  (3)", "b  (3)", "c  (3)"]
    assert list(mapped(figure, 1)) == ["x  (3)", "y  (6)"]
    assert [axes.get_title("left") for axes in figure.axes] == ["Features by task", "Features by group"]
    np.testing.assert_array_equal(mapped(figure, 0)["a  (3)"], mapped(figure, 1)["x  (3)"])
    names = [f"task number {index}" for index in range(20)]
    for each in (figure, embedding_map(np.random.default_rng(0).normal(size=(20, 4)), names, names)):
        assert figure_to_tensor(each).shape[::2] == (3, 1500)


def test_a_map_does_not_depend_on_the_sign_that_the_decomposition_takes() -> None:
    features = np.random.default_rng(0).normal(size=(9, 4))
    rotated = features + 1e-9 * np.random.default_rng(1).normal(size=(9, 4))
    ours, theirs = (mapped(embedding_map(each, ["a"] * 9, ["x"] * 9))["a  (9)"] for each in (features, rotated))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("features", [np.zeros((4, 3)), np.arange(4.0)[:, None], np.ones((1, 3))])
def test_a_map_of_less_than_two_components_has_zeros(features: np.ndarray) -> None:
    names = ["a"] * len(features)
    (points,) = mapped(embedding_map(features, names, names)).values()
    assert points.shape == (len(features), 2)
    assert (points[:, 1] == 0).all()


# ---- saliency ----------------------------------------------------------------------------------------------------


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
    network = resnet10(spatial_dims=len(shape) - 2, n_input_channels=1, num_classes=3, widen_factor=0.125)
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


@pytest.mark.parametrize(("side", "stage"), [(128, 4), (112, 4), (96, 3), (64, 3), (48, 2), (32, 2), (20, 1), (8, 1)])
def test_looks_at_the_last_stage_that_has_four_places_a_side(side: int, stage: int) -> None:
    torch.manual_seed(0)
    network = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, num_classes=1, widen_factor=0.25)
    images = torch.rand(2, 1, side, side + 32)
    maps = saliency_maps(network, images, finding=0)
    torch.testing.assert_close(maps, by_monai(network, images, 0, stage))
    assert not any(torch.allclose(maps, by_monai(network, images, 0, other)) for other in {1, 2, 3, 4} - {stage})


def test_no_map_is_empty_where_the_features_raise_the_logit() -> None:
    torch.manual_seed(0)
    network = resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, num_classes=4, widen_factor=0.25).eval()
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
    network = resnet10(spatial_dims=2, n_input_channels=1, num_classes=3, widen_factor=0.125).train()
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


def drawn(image: Tensor, saliency: Tensor) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(overlay_png(image, saliency)))).astype(int)


def test_an_overlay_is_upright_and_shows_the_image_where_nothing_is_salient() -> None:
    image, saliency = torch.rand(2, 8, 6) * 3 - 1, torch.zeros(1, 8, 6)
    picture = drawn(image, saliency)
    grey = (255 * image[0].double().clamp(0, 1)).round().int().T  # x to the right
    np.testing.assert_array_equal(picture, grey[..., None].expand(6, 8, 3))
    saliency[0, 0, 5] = 5  # clipped
    changed = (drawn(image, saliency) != picture).any(-1)
    assert changed[5, 0]
    assert changed.sum() == 1


def test_an_overlay_departs_from_grey_the_more_the_larger_the_saliency_and_keeps_half_of_the_contrast() -> None:
    saliency = torch.linspace(0, 1, 6).view(1, 6, 1)
    dark, grey, bright = (drawn(torch.full((1, 6, 1), value), saliency)[0] for value in (0.25, 0.5, 0.75))
    colourfulness = grey.max(1) - grey.min(1)
    assert (np.diff(colourfulness[:5]) > 0).all()
    assert colourfulness[5] > 40
    assert grey[5].argmin() == 2  # the salient end of the map is yellow
    assert (bright - dark >= 255 / 4).all()
