"""What `make demo` and `make demo-all` end with: what has been learnt, and where its pictures are.

python scripts/demo_table.py gain bundles/pretrain_vq_ssl
python scripts/demo_table.py chain runs/demo
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fire
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]


class Step(NamedTuple):
    """One bundle of the chain."""

    bundle: str
    weights_of: str  # the bundle before
    measures: dict[str, str]  # tag of TensorBoard → what it is
    tested: dict[str, str]  # metric of the evaluation's metrics.csv → what it is
    pictures: str  # below its folder


STEPS = (
    Step("pretrain_vq_ssl", "–", {"knn_auroc": "k-NN AUROC, frozen features"}, {}, "eval (TensorBoard)"),
    Step(
        "cxr_classify", "pretrain_vq_ssl", {"auroc": "AUROC, validation"}, {"auroc": "AUROC, test"}, "eval/report.html"
    ),
    Step(
        "hssl_multidomain",
        "–",
        {"accuracy_task": "task told rightly", "reconstruction_error": "error of masked voxels (1: blank mean)"},
        {},
        "eval (TensorBoard)",
    ),
    Step(
        "seg_finetune_btcv",
        "hssl_multidomain",
        {"dice_mean": "Dice of 13 organs, validation"},
        {"dice_mean": "Dice, test", "dice_liver": "Dice of the liver, test"},
        "eval/report.html",
    ),
)


def rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """A line for every measure: bundle, weights, measure, first value, last value, where the pictures are."""
    for step in STEPS:
        own = folder / step.bundle
        head = (step.bundle, step.weights_of)
        for tag, title in step.measures.items():
            yield (*head, title, *first_and_last(own, tag), f"{own}/{step.pictures}")
            head = ("", "")
        if step.tested:
            with open(own / "eval" / "metrics.csv", newline="", encoding="utf-8") as file:
                tested = dict(csv.reader(file))
            for name, title in step.tested.items():
                yield ("", "", title, "", f"{float(tested[name]):.3f}", "")


def first_and_last(run: Path, tag: str) -> list[str]:
    """First and last value of a scalar in the newest event file of a run."""
    newest = max((run / "eval").glob("*tfevents*"), key=lambda path: path.stat().st_mtime_ns)
    events = EventAccumulator(str(newest))
    events.Reload()
    values = [each.value for each in events.Scalars(tag)]
    return [f"{value:.3f}" for value in (values[0], values[-1])]


def gain(folder: str) -> None:
    """Print what frozen features tell before and after pretraining, of a folder with its training and evaluation."""
    with open(Path(folder, "eval", "findings.csv"), newline="", encoding="utf-8") as file:
        probes = {tuple(row.values())[:5]: f"{float(row['auroc']):.3f}" for row in csv.DictReader(file)}
    linear = [probes[source, "stages", "linear", "findings", "macro"] for source in ("random", "pretrained")]
    show(
        ("AUROC of frozen features, all stages", "random weights", "pretrained"),
        ("k-NN, all labels (validation)", *first_and_last(Path(folder), "knn_auroc_stages")),
        ("linear probe, a quarter of the labels (test)", *linear),
    )


def chain(folder: str) -> None:
    """Print the table of a folder that `make demo-all` has filled."""
    show(("bundle", "weights of", "measure", "first", "last", "pictures"), *rows(Path(folder)))


def show(*lines: tuple[str, ...]) -> None:
    """Print lines in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    fire.Fire({"gain": gain, "chain": chain})
