"""How a network is run: under autocast, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer

MAX_VOXELS = 2**25  # of a volume whose logits are put together on the network's device


class AutocastInferer(SimpleInferer):
    """Runs the network in bfloat16 where that is safe.

    MONAI's trainer has AMP for CUDA only, with a gradient scaler that bfloat16 does not need.
    """

    def __init__(self, amp: bool = True) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `network` on `inputs`; float32 parts of the network guard themselves."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return super().__call__(inputs, network, *args, **kwargs)


class WindowInferer(SlidingWindowInferer):
    """Segments volumes window by window under autocast, with a 3-D network, or with a 2-D one slice by slice.

    Windows overlap, and near their borders they count less (by a Gaussian). Volumes of more than `MAX_VOXELS` are put
    together on the CPU, so that a GPU holds no more than their windows. A module is put into `channels_last_3d`, or
    into `channels_last`, in place.

    Args:
        roi_size: voxels of a window along the three axes of a volume, or the first two: then the network sees slices
            across the last axis, in batches.
        overlap: part in [0, 1) of a window that it shares with the next; 0.8 takes 5 to 16 times as many as 0.5.
        amp: whether to autocast to bfloat16.
    """

    def __init__(self, roi_size: Sequence[int], overlap: float = 0.5, amp: bool = False) -> None:
        self.of_slices = len(roi_size) == 2
        windows = 16 if self.of_slices else 4  # that pass through the network together
        super().__init__(roi_size, windows, overlap, mode="gaussian", cpu_thresh=MAX_VOXELS)
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits of shape (B, C, X, Y, Z) of volumes of shape (B, in_channels, X, Y, Z)."""
        if isinstance(network, torch.nn.Module):
            # MONAI Label passes a network of its own, whose layout would round differently and so break ties.
            layout = torch.channels_last if self.of_slices else torch.channels_last_3d
            network.to(memory_format=layout)  # type: ignore[call-overload]
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            if not self.of_slices:
                return super().__call__(inputs, network, *args, **kwargs)
            if inputs[0, 0].numel() > MAX_VOXELS:
                kwargs["device"] = "cpu"
            # Slices as a batch: their windows lie together in memory, and all have one map of weights.
            slices = inputs.as_subclass(torch.Tensor).movedim(-1, 1).flatten(0, 1)
            logits = super().__call__(slices, network, *args, **kwargs)
        logits = logits.unflatten(0, (len(inputs), -1)).movedim(1, -1)
        return MetaTensor(logits).copy_meta_from(inputs, copy_attr=False) if hasattr(inputs, "meta") else logits
