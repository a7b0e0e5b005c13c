"""What `make demo-all` ends with: first and last values of its trainings, and the tests, in one table.

python scripts/demo_table.py runs/demo
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import fire
from fire.decorators import SetParseFn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from dissect_monai.writing import aligned


class Measure(NamedTuple):
    """One line of the chain."""

    bundle: str
    name: str  # tag of TensorBoard, or metric of the evaluation's metrics.csv
    title: str
    is_tested: bool = False  # whether the evaluation measured it


WEIGHTS_OF = {"cxr_classify": "pretrain_vq_ssl", "seg_finetune_btcv": "hssl_multidomain"}
MEASURES = (
    Measure("pretrain_vq_ssl", "knn_auroc/mean", "k-NN AUROC, frozen features"),
    Measure("cxr_classify", "auroc/mean", "AUROC, validation"),
    Measure("cxr_classify", "auroc", "AUROC, test", is_tested=True),
    Measure("hssl_multidomain", "accuracy/task", "task told rightly"),
    Measure("hssl_multidomain", "reconstruction_error/mean", "error of masked voxels (1: blank mean)"),
    Measure("seg_finetune_btcv", "dice/mean", "Dice of 13 organs, validation"),
    Measure("seg_finetune_btcv", "dice_mean", "Dice, test", is_tested=True),
    Measure("seg_finetune_btcv", "dice_liver", "Dice of the liver, test", is_tested=True),
)


def rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """A line for every measure: bundle, weights, measure, first value, last value."""
    for bundle, measures in groupby(MEASURES, lambda measure: measure.bundle):
        own, weights = folder / bundle, WEIGHTS_OF.get(bundle)
        head = (bundle, weights or "–")
        for _, name, title, is_tested in measures:
            if is_tested:
                with open(own / "eval" / "metrics.csv", newline="", encoding="utf-8") as file:
                    yield ("", "", title, "", f"{float(dict(csv.reader(file))[name]):.3f}")
            else:
                yield (*head, title, *first_and_last(own, name))
                head = ("", "")


def first_and_last(run: Path, tag: str) -> list[str]:
    """First and last value of a scalar in the newest event file of a run."""
    newest = max((run / "eval").glob("*tfevents*"), key=lambda path: path.stat().st_mtime_ns)
    values = [each.value for each in EventAccumulator(str(newest)).Reload().Scalars(tag)]
    return [f"{value:.3f}" for value in (values[0], values[-1])]


def chain(folder: str) -> None:
    """Print the table of a folder that `make demo-all` has filled."""
    print(aligned([("bundle", "weights of", "measure", "first", "last"), *rows(Path(folder))]))


if __name__ == "__main__":
    fire.Fire(SetParseFn(str)(chain))  # a path, as it is typed
