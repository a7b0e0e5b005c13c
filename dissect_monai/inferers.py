"""How a network is run: under autocast, on any device."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import SimpleInferer


class AutocastInferer(SimpleInferer):
    """Runs the network in bfloat16 where that is safe.

    MONAI's trainer has AMP for CUDA only, with a gradient scaler that bfloat16 does not need.

    Args:
        amp: whether to autocast; off, it is `SimpleInferer`.
    """

    def __init__(self, amp: bool = True) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `network` on `inputs`; float32 parts of the network guard themselves."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return super().__call__(inputs, network, *args, **kwargs)
