"""Time of one whole pretraining step, and images per second from the data set to the updated network.

    python benchmarks/step.py --device cpu
    python benchmarks/step.py --device cuda --encoder resnet50

The step: two views of decoded uint8 images (`TwoViews`), `VQSSLNet`, `VQSSLLoss`, backward, fused AdamW, EMA target.
Its four codebooks have the sizes of benchmarks/quantizer.py, behind the network's projections to 64 channels; maps are
fused by adding, since attention over 56x56 positions would cost more than the encoder. There is no decoder.

"monai" and "vqp" are the same step with `EMAQuantizer` (what MONAI's `VectorQuantizer` wraps) or `VectorQuantize` in
the place of every codebook, online and target, with the flags of benchmarks/quantizer.py. They run twice: in torch's
contiguous layout, which a network has unless asked otherwise, and in channels_last like ours. A gate is held against
the faster of the two. "encoder" is the floor: online encoder forward and backward, target encoder forward, on
finished views; heads, projections, codebooks, loss, augmentation, optimiser and EMA are what the step adds to it.

"loader" adds the data: uint8 images from a `CacheDataset`, augmented on the device. "monai loader" is what it replaces:
cached float images, MONAI's dict transforms of two views in 16 workers, and the step with MONAI's codebooks, otherwise
as ours. On CPU, where this is exercised but no gate is held, loaders have no workers.

On CPU one thread, float32 and process time; on CUDA bfloat16 autocast and events. A ratio is the median over the
rounds, with its extremes.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from augment import monai_transform
from common import Timings, compare
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader, set_track_meta
from monai.networks import nets
from quantizer import make_module
from torch import Tensor, nn

from dissect_monai.augment import BatchAugment, TwoViews
from dissect_monai.losses import VQSSLLoss
from dissect_monai.networks import VQSSLNet, feature_maps
from dissect_monai.optimizers import ssl_optimizer
from dissect_monai.quantizers import Quantized

NUM_EMBEDDINGS = (512, 512, 1024, 1024)  # of the four stages, as in LEVELS of quantizer.py
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Settings(NamedTuple):
    """What all variants have in common."""

    device: str
    encoder: str
    batch: int
    image_size: int

    def autocast(self) -> torch.autocast:
        """Bfloat16 on CUDA, nothing on CPU."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


class LibraryCodebook(nn.Module):
    """A library's quantiser with the interface that `VQSSLNet` expects of an `EMACodebook`."""

    def __init__(self, library: str, codes: Tensor) -> None:
        super().__init__()
        self.library = library
        module = make_module(library, codes, spatial_dims=2)
        self.quantizer = module.quantizer if library == "monai" else module

    @property
    def ema_cluster_size(self) -> Tensor:
        return self.quantizer._codebook.cluster_size[0] if self.library == "vqp" else self.quantizer.ema_cluster_size

    def forward(self, inputs: Tensor) -> Quantized:
        if self.library == "vqp":
            features, indices, commitment = self.quantizer(inputs)
            return Quantized(features, indices, commitment, inputs)
        features, commitment, indices = self.quantizer(inputs)
        return Quantized(features, indices, commitment, inputs)

    def lookup(self, inputs: Tensor) -> Quantized:
        """The cheapest call of each library that leaves the codes alone."""
        zero = inputs.new_zeros(())
        if self.library == "vqp":
            self.quantizer.eval()
            features, indices, _ = self.quantizer(inputs)
            self.quantizer.train()
            return Quantized(features, indices, zero, inputs)
        indices = self.quantizer.quantize(inputs)[2]
        return Quantized(self.quantizer.embed(indices), indices, zero, inputs)


class Step:
    """A network with the codebooks of one library, and all that trains it."""

    def __init__(self, library: str, memory_format: torch.memory_format, settings: Settings) -> None:
        torch.manual_seed(0)
        self.settings, self.memory_format = settings, memory_format
        encoder = getattr(nets, settings.encoder)(
            spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False
        )
        network = VQSSLNet(encoder, stages=(1, 2, 3, 4), num_embeddings=NUM_EMBEDDINGS, metric="euclidean", fusion="add")
        with torch.no_grad():
            network(torch.rand(2, 1, settings.image_size, settings.image_size))  # seeds the codes
        for i, codebook in enumerate(network.quantizer.codebooks):
            network.quantizer.codebooks[i] = make_codebook(library, codebook.embedding.weight.clone())
        self.network = network.to(settings.device, memory_format=memory_format)
        self.loss = VQSSLLoss()
        self.optimizer = ssl_optimizer(self.network, "adamw", learning_rate=1e-3, weight_decay=0.05)
        self.augment = TwoViews(BatchAugment(image_size=settings.image_size))

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """One step from uint8 images; returns the loss."""
        return self.train(self.augment(batch, self.settings.device, non_blocking=True).images)

    def train(self, views: Tensor) -> Tensor:
        """One step from finished views; returns the loss."""
        with self.settings.autocast():
            output = self.network(views.contiguous(memory_format=self.memory_format))
        loss = self.loss(output, views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.network.update_target(0.996)
        return loss.detach()

    def encoder_only(self, views: Tensor) -> None:
        """The floor of a step."""
        with self.settings.autocast():
            maps = feature_maps(self.network.encoder, views)
            with torch.no_grad():
                feature_maps(self.network.target.encoder, views)
        self.network.encoder.zero_grad()
        maps[-1].float().mean().backward()


def make_codebook(library: str, codes: Tensor) -> nn.Module:
    """A codebook that `VQSSLNet` can use, holding the given codes."""
    return make_module(library, codes, spatial_dims=2) if library == "ours" else LibraryCodebook(library, codes)
