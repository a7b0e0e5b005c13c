"""What hierarchical self-supervision has learnt, judged on validation data: retrieval, reconstruction, shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from torch import Tensor, nn

from dissect_monai.data.datasets import items_of
from dissect_monai.data.sampling import part_of_tasks
from dissect_monai.handlers.monitors import level_metrics
from dissect_monai.losses.pretraining import unexplained_variance
from dissect_monai.metrics.probes import extract_features, intensity_histograms
from dissect_monai.metrics.representation import DomainFeatures, collapse_metrics, shortcut_metrics
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.transforms.views import HierarchyViews
from dissect_monai.writing import metric_name

NUM_BINS = 32  # of the intensity histograms


@dataclass(eq=False)
class HSSLValidation:
    """Judges an `HSSLNet` on validation data, among others by how well its features betray the data set.

    Attached to an evaluator whose network is the `HSSLNet` and whose `prepare_batch` is `HierarchyViews` that make two
    views, it leaves in the engine's metrics

    - `retrieval_*` and `accuracy_*`, see `level_metrics`, over all validation images;
    - `reconstruction_error_<task>`, the unexplained variance over the masked voxels (over all, where a batch has none),
      a mean over the views of a task, and `reconstruction_error`, the mean over tasks;
    - `shortcut_*`, see `shortcut_metrics`, of the bottleneck for the images as they are, with a few training images of
      each task as bank;
    - `collapse_*` and `domain_shift` of the same features, see `collapse_metrics`.

    What cannot be told from the data, with a single task above all, is left out. The loader does not shuffle, and the
    items of both data sets have a "task" and a "group".
    """

    training: Dataset

    def attach(self, engine: Any) -> None:
        """Collect during a validation and judge at its end; attach before what writes the metrics."""
        self.bank = DataLoader(part_of_tasks(self.training), batch_size=engine.data_loader.batch_size)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Any) -> None:
        """Leave the metrics in the engine's state."""
        bank, items = (_features(engine, loader) for loader in (self.bank, engine.data_loader))
        engine.state.metrics |= self._scored() | shortcut_metrics(bank, items) | collapse_metrics(items)

    def _start(self, engine: Any) -> None:
        self.views: HierarchyViews = engine.prepare_batch
        self.views.set_epoch(0)  # all validations have the same views
        # Of each batch: embeddings of three levels, logits of task and group, errors, task and group, all (2·B, ...)
        self.seen: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def _collect(self, engine: Engine) -> None:
        target, output = engine.state.output["label"], engine.state.output["pred"]
        masked = target.masked is not None and target.masked.any()
        regions = target.masked.split(1) if masked else [None] * len(target.views)
        pairs = zip(output.reconstruction.split(1), target.views.split(1), regions, strict=True)
        errors = torch.stack([unexplained_variance(*each) for each in pairs])
        labels = target.task.repeat(2), target.group.repeat(2)
        self.seen.append((*output.embeddings, output.task_logits, output.group_logits, errors, *labels))

    def _scored(self) -> dict[str, float]:
        """Metrics of the views."""
        *embeddings, task_logits, group_logits, errors, tasks, groups = map(_joined, zip(*self.seen, strict=True))
        error = errors.unflatten(0, (2, -1)).mean(0)
        task, group = tasks[: len(error)], groups[: len(error)]
        levels = level_metrics(embeddings, (task_logits, group_logits), (task, group))
        by_task = {
            metric_name("reconstruction_error", name): float(error[task == index].mean())
            for name, index in self.views.numbers["task"].items()
            if (task == index).any()
        }
        metrics = {name: float(value) for name, value in levels.items()}
        return {**metrics, "reconstruction_error": float(np.mean([*by_task.values()])), **by_task}


def _features(engine: Any, loader: DataLoader[Any]) -> DomainFeatures:
    found = extract_features(engine.network.segresnet, loader, engine.state.device, _histograms_and_bottleneck)
    items = items_of(loader.dataset)
    task, group = ([item[key] for item in items] for key in ("task", "group"))
    return DomainFeatures(found.last, found.stages[:, :NUM_BINS], task, group)


def _histograms_and_bottleneck(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Two "stages" for `extract_features`, so that the images are read once."""
    return [intensity_histograms(images, NUM_BINS).unsqueeze(2), feature_maps(encoder, images)[-1]]


def _joined(batches: Sequence[Tensor]) -> Tensor:
    """Batches (2·B, ...) of first views, then second ones, as one that is so, too."""
    return torch.cat([batch.unflatten(0, (2, -1)) for batch in batches], dim=1).flatten(0, 1)
