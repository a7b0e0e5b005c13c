"""Lets torchvision, whose packages are built for CUDA, be imported beside a PyTorch for the CPU.

At import it declares the meta kernels of two operators, which its compiled part would have defined and, without CUDA,
does not. `make label` puts this module into the environment of MONAI Label, which imports torchvision, but calls
neither operator.
"""

import torch

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
