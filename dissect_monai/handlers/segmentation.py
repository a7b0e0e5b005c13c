"""Segmentations scored against the label files, on their own grid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.transforms import LoadImage
from monai.utils import ImageMetaKey
from torch import Tensor

from dissect_monai.common import InputError, Item
from dissect_monai.data.datasets import items_of
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.handlers.segmentation_report import StoredMap, case_figure, write_segmentation_report
from dissect_monai.handlers.segmentation_table import CaseScores, metrics_by_name, summarize, write_tables
from dissect_monai.metrics.segmentation import score_structures
from dissect_monai.transforms.labels import LabelMap, classes_to_values, integer_map, largest_components
from dissect_monai.transforms.spatial import refuse_apart, to_original_grid
from dissect_monai.visualize.classifier import figure_to_tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class SegmentationEvaluation:
    """Scores the predictions of an evaluator on the grid of the label files, see `score_case` and `summarize`.

    The evaluator's `pred` must be logits or label maps of volumes, `MetaTensor`s that know the file of their image, in
    batches or decollated; an image that comes twice counts once. It leaves `dice_mean`, `hd95_mean`,
    `surface_dice_mean` (with `_low` and `_high`), `dice_<structure>`, `missed` and `false_positives` in the engine's
    metrics. Structures that no label has, or no prediction can have, are named in the log. The processes of a
    distributed run score a part of the cases each, and all of them have the metrics of all cases.

    Args:
        output_dir: folder for cases.csv, subjects.csv, summary.csv and report.html; None writes nothing.
        class_names: structures of the classes 1, 2, ...; None if predictions are label maps with the values of files.
        tolerance: of the surface Dice in mm.
        largest_only: structures, or all of them (True), of which only the largest connected part counts.
        num_samples: bootstrap resamples.
        seed: seed of the resamples.
        writer: TensorBoard, which gets the first cases as overlays; None draws none.
        num_overlays: how many cases are drawn for `writer`.
        facts: headline facts of the report by name, such as where the weights come from; None writes no report.
        notes: sentences of the report on how to read it.
        window: values of the images that are black and white in the pictures, where the modality is CT.

    Raises:
        ValueError: during the run, as `refuse_unmapped` and `score_case` say, or if a prediction is of no item of the
            evaluator's data set.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        tolerance: float = 2.0,
        largest_only: bool | Sequence[str] = False,
        num_samples: int = 1000,
        seed: int = 0,
        writer: SummaryWriter | None = None,
        num_overlays: int = 2,
        facts: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        window: tuple[float, float] | None = None,
    ) -> None:
        self.output_dir = output_dir
        self.class_names = class_names
        self.tolerance = tolerance
        self.largest_only = largest_only
        self.num_samples, self.seed = num_samples, seed
        self.writer, self.num_overlays = writer, num_overlays
        self.facts, self.notes, self.window = facts, notes, window
        self.items: dict[str, Item] = {}
        self.cases: dict[str, CaseScores] = {}
        self.stored: dict[str, StoredMap] = {}

    def attach(self, engine: Engine) -> None:
        """Score after every batch, sum up at the end; attach before what writes the metrics."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Score the predictions of one batch."""
        output = engine.state.output
        for each in output if isinstance(output, list) else decollate_batch({"pred": output["pred"]}):
            pred = each["pred"]
            image = getattr(pred, "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ)
            if image not in self.items:
                raise InputError(
                    "`pred` must know the file of its image, one of the evaluator's data set, got "
                    f"{image}: keep `track_meta` in the preprocessing."
                )
            item = self.items[image]
            maps = _read_maps(item, pred, self.class_names, self.largest_only)
            self.cases[image] = _score(item, maps, self.tolerance)
            if self.facts is not None:
                self.stored[image] = StoredMap(maps.pred)
            if self.writer is not None and len(self.cases) <= self.num_overlays:
                figure = case_figure(item, maps.pred, maps.labels, self.window)
                name = f"overlays/{len(self.cases)}_{Path(image).name.split('.')[0]}"
                self.writer.add_image(name, figure_to_tensor(figure), engine.state.epoch)

    def _start(self, engine: Any) -> None:
        self.items = {item["image"]: item for item in items_of(engine.data_loader.dataset)}
        self.cases, self.stored = {}, {}
        refuse_unmapped(list(self.items.values()))
        named = dict.fromkeys(name for item in self.items.values() for name in item["labels"])
        unknown = [name for name in named if self.class_names is not None and name not in self.class_names]
        if unknown:
            logger.warning("Not scored, since the network has no class for them: %s.", ", ".join(unknown))

    def _finish(self, engine: Engine) -> None:
        cases = _of_all_processes(self.cases)
        summaries = summarize(cases, self.num_samples, self.seed)
        unlabelled = [each.structure for each in summaries[1:] if not each.n]
        if unlabelled:
            logger.warning("Not scored, since no label map has them: %s.", ", ".join(unlabelled))
        engine.state.metrics |= metrics_by_name(summaries)
        if self.output_dir is None:
            return
        write_tables(self.output_dir, cases, summaries)
        if self.facts is not None:
            path = Path(self.output_dir, "report.html")
            facts, notes = self.facts, self.notes
            write_segmentation_report(path, cases, summaries, self.items, self.stored, facts, notes, self.window)


def score_case(
    item: Item,
    pred: Tensor,
    class_names: Sequence[str] | None = None,
    tolerance: float = 2.0,
    largest_only: bool | Sequence[str] = False,
) -> CaseScores:
    """Score a prediction on the grid of the label file of its item.

    Args:
        item: "image", "label": paths; "labels": {name: values}, as `aggregate` leaves them; "subject", else the image
            is one of its own.
        pred: a `MetaTensor` of logits (C, X, Y, Z), or of a label map (1, X, Y, Z), on any grid.
        class_names: structures of the classes 1, 2, ...; those that the item does not name, or that are no class, are
            not scored. None if `pred` is a label map with the values of the file.
        tolerance: of the surface Dice in mm.
        largest_only: structures, or all of them (True), of which only the largest connected part counts.

    Raises:
        ValueError: if the label file cannot be read, has fractions or lies beside the prediction, `pred` has another
            number of classes, is no `MetaTensor` or has logits without `class_names`, or item and classes share no
            structure.
    """
    return _score(item, _read_maps(item, pred, class_names, largest_only), tolerance)


class _Maps(NamedTuple):
    """What is compared, on the grid and with the values of the label file."""

    label: LabelMap
    pred: LabelMap
    labels: dict[str, list[int]]  # those that are scored
    spacing: list[float]


def _read_maps(
    item: Item, pred: Tensor, class_names: Sequence[str] | None, largest_only: bool | Sequence[str]
) -> _Maps:
    label = read_label(item)
    labels = {name: values for name, values in item["labels"].items() if class_names is None or name in class_names}
    if not labels:
        raise InputError(
            f"`class_names` must share a structure with the `labels` of {item['image']}, "
            f"got {class_names} and {list(item['labels'])}."
        )
    if len(pred) > 1 and len(pred) != 1 + len(class_names or ()):
        raise InputError(f"`class_names` must name the {len(pred) - 1} classes of the logits, got {class_names}.")
    pred_map = to_original_grid(pred, label.shape[1:], label.affine)[0].cpu().numpy()
    refuse_apart(label, pred, f"label map {item['label']}")
    if class_names is not None:
        pred_map = classes_to_values(pred_map, class_names, labels)
    cleaned = [name for name in labels if largest_only is True or (largest_only and name in largest_only)]
    pred_map = largest_components(pred_map, [labels[name] for name in cleaned])
    label_map = integer_map(f"label map {item['label']}", label[0].numpy())
    return _Maps(label_map, pred_map, labels, [float(each) for each in label.pixdim])


def _score(item: Item, maps: _Maps, tolerance: float) -> CaseScores:
    _name_unknown(maps.label, item)
    scores = score_structures(maps.label, maps.pred, maps.labels, maps.spacing, tolerance)
    return CaseScores(item["image"], str(item.get("subject", item["image"])), scores)


def _of_all_processes(cases: dict[str, CaseScores]) -> list[CaseScores]:
    """The cases of every process, each once, in the same order in all of them."""
    if not dist.is_initialized():
        return list(cases.values())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, cases)
    merged = {image: case for each in gathered for image, case in each.items()}
    return [merged[image] for image in sorted(merged)]


