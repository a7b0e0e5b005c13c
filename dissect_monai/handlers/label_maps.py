"""Segmentations as files: label maps on the grid of their images, with the names of their structures beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from dissect_monai.common import InputError
from dissect_monai.data.datasets import ReadableLoader
from dissect_monai.data.readers import VOLUME_SUFFIXES
from dissect_monai.writing import write_csv, written_atomically


class LabelMapSaver:
    """Writes the label map of every volume as NIfTI in uint8, and a JSON of the same name with what its values mean.

    The files have the names of their images, in the same folders below `output_dir`: sub/scan.nrrd becomes
    sub/scan_seg.nii.gz and sub/scan_seg.json, which holds the path of the image, the name of each value, and the volume
    of each structure in ml. label_maps.csv lists all images with their label maps, or why they could not be read; when
    it is written, such images end the run with an error.

    The evaluator's `pred` must be label maps on the grid of their images, as `OriginalGridd` leaves them, decollated.

    Args:
        loader: the evaluator's loader.
        class_names: structures of the values 1, 2, ..., at most 255.
        output_dir: folder to write to.

    Raises:
        ValueError: if there are more structures; at the end of the run, if volumes could not be read.
    """

    def __init__(self, loader: ReadableLoader, class_names: Sequence[str], output_dir: str | Path) -> None:
        if len(class_names) > 255:
            raise InputError(f"`class_names` must be at most 255, which uint8 can number, got {len(class_names)}.")
        self.loader = loader
        self.class_names = list(class_names)
        self.output_dir = Path(output_dir)
        self.written: dict[int, Path] = {}

    def attach(self, engine: Engine) -> None:
        """Write after every volume, and the table at the end."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Write the label maps of one batch."""
        for entry, item in zip(engine.state.batch, engine.state.output, strict=True):
            index = int(entry["index"])
            path = self.output_dir / f"{self.names[index]}_seg.nii.gz"
            save_label_map(item["pred"], path)
            self._describe(item["pred"], self.loader.dataset.data[index]["image"], path)
            self.written[index] = path

    def _start(self, engine: Engine) -> None:
        self.written = {}
        self.names = relative_names([item["image"] for item in self.loader.dataset.data])

    def _describe(self, label_map: MetaTensor, image: str, path: Path) -> None:
        voxel_ml = float(np.prod(label_map.pixdim.numpy())) / 1000
        counts = np.bincount(np.asarray(label_map.cpu()).ravel(), minlength=len(self.class_names) + 1)
        volumes = {
            name: round(int(count) * voxel_ml, 3) for name, count in zip(self.class_names, counts[1:], strict=True)
        }
        labels = dict(enumerate(["background", *self.class_names]))
        content = {"image": image, "label_map": path.name, "labels": labels, "volumes_ml": volumes}
        with written_atomically(path.with_name(path.name.removesuffix(".nii.gz") + ".json")) as file:
            file.write((json.dumps(content, indent=4) + "\n").encode(errors="replace"))

    def _finish(self, engine: Engine) -> None:
        path, errors = self.output_dir / "label_maps.csv", self.loader.errors
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows = [
            [item["image"], self.written.get(index, ""), errors.get(index, "")]
            for index, item in enumerate(self.loader.dataset.data)
        ]
        write_csv(path, ["image", "label_map", "error"], rows)
        engine.logger.info("Wrote the label maps of %d volumes to %s.", len(self.written), self.output_dir)
        self.loader.refuse_unreadable(path)


def save_label_map(label_map: MetaTensor, path: str | Path) -> None:
    """Write a label map as NIfTI in uint8, with its affine in both headers.

    Args:
        label_map: shape (1, X, Y, Z), values in [0, 255].
        path: a name that ends in .nii.gz; the file appears whole.
    """
    affine = label_map.affine.cpu().numpy().astype(float)
    image = nibabel.Nifti1Image(np.asarray(label_map.cpu())[0].astype(np.uint8), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner", strip_shears=True)
    image.header.set_xyzt_units("mm")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nibabel.save(image, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def relative_names(images: Sequence[str]) -> list[str]:
    """A different name for each image, from its path below the folder that all share, without suffix.

    Example:
        >>> relative_names(["/data/a/scan.nii.gz", "/data/b/scan.nrrd", "/data/b/scan.nii.gz"])
        ['a/scan', 'b/scan.nrrd', 'b/scan.nii.gz']
    """
    folder = os.path.commonpath([os.path.dirname(image) for image in images]) if images else ""
    relative = [os.path.relpath(image, folder) for image in images]
    short = [_without_suffix(name) for name in relative]
    names = [name if short.count(brief) > 1 else brief for name, brief in zip(relative, short, strict=True)]
    # a.mha, a.nrrd and a.mha.nii would give a.mha twice.
    return names if len({*names}) == len({*relative}) else relative


def _without_suffix(name: str) -> str:
    suffixes = [suffix for suffix in VOLUME_SUFFIXES if name.lower().endswith(suffix)]
    return name[: -len(max(suffixes, key=len))] if suffixes else name
