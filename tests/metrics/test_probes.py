import logging

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from dissect_monai.metrics.probes import (
    CS,
    DEFAULT_C,
    extract_features,
    grouped_cross_val_scores,
    intensity_histograms,
    knn_scores,
    linear_probe,
    pixel_pca,
)


class Encoder(nn.Module):
    def __init__(self, spatial_dims: int = 2) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if spatial_dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first = nn.Sequential(conv(1, 3, 3, 2, 1), norm(3), nn.Dropout(0.5))
        self.second = conv(3, 5, 3, 2, 1)


def stages(encoder: nn.Module, image: Tensor) -> list[Tensor]:
    first = encoder.first(image)
    return [first, encoder.second(first)]


def batches(spatial_dims: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, *(8,) * spatial_dims)
    return [{"image": torch.rand((size, *shape), generator=generator)} for size in (4, 4, 2)]


def problem(num_items: int = 150, num_features: int = 12, num_findings: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_items, num_features)) * rng.uniform(0.1, 10, num_features) + 3
    z = (x - 3) / x.std(0)
    return x, (z[:, :num_findings] + rng.normal(size=(num_items, num_findings)) > 0.4).astype(float)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_features_are_the_global_averages_of_the_stages(spatial_dims: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder(spatial_dims)
    features = extract_features(encoder, batches(spatial_dims), "cpu", stages)
    assert features.last.shape == (10, 5)
    assert features.stages.shape == (10, 8)
    np.testing.assert_array_equal(features.stages[:, 3:], features.last)
    with torch.no_grad():
        expected = stages(encoder.eval(), batches(spatial_dims)[0]["image"])[1].flatten(2).mean(2)
    np.testing.assert_allclose(features.last[:4], expected, rtol=1e-5, atol=1e-6)


def test_byte_images_are_scaled_to_one() -> None:
    encoder = Encoder()
    image = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    as_bytes = extract_features(encoder, [{"image": image}], "cpu", stages)
    as_floats = extract_features(encoder, [{"image": image / 255}], "cpu", stages)
    np.testing.assert_allclose(as_bytes.stages, as_floats.stages, rtol=1e-5, atol=1e-6)


def test_extraction_is_frozen_and_restores_the_mode_of_each_module_even_after_an_error() -> None:
    encoder, grad = Encoder().train(), []
    encoder.first[1].eval()
    modes = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    def noting(encoder: nn.Module, image: Tensor) -> list[Tensor]:
        grad.append(torch.is_grad_enabled())
        return stages(encoder, image)

    first, second = (extract_features(encoder, batches(), "cpu", noting) for _ in range(2))
    np.testing.assert_array_equal(first.stages, second.stages)  # dropout would differ
    assert not any(grad)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert modes == [module.training for module in encoder.modules()]
    with pytest.raises(KeyError, match="image"):
        extract_features(encoder, [{}], "cpu", stages)
    assert modes == [module.training for module in encoder.modules()]
    with pytest.raises(ValueError, match="`loader` must yield at least one batch, got none"):
        extract_features(encoder, [], "cpu", stages)


def test_pixel_components_come_from_the_training_images_only() -> None:
    torch.manual_seed(0)
    train, test = torch.rand(20, 1, 64, 64), torch.rand(5, 1, 64, 64) * 100
    train_x, test_x, twice_x = pixel_pca(train, test, torch.cat([test, test]), num_components=6, size=16)
    assert (train_x.shape, test_x.shape) == ((20, 6), (5, 6))
    np.testing.assert_allclose(twice_x, np.concatenate([test_x, test_x]), rtol=1e-4, atol=1e-4)
    small = train.reshape(20, 16, 4, 16, 4).mean((2, 4)).flatten(1).numpy()
    np.testing.assert_allclose(np.abs(train_x), np.abs(PCA(6).fit_transform(small)), rtol=1e-3, atol=1e-3)
    assert pixel_pca(torch.randint(0, 256, (7, 1, 32, 32), dtype=torch.uint8))[0].shape == (7, 6)


def test_knn_agrees_with_sklearn() -> None:
    x, y = problem()
    scaler = StandardScaler().fit(x[:100])
    unit = scaler.transform(x) / np.linalg.norm(scaler.transform(x), axis=1, keepdims=True)
    scores = knn_scores(x[:100], y[:100], x[100:], k=7, temperature=0.2)
    assert scores.shape == (50, 3)
    for finding in range(3):
        reference = KNeighborsClassifier(7, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2))
        expected = reference.fit(unit[:100], y[:100, finding]).predict_proba(unit[100:])[:, 1]
        np.testing.assert_allclose(scores[:, finding], expected, atol=1e-6)


