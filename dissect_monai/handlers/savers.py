"""What inference leaves of every image: probabilities, label maps, embeddings."""

from __future__ import annotations

import gzip
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from PIL import Image
from torch import Tensor, nn

from dissect_monai.common import NO_FINDING, PICTURE, InputError
from dissect_monai.data.datasets import ReadableLoader
from dissect_monai.data.readers import IMAGE_SUFFIX
from dissect_monai.networks.codes import DiscreteCodes
from dissect_monai.visualize.classifier import has_saliency, overlay, saliency_maps, whole_image
from dissect_monai.writing import write_csv, written_atomically

OVERLAYS = ("none", "top", "all")


class Saver(ABC):
    """Collects a result of every image of a `ReadableLoader` after every batch, and writes `path` at the end of a run.

    Raises:
        ValueError: when all is written, if images could not be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Collect after every batch, write at the end."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def __call__(self, engine: Any) -> None:
        """Keep the results of one batch."""
        batch = engine.state.batch
        indices = batch["index"].tolist() if isinstance(batch, dict) else [int(each["index"]) for each in batch]
        self.results |= zip(indices, self._collect(indices, engine), strict=True)

    @property
    def images(self) -> list[str]:
        """Paths of all images."""
        return [str(item["image"]) for item in self.loader.dataset.data]

    def rows(self, unknown: Any = "") -> Iterator[tuple[str, Any, str]]:
        """Path of every image, its result or `unknown`, and the error or an empty text."""
        for index, image in enumerate(self.images):
            yield image, self.results.get(index, unknown), self.loader.errors.get(index, "")

    def _start(self, engine: Any) -> None:
        self.loader: ReadableLoader = engine.data_loader
        self.results: dict[int, Any] = {}  # by the index of the image

    @abstractmethod
    def _collect(self, indices: list[int], engine: Any) -> Iterable[Any]:
        """The results of one batch, of images with these indices."""

    @abstractmethod
    def _write(self) -> None:
        """Write `path`."""

    def _finish(self, engine: Engine) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        engine.logger.info("Wrote the results of %d images to %s.", len(self.results), self.path)
        self.loader.refuse_unreadable(self.path)


class PredictionSaver(Saver):
    """Writes probabilities.csv: for every image its path, the probability of each finding, and why it cannot be read.

    With thresholds there is a column "<finding> called" for each finding: 1 if it reaches its threshold, else 0. The
    evaluator's output must hold probabilities (a sigmoid is the last of its postprocessing) and have `decollate=False`.

    Args:
        label_names: names of the C findings, the columns.
        output_dir: folder for the table and the overlays.
        overlays: saliency to draw over the original image, with finding, probability and threshold, as
            overlays/<index>_<image>_<finding>.png: "none", "top" (of each image the finding furthest above its
            threshold, or the likeliest without thresholds; never "No finding") or "all"; for 2-D images.
        thresholds: probability from which on each finding is called, as `read_calibration` gives them; with NaN it is
            neither called nor not. None calls nothing.

    Overlays of an earlier run are deleted when a run starts, since they may be of other images.

    Raises:
        ValueError: if the thresholds are of other findings; during the run, if there are more or fewer probabilities
            than names.
    """

    def __init__(
        self,
        label_names: Sequence[str],
        output_dir: str | Path,
        overlays: str = "none",
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(Path(output_dir, "probabilities.csv"))
        self.label_names = list(label_names)
        self.overlays = overlays
        self.thresholds = dict(thresholds or {})
        if self.thresholds and list(self.thresholds) != self.label_names:
            got = ", ".join(self.thresholds)
            raise InputError(f"`thresholds` must be of {', '.join(self.label_names)}, in this order, got {got}.")

    def _start(self, engine: Any) -> None:
        super()._start(engine)
        self.overlays = self.overlays if self.overlays == "none" or has_saliency(engine.network) else "none"
        for path in self.path.parent.glob("overlays/[0-9][0-9][0-9][0-9][0-9]*_*.png"):
            path.unlink()

    def _collect(self, indices: list[int], engine: Any) -> list[list[float]]:
        output = engine.state.output
        probabilities = output["pred"].as_subclass(Tensor).detach().cpu()
        if probabilities.shape[1] != len(self.label_names):
            got = f"{probabilities.shape[1]} outputs, got {len(self.label_names)}"
            raise InputError(f"`label_names` must name the network's {got}.")
        if self.overlays != "none":
            self._draw(engine.network, indices, output["image"].as_subclass(Tensor), probabilities)
        return probabilities.tolist()

    def _draw(self, network: nn.Module, indices: list[int], images: Tensor, probabilities: Tensor) -> None:
        folder = self.path.parent / "overlays"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = torch.ones_like(probabilities, dtype=torch.bool)
        if self.overlays == "top":
            score = self._score(probabilities)
            wanted = (score == score.amax(1, keepdim=True)) & ~score.isneginf()
        for finding in wanted.any(0).nonzero().flatten().tolist():
            rows = wanted[:, finding].nonzero().flatten().tolist()
            maps = saliency_maps(network, images[rows], finding)
            for row, saliency in zip(rows, maps, strict=True):
                path, label = self.images[indices[row]], self.label_names[finding]
                name = f"{indices[row]:05d}_{Path(path).name.split('.')[0]}_{label}".replace(" ", "_").replace("/", "_")
                caption = f"{label}: probability {float(probabilities[row, finding]):.3f}"
                caption += f", threshold {self.thresholds[label]:.3f}" if label in self.thresholds else ""
                (folder / f"{name}.png").write_bytes(overlay(whole_image(path), saliency, caption))

    def _score(self, probabilities: Tensor) -> Tensor:
        """By how much each finding is the one to look at; −inf for what is none, or has no threshold."""
        score = probabilities.double().logit()
        if self.thresholds:
            thresholds = torch.tensor([*self.thresholds.values()], dtype=score.dtype)
            score = (score - thresholds.logit()).nan_to_num(-inf, inf, -inf)
        score[:, [name.lower() == NO_FINDING.lower() for name in self.label_names]] = -inf
        return score

    def _write(self) -> None:
        lines = []
        for image, result, error in self.rows(unknown=[nan] * len(self.label_names)):
            texts = ["" if isnan(value) else f"{value:.6f}" for value in result]
            pairs = zip(result, self.thresholds.values(), strict=True) if self.thresholds else ()
            calls = ["" if isnan(value + threshold) else int(value >= threshold) for value, threshold in pairs]
            lines.append([image, *texts, *calls, error])
        called = [f"{name} called" for name in self.thresholds]
        write_csv(self.path, ["image", *self.label_names, *called, "error"], lines)


class LabelMapSaver(Saver):
    """Writes the label map of every volume as NIfTI in uint8, and a JSON of the same name with what its values mean.

    The files have the names of their images, in the same folders below `output_dir`: sub/scan.nrrd becomes
    sub/scan_seg.nii.gz and sub/scan_seg.json, which holds the path of the image, the name of each value, and the volume
    of each structure in ml. label_maps.csv lists all images with their label maps, or why they could not be read.

    Those of pictures are PNG masks of the same size, with values or colours as in the masks of training, and their JSON
    has the area of each structure in pixels, or in mm² if the picture has a spacing.

    The evaluator's `pred` must be label maps on the grid of their images, as `OriginalGridd` leaves them, decollated.

    Args:
        class_names: structures of the values 1, 2, ..., at most 255.
        output_dir: folder to write to.
        mask_values: what each structure is in the mask of a picture: a value, or a colour [red, green, blue]. What is
            not there has the value of its class.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        output_dir: str | Path,
        mask_values: Mapping[str, int | list[int]] | None = None,
    ) -> None:
        if len(class_names) > 255:
            raise InputError(f"`class_names` must be at most 255, which uint8 can number, got {len(class_names)}.")
        super().__init__(Path(output_dir, "label_maps.csv"))
        self.class_names = list(class_names)
        of_masks = {"background": 0, **(mask_values or {})}
        given = [of_masks.get(name, value) for value, name in enumerate(["background", *class_names])]
        in_colour = any(isinstance(each, list) for each in given)
        self.of_classes = [[each] * 3 if in_colour and isinstance(each, int) else each for each in given]

    def _start(self, engine: Any) -> None:
        super()._start(engine)
        self.names = relative_names(self.images)

    def _collect(self, indices: list[int], engine: Any) -> list[Path]:
        return [self._save(index, each["pred"]) for index, each in zip(indices, engine.state.output, strict=True)]

    def _save(self, index: int, label_map: MetaTensor) -> Path:
        is_picture = PICTURE in label_map.meta
        path = self.path.parent / f"{self.names[index]}_seg{'.png' if is_picture else '.nii.gz'}"
        names = ["background", *self.class_names]
        labels: dict[Any, Any] = dict(enumerate(names))
        size, key = float(np.prod(label_map.pixdim.numpy())) / 1000, "volumes_ml"
        if is_picture:
            save_mask(label_map, path, self.of_classes)
            in_colour = isinstance(self.of_classes[0], list)
            labels = dict(zip(*((names, self.of_classes) if in_colour else (self.of_classes, names)), strict=True))
            size = float(np.prod(label_map.pixdim.numpy()[:2]))
            key = "areas_pixels" if size == 1 else "areas_mm2"
        else:
            save_label_map(label_map, path)
        counts = np.bincount(np.asarray(label_map.cpu()).ravel(), minlength=len(names))[1:]
        sizes = {name: round(int(count) * size, 3) for name, count in zip(self.class_names, counts, strict=True)}
        content = {"image": self.images[index], "label_map": path.name, "labels": labels, key: sizes}
        with written_atomically(path.with_name(IMAGE_SUFFIX.sub("", path.name) + ".json")) as file:
            file.write((json.dumps(content, indent=4) + "\n").encode(errors="replace"))
        return path

    def _write(self) -> None:
        write_csv(self.path, ["image", "label_map", "error"], self.rows())


