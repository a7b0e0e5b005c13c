"""How a network is run: under autocast, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
    """Segments volumes window by window under autocast.

    Windows overlap, and near their borders they count less (by a Gaussian). Volumes of more than `MAX_VOXELS` are put
    together on the CPU, so that a GPU holds no more than their windows. A module is put into `channels_last_3d`,
    in place.

    Args:
        roi_size: voxels of a window.
        overlap: part in [0, 1) of a window that it shares with the next; 0.8 takes 5 to 16 times as many as 0.5.
        amp: whether to autocast to bfloat16.
    """

    def __init__(self, roi_size: Sequence[int], overlap: float = 0.5, amp: bool = False) -> None:
        super().__init__(roi_size, 4, overlap, mode="gaussian", cpu_thresh=MAX_VOXELS)
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits of shape (B, C, X, Y, Z) of volumes of shape (B, in_channels, X, Y, Z)."""
        if isinstance(network, torch.nn.Module):
            # MONAI Label passes a network of its own, whose layout would round differently and so break ties.
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return super().__call__(inputs, network, *args, **kwargs)