def test_knn_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem()
    whole = knn_scores(x[:100], y[:100], x[100:])
    monkeypatch.setattr("dissect_monai.metrics.probes._KNN_ROWS", 8)
    np.testing.assert_allclose(knn_scores(x[:100], y[:100], x[100:]), whole)


def test_knn_asks_only_neighbours_of_known_label() -> None:
    x, y = problem()
    y[:60, 1] = np.nan
    y[:, 2] = np.nan
    scores = knn_scores(x[:100], y[:100], x[100:], k=50)
    np.testing.assert_allclose(scores[:, 0], knn_scores(x[:100], y[:100, :1], x[100:], k=50)[:, 0])
    assert not np.isnan(scores[:, 1]).any()
    assert np.isnan(scores[:, 2]).all()


@pytest.mark.parametrize("num_features", [12, 300])
def test_linear_probe_agrees_with_sklearn_and_chooses_c_on_validation(num_features: int) -> None:
    x, y = problem(num_features=num_features)
    train, val, test = slice(0, 80), slice(80, 120), slice(120, 150)

    def reference(c: float, rows: slice) -> np.ndarray:
        models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-9, max_iter=10000)) for _ in range(3)]
        return np.stack([m.fit(x[train], y[train, i]).predict_proba(x[rows])[:, 1] for i, m in enumerate(models)], 1)

    best = max(CS, key=lambda c: roc_auc_score(y[val], reference(c, val), average="macro"))
    result = linear_probe(x[train], y[train], x[val], y[val], x[test])
    assert result.c == best
    np.testing.assert_allclose(result.scores, reference(best, test), atol=1e-3)


def test_linear_probe_scores_an_item_alike_in_any_company() -> None:
    x, y = problem()
    all_scores, one = (linear_probe(x[:80], y[:80], x[80:120], y[80:120], x[rows]) for rows in (slice(120, 150), [130]))
    np.testing.assert_allclose(all_scores.scores[10], one.scores[0])


def test_linear_probe_drops_unknown_labels_finding_by_finding() -> None:
    x, y = problem()
    masked = y.copy()
    masked[20:80, 0] = np.nan
    full = linear_probe(x[:80], y[:80], x[80:120], y[80:120], x[120:], cs=[0.1])
    part = linear_probe(x[:80], masked[:80], x[80:120], y[80:120], x[120:], cs=[0.1])
    np.testing.assert_array_equal(full.scores[:, 1:], part.scores[:, 1:])
    assert not np.allclose(full.scores[:, 0], part.scores[:, 0])


def test_linear_probe_leaves_out_and_names_a_finding_of_one_class(caplog: pytest.LogCaptureFixture) -> None:
    x, y = problem()
    y[:80, 1] = 0
    result = linear_probe(x[:80], y[:80], x[80:120], y[80:120], x[120:])
    assert np.isnan(result.scores).all(0).tolist() == [False, True, False]
    assert "for lack of a class in training: findings (1,)" in caplog.text


