"""How well a pretrained decoder fills in what is masked of a patch, per data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import Tensor

from dissect_monai.common import Array, Interval, Item
from dissect_monai.data.datasets import items_of
from dissect_monai.losses.pretraining import unexplained_variance
from dissect_monai.metrics.intervals import bootstrap
from dissect_monai.networks.weights import has_decoder
from dissect_monai.visualize.training import show_mask, slice_figure
from dissect_monai.writing import columns, metric_name, write_csv


class ReconstructionRow(NamedTuple):
    """One line of reconstruction.csv: a task; errors are shares of the variance of a patch."""

    task: str
    group: str
    patches: int
    subjects: int
    masked_error: Interval
    error: Interval


@dataclass(eq=False)
class ReconstructionHandler:
    """Measures the reconstructions of an evaluator whose `prepare_batch` is `MaskedImages`, per task.

    It writes reconstruction.csv, whose lines are `ReconstructionRow`s, and reconstruction.png, the first patch of every
    task, in the order of the lines: as it was, as the network saw it, the masked voxels blue, and as it reconstructed
    it. The error of the masked voxels is left in the engine's metrics as `reconstruction_error_<task>`.
    Items of the evaluator's data set have a "task", a "group" and a "subject".
    """

    output_dir: str | Path
    num_samples: int = 1000  # bootstrap resamples
    seed: int = 0  # of the resamples
    weights_path: str | Path | None = None  # of the network; of an encoder alone there is nothing to measure

    def attach(self, engine: Engine) -> None:
        """Measure every batch, and sum up when `engine` has seen them all."""
        if self.weights_path is not None and not has_decoder(self.weights_path):
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _start(self, engine: Any) -> None:
        self._data: list[Item] = items_of(engine.data_loader.dataset)
        self._errors: list[Tensor] = []  # (B, 2), of the masked voxels, NaN if there are none, and of all
        self._pictures: dict[str, list[Tensor]] = {}  # target, input and reconstruction of each task

    def _measure(self, engine: Engine) -> None:
        output = engine.state.output
        views, masked = output["label"]
        images, reconstructions = output["image"], output["pred"].float()
        seen = sum(map(len, self._errors))
        for index, item in enumerate(self._data[seen : seen + len(views)]):
            one = slice(index, index + 1)
            shown = (views[one], show_mask(images[one], masked[one]), reconstructions[one])
            self._pictures.setdefault(item["task"], [each.cpu() for each in shown])
        within = view_errors(reconstructions, views, masked).where(masked.flatten(1).any(1), torch.nan)
        self._errors.append(torch.stack([within, view_errors(reconstructions, views)], 1).cpu())

    def __call__(self, engine: Engine) -> None:
        """Write the table and the picture, and leave the metrics."""
        errors = torch.cat(self._errors).double().numpy()
        rows = [self._row(task, errors) for task in sorted({item["task"] for item in self._data})]
        write_csv(Path(self.output_dir, "reconstruction.csv"), columns(ReconstructionRow), rows, nan="nan")
        tiles = zip(*(self._pictures[row.task] for row in rows), strict=True)
        figure = slice_figure([torch.cat(column) for column in tiles])
        pixels = figure.mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(Path(self.output_dir, "reconstruction.png"))
        for row in rows:
            engine.state.metrics[metric_name("reconstruction_error", row.task)] = row.masked_error.value

    def _row(self, task: str, errors: Array) -> ReconstructionRow:
        chosen = [index for index, item in enumerate(self._data) if item["task"] == task]
        items = [self._data[index] for index in chosen]
        subjects = [str(item.get("subject", item["image"])) for item in items]
        within, whole = (self._interval(each, subjects) for each in errors[chosen].T)
        return ReconstructionRow(task, items[0]["group"], len(items), len(set(subjects)), within, whole)

    def _interval(self, errors: Array, subjects: Sequence[str]) -> Interval:
        known = ~np.isnan(errors)
        if not known.any():
            return Interval(*[float("nan")] * 3)

        def mean(weight: Array) -> Array:
            with np.errstate(invalid="ignore"):
                return weight[:, known] @ errors[known] / weight[:, known].sum(1)

        return bootstrap(mean, subjects, self.num_samples, self.seed)


def view_errors(reconstructions: Tensor, views: Tensor, where: Tensor | None = None) -> Tensor:
    """`unexplained_variance` of each of V views, shape (V,)."""
    regions = [None] * len(views) if where is None else where.split(1)
    parts = zip(reconstructions.split(1), views.split(1), regions, strict=True)
    return torch.stack([unexplained_variance(*part) for part in parts])
