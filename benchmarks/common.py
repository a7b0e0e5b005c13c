"""Timing and peak memory, shared by the benchmarks; `python benchmarks/<name>.py` finds it beside itself."""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch


class Ratio(NamedTuple):
    """How many times slower one variant is than another: the median over the rounds and its extremes."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


class Timings(NamedTuple):
    """Milliseconds of every round of every variant; round i of all variants ran side by side."""

    rounds: dict[str, list[float]]

    def __str__(self) -> str:
        return "  ".join(f"{name} {self.median(name):.2f}" for name in self.rounds) + " ms"

    def median(self, name: str) -> float:
        """Median time of one variant in milliseconds."""
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """Time of `slow` over time of `fast`, taken round by round."""
        ratios = [a / b for a, b in zip(self.rounds[slow], self.rounds[fast], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def __add__(self, other: "Timings") -> "Timings":  # type: ignore[override]
        """Times of doing both, round by round; several levels of a network are summed so."""
        return Timings(
            {
                name: [a + b for a, b in zip(times, other.rounds[name], strict=True)]
                for name, times in self.rounds.items()
            }
        )


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that the benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def compare(
    variants: Mapping[str, Callable[[], object]], rounds: int = 7, device: str = "cpu", warmup: int = 2
) -> Timings:
    """Time the variants interleaved, so that a drift of the machine meets all of them alike.

    On CPU one thread and process time, which other processes do not disturb; on CUDA events.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    clock = _cpu_milliseconds if device == "cpu" else _cuda_milliseconds
    for _ in range(warmup):
        for variant in variants.values():
            variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(clock(variant))
    return Timings(times)


def peak_memory(build: Callable[[], Any], step: Callable[[Any], object], device: str = "cpu") -> float:
    """Extra peak memory in MiB of `step(build())` over `build()` alone, on CPU each in a fresh process.

    Both must be picklable then: functions of a module, or `functools.partial` of such.
    """
    if device != "cpu":
        return _peak_on_gpu(build, step)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        used = pool.apply(_peak, (build, step))
        baseline = pool.apply(_peak, (build, None))
    return used - baseline


def at_least(name: str, value: float, limit: float) -> dict[str, bool]:
    """A gate, with the value that is held against it."""
    return {f"{name} {value:.2f} >= {limit:g}": value >= limit}


def at_most(name: str, value: float, limit: float) -> dict[str, bool]:
    """A gate, with the value that is held against it."""
    return {f"{name} {value:.2f} <= {limit:g}": value <= limit}


def conclude(gates: Mapping[str, bool], binding: bool = True) -> NoReturn:
    """Say which gates hold; the exit status is 1 if one is missed. Gates of another device do not bind."""
    for gate, holds in gates.items():
        print(f"{('holds' if holds else 'MISSED') if binding else 'measured'}: {gate}")
    sys.exit(binding and not all(gates.values()))


def _cpu_milliseconds(variant: Callable[[], object]) -> float:
    start = time.process_time()
    variant()
    return 1e3 * (time.process_time() - start)


def _cuda_milliseconds(variant: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    variant()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _peak(build: Callable[[], Any], step: Callable[[Any], object] | None) -> float:
    torch.set_num_threads(1)
    inputs = build()
    if step is not None:
        step(inputs)
    # Not resource.ru_maxrss: over spawn a process inherits the peak of its parent.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) / 1024 if peak else float("nan")


def _peak_on_gpu(build: Callable[[], Any], step: Callable[[Any], object]) -> float:
    step(build())  # the libraries' workspaces come with the first call and stay
    inputs = build()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20
