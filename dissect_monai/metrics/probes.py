"""Frozen features, their k-NN and linear probes, and baselines that need no network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import Dataset

from dissect_monai.common import Array, InputError
from dissect_monai.metrics.classification import both_classes
from dissect_monai.networks.encoders import feature_maps, pool
from dissect_monai.transforms.views import prepare_images

logger = logging.getLogger(__name__)
CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_C = 1e-2  # used where validation cannot choose; the middle of CS
_KNN_ROWS = 1024  # test rows whose similarities are held at once


class Features(NamedTuple):
    """Frozen features of a data set, pooled over space."""

    last: NDArray[np.float32]  # (N, C of the last stage)
    stages: NDArray[np.float32]  # (N, sum of C over all stages)


def extract_features(
    encoder: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    device: torch.device | str,
    stages_fn: Callable[[nn.Module, Tensor], list[Tensor]] = feature_maps,
) -> Features:
    """Global averages of the feature maps of every image, in the order of the loader, without gradients.

    The encoder runs in eval mode; the modes of its modules are restored.

    Args:
        encoder: network on `device`.
        loader: batches with an "image" of shape (B, C, *spatial): uint8, which is scaled to [0, 1], or float.
        device: where to run.
        stages_fn: maps encoder and images to one feature map (B, C, *spatial) per stage, the last stage last.
    """
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    pooled: list[list[Tensor]] = []
    try:
        with torch.inference_mode():
            for batch in loader:
                image, _ = prepare_images(batch, device, non_blocking=True)
                pooled.append([pool(stage) for stage in stages_fn(encoder, image)])
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not pooled:
        raise InputError("`loader` must yield at least one batch, got none.")
    stages = [torch.cat(stage).cpu().numpy() for stage in zip(*pooled, strict=True)]
    return Features(stages[-1], np.concatenate(stages, axis=1))


def intensity_histograms(images: Tensor, num_bins: int = 32) -> Tensor:
    """Histogram of the intensities of each image, (B, C, *spatial) in [0, 1], which needs no network.

    Returns the shares of bins of equal width, all channels together, shape (B, `num_bins`); each row sums to 1. Values
    outside of [0, 1] count in the first or the last bin.

    Example:
        >>> intensity_histograms(torch.tensor([[[0.1, 0.2, 0.9, 1.0]]]), num_bins=2)
        tensor([[0.5000, 0.5000]])
    """
    bins = images.flatten(1).mul(num_bins).long().clamp_(0, num_bins - 1)
    row = torch.arange(len(images), device=images.device).unsqueeze(1)
    counts = torch.bincount((bins + num_bins * row).flatten(), minlength=len(images) * num_bins)
    return counts.view(len(images), num_bins) / bins.shape[1]


def pixel_pca(
    train_images: Tensor, *other_images: Tensor, num_components: int = 100, size: int = 32
) -> list[NDArray[np.float32]]:
    """Principal components of the pixels, the baseline that needs no network; fitted on the training images only.

    Each set of images is of shape (N, C, H, W), any real dtype, and is averaged to C·size² pixels first. Each gets
    features of shape (N, `num_components`), which is cut to C·size² and to the training images less one.
    """
    sets = (train_images, *other_images)
    pixels = [F.adaptive_avg_pool2d(images.float(), size).flatten(1).numpy() for images in sets]
    # One less than the images: the last component of as many would be rounding error, blown up by the probe.
    pca = PCA(min(num_components, len(pixels[0]) - 1, pixels[0].shape[1]), random_state=0).fit(pixels[0])
    return [pca.transform(each) for each in pixels]


def knn_scores(train_x: Array, train_y: Array, test_x: Array, k: int = 20, temperature: float = 0.07) -> Array:
    """Vote of the k nearest training items of known label for each finding, weighted by exp(cosine / temperature).

    Features are standardised with the training statistics and L2-normalised before. Arguments and result are those of
    `linear_probe`, except the choice of C.

    Reference:
        Wu et al., Unsupervised feature learning via non-parametric instance discrimination, CVPR 2018, Sec. 3.4 and
        its temperature. Standardising is ours: the raw cosines of pooled ReLU features, all positive, hardly differ.
    """
    train_x, test_x = (F.normalize(torch.from_numpy(x), dim=1).numpy() for x in _standardised(train_x, test_x))
    blocks = np.array_split(test_x, len(test_x) // _KNN_ROWS + 1)
    return np.concatenate([_vote(block @ train_x.T, train_y, k, temperature) for block in blocks])


def linear_probe(train_x: Array, train_y: Array, val_x: Array, val_y: Array, test_x: Array) -> Array:
    """Logistic regression on standardised frozen features: one problem a finding, one C for all, chosen on validation.

    C is the one of highest macro AUROC over the findings with both classes in training and validation, the smallest of
    equals; without such a finding it is `DEFAULT_C`, and the log says so. Items of unknown label are dropped finding by
    finding. Findings with a single class in training are named in the log.

    Features are (N, D), labels (N, C), 1, 0 or NaN (unknown); the scaler and the models are fitted on those of training
    alone. Probabilities of the M test items are (M, C), NaN for a finding that lacks a class in training.
    """
    c = _choose_c(train_x, train_y, val_x, val_y)
    if left_out := tuple(np.flatnonzero(~both_classes(train_y)).tolist()):
        logger.warning("Left out of the linear probe, for lack of a class in training: findings %s.", left_out)
    return logistic_regression(train_x, train_y, test_x, c)


def grouped_cross_val_scores(x: Array, y: Array, subjects: Sequence[str], num_folds: int = 5, seed: int = 0) -> Array:
    """Probabilities (N, C) of the linear probe for every item, fitted on the other folds, which hold whole subjects.

    For each fold C is chosen on the next one, and the probe is then fitted on all but the first. So there are at least
    3 folds, and at most as many as subjects. Features (N, D) and labels (N, C) are those of `linear_probe`; NaN is the
    score where a finding lacks a class in the training folds.
    """
    names, item_subject = np.unique(np.asarray(subjects), return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(len(names)) % num_folds)[item_subject]
    scores = np.full(y.shape, np.nan)
    for held_out in range(num_folds):
        test = fold == held_out
        val = fold == (held_out + 1) % num_folds
        train = ~test & ~val
        c = _choose_c(x[train], y[train], x[val], y[val])
        scores[test] = logistic_regression(x[~test], y[~test], x[test], c)
    return scores


def logistic_regression(train_x: Array, train_y: Array, test_x: Array, c: float) -> Array:
    """Probabilities (M, C) of the test items, one problem a finding, with the inverse strength `c` of the L2 penalty.

    Arguments and result are those of `linear_probe`.
    """
    train_x, test_x = _standardised(train_x, test_x)
    scores = np.full((len(test_x), train_y.shape[1]), np.nan)
    # Products this small do not repay threads, which on a busy machine wait for each other fifty times as long.
    with threadpool_limits(1, user_api="blas"):
        for finding in np.flatnonzero(both_classes(train_y)):
            known = ~np.isnan(train_y[:, finding])
            # At the default tolerance of 1e-4 probabilities are still up to 0.01 from the optimum.
            model = LogisticRegression(C=c, tol=1e-5, max_iter=2000).fit(train_x[known], train_y[known, finding])
            scores[:, finding] = model.predict_proba(test_x)[:, 1]
    return scores


def _standardised(train_x: Array, test_x: Array) -> tuple[Array, Array]:
    """Both sets in float64, with the mean and standard deviation of the first."""
    train_x, test_x = train_x.astype(np.float64), test_x.astype(np.float64)
    scaler = StandardScaler().fit(train_x)
    return scaler.transform(train_x), scaler.transform(test_x)


def _vote(similarity: Array, train_y: Array, k: int, temperature: float) -> Array:
    """Scores (M, C) from the similarities (M, N) of test and training items."""
    scores = np.full((len(similarity), train_y.shape[1]), np.nan)
    # With one class every score would be the same, and its AUROC a meaningless 0.5.
    for finding in np.flatnonzero(both_classes(train_y)):
        label = train_y[:, finding]
        known = np.flatnonzero(~np.isnan(label))
        near, index = torch.from_numpy(similarity[:, known]).topk(min(k, len(known)))
        weight = (near / temperature).softmax(1).numpy()
        scores[:, finding] = (weight * label[known][index.numpy()]).sum(1)
    return scores


def _choose_c(train_x: Array, train_y: Array, val_x: Array, val_y: Array) -> float:
    judged = np.flatnonzero(both_classes(train_y, val_y))
    if not len(judged):
        logger.warning("No finding has both classes in training and validation: C is the default, %g.", DEFAULT_C)
        return DEFAULT_C
    known = ~np.isnan(val_y)

    def macro_auroc(c: float) -> float:
        scores = logistic_regression(train_x, train_y, val_x, c)
        return float(np.mean([roc_auc_score(val_y[known[:, i], i], scores[known[:, i], i]) for i in judged]))

    return max(CS, key=macro_auroc)


@dataclass(eq=False)
class FeatureDataset(Dataset[dict[str, Tensor]]):
    """Frozen features in place of images: what the head of a linear probe trains on.

    The global averages of the last stage are computed once, in eval mode, at the first access: after pretrained weights
    are loaded and after a run has resumed. A loader of them has no workers, each of which would compute them all.
    """

    dataset: Dataset[Any]  # items {"image", "label"} without augmentation; images uint8, scaled to [0, 1], or float
    network: nn.Module  # one of `build_encoder` on `device`, whose head is left out
    device: torch.device | str = "cpu"  # where to compute; the features are kept in main memory
    batch_size: int = 64
    num_workers: int = 0  # processes that read the images

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The feature (C,) of one image as "image", and its "label"."""
        features, labels = self._cache
        return {"image": features[index], "label": labels[index]}

    @cached_property
    def _cache(self) -> tuple[Tensor, Tensor]:
        labels: list[Tensor] = []

        def batches() -> Iterator[dict[str, Tensor]]:
            for batch in DataLoader(self.dataset, batch_size=self.batch_size, num_workers=self.num_workers):
                labels.append(batch["label"])
                yield batch

        features = extract_features(self.network, batches(), self.device).last
        return torch.from_numpy(features), torch.cat(labels)
