"""Speed and memory of the encoders: the table of docs/encoders.md.

    python benchmarks/encoders.py [--device cuda] [--rounds 7]

Images a second: inference, batches of 4 images of 224 px, float32; on CPU one thread and process time. The ratio to
ResNet-18 is the median over rounds in which all take turns. Memory: peak of a forward and backward pass of 4 images
over the network alone, on CPU each in a process of its own; gradients are part of it, an optimiser is not.
"""

from functools import partial

import torch
from common import compare, make_parser, peak_memory
from torch import Tensor, nn

from dissect_monai import build_encoder

NAMES = ("resnet18", "resnet50", "densenet121", "efficientnet-b0", "swin", "SegResNet")
BATCH, SIDE = 4, 224
Inputs = tuple[nn.Module, Tensor]


def build(name: str, device: str) -> Inputs:
    torch.manual_seed(0)
    return build_encoder(name).to(device), torch.rand(BATCH, 1, SIDE, SIDE, device=device)


def train(inputs: Inputs) -> None:
    network, images = inputs
    network(images).square().mean().backward()


@torch.inference_mode()
def infer(inputs: Inputs) -> None:
    network, images = inputs
    network(images)


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    device, inputs = arguments.device, {name: build(name, arguments.device) for name in NAMES}
    for network, _ in inputs.values():
        network.eval()
    timings = compare({name: partial(infer, each) for name, each in inputs.items()}, arguments.rounds, device)
    print("| encoder | million parameters | images a second | of ResNet-18 | MiB of a step |")
    print("|---|---|---|---|---|")
    for name, (network, _) in inputs.items():
        millions = sum(each.numel() for each in network.parameters()) / 1e6
        speed, share = 1e3 * BATCH / timings.median(name), timings.ratio(NAMES[0], name)
        memory = peak_memory(partial(build, name, device), train, device)
        print(f"| `{name}` | {millions:.1f} | {speed:.1f} | {share} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
