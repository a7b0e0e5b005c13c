"""Segmentations scored against the label files, on their own grid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import decollate_batch
from monai.utils import ImageMetaKey
from torch import Tensor

from dissect_monai.common import InputError, Item
from dissect_monai.data.datasets import items_of
from dissect_monai.handlers.segmentation_report import (
    CaseMaps,
    CaseScores,
    case_figure,
    load_volume,
    summarize,
    summary_metrics,
    write_segmentation_report,
    write_tables,
)
from dissect_monai.metrics.segmentation import score_structures
from dissect_monai.transforms.labels import chosen_structures, integer_map, largest_components, values_to_classes
from dissect_monai.transforms.spatial import refuse_apart, to_original_grid
from dissect_monai.visualize.classifier import figure_to_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
NUM_OVERLAYS = 2


class SegmentationEvaluation:
    """Scores the predictions of an evaluator on the grid of the label files, see `score_structures` and `summarize`.

    The evaluator's `pred` must be logits or label maps of volumes, `MetaTensor`s that know the file of their image, in
    batches or decollated; an image that comes twice counts once. It leaves `dice_mean`, `hd95_mean`,
    `surface_dice_mean` (with `_low` and `_high`), `dice_<structure>`, `missed` and `false_positives` in the engine's
    metrics. Structures that no label has, or no prediction can have, are named in the log. The processes of a
    distributed run score a part of the cases each, and all of them have the metrics of all cases.

    Args:
        class_names: structures of the classes 1, 2, ...
        output_dir: folder for cases.csv, subjects.csv, summary.csv and report.html; None writes nothing.
        tolerance: of the surface Dice in mm.
        largest_only: structures of which only the largest connected part counts, see `chosen_structures`.
        num_samples: bootstrap resamples.
        seed: seed of the resamples.
        writer: TensorBoard, which gets the first two cases as overlays; None draws none.
        facts: headline facts of the report by name, such as where the weights come from; None writes no report.
        notes: sentences of the report on how to read it.
        window: values of the images that are black and white in the pictures, where the modality is CT.

    Raises:
        ValueError: during the run, as `refuse_unmapped` and `read_maps` say, or if a prediction is of no item of the
            evaluator's data set.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        output_dir: str | Path | None = None,
        tolerance: float = 2.0,
        largest_only: str | Sequence[str] = (),
        num_samples: int = 1000,
        seed: int = 0,
        writer: SummaryWriter | None = None,
        facts: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        window: tuple[float, float] | None = None,
    ) -> None:
        self.class_names = list(class_names)
        self.output_dir = output_dir
        self.tolerance = tolerance
        self.largest_only = chosen_structures(largest_only, class_names)
        self.num_samples, self.seed = num_samples, seed
        self.writer = writer
        self.facts, self.notes, self.window = facts, notes, window
        self.items: dict[str, Item] = {}
        self.cases: dict[str, CaseScores] = {}
        self.stored: dict[str, bytes] = {}

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
            maps = read_maps(item, pred, self.class_names, self.largest_only)
            self.cases[image] = score_case(item, maps, self.class_names, self.tolerance)
            if self.facts is not None:
                self.stored[image] = maps.compressed()
            if self.writer is not None and len(self.cases) <= NUM_OVERLAYS:
                figure = case_figure(item, maps, scored_classes(item, self.class_names), self.window)
                name = f"overlays/{len(self.cases)}_{Path(image).name.split('.')[0]}"
                self.writer.add_image(name, figure_to_tensor(figure), engine.state.epoch)

    def _start(self, engine: Any) -> None:
        self.items = {item["image"]: item for item in items_of(engine.data_loader.dataset)}
        self.cases, self.stored = {}, {}
        refuse_unmapped(list(self.items.values()))
        named = dict.fromkeys(name for item in self.items.values() for name in item["labels"])
        unknown = [name for name in named if name not in self.class_names]
        if unknown:
            logger.warning("Not scored, since the network has no class for them: %s.", ", ".join(unknown))

    def _finish(self, engine: Engine) -> None:
        cases = _of_all_processes(self.cases)
        summaries = summarize(cases, self.num_samples, self.seed)
        unlabelled = [each.structure for each in summaries[1:] if not each.n]
        if unlabelled:
            logger.warning("Not scored, since no label map has them: %s.", ", ".join(unlabelled))
        engine.state.metrics |= summary_metrics(summaries)
        if self.output_dir is None:
            return
        write_tables(self.output_dir, cases, summaries)
        if self.facts is None:
            return
        # All structures in all pictures, so that each has one colour.
        no_class: dict[str, list[int]] = {each.structure: [] for each in summaries[1:]}

        def draw(case: CaseScores) -> Figure | None:
            if case.case not in self.stored:
                return None
            item, maps = self.items[case.case], CaseMaps.restored(self.stored[case.case])
            return case_figure(item, maps, no_class | scored_classes(item, self.class_names), self.window)

        path = Path(self.output_dir, "report.html")
        write_segmentation_report(path, cases, summaries, draw, self.facts, self.notes)