def read_label(item: Item) -> MetaTensor:
    """The label map of an item as its file has it, of shape (1, X, Y, Z) with the affine of the file."""
    load = LoadImage(ImageFileReader(spatial_dims=3), image_only=True, dtype=None, ensure_channel_first=True)
    return load(item["label"])


def refuse_unmapped(items: Sequence[Item]) -> None:
    """Refuse items that no segmentation can be scored on.

    Raises:
        ValueError: if there is none, or one lacks the path of a label map or names of its values.
    """
    for item in items:
        if not isinstance(item.get("label"), str) or not isinstance(item.get("labels"), Mapping) or not item["labels"]:
            raise InputError(
                "every volume must have a label map (`label`) and names of its values (`labels`) to be scored, got "
                f"`label` {item.get('label')!r} and `labels` {item.get('labels')!r} for {item['image']}: write them "
                'into its dataset.json, such as {"1": "spleen"}.'
            )
    if not items:
        raise InputError("segmentations must be scored on at least one volume with a label map, got none.")


def _name_unknown(label_map: LabelMap, item: Item) -> None:
    """Say which values of a label map nobody has named: they count as background."""
    named = {0, *(value for values in item["labels"].values() for value in values)}
    unknown = sorted({*np.unique(label_map).tolist()} - named)
    if unknown:
        logger.warning(
            "%s has the values %s, which `labels` does not name: they count as background.",
            item["label"], ", ".join(map(str, unknown)),
        )  # fmt: skip
