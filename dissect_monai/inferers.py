"""How a network is run: under autocast, on any device."""

from __future__ import annotations

from collections.abc import Mapping
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


def prepare_images(
    batchdata: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Batch of a MONAI evaluator whose images are cached as uint8: move them first, scale them to [0, 1] there.

    Args:
        batchdata: with an "image" of any shape, uint8, or float, which is left as it is; and possibly a "label".
        device: where to.
        non_blocking: whether the copy may overlap.
        kwargs: for `Tensor.to`.

    Returns:
        the images as float32, and the label, or None.
    """
    image = torch.as_tensor(batchdata["image"]).to(device, non_blocking=non_blocking, **kwargs)
    label = batchdata.get("label")
    if label is not None:
        label = torch.as_tensor(label).to(device, non_blocking=non_blocking)
    return (image.float() / 255 if image.dtype == torch.uint8 else image), label
