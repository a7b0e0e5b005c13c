"""Pack what scripts/gpu/run.py needs on a machine without a network: wheels, small X-rays, small volumes.

    python scripts/gpu/pack.py --data DIR --out runs/gpu_pack [--python 3.12] [--limit_mib 60]

DIR holds data sets, each a folder with a dataset.json. All sets of pictures go into films.zip, as small square JPEGs;
ct_btcv is resampled to 3×3×4 mm and mr_acdc keeps its grid, both with 8 bits a voxel. Unpacked, each is a folder with
a dataset.json again. The wheels are those of this repository and of the packages that a machine with PyTorch lacks, for
its Python on x86-64 Linux. manifest.json says what is in the pack, with sizes, SHA-256 digests and versions, and what
was left out because the limit was passed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_LZMA, ZIP_STORED, ZipFile

import nibabel
import numpy as np
from monai.transforms import LoadImage, Spacing
from PIL import Image

from dissect_monai import ImageFileReader
from dissect_monai.data.readers import PICTURE_SUFFIXES

ROOT = Path(__file__).resolve().parents[2]
# What the recipes and the benchmarks need beside PyTorch and its usual company, by worth.
PACKAGES = (
    "monai", "pytorch-ignite", "nibabel", "fire", "termcolor", "pytorch-metric-learning", "einops", "einx", "frozendict",
    "loguru", "torch-einops-utils", "vector-quantize-pytorch", "kornia", "kornia-rs",
)  # fmt: skip
READERS = ("simpleitk",)  # of DICOM, MHA and NRRD, which the pack does not hold; 50 MiB
GRIDS = {"ct_btcv": (3.0, 3.0, 4.0), "mr_acdc": (0.0, 0.0, 0.0)}  # mm; 0 keeps an axis
CT_WINDOW = (-125.0, 275.0)  # HU, of the recipes
GLIBCS = (39, 35, 34, 31, 28, 27, 24, 17)  # of manylinux tags, which pip takes literally
NUM_GREYS = 64  # of a volume: 6 HU, under the noise at this spacing; noise does not compress
MIB = 2**20


class Pack:
    """A folder that is filled up to a limit, and what is to be said of it."""

    def __init__(self, folder: Path, limit_mib: float, **facts: Any) -> None:
        self.folder, self.limit = folder, int(limit_mib * MIB)
        self.manifest: dict[str, Any] = {**facts, "limit_mib": limit_mib, "files": {}, "left_out": {}}

    @property
    def size(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def add(self, path: Path, name: str, **facts: Any) -> None:
        """Move a file in, or leave it out and say so."""
        size = path.stat().st_size
        if self.size + size > self.limit:
            self.leave_out(name, f"{size / MIB:.1f} MiB, with which the pack passes {self.manifest["limit_mib"]:g} MiB")
            return
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, self.folder / name)
        self.manifest["files"][name] = {"bytes": size, "sha256": digest, **facts}
        print(f"{name:45} {size / MIB:6.2f} MiB  {json.dumps(facts)}", flush=True)

    def leave_out(self, name: str, reason: str) -> None:
        self.manifest["left_out"][name] = reason
        print(f"{name:45} left out: {reason}", flush=True)

    def close(self) -> None:
        text = json.dumps(self.manifest, indent=1)
        (self.folder / "manifest.json").write_text(text, encoding="utf-8")
        print(f"{self.size / MIB:.1f} MiB in {self.folder}")


def add_wheels(pack: Pack, python: str, names: tuple[str, ...], folder: Path) -> None:
    """Download wheels in the tested versions, or in the newest."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0]: line for line in lines if "==" in line}
    tags = [part for glibc in GLIBCS for part in ("--platform", f"manylinux_2_{glibc}_x86_64")]
    tags += ["--platform", "manylinux2014_x86_64", "--python-version", python, "--implementation", "cp"]
    wanted = [pins.get(name, name) for name in names]
    call_pip("download", "--no-deps", "--only-binary=:all:", *tags, "--dest", str(folder), *wanted)
    take_wheels(pack, folder)


def take_wheels(pack: Pack, folder: Path) -> None:
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        pack.add(wheel, f"wheels/{wheel.name}", package=name, version=version)


def call_pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=False).returncode:
        sys.exit(f"error: `pip {arguments[0]}` failed, as it says above: packing needs a network.")