def read_maps(item: Item, pred: Tensor, class_names: Sequence[str], largest_only: Sequence[str] = ()) -> CaseMaps:
    """Read the label file of an item as classes, and bring a prediction to its grid.

    Args:
        item: "image", "label": paths; "labels": {name: values}, as `aggregate` leaves them.
        pred: a `MetaTensor` of logits (C, X, Y, Z), or of a label map of classes (1, X, Y, Z), on any grid.
        class_names: structures of the classes 1, 2, ...; what the item names beside them is background.
        largest_only: structures of which only the largest connected part of the prediction counts.

    Raises:
        ValueError: if the label file cannot be read, has fractions or lies beside the prediction, `pred` has another
            number of classes or is no `MetaTensor`, two classes share a value, or item and classes share no structure.
    """
    label, where = load_volume(item["label"]), f"label map {item['label']}"
    classes = scored_classes(item, class_names)
    if not classes:
        raise InputError(
            f"`class_names` must share a structure with the `labels` of {item['image']}, "
            f"got {class_names} and {list(item['labels'])}."
        )
    pred_map = integer_map("pred", to_original_grid(pred, label.shape[1:], label.affine)[0].cpu().numpy())
    refuse_apart(label, pred, where)
    num_classes = len(pred) - 1 or int(pred_map.max())
    if num_classes > len(class_names) or 1 < len(pred) <= len(class_names):
        raise InputError(f"`class_names` must name the {num_classes} classes of the prediction, got {class_names}.")
    values = integer_map(where, (label[0] if len(label) == 1 else label).numpy())
    label_map, unknown = values_to_classes(values, item["labels"], class_names, where)
    if unknown:
        logger.warning(
            "%s has the values %s, which `labels` does not name: they count as background.",
            item["label"], ", ".join(map(str, unknown)),
        )  # fmt: skip
    pred_map = largest_components(pred_map, [each for name, each in classes.items() if name in largest_only])
    return CaseMaps(label_map, pred_map, label.affine.numpy(), [float(each) for each in label.pixdim])


def score_case(item: Item, maps: CaseMaps, class_names: Sequence[str], tolerance: float = 2.0) -> CaseScores:
    """Score the structures that an item and the classes share, see `score_structures`; without "subject", by image."""
    classes = scored_classes(item, class_names)
    scores = score_structures(maps.label, maps.pred, classes, maps.spacing, tolerance)
    # The table has the values of the file.
    scores = [each._replace(values=tuple(map(int, item["labels"][each.structure]))) for each in scores]
    return CaseScores(item["image"], str(item.get("subject", item["image"])), scores)


def scored_classes(item: Item, class_names: Sequence[str]) -> dict[str, list[int]]:
    """The class of each structure that an item names, {name: [class]}."""
    return {name: [list(class_names).index(name) + 1] for name in item["labels"] if name in class_names}


def _of_all_processes(cases: dict[str, CaseScores]) -> list[CaseScores]:
    """The cases of every process, each once, in the same order in all of them."""
    if not dist.is_initialized():
        return list(cases.values())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, cases)
    merged = {image: case for each in gathered for image, case in each.items()}
    return [merged[image] for image in sorted(merged)]


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
