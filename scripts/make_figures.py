"""Draw the pictures of the README and the documentation, from generated images alone: `make figures`.

python scripts/make_figures.py images FOLDER        # images that are larger than those of the demo
python scripts/make_figures.py overview FOLDER      # of a pretraining and a segmentation of these
python scripts/make_figures.py demo FOLDER          # of what `make demo` has trained there
python scripts/make_figures.py report PAGE PICTURE  # a report as a picture, by a browser without a window
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from fire.decorators import SetParseFn
from numpy.typing import NDArray
from PIL import Image
from render_results import FILMS, draw_lines, film_panels

from dissect_monai import BTCV_ORGANS, load_codes, read_settings, write_volume_phantoms, write_xray_phantoms
from dissect_monai.visualize.segmentation import ORGAN_COLORS, organ_color
from dissect_monai.visualize.training import code_colors
from dissect_monai.writing import read_csv

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PRETRAINED, SEGMENTED = "pretrain_vq_ssl", "seg_finetune_btcv"


def images(folder: str) -> None:
    """Write the X-rays for the pretraining and the volume for the segmentation."""
    write_xray_phantoms(Path(folder, "xrays"), image_size=160)
    write_volume_phantoms(Path(folder, "volumes"), 1, 1, 1, image_size=128, seed=5, tasks=["abdomen_ct"])


def overview(folder: str) -> None:
    """Write docs/overview.png: what each kind of bundle sees, and what pretraining gains."""
    from matplotlib.figure import Figure

    xray, *maps = code_maps(Path(folder, PRETRAINED), Path(folder, "xrays"), [2])[0]
    ct, organs = segmented(Path(folder))
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.12))
    sides = [f"{len(each)}×{len(each)} codes" for each in maps]
    panels(above, [xray, *maps], ["X-ray", *sides], "pretrain_vq_ssl: codes learnt without labels")
    left, right = below.subfigures(1, 2, width_ratios=(1.35, 1))
    panels(left, [ct, organs], ["CT", "organs found"], "seg_finetune_btcv: organs from few labels")
    right.suptitle("does pretraining help?", weight="bold", fontsize=11)
    gain(right.subplots())
    save(figure, DOCS / "overview.png")


def demo(folder: str) -> None:
    """Write docs/demo.png: X-rays, their codes, and what the decoder makes of these."""
    from matplotlib.figure import Figure

    rows = code_maps(Path(folder), Path(folder, "phantoms"), [0, 1, 4], decoded=True)
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    titles = ["X-ray", *(f"{len(each)}×{len(each)} codes" for each in rows[0][1:-1]), "from the codes"]
    for index, row in enumerate(rows):
        for place, picture in enumerate(row):
            axes = figure.add_subplot(len(rows), len(row), index * len(row) + place + 1)
            show(axes, picture, "" if index else titles[place])
    save(figure, DOCS / "demo.png")


def code_maps(run: Path, data: Path, chosen: Sequence[int], decoded: bool = False) -> list[list[NDArray[Any]]]:
    """Of test images: the image, its codes in colours, fine to coarse, and what the decoder makes of them."""
    codes = load_codes(run)
    size = read_settings(run / "models" / "model.pt")["image_size"]
    found = sorted((data / "images").glob("*.png"))[-64:]
    pictures = []
    for path in (found[index] for index in chosen):
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("F").resize((size, size), Image.Resampling.BOX))
        low, high = np.percentile(pixels, (0.5, 99.5))
        image = torch.tensor(np.clip((pixels - low) / (high - low), 0, 1)).T[None, None]  # (x, y), as MONAI reads
        indices = codes.encode(image)
        colors = [code_colors(book.get_parameter("embedding.weight").detach()) for book in codes.quantizer.codebooks]
        row: list[Any] = [image, *(color[each] for color, each in zip(colors, indices, strict=True))]
        row += [codes.decode(indices).clamp(0, 1)] if decoded else []
        pictures.append([np.asarray(each.squeeze().transpose(0, 1)) for each in row])
    return pictures


def segmented(folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """The axial slice of a volume that shows most organs, grey, and the same with the organs that were found."""
    row = read_csv(folder / SEGMENTED / "eval" / "label_maps" / "label_maps.csv")[0]
    maps = [nib.as_closest_canonical(nib.load(path)) for path in (row["image"], row["label_map"])]
    volume, labels = (np.asarray(each.dataobj) for each in maps)
    best = max(range(labels.shape[2]), key=lambda z: len(np.unique(labels[..., z])))
    # As a radiologist sees it: the patient's right on the left, the front above.
    ct, found = (np.rot90(each[..., best])[:, ::-1] for each in (volume, labels))
    grey = np.clip((ct.astype(np.float32) + 125) / 400, 0, 1)[..., None].repeat(3, -1)
    colored = grey.copy()
    for value in range(1, len(BTCV_ORGANS) + 1):
        color = np.array([int(organ_color(value)[start : start + 2], 16) / 255 for start in (1, 3, 5)])
        colored[found == value] = 0.35 * grey[found == value] + 0.65 * color
    body = np.argwhere(grey[..., 0] > 0)
    (top, start), (bottom, end) = body.min(0), body.max(0) + 1
    return grey[top:bottom, start:end], colored[top:bottom, start:end]


def panels(figure: Any, pictures: Sequence[NDArray[Any]], titles: Sequence[str], title: str) -> None:
    """Pictures side by side under one title."""
    figure.suptitle(title, weight="bold", fontsize=11)
    for axes, picture, name in zip(figure.subplots(1, len(pictures)), pictures, titles, strict=True):
        show(axes, picture, name)


def show(axes: Any, picture: NDArray[Any], title: str) -> None:
    """A picture without axes; what has one channel is grey."""
    axes.imshow(picture, cmap="gray", interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def gain(axes: Any) -> None:
    """What a probe tells at each share of the labels, of pretrained, untrained and no encoders."""
    titles = {"VQ with NT-Xent": "pretrained", "random": "random weights", "pixels": "pixels"}
    found = film_panels(ROOT / "results" / "cxr_films.csv")["all stages"]
    draw_lines(axes, {title: found[recipe] for recipe, title in titles.items()}, FILMS)
    axes.set_ylabel("AUROC, viral or bacterial")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG of 256 colours, which is a third of the size."""
    with TemporaryDirectory() as folder:
        figure.savefig(Path(folder, "figure.png"), dpi=130)
        compress(Path(folder, "figure.png"), path)


