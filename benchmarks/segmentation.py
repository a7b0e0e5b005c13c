"""Time of an epoch of seg_finetune_btcv with its data on the device, against MONAI's CacheDataset on the CPU.

    python benchmarks/segmentation.py --device cuda [--data DIR]

Both are the recipe itself, with its network, patches and transforms: "on device" keeps preprocessed volumes on the
device and draws patches there, in one thread; "cached" keeps them in main memory (a CacheDataset), draws patches in 8
workers, and moves them. Both run under autocast to bfloat16 on CUDA. Random transforms draw the same in both, so that
the losses, which are printed, agree but for rounding. One after the other, the first epoch left out; without --data on
phantoms of the abdomen, and on a CPU small, without workers and without a gate.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Timings, at_least, conclude, make_parser
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow

from dissect_monai import write_volume_phantoms

CONFIG = Path(__file__).resolve().parent.parent / "bundles" / "seg_finetune_btcv" / "configs" / "train.json"
GATE = 1.5  # times as fast, on CUDA
KNOBS: dict[str, Any] = {"label_fraction": 0.34, "iterations_per_epoch": 15, "select": "last", "warmup_epochs": 0}
ON_CPU = {"pixdim": [12, 12, 12], "patch_size": [16, 16, 16], "init_filters": 8, "iterations_per_epoch": 2}


class EpochClock:
    """Milliseconds and mean loss of every epoch."""

    def __init__(self, trainer: Engine) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        trainer.add_event_handler(Events.EPOCH_STARTED, self.start)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.stop)

    def start(self) -> None:
        """Begin an epoch."""
        self.started = time.perf_counter()

    def stop(self, engine: Engine) -> None:
        """End an epoch."""
        self.losses.append(float(engine.state.output["loss"].detach()))  # waits for the device
        self.times.append(1e3 * (time.perf_counter() - self.started))


def measure(data: str, on_device: bool, device: str, rounds: int, folder: str) -> EpochClock:
    """Train for a few epochs."""
    small = ON_CPU if device == "cpu" else {}
    knobs = {**KNOBS, **small, "num_workers": 0 if device == "cpu" else 8, "max_epochs": rounds + 1}
    knobs |= {"dataset_dir": data, "device": device, "on_device": on_device, "val_interval": rounds + 2}
    workflow = ConfigWorkflow(str(CONFIG), workflow_type="train", logging_file=False, output_dir=folder, **knobs)
    workflow.initialize()
    clock = EpochClock(workflow.parser.get_parsed_content("train#trainer"))
    workflow.run()
    workflow.finalize()
    return clock


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", help="folder with the dataset.json of a segmentation")
    args = parser.parse_args()
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        size = 24 if args.device == "cpu" else 96
        data = args.data or str(write_volume_phantoms(folder, 6, 2, 0, image_size=size, tasks=["abdomen_ct"])[0])
        clocks = {
            name: measure(data, name == "on device", args.device, args.rounds, f"{folder}/{name}")
            for name in ("on device", "cached")
        }
    timings = Timings({name: clock.times[1:] for name, clock in clocks.items()})
    for name, clock in clocks.items():
        losses = " ".join(f"{loss:.3f}" for loss in clock.losses)
        print(f"{name:10s} {timings.median(name):8.0f} ms an epoch   / on device {timings.ratio(name, 'on device')}")
        print(f"    losses {losses}")
    ratio = timings.ratio("cached", "on device").median
    conclude(at_least("time of an epoch, cached / on device", ratio, GATE) if args.device == "cuda" else {})


if __name__ == "__main__":
    main()
