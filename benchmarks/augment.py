"""Images per second of two random 224 px views of every image, against MONAI's dict transforms and kornia.

    python benchmarks/augment.py --device cpu

All start from decoded 256 px images in memory, uint8 but for MONAI, whose cache holds floats in [0, 1], and do the same
operations with the same ranges: crop of 0.5–1 of the area, resize, flip, rotation, blur of half of the views, gamma,
contrast, brightness. MONAI transforms image by image without metadata, then stacks: "monai" draws the whole geometry in
one RandAffine, "monai crop" with one transform for each. kornia runs batched: "kornia" cuts its crops ("slice"),
"kornia grid" samples them ("resample"). A gate is held against the faster of the two. On CPU one thread and process
time; on CUDA events, where MONAI still transforms on CPU and pays the upload. A ratio is the median over the rounds,
with its extremes.
"""

import sys
import warnings
from collections.abc import Callable
from math import pi

import torch
import torch.nn.functional as F
from common import Timings, at_least, compare, conclude, make_parser
from monai import transforms as mt
from monai.data import set_track_meta
from torch import Tensor

from dissect_monai.transforms.augment import BatchAugment
from dissect_monai.transforms.views import Views

try:
    import kornia.augmentation as ka
except ImportError:
    sys.exit('kornia is not installed; it comes with `pip install -e ".[bench]"`.')

SIZE = 224
GATES = {"monai": 2.2, "kornia": 1.3}


def make_images(num: int) -> Tensor:
    """Smooth random uint8 images of 256 px."""
    return F.interpolate(torch.rand(num, 1, 16, 16), size=(256, 256), mode="bilinear").mul(255).byte()


def monai_transform(one_affine: bool, size: int = SIZE, key: str = "image") -> mt.Compose:
    """The dict transforms of one view, without metadata."""
    affine = [
        mt.RandAffined(
            key,
            prob=1,
            rotate_range=pi / 18,
            scale_range=(-0.29, 0),  # a side of 0.71 is half of the area
            translate_range=37,
            spatial_size=(size, size),
            padding_mode="border",
        )
    ]
    separate = [
        mt.RandSpatialCropd(key, roi_size=(181, 181), max_roi_size=(256, 256), random_size=True),
        mt.Resized(key, (size, size), mode="bilinear"),
        mt.RandRotated(key, range_x=pi / 18, prob=1, padding_mode="border"),
    ]
    steps = [
        *(affine if one_affine else separate),
        mt.RandFlipd(key, prob=0.5, spatial_axis=0),
        mt.RandGaussianSmoothd(key, sigma_x=(0.1, 1.5), sigma_y=(0.1, 1.5), prob=0.5),
        mt.RandAdjustContrastd(key, gamma=(0.7, 1.5), prob=1),
        mt.RandScaleIntensityd(key, factors=0.3, prob=1),
        mt.RandShiftIntensityd(key, offsets=0.1, prob=1),
    ]
    return mt.Compose(steps)


def kornia_transform(cropping_mode: str) -> Callable[[Tensor], Tensor]:
    """The batched augmentation of one view."""
    return ka.AugmentationSequential(
        ka.RandomResizedCrop((SIZE, SIZE), (0.5, 1), (3 / 4, 4 / 3), cropping_mode=cropping_mode),
        ka.RandomHorizontalFlip(p=0.5),
        ka.RandomRotation(10.0, p=1),
        ka.RandomGaussianBlur((11, 11), (0.1, 1.5), p=0.5),
        ka.RandomGamma((0.7, 1.5), p=1),
        ka.RandomContrast((0.7, 1.3), p=1),
        ka.RandomBrightness((0.9, 1.1), p=1),
        data_keys=["input"],
        same_on_batch=False,
    )


def make_variants(images: Tensor, device: str) -> dict[str, Callable[[], Tensor]]:
    """Every implementation as a call that returns both views of all images on the device."""
    set_track_meta(False)  # MetaTensors would double MONAI's time
    cached, on_device = images / 255, images.to(device)

    def with_monai(transform: mt.Compose) -> Callable[[], Tensor]:
        return lambda: torch.stack([transform({"image": image})["image"] for image in [*cached, *cached]]).to(device)

    def with_kornia(transform: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.cat([transform(on_device / 255) for _ in range(2)])

    views = Views(BatchAugment(image_size=SIZE))
    return {
        "monai": with_monai(monai_transform(one_affine=True)),
        "monai crop": with_monai(monai_transform(one_affine=False)),
        "kornia": with_kornia(kornia_transform("slice")),
        "kornia grid": with_kornia(kornia_transform("resample")),
        "ours": lambda: views({"image": on_device}, device).images,
    }


def check(variants: dict[str, Callable[[], Tensor]], images: Tensor, device: str) -> None:
    """Shapes and ranges of all variants, and our geometry against `F.interpolate`."""
    for name, variant in variants.items():
        views = variant()
        assert views.shape == (2 * len(images), 1, SIZE, SIZE), (name, views.shape)
        assert views.isfinite().all(), name
        low, high = views.aminmax()
        # MONAI's intensity transforms may leave [0, 1]; it is not charged for clipping.
        assert low >= -0.2, (name, low)
        assert high <= 1.5, (name, high)
    identity = BatchAugment(
        image_size=SIZE, crop_scale=None, flip_prob=0, rotation=0, gamma=None, brightness=0, contrast=None, blur_prob=0
    )
    resized = F.interpolate(images.to(device) / 255, size=(SIZE, SIZE), mode="bilinear")
    torch.testing.assert_close(identity(images.to(device)), resized, atol=1e-5, rtol=0)


def report(timings: Timings, batch: int, device: str) -> None:
    """Print speeds and ratios, then the gates."""
    for name in timings.rounds:
        speed = 1e3 * batch / timings.median(name)
        print(f"{name:12s} {speed:8.0f} images/s   time / ours {timings.ratio(name, 'ours')}")
    gates: dict[str, bool] = {}
    for library, gate in GATES.items():
        ratio = min(timings.ratio(name, "ours").median for name in timings.rounds if name.startswith(library))
        gates |= at_least(f"time, {library} / ours", ratio, gate)
    conclude(*((gates,) if device == "cpu" else ({}, gates)))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    images = make_images(args.batch)
    variants = make_variants(images, args.device)
    check(variants, images, args.device)
    report(compare(variants, args.rounds, args.device), args.batch, args.device)


if __name__ == "__main__":
    main()