def test_linear_probe_falls_back_to_the_default_c_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x, y = problem()
    y[80:120] = np.nan
    with caplog.at_level(logging.WARNING):
        result = linear_probe(x[:80], y[:80], x[80:120], y[80:120], x[120:])
    assert result.c == DEFAULT_C
    assert not np.isnan(result.scores).any()
    assert "No finding has both classes in training and validation: C is the default, 0.01" in caplog.text


def test_findings_that_validation_cannot_judge_take_no_part_in_the_choice() -> None:
    x, y = problem()
    chosen = linear_probe(x[:80], y[:80, 1:], x[80:120], y[80:120, 1:], x[120:])
    y[80:120, 0] = 0
    assert linear_probe(x[:80], y[:80], x[80:120], y[80:120], x[120:]).c == chosen.c


def test_cross_validation_scores_every_item_and_follows_its_seed() -> None:
    x, y = problem()
    subjects = np.arange(150) // 3
    first, again, other = (grouped_cross_val_scores(x, y, subjects, seed=seed, cs=[0.01, 1]) for seed in (0, 0, 1))
    assert first.shape == (150, 3)
    assert ((first > 0) & (first < 1)).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert roc_auc_score(y, first) > 0.7


def test_cross_validation_keeps_subjects_whole() -> None:
    rng = np.random.default_rng(0)
    subjects = np.arange(60).repeat(4)
    x = rng.normal(size=(60, 200)).repeat(4, axis=0)  # a fingerprint of the subject
    y = (rng.random((60, 1)) < 0.5).astype(float).repeat(4, axis=0)
    assert roc_auc_score(y, grouped_cross_val_scores(x, y, np.arange(240), cs=[1.0])) > 0.95
    assert roc_auc_score(y, grouped_cross_val_scores(x, y, subjects, cs=[1.0])) < 0.75


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.1), (5, 0.0)])
def test_knn_rejects_what_is_not_positive(k: int, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"`k` and `temperature` must be positive, got {k} and {temperature}"):
        knn_scores(*problem(), problem()[0], k, temperature)


@pytest.mark.parametrize("cs", [[], [0.0, 1.0]])
def test_rejects_bad_cs(cs: list[float]) -> None:
    x, y = problem()
    with pytest.raises(ValueError, match=r"`cs` must hold positive values, got \["):
        linear_probe(x, y, x, y, x, cs)


def test_rejects_disagreeing_shapes_and_bad_labels() -> None:
    x, y = problem()
    with pytest.raises(
        ValueError, match=r"must have shapes \(N, D\) and \(N, C\), N > 0, got \(150, 12\) and \(150,\)"
    ):
        knn_scores(x, y[:, 0], x)
    with pytest.raises(ValueError, match=r"Labels must be 1, 0 or NaN \(unknown\), got \[-1"):
        linear_probe(x, y - 1, x, y, x)
    with pytest.raises(ValueError, match=r"same findings in training and validation, got 3 and 2"):
        linear_probe(x, y, x, y[:, :2], x)


def test_cross_validation_rejects_bad_folds_and_subjects() -> None:
    x, y = problem()
    with pytest.raises(ValueError, match=r"`num_folds` must be in \[3, 2\], the number of subjects, got 3"):
        grouped_cross_val_scores(x, y, np.arange(150) % 2, num_folds=3)
    with pytest.raises(ValueError, match="`subjects` must name the subject of each of the 150 items, got 9"):
        grouped_cross_val_scores(x, y, np.arange(9))


# ---- intensities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 2])
def test_histograms_agree_with_numpy_and_sum_to_one(spatial_dims: int, channels: int) -> None:
    images = torch.rand(3, channels, *[7] * spatial_dims)
    found = intensity_histograms(images)
    expected = [np.histogram(image, 32, (0, 1))[0] / image.size for image in images.numpy()]
    assert found.shape == (3, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_intensities_out_of_range_count_at_the_ends() -> None:
    found = intensity_histograms(torch.tensor([[[-0.1, -3.0, 1.0, 7.0]]]), num_bins=4)
    assert found.tolist() == [[0.5, 0, 0, 0.5]]
