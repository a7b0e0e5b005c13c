"""Speed and memory of the encoders: the table of docs/encoders.md.

    python benchmarks/encoders.py [--device cuda] [--rounds 3]

Images a second: inference, batches of 4 images of 224 px, float32; on CPU one thread and process time. The ratio to
ResNet-18 is the median over rounds in which all take turns. Memory is counted, not measured: what autograd keeps of an
image for the backward pass, each storage once, without the parameters.
"""

from functools import partial

import torch
from common import compare, make_parser
from torch import Tensor, nn

from dissect_monai import build_encoder

NAMES = ("resnet18", "resnet50", "densenet121", "efficientnet-b0", "swin", "SegResNet")
BATCH, SIDE = 4, 224


@torch.inference_mode()
def infer(network: nn.Module, images: Tensor) -> None:
    network(images)


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass in training keeps for the backward pass."""
    own = {each.untyped_storage().data_ptr() for each in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        output = network.train()(images)
    counted = sum(each.untyped_storage().nbytes() for key, each in kept.items() if key not in own)
    del output
    return counted


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    torch.manual_seed(0)
    images = torch.rand(BATCH, 1, SIDE, SIDE, device=arguments.device)
    networks = {name: build_encoder(name).to(arguments.device).eval() for name in NAMES}
    variants = {name: partial(infer, network, images) for name, network in networks.items()}
    timings = compare(variants, arguments.rounds, arguments.device, warmup=1)
    print("| `--encoder` | million parameters | images a second | time of ResNet-18's | MiB kept of an image |")
    print("|---|---|---|---|---|")
    for name, network in networks.items():
        millions = sum(each.numel() for each in network.parameters()) / 1e6
        speed, ratio = 1e3 * BATCH / timings.median(name), timings.ratio(name, NAMES[0])
        kept = kept_bytes(network, images) / BATCH / 2**20
        print(f"| `{name}` | {millions:.1f} | {speed:.1f} | {ratio} | {kept:.0f} |", flush=True)


if __name__ == "__main__":
    main()
