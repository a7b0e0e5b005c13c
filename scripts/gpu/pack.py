"""Pack what scripts/gpu/run.py needs on a machine without a network: wheels, small X-rays, small volumes.

    python scripts/gpu/pack.py --data DIR --out runs/gpu_pack [--python 3.12] [--limit_mib 60] [--slices]

DIR holds data sets, each a folder with a dataset.json. All sets of pictures go into films.zip, as small square JPEGs;
ct_btcv is resampled to 3×3×4 mm and mr_acdc keeps its grid, both with 64 grey levels. With --slices the pack holds the
seven sets of volumes of scripts/experiments/slices_pretraining.json instead, with pixels of 2.5 mm in the plane.
Unpacked, each is a folder with a dataset.json again. The wheels are those of this repository and of the packages that a
machine with PyTorch lacks, for its Python on x86-64 Linux. manifest.json says what is in the pack, with sizes, SHA-256
digests and versions, and what was left out because the limit was passed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZIP_LZMA, ZIP_STORED, ZipFile

import nibabel
import numpy as np
from monai.transforms import LoadImage, Spacing
from PIL import Image

from dissect_monai import ImageFileReader
from dissect_monai.data.datalists import PATH_KEYS, SPLITS
from dissect_monai.data.readers import PICTURE_SUFFIXES

ROOT = Path(__file__).resolve().parents[2]
# What the recipes and the benchmarks need beside PyTorch and its usual company.
PACKAGES = (
    "monai", "pytorch-ignite", "nibabel", "fire", "termcolor", "pytorch-metric-learning", "einops", "einx",
    "frozendict", "loguru", "torch-einops-utils", "vector-quantize-pytorch", "kornia", "kornia-rs",
)  # fmt: skip
GRIDS = {"ct_btcv": (3.0, 3.0, 4.0), "mr_acdc": (0.0, 0.0, 0.0)}  # mm; 0 keeps an axis
SLICES = {
    "ct_btcv": (2.5, 2.5, 5.0), "ct_openkbp": (2.5, 2.5, 0.0), "mr_acdc": (2.5, 2.5, 0.0), "mr_camcan": (2.5, 2.5, 5.0),
    "mr_chaos": (2.5, 2.5, 0.0), "mr_hippocampus": (0.0, 0.0, 0.0), "mr_lgg": (2.5, 2.5, 0.0),
}  # fmt: skip
CT_WINDOW = (-125.0, 275.0)  # HU, of the recipes
GLIBCS = (39, 35, 34, 31, 28, 27, 24, 17)  # of manylinux tags, which pip takes literally
NUM_GREYS = 64  # of a volume: 6 HU, under the noise at this spacing; noise does not compress
MIB = 2**20


class Pack:
    """A folder that is filled up to a limit, and what is to be said of it."""

    def __init__(self, folder: Path, limit_mib: float, **facts: Any) -> None:
        self.folder, self.limit_mib = folder, limit_mib
        self.manifest: dict[str, Any] = {**facts, "limit_mib": limit_mib, "files": {}, "left_out": {}}

    @property
    def mib(self) -> float:
        """Size of all files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values()) / MIB

    def add(self, path: Path, name: str, **facts: Any) -> None:
        """Move a file in, or leave it out and say so."""
        size = path.stat().st_size
        if self.mib + size / MIB > self.limit_mib:
            self.leave_out(name, f"{size / MIB:.1f} MiB, with which the pack passes {self.limit_mib:g} MiB")
            return
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, self.folder / name)
        self.manifest["files"][name] = {"bytes": size, "sha256": digest, **facts}
        print(f"{name:45} {size / MIB:6.2f} MiB  {json.dumps(facts)}", flush=True)

    def leave_out(self, name: str, reason: str) -> None:
        """Note what the pack lacks."""
        self.manifest["left_out"][name] = reason
        print(f"{name:45} left out: {reason}", flush=True)

    def add_wheels(self, folder: Path, *arguments: str) -> None:
        """Add the wheels that pip leaves in a folder."""
        if subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=False).returncode:
            sys.exit(f"error: `pip {arguments[0]}` failed, as it says above: packing needs a network.")
        for wheel in sorted(folder.glob("*.whl")):
            name, version = wheel.name.split("-")[:2]
            self.add(wheel, f"wheels/{wheel.name}", package=name, version=version)


def download(python: str, folder: Path, *names: str) -> list[str]:
    """Arguments of pip for wheels in the tested versions, or the newest."""
    pins = {line.split("==")[0]: line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()}
    platforms = [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in GLIBCS] + ["--platform=manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation=cp", *platforms]
    return ["download", *options, "--dest", str(folder), *(pins.get(name, name) for name in names)]


