from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve

from dissect_monai.metrics.classification import expected_calibration_error, reliability
from dissect_monai.visualize.classifier import (
    COLORS,
    NUM_BINS,
    embedding_map,
    figure_to_png,
    figure_to_tensor,
    image_to_png,
    reliability_plot,
    roc_plot,
    saliency_overlay,
)

NAMES = ["Effusion", "Mass", "Hernia"]
both_plots = pytest.mark.parametrize("plot", [roc_plot, reliability_plot])


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


@both_plots
@pytest.mark.parametrize("num_findings", [1, 30])
def test_a_figure_is_900_pixels_wide_for_any_number_of_findings(plot: Any, num_findings: int) -> None:
    figure = plot(*toy(num_findings), [f"finding {index}" for index in range(num_findings)])
    picture = figure_to_tensor(figure)
    assert picture.shape[::2] == (3, 900)
    assert picture.min() >= 0
    assert picture.max() == 1


def test_roc_curves_agree_with_sklearn() -> None:
    labels, scores = toy()
    figure = roc_plot(labels, scores, NAMES)
    known = ~np.isnan(labels[:, 1])
    expected = roc_curve(labels[known, 1], scores[known, 1])[:2]
    np.testing.assert_allclose(curve(figure, "Mass").get_data(), expected)
    area = roc_auc_score(labels[known, 1], scores[known, 1])
    assert f"Mass  {area:.3f}" in legend(figure)


def test_roc_names_findings_best_first_and_leaves_out_those_without_both_classes() -> None:
    labels, scores = toy()
    scores[:, 1] = np.nan_to_num(labels[:, 1])
    figure = roc_plot(labels, scores, NAMES)
    assert [entry.split()[0] for entry in legend(figure)] == ["Mass", "Effusion"]
    assert legend(figure)[0] == "Mass  1.000"
    assert figure.axes[0].get_title("left").startswith("ROC of 2 of 3 findings, mean AUROC")


def test_reliability_curves_agree_with_their_bins() -> None:
    labels, probabilities = toy()
    figure = reliability_plot(labels, probabilities, NAMES)
    bins = reliability(labels[:, 0], probabilities[:, 0], NUM_BINS)
    np.testing.assert_allclose(curve(figure, "Effusion").get_data(), bins[:2])
    errors = [expected_calibration_error(*columns) for columns in zip(labels.T, probabilities.T, strict=True)][:2]
    entries = [f"{name}  {error:.3f}" for name, error in zip(NAMES[:2], errors, strict=True)]
    pooled = expected_calibration_error(labels[:, :2].ravel(), probabilities[:, :2].ravel())
    assert legend(figure) == [f"All pooled  {pooled:.3f}", *entries]
    assert figure.axes[0].get_title("left") == f"Reliability of 2 of 3 findings, mean ECE {np.mean(errors):.3f}"


def test_both_figures_show_the_same_findings() -> None:
    labels, probabilities = toy(6)
    labels[:, 2] = 1
    labels[:, 3] = np.nan
    names = list("abcdef")
    figures = [plot(labels, probabilities, names) for plot in (roc_plot, reliability_plot)]
    shown = [{entry.split()[0] for entry in legend(figure)} for figure in figures]
    assert shown == [set("abe"), {"All", *"abe"}]


def test_intervals_of_the_pooled_curve_agree_with_wilsons_formula() -> None:
    figure = reliability_plot([[0]] * 8 + [[1]] * 2, [[0.55]] * 10, ["Mass"])
    (interval,) = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(interval, [[0.55, 0.0567], [0.55, 0.5098]], atol=1e-4)  # of 2 in 10


def test_the_histogram_counts_every_known_label_of_the_findings_shown() -> None:
    labels, probabilities = toy()
    figure = reliability_plot(labels, probabilities, NAMES)
    labels = labels[:, :2]
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert texts == [f"negative ({(labels == 0).sum()})", f"positive ({(labels == 1).sum()})"]


def test_a_finding_has_one_colour_in_both_figures() -> None:
    labels, probabilities = toy(10)
    names = list("abcdefghij")
    styles = [
        [(curve(plot(labels, probabilities, names), name + " ").get_color(), index) for index, name in enumerate("bgh")]
        for plot in (roc_plot, reliability_plot)
    ]
    assert styles[0] == styles[1]
    assert styles[0] == [(COLORS[1], 0), (COLORS[6], 1), (COLORS[0], 2)]


@both_plots
def test_without_labels_a_figure_is_empty(plot: Any) -> None:
    figure = plot(np.full((4, 2), np.nan), np.zeros((4, 2)), ["a", "b"])
    assert "of 0 of 2 findings" in figure.axes[0].get_title("left")
    assert not figure.legends


