"""The discrete codes of images, and the images of codes: what pretraining leaves beside the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dissect_monai.common import InputError
from dissect_monai.networks.encoders import PROBE_SIDE, encoder_of, feature_maps, stage_shapes
from dissect_monai.networks.quantizers import EMACodebook, MultiScaleQuantizer
from dissect_monai.networks.vqssl import Decoder, VQSSLNet
from dissect_monai.networks.weights import load_torch, load_weights, read_settings
from dissect_monai.writing import save_atomically

CODEBOOKS, DECODER = "codebooks.pt", "decoder.pt"
REMEDY = "give the `output_dir` of a finished pretraining, which has models/ and codes/"


class DiscreteCodes(nn.Module):
    """Turns images into codes at several scales, and codes into images: pretraining without its heads and target.

    `stages` of the encoder are quantised, counted from 1, fine to coarse; without a reconstruction term there is no
    `decoder`.
    """

    def __init__(
        self, encoder: nn.Module, quantizer: MultiScaleQuantizer, stages: Sequence[int], decoder: Decoder | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        self.stages = tuple(stages)
        self.decoder = decoder
        self._stride = 0  # of the finest scale, which only decoding needs
        if decoder is not None:
            channels = len(decoder.head.get_parameter("bias"))
            spatial_dims = quantizer.projections[0].get_parameter("weight").ndim - 2
            self._stride = PROBE_SIDE // stage_shapes(encoder, spatial_dims, channels)[stages[0] - 1][1]
        self.eval()

    def train(self, mode: bool = True) -> DiscreteCodes:
        """Stay in evaluation mode, whatever network this is a part of: training mode would move the codes."""
        return super().train(False)

    @property
    def num_embeddings(self) -> list[int]:
        """Number of codes of each scale, fine to coarse."""
        return [codebook.num_embeddings for codebook in self._codebooks]

    @property
    def _codebooks(self) -> list[EMACodebook]:
        return cast("list[EMACodebook]", list(self.quantizer.codebooks))

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """The code of every position, at every scale.

        Args:
            images: shape (B, C, *spatial), float in [0, 1], as pretraining saw them: the axes as MONAI's readers give
                them, (x, y), not rows and columns; intensities from an image's 0.5th to its 99.5th percentile, or as
                `NormalizeModalityd` scales them for volumes.

        Returns:
            one tensor (B, *spatial_i) for each stage, fine to coarse, int64 in [0, num_embeddings[i]).
        """
        if not images.is_floating_point():
            raise InputError(f"`images` must be float in [0, 1], got {images.dtype}: scale their intensities first.")
        maps = feature_maps(self.encoder, images.float())
        return [scale.indices for scale in self.quantizer([maps[stage - 1] for stage in self.stages])]

    def histograms(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """How often each code stands in each image: of `indices` as `encode` returns them, (B, num_embeddings[i])."""
        flat = [each.flatten(1) for each in indices]
        counts = [each.new_zeros(len(each), number) for each, number in zip(flat, self.num_embeddings, strict=True)]
        pairs = zip(counts, flat, strict=True)
        return [count.scatter_add_(1, each, torch.ones_like(each)) for count, each in pairs]

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor], image_size: Sequence[int] | None = None) -> Tensor:
        """The image that the decoder makes of codes.

        Args:
            indices: as `encode` returns them.
            image_size: spatial size of the images; None for the positions of the finest scale times its stride.

        Returns:
            shape (B, C, *image_size), float in [0, 1].
        """
        if self.decoder is None:
            raise InputError("these codes have no decoder: pretrain with a positive `reconstruction_weight`.")
        if len(indices) != len(self.stages):
            raise InputError(f"`indices` must have {len(self.stages)} tensors, one per stage, got {len(indices)}.")
        maps = [codebook.features_of(each) for codebook, each in zip(self._codebooks, indices, strict=True)]
        size = image_size or [side * self._stride for side in indices[0].shape[1:]]
        return cast("Tensor", self.decoder(maps, size))


def save_codes(network: VQSSLNet, directory: str | Path) -> None:
    """Write projections and codebooks as codebooks.pt and the decoder as decoder.pt, plain state dicts."""
    save_atomically(network.quantizer.state_dict(), Path(directory, CODEBOOKS))
    if network.decoder is None:
        Path(directory, DECODER).unlink(missing_ok=True)
    else:
        save_atomically(network.decoder.state_dict(), Path(directory, DECODER))


def load_codes(path: str | Path) -> DiscreteCodes:
    """The codes of a pretraining, on the CPU.

    Args:
        path: the `output_dir` of the run, or a bundle unpacked from its archive: models/model.pt and model.json,
            codes/codebooks.pt, and codes/decoder.pt if there was a reconstruction term; or such a models/model.pt.

    Raises:
        FileNotFoundError: if one of the others is missing.
        ValueError: if a file is damaged or of something else, or the encoder is none that the bundle pretrains.
    """
    weights = Path(path) if Path(path).suffix == ".pt" else Path(path, "models", "model.pt")
    folder = codes_dir(weights)
    state = load_torch(folder / CODEBOOKS, REMEDY)
    settings = read_settings(weights)
    try:
        encoder = load_weights(_build_encoder(settings, weights), weights)
        kernels = [value for name, value in state.items() if name.startswith("projections.") and value.ndim > 1]
        sizes = [len(value) for name, value in state.items() if name.endswith("embedding.weight")]
        spatial_dims, width = settings["spatial_dims"], len(kernels[0])
        channels = [kernel.shape[1] for kernel in kernels]
        quantizer = MultiScaleQuantizer(spatial_dims, channels, sizes, width, metric=settings["metric"])
        quantizer.load_state_dict(state)
        decoder = None
        if (folder / DECODER).is_file():
            state = load_torch(folder / DECODER, REMEDY)
            decoder = Decoder(spatial_dims, width, len(state["head.bias"]), len(kernels))
            decoder.load_state_dict(state)
        return DiscreteCodes(encoder, quantizer, settings["stages"], decoder)
    except (KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{folder} does not hold the codes of {weights} ({error}): {REMEDY}.") from error


def codes_dir(weights: str | Path) -> Path:
    """The folder of the codes that belong to a models/model.pt: codes/ beside models/."""
    return Path(weights).absolute().parent.parent / "codes"


def _build_encoder(settings: Mapping[str, Any], weights: Path) -> nn.Module:
    try:
        return encoder_of(settings)
    except (KeyError, InputError) as error:
        raise InputError(f"{weights} must be of an encoder that was pretrained, got {error}: {REMEDY}.") from error
