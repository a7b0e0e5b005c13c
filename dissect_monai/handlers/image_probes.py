"""Frozen features of labelled images: how well the findings can be read off them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import ensure_tuple
from torch import nn
from torch.utils.data import DataLoader

from dissect_monai.common import InputError, Item
from dissect_monai.data.datalists import SPLITS, Datalist, finding_matrix
from dissect_monai.data.datasets import items_of
from dissect_monai.handlers.probes import Baseline, FrozenProbes, Question
from dissect_monai.metrics.probes import pixel_pca


class ProbeHandler(FrozenProbes):
    """Judges frozen encoders and the pixel baseline by linear probe and k-NN, with 95 % intervals by subject.

    C of the linear probe is chosen on validation; the test split is scored once. With `num_folds` the probe is
    cross-validated over all labelled images instead, folds grouped by subject, for small test splits. What it writes
    and leaves in the engine's metrics is described with `FrozenProbes`; the questions are `findings` and `shortcut`.

    Args:
        encoders: encoders by name; the first is compared with all others.
        loaders: loaders of the splits `training`, `validation` and `test`, of data sets with a data list `data`.
        label_names: names of the values of a label.
        output_dir: folder for the tables.
        findings: findings to score, of `label_names` or "No finding" (all labels 0); None is all of them.
        shortcut: key of an attribute with two values, such as `view`, asked of the same features; None for none.
        num_folds: 0 for the given splits, else the number of folds.
        pixels: whether to judge the principal components of the pixels, too; of volumes there are none.
        num_samples: bootstrap resamples.
        seed: seed of folds and resamples.

    Raises:
        ValueError: if a finding is unknown or the shortcut has not two values.

    Reference:
        Frozen encoder in eval mode, standardised features, logistic regression; see README, "Evaluation".
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        loaders: Mapping[str, DataLoader[Any]],
        label_names: Sequence[str],
        output_dir: str | Path,
        findings: str | Sequence[str] | None = None,
        shortcut: str | None = None,
        num_folds: int = 0,
        pixels: bool = True,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> None:
        splits = [items_of(loaders[split].dataset) for split in SPLITS]
        names = list(ensure_tuple(findings) if findings else label_names)
        questions = [Question("findings", names, [finding_matrix(items, label_names, names) for items in splits])]
        if shortcut is not None:
            questions.append(_shortcut_question(splits, shortcut))
        super().__init__(encoders, loaders, questions, output_dir, num_folds, num_samples, seed)
        self.pixels = pixels

    def baseline(self) -> Baseline | None:
        """Principal components of the pixels; none of volumes."""
        if not self.pixels:
            return None
        images = [torch.cat([torch.as_tensor(batch["image"]).float() for batch in loader]) for loader in self.loaders]
        return Baseline("pixels", "pca", list(pixel_pca(*images))) if images[0].ndim == 4 else None


def refuse_unlabelled(
    datalist: Datalist, findings: str | Sequence[str] | None = None, splits: Sequence[str] = SPLITS
) -> None:
    """Refuse data without labels, or whose labels leave nothing to learn or to score.

    Args:
        datalist: the labelled items of the three splits.
        findings: the findings to learn and to score; None is all of them.
        splits: the splits that are needed.

    Raises:
        ValueError: naming the splits without labelled items, or those without both classes of any finding.
    """
    empty = [split for split in splits if not getattr(datalist, split)]
    if empty:
        raise InputError(
            f"labelled images are needed in {', '.join(splits)}; {', '.join(empty)} has none. "
            "Give --dataset_dir a folder whose dataset.json has these lists with a `label` per item."
        )
    names = list(ensure_tuple(findings) if findings else datalist.label_names)
    judged = [split for split in splits if split != "validation"]
    usable = np.ones(len(names), dtype=bool)
    for split in judged:
        labels = finding_matrix(getattr(datalist, split), datalist.label_names, names)
        usable &= (labels == 1).any(0) & (labels == 0).any(0)
    if not usable.any():
        raise InputError(
            f"no finding ({', '.join(names)}) has both a 1 and a 0 in {' and in '.join(judged)}: nothing can be learnt "
            "or scored. Correct the labels, or raise --label_fraction."
        )


def _shortcut_question(splits: Sequence[list[Item]], key: str) -> Question:
    values = sorted({str(item[key]) for items in splits for item in items if key in item})
    if len(values) != 2:
        raise InputError(f"`shortcut` must name a key of the items with two values, got {key!r} with {values}.")
    truth = {value: float(value == values[0]) for value in values}
    labels = [np.array([[truth[str(item[key])] if key in item else np.nan] for item in items]) for items in splits]
    return Question("shortcut", [f"{key}={values[0]}"], labels)
