"""Writing embeddings, and optionally codes, of many images to one file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import eval_mode
from numpy.typing import NDArray
from torch import Tensor, nn

from dissect_monai.common import InputError
from dissect_monai.data.datasets import ReadableLoader
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.networks.quantizers import MultiScaleQuantizer
from dissect_monai.networks.weights import load_torch

FORMATS = ("csv", "npz")


class EmbeddingSaver:
    """Writes one embedding per image to embeddings.csv or embeddings.npz.

    The CSV has a line per image: its path, why it could not be read (or nothing), then the embedding. The NPZ has, of
    the N images that could be read, `image` (N,), `embedding` (N, C) and, with a quantiser, `codes_stageS`
    (N, *spatial) for each stage S; and `unreadable` and `error` of the others. When all is written, images that could
    not be read end the run with an error.

    Args:
        loader: the evaluator's loader.
        output_dir: folder of the file.
        output_format: `csv` or `npz`.
        encoder: the evaluator's network; only used for the codes.
        checkpoint: a `checkpoint_epoch=N.pt` of pretraining whose codebooks give the codes; None writes no codes.

    Raises:
        ValueError: if the format is unknown, or codes are asked for in a CSV; at the end, if images could not be read.
    """

    def __init__(
        self,
        loader: ReadableLoader,
        output_dir: str | Path,
        output_format: str = "csv",
        encoder: nn.Module | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        if output_format not in FORMATS:
            raise InputError(f"`output_format` must be csv or npz, got {output_format!r}.")
        if checkpoint is not None and output_format != "npz":
            raise InputError("codes are maps, which a CSV cannot hold: give --output_format npz.")
        self.loader = loader
        self.path = Path(output_dir) / f"embeddings.{output_format}"
        self.encoder = encoder
        self.codes = None if checkpoint is None else load_quantizer(checkpoint)
        self.arrays: dict[str, list[Tensor]] = {}

    def attach(self, engine: Engine) -> None:
        """Collect after every batch, write at the end."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def __call__(self, engine: Engine) -> None:
        """Keep the embeddings, and the codes, of one batch."""
        self._keep("embedding", engine.state.output["pred"])
        if self.codes is None or self.encoder is None:
            return
        quantizer, stages = self.codes
        with torch.inference_mode(), eval_mode(self.encoder):  # the evaluator has left that mode
            maps = feature_maps(self.encoder, engine.state.output["image"].as_subclass(Tensor))
            quantized = quantizer.eval().to(maps[0].device)([maps[stage - 1] for stage in stages])
        for stage, scale in zip(stages, quantized, strict=True):
            self._keep(f"codes_stage{stage}", scale.indices.int())

    def _keep(self, name: str, values: Tensor) -> None:
        self.arrays.setdefault(name, []).append(values.detach().as_subclass(Tensor).cpu())

    def _write(self, engine: Engine) -> None:
        arrays = {name: torch.cat(parts).numpy() for name, parts in self.arrays.items()}
        images, errors = [str(item["image"]) for item in self.loader.dataset.data], self.loader.errors
        read = [image for index, image in enumerate(images) if index not in errors]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix == ".npz":
            arrays |= {"image": np.array(read), "unreadable": np.array([images[index] for index in errors])}
            np.savez_compressed(self.path, error=np.array(list(errors.values())), **arrays)  # type: ignore[arg-type]
        else:
            _write_csv(self.path, images, errors, arrays.get("embedding", np.zeros((0, 0))))
        engine.logger.info("Wrote %d embeddings to %s.", len(read), self.path)
        self.loader.refuse_unreadable(self.path)


class TrainedQuantizer(NamedTuple):
    """The quantiser of a pretraining run."""

    quantizer: MultiScaleQuantizer
    stages: list[int]  # the stages of the encoder that it quantises, counted from 1


def load_quantizer(path: str | Path) -> TrainedQuantizer:
    """Projections and codebooks of a training checkpoint; their sizes and settings are read from it.

    Args:
        path: a `checkpoint_epoch=N.pt` of `TrainingCheckpoint`.

    Raises:
        ValueError: if the checkpoint holds no quantiser.
    """
    checkpoint = load_torch(path, "give --checkpoint a checkpoint_epoch=N.pt of pretraining")
    prefix, settings = "quantizer.", checkpoint.get("settings", {})
    network = checkpoint.get("network", {})
    state = {key.removeprefix(prefix): value for key, value in network.items() if key.startswith(prefix)}
    channels = [value.shape[1] for key, value in state.items() if key.startswith("projections.") and value.ndim > 1]
    codes = [value.shape for key, value in state.items() if key.endswith("embedding.weight")]
    if not codes or "stages" not in settings:
        raise InputError(f"{path} holds no quantiser: give --checkpoint a checkpoint_epoch=N.pt of pretraining.")
    quantizer = MultiScaleQuantizer(
        settings["spatial_dims"], channels, [shape[0] for shape in codes], codes[0][1], metric=settings["metric"]
    )
    quantizer.load_state_dict(state)
    return TrainedQuantizer(quantizer, settings["stages"])


def _write_csv(path: Path, images: Sequence[str], errors: dict[int, str], embedding: NDArray[Any]) -> None:
    rows = iter(embedding)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "error", *(f"e{index}" for index in range(embedding.shape[1]))])
        for index, image in enumerate(images):
            if index in errors:
                writer.writerow([image, errors[index]])
            else:
                writer.writerow([image, "", *(f"{value:.6g}" for value in next(rows))])
