"""Time and memory of the contrastive loss, forward and backward, against pytorch-metric-learning, lightly and MONAI.

    python benchmarks/contrast.py --device cpu

Embeddings of 128 channels: two views each of a batch of images. "three levels" contrasts images, 7 tasks and 3 groups
on the same embeddings: ours in one call, which sums their denominators once, pytorch-metric-learning by its SupConLoss
thrice. "projected" is `hierarchical_contrast`, where every level has embeddings of its own, as those of HSSLNet: three
times the work, in which pytorch-metric-learning takes as long as before. "one level" contrasts the images alone,
against the NT-Xent loss as lightly computes it (cross-entropy over two blocks of logits) and MONAI's ContrastiveLoss,
which broadcasts all pairs and is measured at a quarter of the size. The floor is three plain matrix products of all
pairs: one forward, two backward. On CPU one thread and process time, on CUDA events; a ratio is the median over the
rounds, with its extremes.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from common import Timings, at_least, at_most, compare, conclude, make_parser, peak_memory
from monai.losses import ContrastiveLoss
from torch import Tensor
from torch.nn import functional as F

from dissect_monai.losses.contrastive import hierarchical_contrast, supervised_contrast

try:
    from pytorch_metric_learning.losses import SupConLoss
except ImportError:
    sys.exit('pytorch-metric-learning is not installed; it comes with `pip install -e ".[dev]"`.')

NUM, DIM, TEMPERATURE = 4096, 128, 0.1


class Inputs(NamedTuple):
    """Embeddings of two views of every image, and the task and group of every image."""

    embeddings: Tensor  # (num, DIM)
    task: Tensor  # (num / 2,)
    group: Tensor  # (num / 2,)


Losses = Mapping[str, Callable[[Inputs], Tensor]]


def build(num: int, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(num, DIM, generator=generator).to(device).requires_grad_()
    task, group = (torch.randint(classes, (num // 2,), generator=generator).to(device) for classes in (7, 3))
    return Inputs(embeddings, task, group)


def labels_of(inputs: Inputs) -> list[Tensor]:
    images = torch.arange(len(inputs.task), device=inputs.task.device)
    return [each.repeat(2) for each in (images, inputs.task, inputs.group)]


def ours_hierarchical(inputs: Inputs) -> Tensor:
    return torch.stack(supervised_contrast(inputs.embeddings, labels_of(inputs), TEMPERATURE)).sum()


def projected_hierarchical(inputs: Inputs) -> Tensor:
    levels = [inputs.embeddings] * 3
    return torch.stack([*hierarchical_contrast(levels, inputs.task, inputs.group, TEMPERATURE).values()]).sum()


def pml_hierarchical(inputs: Inputs) -> Tensor:
    loss = SupConLoss(TEMPERATURE)
    return torch.stack([loss(inputs.embeddings, each) for each in labels_of(inputs)]).sum()


def ours_image(inputs: Inputs) -> Tensor:
    images = torch.arange(len(inputs.task), device=inputs.task.device).repeat(2)
    return supervised_contrast(inputs.embeddings, [images], TEMPERATURE)[0]


def nt_xent_image(inputs: Inputs) -> Tensor:
    """NT-Xent with the logits of lightly's NTXentLoss: each view against all others but itself, by cross-entropy."""
    first, second = F.normalize(inputs.embeddings, dim=1).chunk(2)
    num = len(first)
    others = ~torch.eye(num, dtype=torch.bool, device=first.device)
    same = [(view @ view.t() / TEMPERATURE)[others].view(num, -1) for view in (first, second)]
    cross = [a @ b.t() / TEMPERATURE for a, b in ((first, second), (second, first))]
    logits = torch.cat([torch.cat(pair, dim=1) for pair in zip(cross, same, strict=True)])
    return F.cross_entropy(logits, torch.arange(num, device=first.device).repeat(2))


def monai_image(inputs: Inputs) -> Tensor:
    return ContrastiveLoss(TEMPERATURE)(*inputs.embeddings.chunk(2))


def floor(inputs: Inputs) -> None:
    """The products that no exact loss of one level can spare: logits forward, logits again and gradient backward."""
    rows = inputs.embeddings.detach()
    products = torch.mm(rows, rows.t())
    torch.mm(rows, rows.t(), out=products)
    torch.mm(products, rows)


def step(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and the gradient of the embeddings."""
    value = loss(inputs)
    return value.detach(), torch.autograd.grad(value, inputs.embeddings)[0]


def measure(losses: Losses, num: int, device: str, rounds: int) -> Timings:
    """Check that all losses and their gradients are equal, then time them side by side."""
    inputs = build(num, device)
    expected, gradient = step(losses["ours"], inputs)
    for name, loss in losses.items():
        actual, other = step(loss, inputs)
        torch.testing.assert_close(actual, expected, msg=partial("{}: {}".format, name))
        torch.testing.assert_close(other, gradient, msg=partial("{}: {}".format, name))
    variants = {name: partial(step, loss, inputs) for name, loss in losses.items()}
    return compare({**variants, "floor": partial(floor, inputs)}, rounds, device)


def report(name: str, timings: Timings, other: str) -> None:
    print(f"{name}: {timings}")
    print(f"    {other} / ours {timings.ratio(other, 'ours')}")
    if "projected" in timings.rounds:
        print(f"    {other} / projected {timings.ratio(other, 'projected')}")
    print(f"    ours / floor {timings.ratio('ours', 'floor')}", flush=True)


def peaks(losses: Losses, device: str) -> dict[str, float]:
    """Extra peak memory in MiB of every loss."""
    used = {
        name: peak_memory(partial(build, NUM, device), partial(step, loss), device) for name, loss in losses.items()
    }
    for name, peak in used.items():
        print(f"    {name} {peak:.0f} MiB, {peak / used['ours']:.2f}x ours", flush=True)
    return used


def main() -> None:
    args = make_parser(__doc__).parse_args()

    three = {"ours": ours_hierarchical, "projected": projected_hierarchical, "pml": pml_hierarchical}
    one = {"ours": ours_image, "nt_xent": nt_xent_image}
    small = {"ours": ours_image, "monai": monai_image}
    levels = measure(three, NUM, args.device, args.rounds)
    report(f"three levels, {NUM}x{DIM}", levels, "pml")
    level = measure(one, NUM, args.device, args.rounds)
    report(f"one level, {NUM}x{DIM}", level, "nt_xent")
    quarter = measure(small, NUM // 4, args.device, args.rounds)
    report(f"one level, {NUM // 4}x{DIM}", quarter, "monai")

    print(f"extra peak memory, three levels, {NUM}x{DIM}; one copy of all pairs is {4 * NUM**2 / 2**20:.0f} MiB")
    hierarchical = peaks(three, args.device)
    print(f"extra peak memory, one level, {NUM}x{DIM}")
    single = peaks(one, args.device)

    gates = (
        at_least("time, three levels, pml / ours", levels.ratio("pml", "ours").median, 12)
        | at_least("memory, three levels, pml / ours", hierarchical["pml"] / hierarchical["ours"], 12)
        | at_least("time, one level, nt_xent / ours", level.ratio("nt_xent", "ours").median, 2.4)
        | at_least("memory, one level, nt_xent / ours", single["nt_xent"] / single["ours"], 6)
        | at_least("time, one level of a quarter, monai / ours", quarter.ratio("monai", "ours").median, 100)
        | at_most("time, one level, ours / three matrix products", level.ratio("ours", "floor").median, 2.5)
    )
    conclude(gates, binding=args.device == "cpu")


if __name__ == "__main__":
    main()