def data_sets(data: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders with a dataset.json, and what it says."""
    for path in sorted(data.glob("*/dataset.json")):
        yield path.parent, json.loads(path.read_text(encoding="utf-8"))


def splits_of(content: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for split in ("training", "validation", "test"):
        yield split, [item if isinstance(item, dict) else {"image": item} for item in content.get(split, [])]


def small_film(path: Path, size: int, quality: int) -> bytes:
    """A picture as a square JPEG; of 16 bits, its own range becomes 8."""
    array, _ = ImageFileReader(spatial_dims=2).get_data(path)
    if array.dtype != np.uint8:
        low, high = np.percentile(array, (0.5, 99.5))
        array = ((array - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    file = io.BytesIO()
    small = Image.fromarray(array.astype(np.uint8).T).resize((size, size), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def write_films(path: Path, sets: list[tuple[Path, dict[str, Any]]], size: int, quality: int) -> None:
    """All sets of pictures in one archive; images are numbered, which keeps its directory short."""
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for folder, content in sets:
            number, lists = 0, {}
            for split, items in splits_of(content):
                lists[split] = []
                for item in items:
                    name = f"{number:05}.jpg"
                    archive.writestr(f"{folder.name}/{name}", small_film(folder / item["image"], size, quality))
                    lists[split].append({**item, "image": name})
                    number += 1
            archive.writestr(f"{folder.name}/dataset.json", json.dumps({**content, **lists}), ZIP_DEFLATED)


def small_volume(path: Path, pixdim: tuple[float, ...], window: tuple[float, float] | None, is_label: bool) -> bytes:
    """A volume as NIfTI of 8 bits; its values are those of the file, within the window or the range of all but 1 %."""
    image = LoadImage(reader=ImageFileReader(spatial_dims=3), ensure_channel_first=True, image_only=True)(path)
    image = Spacing(pixdim, mode="nearest" if is_label else "bilinear")(image)
    array = image[0].numpy()
    slope, low = 1.0, 0.0
    if not is_label:
        low, high = window or np.percentile(array, (0.5, 99.5))
        slope = max(high - low, 1e-6) / (NUM_GREYS - 1)
        array = (array.clip(low, high) - low) / slope
    file = nibabel.Nifti1Image(array.round().astype(np.uint8), image.affine.numpy())
    file.header.set_slope_inter(slope, low)
    return bytes(file.to_bytes())


def write_volumes(path: Path, folder: Path, content: dict[str, Any], pixdim: tuple[float, ...]) -> None:
    """A set of volumes and label maps as an archive, with the names that they had."""
    window = CT_WINDOW if "CT" in str(content.get("modality")) else None
    with ZipFile(path, "w", ZIP_LZMA) as archive:
        lists: dict[str, list[Any]] = {}
        for split, items in splits_of(content):
            lists[split] = []
            for item in items:
                names = {key: re.sub(r"\.gz$", "", item[key]) for key in ("image", "label") if key in item}
                for key, name in names.items():
                    small = small_volume(folder / item[key], pixdim, window, key == "label")
                    archive.writestr(f"{folder.name}/{name}", small)
                lists[split].append({**item, **names})
        archive.writestr(f"{folder.name}/dataset.json", json.dumps({**content, **lists}))


def is_films(content: dict[str, Any]) -> bool:
    first = [item for _, items in splits_of(content) for item in items[:1]]
    return bool(first) and first[0]["image"].lower().endswith(PICTURE_SUFFIXES)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--limit_mib", type=float, default=60)
    parser.add_argument("--image_size", type=int, default=80, help="side of an X-ray in pixels")
    parser.add_argument("--quality", type=int, default=75, help="of the JPEGs")
    parser.add_argument("--no_wheels", action="store_true", help="for a machine that has all packages")
    args = parser.parse_args(arguments)
    sets = list(data_sets(args.data))
    if not sets:
        sys.exit(f"error: --data must be a folder of data sets, each with a dataset.json, got {args.data}.")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: --out must be a new or empty folder, got {args.out}: remove it, or give another.")
    pack = Pack(args.out, args.limit_mib, python=args.python, image_size=args.image_size)
    args.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.out) as name:
        folder = Path(name)
        if not args.no_wheels:
            call_pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
            take_wheels(pack, folder)
            add_wheels(pack, args.python, PACKAGES, folder)
        films = [(each, content) for each, content in sets if is_films(content)]
        if films:
            write_films(folder / "films", films, args.image_size, args.quality)
            counts = {each.name: sum(len(items) for _, items in splits_of(content)) for each, content in films}
            pack.add(folder / "films", "films.zip", images=counts)
        for each, content in sets:
            if each.name in GRIDS:
                write_volumes(folder / each.name, each, content, GRIDS[each.name])
                pack.add(folder / each.name, f"{each.name}.zip", pixdim=GRIDS[each.name])
        for name in GRIDS.keys() - {each.name for each, _ in sets}:
            pack.leave_out(name, f"it is not in {args.data}")
        if not args.no_wheels:
            add_wheels(pack, args.python, READERS, folder)
    pack.close()


if __name__ == "__main__":
    main()
