"""How well a pretrained decoder fills in what is masked of a patch, per data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import Tensor

from dissect_monai.common import Array, InputError, Interval, Item
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


class ReconstructionHandler:
    """Measures the reconstructions of an evaluator whose `prepare_batch` is `MaskedImages`, per task.

    It writes reconstruction.csv, whose lines are `ReconstructionRow`s, and reconstruction.png, the first patch of every
    task, in the order of the lines: as it was, as the network saw it, the masked voxels blue, and as it reconstructed
    it. The error of the masked voxels is left in the engine's metrics as `reconstruction_error_<task>`.

    Args:
        data: the data list of the patches, each with "task", "group" and "subject", in the order of the evaluator.
        output_dir: folder for both files.
        num_samples: bootstrap resamples.
        seed: seed of the resamples.
        weights_path: weights of the network; of an encoder alone there is nothing to measure.

    Raises:
        ValueError: during the run, if the evaluator sees another number of patches.
    """

    def __init__(
        self,
        data: Sequence[Item],
        output_dir: str | Path,
        num_samples: int = 1000,
        seed: int = 0,
        weights_path: str | Path | None = None,
    ) -> None:
        self.data = data
        self.output_dir = Path(output_dir)
        self.num_samples, self.seed = num_samples, seed
        self.weights_path = weights_path
        self._clear()

    def attach(self, engine: Engine) -> None:
        """Measure every batch, and sum up when `engine` has seen them all."""
        if self.weights_path is not None and not has_decoder(self.weights_path):
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _clear(self) -> None:
        self._errors: list[Tensor] = []  # (B, 2), of the masked voxels, NaN if there are none, and of all
        self._pictures: dict[str, list[Tensor]] = {}  # target, input and reconstruction of each task

    def _measure(self, engine: Engine) -> None:
        output = engine.state.output
        views, masked = output["label"]
        images, reconstructions = output["image"], output["pred"].float()
        seen = sum(map(len, self._errors))
        for index, item in enumerate(self.data[seen : seen + len(views)]):
            one = slice(index, index + 1)
            shown = (views[one], show_mask(images[one], masked[one]), reconstructions[one])
            self._pictures.setdefault(item["task"], [each.cpu() for each in shown])
        within = view_errors(reconstructions, views, masked).where(masked.flatten(1).any(1), torch.nan)
        self._errors.append(torch.stack([within, view_errors(reconstructions, views)], 1).cpu())

    def __call__(self, engine: Engine) -> None:
        """Write the table and the picture, and leave the metrics."""
        errors = torch.cat(self._errors).double().numpy()
        if len(errors) != len(self.data):
            raise InputError(f"`data` must be the {len(errors)} patches of the evaluator, got {len(self.data)}.")
        rows = [self._row(task, errors) for task in sorted({item["task"] for item in self.data})]
        write_csv(self.output_dir / "reconstruction.csv", columns(ReconstructionRow), rows, nan="nan")
        tiles = zip(*(self._pictures[row.task] for row in rows), strict=True)
        figure = slice_figure([torch.cat(column) for column in tiles])
        pixels = figure.mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(self.output_dir / "reconstruction.png")
        for row in rows:
            engine.state.metrics[metric_name("reconstruction_error", row.task)] = row.masked_error.value

    def _row(self, task: str, errors: Array) -> ReconstructionRow:
        chosen = [index for index, item in enumerate(self.data) if item["task"] == task]
        items = [self.data[index] for index in chosen]
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
