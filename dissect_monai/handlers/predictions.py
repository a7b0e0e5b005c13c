"""The table of a classifier's predictions, and where it looked."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from math import inf, isnan, nan
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from dissect_monai.common import NO_FINDING, InputError
from dissect_monai.data.datasets import ReadableLoader
from dissect_monai.visualize.saliency import overlay_png, saliency_maps

OVERLAYS = ("none", "top", "all")


class PredictionSaver:
    """Writes probabilities.csv: for every image its path, the probability of each finding, and why it cannot be read.

    With thresholds there is a column "<finding> called" for each finding: 1 if it reaches its threshold, else 0.
    Overlays of an earlier run are deleted when a run starts.

    The evaluator's output must hold probabilities (a sigmoid is the last of its postprocessing) and have
    `decollate=False`. When all is written, images that could not be read end the run with an error.

    Args:
        loader: the evaluator's loader.
        label_names: names of the C findings, the columns.
        output_dir: folder for the table and the overlays.
        overlays: saliency to draw as overlays/<index>_<image>_<finding>.png: "none", "top" (of each image the finding
            furthest above its threshold, or the likeliest without thresholds; never "No finding") or "all"; for 2-D
            images. Where nothing speaks for the finding the name ends in "_nothing".
        network: the evaluator's network, for the overlays.
        thresholds: probability from which on a finding is called, by name, as `read_calibration` gives them; with NaN
            it is neither called nor not.

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
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        if overlays not in OVERLAYS:
            raise InputError(f"`overlays` must be one of {', '.join(OVERLAYS)}, got {overlays!r}.")
        if overlays != "none" and network is None:
            raise InputError("`network` must be given for `overlays`, got None.")
        self.loader = loader
        self.label_names = list(label_names)
        self.output_dir = Path(output_dir)
        self.thresholds = dict(thresholds or {})
        self.overlays = overlays
        self.network = network
        self.probabilities: dict[int, list[float]] = {}

    def attach(self, engine: Engine) -> None:
        """Collect and draw after every batch, write at the end."""
        engine.add_event_handler(Events.STARTED, self._remove_old)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        """Keep the probabilities of one batch, and draw its overlays."""
        probabilities = engine.state.output["pred"].as_subclass(Tensor).detach().cpu()
        if probabilities.shape[1] != len(self.label_names):
            raise InputError(
                f"`label_names` must name the network's {probabilities.shape[1]} outputs, got {len(self.label_names)}."
            )
        indices = engine.state.batch["index"].tolist()
        self.probabilities |= dict(zip(indices, probabilities.tolist(), strict=True))
        if self.network is not None and self.overlays != "none":
            self._draw(self.network, indices, engine.state.output["image"].as_subclass(Tensor), probabilities)

    def _remove_old(self, engine: Engine) -> None:
        for path in (self.output_dir / "overlays").glob("[0-9][0-9][0-9][0-9][0-9]*_*.png"):
            path.unlink()

    def _draw(self, network: nn.Module, indices: list[int], images: Tensor, probabilities: Tensor) -> None:
        folder = self.output_dir / "overlays"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = torch.ones_like(probabilities, dtype=torch.bool)
        if self.overlays == "top":
            score = self._score(probabilities)
            wanted = (score == score.amax(1, keepdim=True)) & ~score.isneginf()
        for finding in wanted.any(0).nonzero().flatten().tolist():
            rows = wanted[:, finding].nonzero().flatten().tolist()
            maps = saliency_maps(network, images[rows], finding)
            for row, saliency in zip(rows, maps, strict=True):
                stem = Path(self.loader.dataset.data[indices[row]]["image"]).name.split(".")[0]
                nothing = "" if saliency.any() else "_nothing"
                name = f"{indices[row]:05d}_{stem}_{self.label_names[finding]}{nothing}".replace(" ", "_")
                (folder / f"{name.replace('/', '_')}.png").write_bytes(overlay_png(images[row], saliency))

    def _score(self, probabilities: Tensor) -> Tensor:
        """By how much each finding is the one to look at; −inf for what is none, or has no threshold."""
        score = probabilities.double().logit()
        if self.thresholds:
            thresholds = [self.thresholds.get(name, nan) for name in self.label_names]
            score = (score - torch.tensor(thresholds, dtype=score.dtype).logit()).nan_to_num(-inf, inf, -inf)
        score[:, [name.lower() == NO_FINDING.lower() for name in self.label_names]] = -inf
        return score

    def _write(self, engine: Engine) -> None:
        path, errors = self.output_dir / "probabilities.csv", self.loader.errors
        items = self.loader.dataset.data
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            called = [f"{name} called" for name in self.label_names if name in self.thresholds]
            writer.writerow(["image", *self.label_names, *called, "error"])
            for index, item in enumerate(items):
                values = self.probabilities.get(index, [nan] * len(self.label_names))
                writer.writerow([item["image"], *self._texts(values), errors.get(index, "")])
        engine.logger.info("Wrote the predictions of %d images to %s.", len(items) - len(errors), path)
        self.loader.refuse_unreadable(path)

    def _texts(self, probabilities: Sequence[float]) -> list[str]:
        """The probabilities of an image, then its calls; blank is unknown."""
        calls = []
        for name, probability in zip(self.label_names, probabilities, strict=True):
            if name in self.thresholds:
                threshold = self.thresholds[name]
                calls.append("" if isnan(probability) or isnan(threshold) else f"{int(probability >= threshold)}")
        return [*("" if isnan(value) else f"{value:.6f}" for value in probabilities), *calls]
