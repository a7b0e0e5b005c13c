"""Writing embeddings, and optionally codes, of many images to one file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from dissect_monai.data import Item
from dissect_monai.networks import feature_maps
from dissect_monai.quantizers import MultiScaleQuantizer

FORMATS = ("csv", "npz")


class EmbeddingSaver:
    """Writes one embedding per image to embeddings.csv or embeddings.npz.

    The CSV has a line per image: its path, then the embedding. The NPZ has `image` (N,), `embedding` (N, C) and, with
    a quantiser, `codes_stageS` (N, *spatial) for each stage S.

    Args:
        items: the data list, in the order in which the evaluator sees it.
        output_dir: folder of the file.
        output_format: `csv` or `npz`.
        encoder: the evaluator's network; only used for the codes.
        quantizer: projections and codebooks as `load_quantizer` gives them; None writes no codes.
        stages: the stages that were quantised, counted from 1.

    Raises:
        ValueError: if the format is unknown, or codes are asked for in a CSV.
    """

    def __init__(
        self,
        items: Sequence[Item],
        output_dir: str | Path,
        output_format: str = "csv",
        encoder: nn.Module | None = None,
        quantizer: MultiScaleQuantizer | None = None,
        stages: Sequence[int] = (),
    ) -> None:
        if output_format not in FORMATS:
            raise ValueError(f"`output_format` must be csv or npz, got {output_format!r}.")
        if quantizer is not None and output_format != "npz":
            raise ValueError("codes are maps, which a CSV cannot hold: give --output_format npz.")
        self.items = items
        self.path = Path(output_dir) / f"embeddings.{output_format}"
        self.encoder = encoder
        self.quantizer = quantizer
        self.stages = stages
        self.arrays: dict[str, list[Tensor]] = {}

    def attach(self, engine: Engine) -> None:
        """Collect after every batch, write at the end."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        """Keep the embeddings, and the codes, of one batch."""
        self._keep("embedding", engine.state.output["pred"])
        if self.quantizer is None or self.encoder is None:
            return
        with torch.inference_mode():
            maps = feature_maps(self.encoder, engine.state.output["image"].as_subclass(Tensor))
            quantized = self.quantizer.eval().to(maps[0].device)([maps[stage - 1] for stage in self.stages])
        for stage, scale in zip(self.stages, quantized, strict=True):
            self._keep(f"codes_stage{stage}", scale.indices.int())

    def _keep(self, name: str, values: Tensor) -> None:
        self.arrays.setdefault(name, []).append(values.detach().as_subclass(Tensor).cpu())

    def _write(self, engine: Engine) -> None:
        arrays = {name: torch.cat(parts).numpy() for name, parts in self.arrays.items()}
        images = [str(item["image"]) for item in self.items]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix == ".npz":
            np.savez_compressed(self.path, image=np.array(images), **arrays)  # type: ignore[arg-type]
        else:
            _write_csv(self.path, images, arrays["embedding"])
        engine.logger.info("Wrote %d embeddings to %s.", len(images), self.path)


def load_quantizer(path: str | Path, spatial_dims: int, metric: str) -> MultiScaleQuantizer:
    """Projections and codebooks of a training checkpoint; their sizes are read from it.

    Args:
        path: a `checkpoint_epoch=N.pt` of `TrainingCheckpoint`.
        spatial_dims: 2 or 3.
        metric: lookup metric of the run.

    Raises:
        ValueError: if the checkpoint holds no quantiser.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "quantizer."
    network = checkpoint.get("network", {})
    state = {key.removeprefix(prefix): value for key, value in network.items() if key.startswith(prefix)}
    channels = [value.shape[1] for key, value in state.items() if key.startswith("projections.") and value.ndim > 1]
    codes = [value.shape for key, value in state.items() if key.endswith("embedding.weight")]
    if not codes:
        raise ValueError(f"{path} holds no quantiser: give --checkpoint a checkpoint_epoch=N.pt of pretraining.")
    quantizer = MultiScaleQuantizer(spatial_dims, channels, [shape[0] for shape in codes], codes[0][1], metric=metric)
    quantizer.load_state_dict(state)
    return quantizer


def _write_csv(path: Path, images: Sequence[str], embedding: np.ndarray[Any, Any]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"e{index}" for index in range(embedding.shape[1]))])
        for image, row in zip(images, embedding, strict=True):
            writer.writerow([image, *(f"{value:.6g}" for value in row)])