def compress(source: Path, path: Path) -> None:
    """Write a picture with 256 colours, those of the organs among them: the usual choice makes two of them one."""
    with Image.open(source) as picture:
        pixels = picture.convert("RGB")
        own = [int(color[start : start + 2], 16) for color in (*ORGAN_COLORS, "#FFFFFF") for start in (1, 3, 5)]
        rest = pixels.quantize(255 - len(ORGAN_COLORS)).getpalette() or []
        palette = Image.new("P", (1, 1))
        palette.putpalette([*own, *rest])
        pixels.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def report(page: str, picture: str, width: int = 1000, height: int = 1650) -> None:
    """Write what a browser shows of a page.

    Args:
        page: path of the HTML file.
        picture: path of the PNG.
        width: of the window in pixels.
        height: of the window in pixels; what is below is left out.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"error: one of {', '.join(BROWSERS)} must be installed to take a picture of a page.")
    with TemporaryDirectory() as folder:
        shot = Path(folder, "page.png")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
        subprocess.run([browser, *options, f"--screenshot={shot}", Path(page).resolve().as_uri()], check=True)
        compress(shot, Path(picture))


if __name__ == "__main__":
    paths = SetParseFn(str, "folder", "page", "picture")  # as they are typed
    fire.Fire({each.__name__: paths(each) for each in (images, overview, demo, report)})