def write_set(
    archive: ZipFile, folder: Path, content: dict[str, Any], suffix: str, convert: Callable[[Path, bool], bytes]
) -> int:
    """Write a data set with a small, numbered file for each image and label map; returns the number of images."""
    lists: dict[str, list[Any]] = {}
    numbers = count()
    for split in SPLITS:
        lists[split] = []
        for item in items_of(content, split):
            names = {key: f"{next(numbers):05}{suffix}" for key in PATH_KEYS if isinstance(item.get(key), str)}
            for key, name in names.items():
                archive.writestr(f"{folder.name}/{name}", convert(folder / item[key], key == "label"))
            lists[split].append({**item, **names})
    archive.writestr(f"{folder.name}/dataset.json", json.dumps({**content, **lists}), ZIP_LZMA)
    return sum(map(len, lists.values()))


def items_of(content: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Items of a split, which may be listed as bare paths."""
    return [item if isinstance(item, dict) else {"image": item} for item in content.get(split, [])]


def small_film(path: Path, is_label: bool, size: int, quality: int) -> bytes:
    """A picture as a square JPEG; where it has more than 8 bits, the range of all but 1 % becomes 8."""
    array, _ = ImageFileReader(spatial_dims=2).get_data(path)
    if array.dtype != np.uint8:
        low, high = np.percentile(array, (0.5, 99.5))
        array = ((array - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    file = io.BytesIO()
    small = Image.fromarray(array.astype(np.uint8).T).resize((size, size), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def small_volume(path: Path, is_label: bool, pixdim: tuple[float, ...], window: tuple[float, float] | None) -> bytes:
    """A volume as NIfTI of few greys; values are those of the file, within the window or the range of all but 1 %."""
    image = LoadImage(reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True, image_only=True)(path)
    image = Spacing(pixdim, mode="nearest" if is_label else "bilinear")(image)
    array, slope, low = image[0].numpy(), 1.0, 0.0
    if not is_label:
        low, high = window or np.percentile(array, (0.5, 99.5))
        slope = max(high - low, 1e-6) / (NUM_GREYS - 1)
        array = (array.clip(low, high) - low) / slope
    file = nibabel.Nifti1Image(array.round().astype(np.uint8), image.affine.numpy())
    file.header.set_slope_inter(slope, low)
    return bytes(file.to_bytes())


def main(arguments: list[str] | None = None) -> None:
    """Make the pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--limit_mib", type=float, default=60)
    parser.add_argument("--image_size", type=int, default=80, help="side of an X-ray in pixels")
    parser.add_argument("--quality", type=int, default=75, help="of the JPEGs")
    parser.add_argument("--slices", action="store_true", help="sets of volumes for the part `slices`, and no X-rays")
    parser.add_argument("--no_wheels", action="store_true", help="for a machine that has all packages")
    args = parser.parse_args(arguments)
    contents = {path.parent: json.loads(path.read_text("utf-8")) for path in sorted(args.data.glob("*/dataset.json"))}
    if not contents:
        sys.exit(f"error: --data must be a folder of data sets, each with a dataset.json, got {args.data}.")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: --out must be a new or empty folder, got {args.out}: remove it, or give another.")
    args.out.mkdir(parents=True, exist_ok=True)
    pack, counts = Pack(args.out, args.limit_mib, python=args.python, image_size=args.image_size), {}
    grids = SLICES if args.slices else GRIDS
    film = partial(small_film, size=args.image_size, quality=args.quality)
    with TemporaryDirectory(dir=args.out) as name:
        folder = Path(name)
        if not args.no_wheels:
            pack.add_wheels(folder, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
            pack.add_wheels(folder, *download(args.python, folder, *PACKAGES))
        with ZipFile(folder / "films.zip", "w", ZIP_STORED) as archive:
            for each, content in contents.items():
                is_film = items_of(content, "training")[0]["image"].lower().endswith(PICTURE_SUFFIXES)
                if is_film and not args.slices:
                    counts[each.name] = write_set(archive, each, content, ".jpg", film)
        if counts:
            pack.add(folder / "films.zip", "films.zip", images=counts)
        for each, content in contents.items():
            if each.name in grids:
                window = CT_WINDOW if "CT" in str(content.get("modality")) else None
                with ZipFile(folder / "volumes", "w", ZIP_LZMA) as archive:
                    volume = partial(small_volume, pixdim=grids[each.name], window=window)
                    write_set(archive, each, content, ".nii", volume)
                pack.add(folder / "volumes", f"{each.name}.zip", pixdim=grids[each.name])
        for name in grids.keys() - {each.name for each in contents}:
            pack.leave_out(name, f"it is not in {args.data}")
        if not args.no_wheels:  # last, of 50 MiB: the reader of DICOM, MHA and NRRD, which the pack does not hold
            pack.add_wheels(folder, *download(args.python, folder, "simpleitk"))
    (args.out / "manifest.json").write_text(json.dumps(pack.manifest, indent=1), encoding="utf-8")
    print(f"{pack.mib:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
