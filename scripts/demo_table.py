"""What `make demo-all` ends with: what each bundle of the chain has learnt, and where its pictures are.

python scripts/demo_table.py runs/demo
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import fire
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]


class Step(NamedTuple):
    """One bundle of the chain."""

    bundle: str
    weights_of: str  # of the bundle before
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


def rows(folder: Path) -> list[tuple[str, ...]]:
    """A line for every measure: bundle, weights, measure, first value, last value, where the pictures are."""
    lines: list[tuple[str, ...]] = []
    for step in STEPS:
        own = folder / step.bundle
        events = EventAccumulator(str(own / "eval"))
        events.Reload()
        head = (step.bundle, step.weights_of)
        for tag, title in step.measures.items():
            values = [each.value for each in events.Scalars(tag)]
            lines.append((*head, title, f"{values[0]:.3f}", f"{values[-1]:.3f}", f"{own}/{step.pictures}"))
            head = ("", "")
        tested = read_metrics(own / "eval" / "metrics.csv") if step.tested else {}
        lines += [("", "", title, "", f"{tested[name]:.3f}", "") for name, title in step.tested.items()]
    return lines


def read_metrics(path: Path) -> dict[str, float]:
    """Metrics as MONAI's `MetricsSaver` writes them: a name and a value a line."""
    pairs = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: float(value) for name, value in pairs}


def main(folder: str) -> None:
    """Print the table of a folder that `make demo-all` has filled."""
    table = [("bundle", "weights of", "measure", "first", "last", "pictures"), *rows(Path(folder))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    fire.Fire(main)
