"""Time of one whole pretraining step, and images per second from the data set to the updated network.

    python benchmarks/step.py --device cpu
    python benchmarks/step.py --device cuda --encoder resnet50

The step: two views of decoded uint8 images (`Views`), `VQSSLNet` without a decoder, `VQSSLLoss`, backward, fused
AdamW, EMA target of BYOL. The codebooks are at stages 2, 3, 4 (strides 8, 16, 32), with 64 channels and 1,024 codes.
The lookup is Euclidean, the only one that MONAI has, and maps are fused by "add", because attention would add to all
variants alike and hide the codebooks; `--fusion attention` measures it.

"monai" and "vqp" are the same step with `EMAQuantizer` (what MONAI's `VectorQuantizer` wraps) or `VectorQuantize` in
the place of every codebook, online and target, with the flags of benchmarks/quantizer.py. Each runs in torch's default
contiguous layout, and once more in channels_last like ours; a gate is held against the faster of the two. "encoder" is
the floor: online encoder forward and backward and target encoder forward, on finished views. All else is what the step
adds to it: projections, codebooks, heads, loss, augmentation, optimiser, EMA.

"byol", "nt_xent" and "vicreg" are our step with each objective, the two latter without predictors and momentum target,
and the peak memory that network, optimiser and one step add to a fresh process.

"loader" adds the data: uint8 images from a cache, augmented on the device; "device loader" has them on the device. A
gate is held against the faster. "monai loader" is what it replaces: float
images from a `CacheDataset`, MONAI's dict transforms of two views in 16 workers, and the step with MONAI's codebooks in
channels_last. On CPU it runs with `--loader` only, without workers and without a gate.

On CPU one thread, float32 and process time; on CUDA bfloat16 autocast and events. A ratio is the median over the
rounds, with its extremes.
"""

import argparse
from functools import partial
from typing import Any

import torch
from augment import make_images, monai_transform
from common import Timings, at_least, at_most, compare, conclude, make_parser, peak_memory
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader, Dataset, set_track_meta
from monai.networks import nets
from quantizer import make_module
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from dissect_monai.data.datasets import DeviceLoader, cached_dataset
from dissect_monai.losses.joint_embedding import OBJECTIVES
from dissect_monai.losses.pretraining import VQSSLLoss
from dissect_monai.networks.encoders import feature_maps
from dissect_monai.networks.optimizers import adamw
from dissect_monai.networks.quantizers import Quantized
from dissect_monai.networks.vqssl import FUSIONS, VQSSLNet
from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import Views

Batch = dict[str, Tensor]

STEP_GATES = {"monai": 1.25, "vqp": 1.3}  # times as fast, on CPU
MAX_SHARE = 0.1  # of the step, outside the encoder, on CPU
LOADER_GATES = {"resnet18": 0.75, "resnet50": 0.85}  # of the encoder's images per second, on CUDA
MONAI_LOADER_GATE = 3  # times as fast, on CUDA
NUM_BATCHES = {"cpu": 2, "cuda": 8}  # per epoch of a loader


class LibraryCodebook(nn.Module):
    """MONAI's or vector-quantize-pytorch's quantiser, as `VQSSLNet` expects an `EMACodebook` to behave."""

    quantizer: Any

    def __init__(self, library: str, codes: Tensor) -> None:
        super().__init__()
        module: Any = make_module(library, codes, spatial_dims=2)
        self.library = library
        self.quantizer = module.quantizer if library == "monai" else module

    @property
    def ema_cluster_size(self) -> Tensor:
        """Running cluster sizes, by which the network weighs its scales."""
        return self.quantizer.ema_cluster_size if self.library == "monai" else self.quantizer._codebook.cluster_size[0]

    def forward(self, inputs: Tensor) -> Quantized:
        """Quantise and move the codes."""
        if self.library == "monai":
            features, commitment, indices = self.quantizer(inputs)
        else:
            features, indices, commitment = self.quantizer(inputs)
        return Quantized(features, indices, commitment, inputs)

    def lookup(self, inputs: Tensor) -> Quantized:
        """Quantise by the fastest calls that leave the codes alone."""
        if self.library == "monai":
            indices = self.quantizer.quantize(inputs)[2]
            features = self.quantizer.embed(indices)
        else:
            features, indices, _ = self.quantizer.eval()(inputs)
            self.quantizer.train()
        return Quantized(features, indices, inputs.new_zeros(()), inputs)


