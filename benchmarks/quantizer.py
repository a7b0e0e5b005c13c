"""Time and memory of one codebook train step (forward, backward, EMA) against MONAI and vector-quantize-pytorch.

    python benchmarks/quantizer.py --device cpu

Every implementation gets the layout that suits it: contiguous for MONAI and vector-quantize-pytorch, channels_last for
ours, which is how the bundles train; "contiguous" is ours on contiguous maps. All run with the same flags: EMA decay
0.99, commitment 0.25, straight-through gradient, no data-dependent start, no revival of dead codes. The floor is one
plain matrix product of all rows and codes. On CPU one thread and process time, on CUDA events; a ratio is the median
over the rounds, with its extremes.
"""

import math
import sys
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import torch
from common import Timings, at_least, at_most, compare, conclude, make_parser, peak_memory
from monai.networks.layers.vector_quantizer import EMAQuantizer, VectorQuantizer
from torch import Tensor, nn

from dissect_monai.networks.quantizers import EMACodebook

try:
    from vector_quantize_pytorch import VectorQuantize
except ImportError:
    sys.exit('vector-quantize-pytorch is not installed; it comes with `pip install -e ".[bench]"`.')


class Level(NamedTuple):
    """Size of one feature map and its codebook."""

    shape: tuple[int, ...]  # (B, C, *spatial)
    num_embeddings: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} K {self.num_embeddings}"


# The four stages of a ResNet at 224 px, and one stage of a 3-D network.
LEVELS = [
    Level((32, 64, 56, 56), 512),
    Level((32, 128, 28, 28), 512),
    Level((32, 256, 14, 14), 1024),
    Level((32, 512, 7, 7), 1024),
]
VOLUME = Level((4, 128, 12, 12, 12), 512)
LIBRARIES = ["monai", "vqp", "contiguous", "ours"]


class Inputs(NamedTuple):
    """A module, its input and the gradient that will reach its features."""

    library: str
    module: nn.Module
    features: Tensor
    gradient: Tensor


def build(library: str, level: Level, device: str) -> Inputs:
    """Make one implementation ready to run; features and codes are the same for all."""
    torch.manual_seed(0)
    batch, channels, *spatial = level.shape
    # Drawn as rows, so that the channels_last maps are views and the memory baseline holds no second copy of them.
    rows = torch.randn(batch, *spatial, channels, device=device)
    gradient = torch.randn(rows.shape, device=device).movedim(-1, 1)
    codes = rows.flatten(0, -2)[:: rows[..., 0].numel() // level.num_embeddings][: level.num_embeddings].clone()
    features = rows.movedim(-1, 1)
    if library != "ours":
        features, gradient = features.contiguous(), gradient.contiguous()
    module = make_module(library, codes, len(spatial)).to(device).train()
    return Inputs(library, module, features.requires_grad_(), gradient)


def make_module(library: str, codes: Tensor, spatial_dims: int) -> nn.Module:
    """The quantiser of a library, holding the given codes."""
    num, channels = codes.shape
    if library == "vqp":
        maps = {"accept_image_fmap": spatial_dims == 2, "accept_3d_fmap": spatial_dims == 3}
        vqp = VectorQuantize(channels, num, decay=0.99, commitment_weight=0.25, rotation_trick=False, **maps)
        vqp.codebook = codes
        vqp._codebook.embed_avg.copy_(codes)
        return vqp
    monai = EMAQuantizer(spatial_dims, num, channels, commitment_cost=0.25, decay=0.99)
    monai.load_state_dict({"embedding.weight": codes, "ema_w": codes, "ema_cluster_size": torch.ones(num)})
    if library == "monai":
        return VectorQuantizer(monai)
    ours = EMACodebook(num, channels, data_init=False, revive_fraction=0)
    ours.load_state_dict(monai.state_dict())
    return ours


def train_step(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, EMA update, backward; quantised features, commitment and the gradient of the input."""
    inputs.features.grad = None
    output = inputs.module(inputs.features)
    if inputs.library == "monai":
        commitment, features = output
    elif inputs.library == "vqp":
        features, _, commitment = output
    else:
        features, commitment = output.features, output.commitment
    torch.autograd.backward((features, commitment), (inputs.gradient, torch.ones_like(commitment)))
    assert inputs.features.grad is not None
    return features.detach(), commitment.detach(), inputs.features.grad


def measure(level: Level, device: str, rounds: int) -> Timings:
    """Check that all implementations compute the same, then time them side by side."""
    inputs = {library: build(library, level, device) for library in LIBRARIES}
    for _ in range(2):
        features, commitment, gradient = train_step(inputs["monai"])
        for library in LIBRARIES[1:]:
            other = train_step(inputs[library])
            # But for a few positions on CUDA, whose two nearest codes are equally near up to rounding.
            same = torch.isclose(other[0], features, rtol=1e-4, atol=1e-4).flatten(2).all(1)
            assert same.float().mean() >= (1 if device == "cpu" else 0.999), (library, same.float().mean())
            torch.testing.assert_close(other[1].squeeze(), commitment, msg=partial("{}: {}".format, library))
            gradients = (each.flatten(2).movedim(1, -1)[same] for each in (other[2], gradient))
            torch.testing.assert_close(*gradients, msg=partial("{}: {}".format, library))
    channels = level.shape[1]
    rows = inputs["monai"].features.detach().movedim(1, -1).reshape(-1, channels)
    codes = torch.randn(channels, level.num_embeddings, device=device)
    variants = {library: partial(train_step, inputs[library]) for library in LIBRARIES}
    return compare({**variants, "floor": partial(torch.mm, rows, codes)}, rounds, device)


def report(name: object, timings: Timings) -> None:
    """Print one line of times and the ratios that matter."""
    print(f"{name}: {timings}")
    for library in ("monai", "vqp"):
        contiguous = timings.ratio(library, "contiguous")
        print(f"    {library} / ours {timings.ratio(library, 'ours')}, / contiguous {contiguous}")
    print(f"    ours / floor {timings.ratio('ours', 'floor')}")


def main() -> None:
    args = make_parser(__doc__).parse_args()

    timings = []
    for level in LEVELS:
        timings.append(measure(level, args.device, args.rounds))
        report(level, timings[-1])
    total = reduce(add, timings)
    report("sum of the four levels", total)
    report(f"{VOLUME}, not in the sum", measure(VOLUME, args.device, args.rounds))

    print(
        f"extra peak memory at {LEVELS[0]}; one copy of the input is {4 * math.prod(LEVELS[0].shape) / 2**20:.0f} MiB"
    )
    peaks = {
        lib: peak_memory(partial(build, lib, LEVELS[0], args.device), train_step, args.device) for lib in LIBRARIES
    }
    for library, peak in peaks.items():
        print(f"    {library} {peak:.0f} MiB, {peak / peaks['ours']:.2f}x ours")

    conclude(
        at_least("time, monai / ours", total.ratio("monai", "ours").median, 4)
        | at_least("time, vqp / ours", total.ratio("vqp", "ours").median, 5)
        | at_most("time, ours / one matrix product", total.ratio("ours", "floor").median, 2.5)
        | at_least("memory, monai / ours", peaks["monai"] / peaks["ours"], 4)
        | at_least("memory, vqp / ours", peaks["vqp"] / peaks["ours"], 5),
        binding=args.device == "cpu",
    )


if __name__ == "__main__":
    main()
