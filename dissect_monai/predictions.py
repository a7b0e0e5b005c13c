"""The table of a classifier's predictions, and where it looked."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from dissect_monai.datasets import ReadableLoader
from dissect_monai.saliency import overlay_png, saliency_maps

OVERLAYS = ("none", "top", "all")


class PredictionSaver:
    """Writes predictions.csv: for every image its path, the probability of each finding, and why it cannot be read.

    The evaluator's output must hold probabilities (a sigmoid is the last of its postprocessing) and have
    `decollate=False`. When all is written, images that could not be read end the run with an error.

    Args:
        loader: the evaluator's loader.
        label_names: names of the C findings, the columns.
        output_dir: folder for the table and the overlays.
        overlays: saliency to draw as overlays/<index>_<image>_<finding>.png: "none", "top" (of each image the likeliest
            finding) or "all"; for 2-D images.
        network: the evaluator's network, for the overlays.

    Raises:
        ValueError: if `overlays` is unknown or has no network; during the run, if there are more or fewer probabilities
            than names; at its end, if images could not be read.
    """

    def __init__(
        self,
        loader: ReadableLoader,
        label_names: Sequence[str],
        output_dir: str | Path,
        overlays: str = "none",
        network: nn.Module | None = None,
    ) -> None:
        if overlays not in OVERLAYS:
            raise ValueError(f"`overlays` must be one of {', '.join(OVERLAYS)}, got {overlays!r}.")
        if overlays != "none" and network is None:
            raise ValueError("`network` must be given for `overlays`, got None.")
        self.loader = loader
        self.label_names = list(label_names)
        self.output_dir = Path(output_dir)
        self.overlays = overlays
        self.network = network
        self.probabilities: dict[int, list[float]] = {}

    def attach(self, engine: Engine) -> None:
        """Collect and draw after every batch, write at the end."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        """Keep the probabilities of one batch, and draw its overlays."""
        probabilities = engine.state.output["pred"].as_subclass(Tensor).detach().cpu()
        if probabilities.shape[1] != len(self.label_names):
            raise ValueError(
                f"`label_names` must name the network's {probabilities.shape[1]} outputs, got {len(self.label_names)}."
            )
        indices = engine.state.batch["index"].tolist()
        self.probabilities |= dict(zip(indices, probabilities.tolist(), strict=True))
        if self.network is not None and self.overlays != "none":
            self._draw(self.network, indices, engine.state.output["image"].as_subclass(Tensor), probabilities)

    def _draw(self, network: nn.Module, indices: list[int], images: Tensor, probabilities: Tensor) -> None:
        folder = self.output_dir / "overlays"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = torch.ones_like(probabilities, dtype=torch.bool)
        if self.overlays == "top":
            wanted = wanted & (probabilities == probabilities.amax(1, keepdim=True))
        for finding in wanted.any(0).nonzero().flatten().tolist():
            rows = wanted[:, finding].nonzero().flatten().tolist()
            maps = saliency_maps(network, images[rows], finding)
            for row, saliency in zip(rows, maps, strict=True):
                stem = Path(self.loader.dataset.data[indices[row]]["image"]).name.split(".")[0]
                name = f"{indices[row]:05d}_{stem}_{self.label_names[finding]}.png".replace(" ", "_").replace("/", "_")
                (folder / name).write_bytes(overlay_png(images[row], saliency))

    def _write(self, engine: Engine) -> None:
        path, errors = self.output_dir / "predictions.csv", self.loader.errors
        items = self.loader.dataset.data
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *self.label_names, "error"])
            for index, item in enumerate(items):
                values = self.probabilities.get(index, [np.nan] * len(self.label_names))
                numbers = ["" if np.isnan(value) else f"{value:.6f}" for value in values]
                writer.writerow([item["image"], *numbers, errors.get(index, "")])
        engine.logger.info("Wrote the predictions of %d images to %s.", len(items) - len(errors), path)
        self.loader.refuse_unreadable(path)