def test_reliability_leaves_out_findings_without_probabilities() -> None:
    labels, probabilities = toy()
    probabilities[:, 1] = np.nan
    figure = reliability_plot(labels, probabilities, NAMES)
    assert [entry.split()[0] for entry in legend(figure)] == ["All", "Effusion"]


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


def test_a_map_does_not_depend_on_the_sign_that_the_decomposition_takes() -> None:
    features = np.random.default_rng(0).normal(size=(9, 4))
    rotated = features + 1e-9 * np.random.default_rng(1).normal(size=(9, 4))
    ours, theirs = (mapped(embedding_map(each, ["a"] * 9, ["x"] * 9))["a  (9)"] for each in (features, rotated))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("num_tasks", [1, 20])
def test_a_map_has_one_width_for_any_number_of_tasks(num_tasks: int) -> None:
    names = [f"task number {index}" for index in range(num_tasks)]
    figure = embedding_map(np.random.default_rng(0).normal(size=(num_tasks, 4)), names, names)
    assert figure_to_tensor(figure).shape[::2] == (3, 1500)


@pytest.mark.parametrize("features", [np.zeros((4, 3)), np.arange(4.0)[:, None], np.ones((1, 3))])
def test_a_map_of_less_than_two_components_has_zeros(features: np.ndarray) -> None:
    names = ["a"] * len(features)
    (points,) = mapped(embedding_map(features, names, names)).values()
    assert points.shape == (len(features), 2)
    assert (points[:, 1] == 0).all()


def test_rejects_a_map_of_items_without_task() -> None:
    with pytest.raises(ValueError, match=r"`features` must be \(N, D\), N > 0, .* got \(4, 3\), 4 and 3"):
        embedding_map(np.zeros((4, 3)), ["a"] * 4, ["x"] * 3)


def test_an_overlay_shows_the_image_where_nothing_is_salient() -> None:
    image = np.linspace(0, 1, 12).reshape(3, 4)
    overlay = saliency_overlay(image, np.zeros((3, 4)))
    assert overlay.dtype == np.uint8
    np.testing.assert_array_equal(overlay, np.repeat((255 * image).round()[..., None], 3, axis=2))


def test_an_overlay_departs_from_grey_the_more_the_larger_the_saliency() -> None:
    saliency = np.linspace(0, 1, 6)[None]
    overlay = saliency_overlay(np.full((1, 6), 0.5), saliency).astype(int)[0]
    colourfulness = overlay.max(1) - overlay.min(1)
    assert (np.diff(colourfulness[:5]) > 0).all()
    assert colourfulness[5] > 40
    assert overlay[5].argmin() == 2  # the salient end of the map is yellow


def test_the_image_is_readable_even_below_the_largest_saliency() -> None:
    dark, bright = (saliency_overlay(np.full((1, 1), grey), np.ones((1, 1))).astype(int) for grey in (0.25, 0.75))
    assert (bright - dark >= 255 / 4).all()  # half of the contrast is left


def test_an_overlay_keeps_rows_and_columns_and_clips() -> None:
    saliency = np.zeros((2, 3))
    saliency[1, 0] = 5
    overlay = saliency_overlay(np.full((2, 3), 2.0), saliency)
    assert overlay.shape == (2, 3, 3)
    np.testing.assert_array_equal((overlay != 255).any(-1), saliency > 0)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_a_picture_survives_its_png(shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image_to_png(picture)))), picture)


def test_a_figure_is_the_same_as_png_and_as_tensor() -> None:
    png, tensor = (convert(roc_plot(*toy(), NAMES)) for convert in (figure_to_png, figure_to_tensor))
    picture = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB")))
    assert torch.equal((tensor * 255).round().byte(), picture.permute(2, 0, 1))


@both_plots
def test_rejects_columns_without_a_name(plot: Any) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(N, 2\), one column a finding, got \(4, 3\) and \(4, 3\)"):
        plot(np.zeros((4, 3)), np.zeros((4, 3)), ["a", "b"])


def test_rejects_logits_in_a_reliability_diagram() -> None:
    with pytest.raises(ValueError, match=r"`probability` must be in \[0, 1\]"):
        reliability_plot([[0], [1]], [[-3], [2]], ["a"])


def test_rejects_an_overlay_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"same shape \(H, W\), got \(2, 3\), \(3, 2\)"):
        saliency_overlay(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"same shape \(H, W\), got \(1, 2, 3\)"):
        saliency_overlay(np.zeros((1, 2, 3)), np.zeros((1, 2, 3)))