def save_label_map(label_map: MetaTensor, path: str | Path) -> None:
    """Write a label map of shape (1, X, Y, Z), values in [0, 255], as .nii.gz in uint8, its affine in both headers."""
    affine = label_map.affine.cpu().numpy().astype(float)
    image = nibabel.Nifti1Image(np.asarray(label_map.cpu())[0].astype(np.uint8), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner", strip_shears=True)
    image.header.set_xyzt_units("mm")
    with written_atomically(path) as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as compressed:
        compressed.write(image.to_bytes())


def save_mask(label_map: MetaTensor, path: str | Path, of_classes: Sequence[int | list[int]]) -> None:
    """Write a label map of shape (1, X, Y, 1) as PNG, with a value or a colour [red, green, blue] for each class."""
    lookup = np.array(of_classes)
    values = lookup[np.asarray(label_map.cpu())[0, :, :, 0].T]
    with written_atomically(path) as file:
        Image.fromarray(values.astype(np.uint8 if lookup.max() < 256 else np.uint16)).save(file, "PNG")


def relative_names(images: Sequence[str]) -> list[str]:
    """A different name for each image, from its path below the folder that all share, without suffix.

    Example:
        >>> relative_names(["/data/a/scan.nii.gz", "/data/b/scan.nrrd", "/data/b/scan.nii.gz"])
        ['a/scan', 'b/scan.nrrd', 'b/scan.nii.gz']
    """
    folder = os.path.commonpath([os.path.dirname(image) for image in images]) if images else ""
    relative = [os.path.relpath(image, folder) for image in images]
    short = [IMAGE_SUFFIX.sub("", name) for name in relative]
    names = [name if short.count(brief) > 1 else brief for name, brief in zip(relative, short, strict=True)]
    # a.mha, a.nrrd and a.mha.nii would give a.mha twice.
    return names if len({*names}) == len({*relative}) else relative


class EmbeddingSaver(Saver):
    """Writes one embedding per image to embeddings.csv or embeddings.npz.

    The CSV has a line per image: its path, why it could not be read (or nothing), then the embedding. The NPZ has, of
    the N images that could be read, `image` (N,), `embedding` (N, D) and, with codes, for each stage S the code maps
    `codes_stageS` (N, *spatial) and their histograms `histogram_stageS` (N, number of codes); and `unreadable` and
    `error` of the others. The evaluator must have `decollate=False`.

    Args:
        output_dir: folder of the file.
        output_format: `csv` or `npz`.
        codes: as `load_codes` gives them, of the encoder's pretraining; None writes no codes.

    Raises:
        ValueError: if codes are asked for in a CSV.
    """

    def __init__(self, output_dir: str | Path, output_format: str = "csv", codes: DiscreteCodes | None = None) -> None:
        if codes is not None and output_format != "npz":
            raise InputError("`output_format` must be npz for codes, which are maps, got csv.")
        super().__init__(Path(output_dir, f"embeddings.{output_format}"))
        self.codes = codes

    def _collect(self, indices: list[int], engine: Any) -> list[dict[str, Any]]:
        output = engine.state.output
        parts = {"embedding": output["pred"]}
        if self.codes is not None:
            images = output["image"].as_subclass(Tensor)
            codes = self.codes.to(images.device).encode(images)
            for stage, maps, counts in zip(self.codes.stages, codes, self.codes.histograms(codes), strict=True):
                parts |= {f"codes_stage{stage}": maps.int(), f"histogram_stage{stage}": counts.int()}
        arrays = [part.detach().as_subclass(Tensor).cpu().numpy() for part in parts.values()]
        return [dict(zip(parts, each, strict=True)) for each in zip(*arrays, strict=True)]

    def _write(self) -> None:
        images, errors = self.images, self.loader.errors
        first: dict[str, Any] = next(iter(self.results.values()), {})
        if self.path.suffix == ".npz":
            arrays: dict[str, Any] = {name: np.stack([each[name] for each in self.results.values()]) for name in first}
            arrays |= {"image": [images[index] for index in self.results], "error": list(errors.values())}
            np.savez_compressed(self.path, **arrays, unreadable=[images[index] for index in errors])
            return
        results = self.rows(unknown={"embedding": []})
        rows = [[image, error, *(f"{value:.6g}" for value in each["embedding"])] for image, each, error in results]
        width = len(first.get("embedding", ()))
        write_csv(self.path, ["image", "error", *(f"e{index}" for index in range(width))], rows)