class Step:
    """A network with the codebooks of one library, and all that trains it; called with a batch of uint8 images."""

    def __init__(
        self,
        library: str,
        memory_format: torch.memory_format,
        batch: Batch,
        args: argparse.Namespace,
        objective: str = "byol",
    ) -> None:
        torch.manual_seed(0)
        self.device = args.device
        self.augment = Views(BatchAugment(image_size=args.image_size))
        encoder = getattr(nets, args.encoder)(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
        network: Any = VQSSLNet(
            encoder, num_embeddings=1024, metric="euclidean", fusion=args.fusion, predict=objective == "byol"
        )
        self.network = network.to(args.device, memory_format=memory_format)
        with torch.no_grad():
            self.network(self.augment(batch, args.device).images)  # seeds the codes from the data
        for i, codebook in enumerate(self.network.codebooks):
            self.network.quantizer.codebooks[i] = make_codebook(library, codebook.embedding.weight)
        self.loss = VQSSLLoss(objective=objective)
        self.optimizer = adamw(self.network, learning_rate=1e-3, weight_decay=0.05)

    def __call__(self, batch: Batch) -> Tensor:
        """One step from images; returns the loss."""
        return self.train(self.augment(batch, self.device, non_blocking=True).images)

    def train(self, views: Tensor) -> Tensor:
        """One step from finished views; returns the loss."""
        with self.autocast():
            output = self.network(views)
        loss = self.loss(output, views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.network.target is not None:
            self.network.update_target(0.996)
        return loss.detach()

    def encoder_only(self, views: Tensor) -> None:
        """The floor of a step."""
        with self.autocast():
            maps = feature_maps(self.network.encoder, views)
            with torch.no_grad():
                feature_maps(self.network.target.encoder, views)
        self.network.encoder.zero_grad()
        maps[-1].float().mean().backward()

    def autocast(self) -> torch.autocast:
        """As the bundles train: bfloat16 on CUDA only."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


def make_codebook(library: str, codes: Tensor) -> Any:
    """A codebook for `VQSSLNet` that holds the given codes."""
    codes = codes.detach().clone()
    codebook = make_module(library, codes, spatial_dims=2) if library == "ours" else LibraryCodebook(library, codes)
    return codebook.to(codes.device).train()


def check(steps: dict[str, Step], batch: Batch) -> None:
    """All steps must begin with the same loss, and all codebooks quantise alike."""
    ours = steps["ours"]
    losses = {name: step(batch) for name, step in steps.items()}
    rtol = 1e-3 if ours.device == "cpu" else 0.03  # layouts round bfloat16 differently
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses["ours"], rtol=rtol, atol=0, msg=partial("{}: {}".format, name))
    with torch.no_grad():
        maps = feature_maps(ours.network.encoder, ours.augment(batch, ours.device).images)[1:]
        for features, projection, codebook in zip(
            maps, ours.network.quantizer.projections, ours.network.codebooks, strict=True
        ):
            check_codebooks(projection(features), codebook.embedding.weight)


def check_codebooks(inputs: Tensor, codes: Tensor) -> None:
    """The same features of all libraries, but for codes that are equally near up to rounding."""
    expected = make_codebook("ours", codes)(inputs)
    for library in STEP_GATES:
        codebook = make_codebook(library, codes)
        for output in (codebook.lookup(inputs), codebook(inputs)):
            same = (output.features - expected.features).abs().amax(1) < 1e-4
            assert same.float().mean() > 0.999, (library, same.float().mean())
        torch.testing.assert_close(output.commitment.squeeze(), expected.commitment, rtol=1e-4, atol=0)


def measure_steps(args: argparse.Namespace) -> Timings:
    """Time whole steps and their floor side by side."""
    batch = make_batch(args)
    steps = {"ours": Step("ours", torch.channels_last, batch, args)}
    for library in STEP_GATES:
        steps[library] = Step(library, torch.contiguous_format, batch, args)
        steps[f"{library} channels_last"] = Step(library, torch.channels_last, batch, args)
    check(steps, batch)
    variants = {name: partial(step, batch) for name, step in steps.items()}
    views = torch.rand(2 * args.batch, 1, args.image_size, args.image_size, device=args.device)
    return compare({**variants, "encoder": partial(steps["ours"].encoder_only, views)}, args.rounds, args.device)


def measure_objectives(args: argparse.Namespace) -> tuple[Timings, dict[str, float]]:
    """Times of our step with each objective side by side, and MiB that each adds to a fresh process."""
    batch = make_batch(args)
    steps = {name: Step("ours", torch.channels_last, batch, args, objective=name) for name in OBJECTIVES}
    timings = compare({name: partial(step, batch) for name, step in steps.items()}, args.rounds, args.device)
    build = partial(make_batch, args)
    return timings, {
        name: peak_memory(build, partial(step_once, args=args, objective=name), args.device) for name in OBJECTIVES
    }


def step_once(batch: Batch, args: argparse.Namespace, objective: str) -> None:
    """A network that takes one step."""
    Step("ours", torch.channels_last, batch, args, objective)(batch)


def make_batch(args: argparse.Namespace) -> Batch:
    """Decoded images, on the device."""
    return {"image": make_images(args.batch).to(args.device)}


def our_loader(images: Tensor, args: argparse.Namespace) -> DataLoader:
    """Cached uint8 images, as the bundles load them."""
    keep_bytes = mt.EnsureTyped("image", dtype=torch.uint8, track_meta=False)
    return make_loader(cached_dataset([{"image": image} for image in images], keep_bytes), 8, args)


def monai_loader(images: Tensor, args: argparse.Namespace) -> DataLoader:
    """Cached float images and two views of each by dict transforms, without metadata."""
    set_track_meta(False)
    steps = [
        mt.ScaleIntensityRanged("image", 0, 255, 0, 1),
        mt.CopyItemsd("image", names="image_2"),
        *monai_transform(one_affine=True, size=args.image_size).transforms,
        *monai_transform(one_affine=True, size=args.image_size, key="image_2").transforms,
    ]
    items = [{"image": image} for image in images]
    return make_loader(CacheDataset(items, mt.Compose(steps), progress=False), 16, args)


def make_loader(dataset: Dataset, num_workers: int, args: argparse.Namespace) -> DataLoader:
    """On CPU without workers, whose time the clock of this process would miss."""
    on_gpu = args.device == "cuda"
    return DataLoader(
        dataset,
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers if on_gpu else 0,
        persistent_workers=on_gpu,
        pin_memory=on_gpu,
        multiprocessing_context="fork" if on_gpu else None,  # keeps `set_track_meta`
    )


def measure_loaders(args: argparse.Namespace) -> Timings:
    """Time an epoch of each loader with its step, and as many steps of the encoder alone."""
    num_batches = NUM_BATCHES[args.device]
    images = make_images(num_batches * args.batch)
    batch = {"image": images[: args.batch]}
    ours, monai = (Step(library, torch.channels_last, batch, args) for library in ("ours", "monai"))
    loader, dict_loader = our_loader(images, args), monai_loader(images, args)
    shuffled = RandomSampler(loader.dataset)
    device_loader = DeviceLoader(loader.dataset, args.batch, shuffled, args.device)
    synthetic = torch.rand(2 * args.batch, 1, args.image_size, args.image_size, device=args.device)

    def with_loader() -> None:
        for batch in loader:
            ours(batch)

    def with_monai_loader() -> None:
        for batch in dict_loader:
            views = [batch[key].to(args.device, non_blocking=True) for key in ("image", "image_2")]
            monai.train(torch.cat(views))

    def with_device_loader() -> None:
        for batch in device_loader:
            ours(batch)

    def encoder() -> None:
        for _ in range(num_batches):
            ours.encoder_only(synthetic)

    variants = {
        "loader": with_loader,
        "device loader": with_device_loader,
        "monai loader": with_monai_loader,
        "encoder": encoder,
    }
    return compare(variants, args.rounds, args.device, warmup=1)


def report_steps(timings: Timings, args: argparse.Namespace) -> dict[str, bool]:
    """Print times, ratios and the share outside the encoder; the gates hold on CPU."""
    for name in timings.rounds:
        print(f"{name:20s} {timings.median(name):8.0f} ms   / ours {timings.ratio(name, 'ours')}")
    encoder = timings.ratio("encoder", "ours")
    share = 1 - encoder.median
    print(f"share of our step outside the encoder {share:.1%} ({1 - encoder.high:.1%} to {1 - encoder.low:.1%})")
    if args.device != "cpu":
        return {}
    gates: dict[str, bool] = {}
    for library, gate in STEP_GATES.items():
        ratio = min(timings.ratio(name, "ours").median for name in timings.rounds if name.startswith(library))
        gates |= at_least(f"time, step with {library} / ours", ratio, gate)
    return gates | at_most("share of our step outside the encoder", share, MAX_SHARE)


def report_objectives(timings: Timings, memory: dict[str, float]) -> dict[str, bool]:
    """Print times, memory and ratios; none may be slower than `byol`."""
    for name in OBJECTIVES:
        ratio = timings.ratio(name, "byol")
        print(f"{name:20s} {timings.median(name):8.0f} ms   / byol {ratio}   peak {memory[name]:.0f} MiB")
    others = [name for name in OBJECTIVES if name != "byol"]
    gates = [at_most(f"time, {name} / byol", timings.ratio(name, "byol").median, 1) for name in others]
    return {name: holds for gate in gates for name, holds in gate.items()}


def report_loaders(timings: Timings, args: argparse.Namespace) -> dict[str, bool]:
    """Print images per second and ratios; the gates hold on CUDA."""
    for name in timings.rounds:
        speed = 1e3 * NUM_BATCHES[args.device] * args.batch / timings.median(name)
        print(f"{name:20s} {speed:8.0f} images/s   time / loader {timings.ratio(name, 'loader')}")
    if args.device != "cuda":
        return {}
    efficiency, gain = (
        max(timings.ratio(name, ours).median for ours in ("loader", "device loader"))
        for name in ("encoder", "monai loader")
    )
    return at_least(f"images/s, ours / {args.encoder} alone", efficiency, LOADER_GATES[args.encoder]) | at_least(
        "images/s, ours / monai loader", gain, MONAI_LOADER_GATE
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--encoder", choices=LOADER_GATES, default="resnet18")
    parser.add_argument("--batch", type=int, help="default: 16 on CPU, 256 on CUDA")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--fusion", choices=FUSIONS, default="add")
    parser.add_argument("--loader", action="store_true", help="measure the loaders on CPU as well")
    parser.add_argument("--loader-only", action="store_true", help="measure nothing else")
    args = parser.parse_args()
    args.batch = args.batch or {"cpu": 16, "cuda": 256}[args.device]

    torch.manual_seed(0)
    gates: dict[str, bool] = {}
    if not args.loader_only:
        gates = report_steps(measure_steps(args), args) | report_objectives(*measure_objectives(args))
    if args.loader or args.loader_only or args.device == "cuda":
        gates |= report_loaders(measure_loaders(args), args)
    conclude(gates)


if __name__ == "__main__":
    main()
