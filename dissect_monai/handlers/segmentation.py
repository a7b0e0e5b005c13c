"""Segmentations scored against the label files, on their own grid."""

from __future__ import annotations

import logging
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import decollate_batch
from monai.utils import ImageMetaKey
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dissect_monai.common import PICTURE, InputError, Item, of_all_processes
from dissect_monai.data.datasets import items_of
from dissect_monai.data.identity import pseudonyms
from dissect_monai.data.masks import load_label
from dissect_monai.handlers.calibration import provenance
from dissect_monai.handlers.ending import Result, with_interval
from dissect_monai.handlers.segmentation_report import (
    CaseMaps,
    CaseScores,
    case_figure,
    representative_cases,
    summarize,
    summary_metrics,
    write_segmentation_report,
    write_tables,
)
from dissect_monai.metrics.segmentation import NAN, score_structures
from dissect_monai.transforms.labels import chosen_structures, integer_map, largest_components, values_to_classes
from dissect_monai.transforms.spatial import refuse_other_grid, to_original_grid
from dissect_monai.visualize.classifier import figure_to_png, figure_to_tensor

logger = logging.getLogger(__name__)
NUM_OVERLAYS = 2
NOTES = (
    "A line is the mean over the subjects whose label has the structure; the first is that of each subject's mean over "
    "its structures, so that subjects count alike. Intervals are percentiles of resamples of the subjects.",
    "Surface Dice is the share of both surfaces that lies within the tolerance of the other one; HD95 the distance to "
    "the other surface that 95 % of a surface stay below.",
)


@dataclass(eq=False)
class SegmentationEvaluation:
    """Scores the predictions of an evaluator on the grid of the label files, see `score_structures` and `summarize`.

    The evaluator's `pred` must be logits or label maps of volumes, `MetaTensor`s that know the file of their image, in
    batches or decollated; an image that comes twice counts once. It leaves `dice_mean`, `hd95_mean`,
    `surface_dice_mean` (with `_low` and `_high`), `dice_<structure>`, `missed` and `false_positives` in the engine's
    metrics. Distances in pictures without a spacing are in pixels. Structures that no label has, or no prediction can
    have, are named in the log. The processes of a distributed run score a part of the cases each, and all of them have
    the metrics of all cases.

    Raises:
        ValueError: during the run, as `read_maps` says, or if a prediction is of no item of the evaluator's data set.
    """

    class_names: Sequence[str]  # structures of the classes 1, 2, ...
    output_dir: str | Path | None = None  # for cases.csv, summary.csv and report.html; None writes nothing
    tolerance: float = 2.0  # of the surface Dice in mm, in pixels of pictures without a spacing
    largest_only: str | Sequence[str] = ()  # whose largest connected part alone counts, see `chosen_structures`
    num_samples: int = 1000  # bootstrap resamples
    seed: int = 0  # of the resamples
    writer: SummaryWriter | None = None  # TensorBoard, which gets the first two cases as overlays; None draws none
    facts: Mapping[str, Any] | None = None  # of the report by name, such as the weights; None writes no report
    notes: Sequence[str] = ()  # of the report, on how to read it
    window: tuple[float, float] | None = None  # values that are black and white in pictures of CT
    split: str = ""  # that is scored

    def __post_init__(self) -> None:
        self.structures = chosen_structures(self.largest_only, self.class_names)

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
            maps = read_maps(item, pred, self.class_names, self.structures)
            case = score_case(item, maps, self.class_names, self.tolerance)
            self.cases[image] = case._replace(pseudonym=self.pseudonyms[image])
            if self.facts is not None:
                self.stored[image] = zlib.compress(pickle.dumps(maps), level=1)
            if self.writer is not None and len(self.cases) <= NUM_OVERLAYS:
                name = f"overlays/{len(self.cases)}_{self.pseudonyms[image]}"
                figure = case_figure(item, maps, self.class_names, self.window)
                figure.suptitle(
                    f"Subject {self.pseudonyms[image]}, epoch {engine.state.epoch}", fontsize=10, color="white"
                )
                self.writer.add_image(name, figure_to_tensor(figure), engine.state.epoch)

    def _start(self, engine: Any) -> None:
        self.items: dict[str, Item] = {item["image"]: item for item in items_of(engine.data_loader.dataset)}
        self.pseudonyms = dict(zip(self.items, pseudonyms([*self.items.values()]), strict=True))
        self.cases: dict[str, CaseScores] = {}
        self.stored: dict[str, bytes] = {}  # label maps of all cases, of which the report draws a few
        named = dict.fromkeys(name for item in self.items.values() for name in item["labels"])
        unknown = [name for name in named if name not in self.class_names]
        if unknown:
            logger.warning("Not scored, since the network has no class for them: %s.", ", ".join(unknown))

    def _finish(self, engine: Any) -> None:
        gathered = of_all_processes(self.cases)
        scored = {image: case for each in gathered for image, case in each.items()}
        # In the same order in all processes.
        cases = [scored[image] for image in (sorted(scored) if len(gathered) > 1 else scored)]
        summaries = summarize(cases, self.num_samples, self.seed)
        unlabelled = [each.structure for each in summaries[1:] if not each.n]
        if unlabelled:
            logger.warning("Not scored, since no label map has them: %s.", ", ".join(unlabelled))
        engine.state.metrics |= summary_metrics(summaries)
        count = summaries[0].n
        subjects = f"{count} subjects" if count > 1 else "1 subject, too few for an interval"
        number = len(summaries) - 1 - len(unlabelled)
        text = f"{with_interval('mean Dice', summaries[0].dice)} of {number} structure{'s' * (number != 1)}"
        of = {"": "", "all": " of all splits"}.get(self.split, f" of the {self.split} split")
        text += f" in {subjects}{of}" + ("" if self.output_dir else f", on validation, epoch {engine.state.epoch}")
        report = [] if self.facts is None else ["report.html"]
        nothing = "nothing could be scored, since no label map has a structure"
        engine.state.result = Result(text if count else nothing, [*report, "summary.csv", "cases.csv"])
        if self.output_dir is None:
            return
        write_tables(self.output_dir, cases, summaries)
        if self.facts is not None:
            pictures = {}
            shown = (case.case for case in representative_cases(cases).values())
            for image in (image for image in shown if image in self.stored):  # not those of other processes
                maps = pickle.loads(zlib.decompress(self.stored[image]))
                pictures[image] = figure_to_png(case_figure(self.items[image], maps, self.class_names, self.window))
            largest = ", ".join(self.structures) or "none"
            facts: dict[str, Any] = {"split": self.split} if self.split else {}
            facts |= {**self.facts, "tolerance of surface Dice": self.tolerance, "largest part only": largest}
            facts, notes = provenance(facts, engine.network, self.num_samples), (*NOTES, *self.notes)
            path = Path(self.output_dir, "report.html")
            write_segmentation_report(path, cases, summaries, pictures, self.class_names, facts, notes)


