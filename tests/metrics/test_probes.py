import numpy as np
import pytest
import torch
from helpers import small_resnet
from monai.data import DataLoader, Dataset
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
    FeatureDataset,
    extract_features,
    grouped_cross_val_scores,
    intensity_histograms,
    knn_scores,
    linear_probe,
    logistic_regression,
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


def test_knn_agrees_with_sklearn_and_in_blocks_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem()
    scaler = StandardScaler().fit(x[:100])
    unit = scaler.transform(x) / np.linalg.norm(scaler.transform(x), axis=1, keepdims=True)
    scores = knn_scores(x[:100], y[:100], x[100:], k=7, temperature=0.2)
    assert scores.shape == (50, 3)
    for finding in range(3):
        reference = KNeighborsClassifier(7, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2))
        expected = reference.fit(unit[:100], y[:100, finding]).predict_proba(unit[100:])[:, 1]
        np.testing.assert_allclose(scores[:, finding], expected, atol=1e-6)
    monkeypatch.setattr("dissect_monai.metrics.probes._KNN_ROWS", 8)
    np.testing.assert_allclose(knn_scores(x[:100], y[:100], x[100:], k=7, temperature=0.2), scores)


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
    scores = linear_probe(x[train], y[train], x[val], y[val], x[test])
    np.testing.assert_allclose(scores, reference(best, test), atol=1e-3)
    # What validation cannot judge takes no part in the choice.
    y[val, 0] = 0
    best = max(CS, key=lambda c: roc_auc_score(y[val, 1:], reference(c, val)[:, 1:], average="macro"))
    scores = linear_probe(x[train], y[train], x[val], y[val], x[test])
    np.testing.assert_allclose(scores, reference(best, test), atol=1e-3)


def test_linear_probe_drops_unknown_labels_finding_by_finding() -> None:
    x, y = problem()
    masked = y.copy()
    masked[20:80, 0] = np.nan
    full, part = (logistic_regression(x[:80], labels[:80], x[120:], 0.1) for labels in (y, masked))
    np.testing.assert_array_equal(full[:, 1:], part[:, 1:])
    assert not np.allclose(full[:, 0], part[:, 0])


def test_linear_probe_names_findings_that_lack_a_class(caplog: pytest.LogCaptureFixture) -> None:
    x, y = problem()
    y[:80, 1] = 0
    y[80:120] = np.nan
    scores = linear_probe(x[:80], y[:80], x[80:120], y[80:120], x[120:])
    np.testing.assert_array_equal(scores, logistic_regression(x[:80], y[:80], x[120:], DEFAULT_C))
    assert np.isnan(scores).all(0).tolist() == [False, True, False]
    assert "for lack of a class in training: findings (1,)" in caplog.text
    assert "No finding has both classes in training and validation: C is the default, 0.01" in caplog.text


def test_cross_validation_scores_every_item_and_follows_its_seed() -> None:
    x, y = problem()
    subjects = np.arange(150) // 3
    first, again, other = (grouped_cross_val_scores(x, y, subjects, seed=seed) for seed in (0, 0, 1))
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
    assert roc_auc_score(y, grouped_cross_val_scores(x, y, np.arange(240))) > 0.95
    assert roc_auc_score(y, grouped_cross_val_scores(x, y, subjects)) < 0.75


@pytest.mark.parametrize("shape", [(3, 1, 7, 7), (3, 2, 7, 7, 7)])
def test_histograms_agree_with_numpy_and_count_what_is_out_of_range_at_the_ends(shape: tuple[int, ...]) -> None:
    images = 2 * torch.rand(shape) - 0.5
    found = intensity_histograms(images)
    expected = [np.histogram(image.clip(0, 1), 32, (0, 1))[0] / image.size for image in images.numpy()]
    assert found.shape == (3, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def images_of(dtype: torch.dtype = torch.float32) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (10, 1, 32, 32), dtype=torch.uint8, generator=generator)
    images = pixels if dtype == torch.uint8 else pixels.to(dtype) / 255
    labels = torch.tensor([[1.0, 0.0, np.nan], [0.0, 1.0, 1.0]]).repeat(5, 1)
    return Dataset([{"image": image, "label": label} for image, label in zip(images, labels, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_head_on_cached_features_is_the_whole_network_in_eval_mode(dtype: torch.dtype) -> None:
    network = small_resnet(num_classes=3)
    network.bn1.running_mean.fill_(0.1)
    network.train()
    features = FeatureDataset(images_of(dtype=dtype), network, batch_size=4)
    batch = next(iter(DataLoader(features, batch_size=len(features))))
    assert batch["image"].shape == (10, network.fc.in_features)
    assert all(module.training for module in network.modules())
    network.eval()
    images = torch.stack([item["image"] for item in images_of().data])
    torch.testing.assert_close(network.fc(batch["image"]), network(images), atol=1e-6, rtol=0)
    expected = torch.stack([item["label"] for item in images_of().data])
    torch.testing.assert_close(batch["label"], expected, equal_nan=True)


def test_features_are_computed_once_and_not_before_the_weights_are_loaded() -> None:
    network, calls = small_resnet(num_classes=3), []
    network.layer4.register_forward_hook(lambda *_: calls.append(1))
    features = FeatureDataset(images_of(), network)
    assert len(features) == 10
    assert not calls
    nn.init.constant_(network.conv1.weight, 0)
    first, second = (DataLoader(features, batch_size=10) for _ in range(2))
    assert torch.equal(next(iter(first))["image"], next(iter(second))["image"])
    assert len(calls) == 1
    assert next(iter(first))["image"].std(0).max() == 0  # of the weights as they are now