def read_maps(item: Item, pred: Tensor, class_names: Sequence[str], largest_only: Sequence[str] = ()) -> CaseMaps:
    """Read the label file of an item as classes, and bring a prediction to its grid.

    Voxels that nobody has annotated (`ignored`) are background in both, so that neither is scored or drawn there.

    Args:
        item: "image", "label": paths; "labels": {name: values}; what it names beside the classes is background;
            "ignored", if there are any: values of voxels that are not annotated.
        pred: a `MetaTensor` of logits (C, X, Y, Z), or of a label map of classes (1, X, Y, Z), on any grid, with the
            metadata of its image.
        class_names: structures of the classes 1, 2, ...
        largest_only: structures of which only the largest connected part of the prediction counts.

    Raises:
        ValueError: if the label file cannot be read, has fractions or is not on the grid of its image, `pred` has
            another number of classes or is no `MetaTensor`, two classes share a value, or item and classes share no
            structure.
    """
    label, where = load_label(item["label"], item), f"label map {item['label']}"
    classes = scored_classes(item, class_names)
    if not classes:
        raise InputError(
            f"`class_names` must share a structure with the `labels` of {item['image']}, "
            f"got {class_names} and {list(item['labels'])}."
        )
    values = integer_map(where, (label[0] if len(label) == 1 else label).numpy())
    refuse_other_grid(label, pred, where)
    pred_map = integer_map("pred", to_original_grid(pred, label.shape[1:], label.affine)[0].cpu().numpy())
    num_classes = len(pred) - 1 or int(pred_map.max())
    if num_classes > len(class_names) or 1 < len(pred) <= len(class_names):
        raise InputError(f"`class_names` must name the {num_classes} classes of the prediction, got {class_names}.")
    label_map, unknown = values_to_classes(values, item["labels"], class_names, where, item.get("ignored", ()))
    if unknown:
        logger.warning(
            "%s has the values %s, which `labels` does not name: they count as background.",
            item["label"], ", ".join(map(str, unknown)),
        )  # fmt: skip
    pred_map = largest_components(pred_map, [value for name, (value,) in classes.items() if name in largest_only])
    if item.get("ignored"):
        label_map, pred_map = (np.where(np.isin(values, item["ignored"]), 0, each) for each in (label_map, pred_map))
    spacing = [float(each) for each in label.pixdim]
    return CaseMaps(label_map, pred_map, label.affine.numpy(), spacing, PICTURE in getattr(pred, "meta", {}))


def score_case(item: Item, maps: CaseMaps, class_names: Sequence[str], tolerance: float = 2.0) -> CaseScores:
    """Score the structures that an item and the classes share, see `score_structures`; without "subject", by image."""
    classes = scored_classes(item, class_names)
    scores = score_structures(maps.label, maps.pred, classes, maps.spacing, tolerance)
    # The table has the values of the file, and a picture no volume.
    scores = [each._replace(values=tuple(map(int, item["labels"][each.structure]))) for each in scores]
    if maps.is_picture:
        scores = [each._replace(label_ml=NAN, pred_ml=NAN) for each in scores]
    in_pixels = maps.is_picture and np.allclose(maps.spacing, 1)
    return CaseScores(item["image"], str(item.get("subject", item["image"])), scores, in_pixels=in_pixels)


def scored_classes(item: Item, class_names: Sequence[str]) -> dict[str, list[int]]:
    """The class of each structure that an item names, {name: [class]}."""
    return {name: [list(class_names).index(name) + 1] for name in item["labels"] if name in class_names}
