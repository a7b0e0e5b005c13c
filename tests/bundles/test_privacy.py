"""Nothing that a run leaves names a patient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers import Recipe, read, write

from dissect_monai import read_datalist
from dissect_monai.data.identity import pseudonyms

pytestmark = pytest.mark.usefixtures("_in_root")
PATIENT = "HOSP-47110"


def planted(given: Path, folder: Path) -> Path:
    """Images of other subjects: X-rays as DICOM files that name them, too."""
    spec, count = read(given / "dataset.json"), iter(range(1000))
    patients: dict[str, str] = {}
    folder.mkdir()
    for split in ("training", "validation", "test"):
        for item in spec[split]:
            item["subject"] = patients.setdefault(item["subject"], f"{PATIENT}{len(patients):02d}")
            image = sitk.ReadImage(given / item["image"])
            if image.GetDimension() == 2:
                image.SetMetaData("0010|0020", item["subject"])
                item["image"] = f"{next(count)}.dcm"
            else:
                item |= {"image": f"{next(count)}.nii.gz", "label": str(given / item["label"])}
            sitk.WriteImage(image, folder / item["image"])
    write(folder / "dataset.json", spec)
    return folder


def written(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """What all files hold, arrays unpacked."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        yield path, path.read_bytes()
        if path.suffix == ".npz":
            for name, array in np.load(path).items():
                yield path, f"{name} {array.tolist()}".encode()


def digests(subject: str) -> Iterator[str]:
    """The first digits of those that can be guessed."""
    places = product(("", "data", "abdomen_ct", "xray_phantoms", "None"), ("", "\t", "/", " "))
    for text, kind in product((*map("".join, places),), ("md5", "sha1", "sha256", "sha512", "blake2b")):
        yield hashlib.new(kind, f"{text}{subject}".encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", ["cxr_classify", "seg_finetune_btcv"])
def test_no_output_holds_a_patient_or_a_digest_that_can_be_guessed(
    name: str, recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    recipe: Any = recipe_of(name)
    data, out = planted(Path(recipe.knobs["dataset_dir"]), tmp_path / "data"), tmp_path / "out"
    tracked = {"tracking": "mlflow"} if name == "cxr_classify" else {}  # to make a store takes longer than a run
    recipe.train(out, dataset_dir=data, **tracked)
    knobs = {"dataset_dir": data, "pretrained": out / "models" / "model.pt"}
    recipe.run("evaluate", out, num_samples=5, **knobs)
    recipe.run("inference", out, **knobs, **({"overlays": "top"} if tracked else {}))
    items = read_datalist(data, spatial_dims=2 if name == "cxr_classify" else 3).items()
    files = [*written(out)]
    assert {"model.json", "report.html", "checkpoint_epoch=1.pt"} <= {path.name for path, _ in files}
    assert any(pseudonyms(items[:1])[0].encode() in content for _, content in files)
    known = {digest for item in items for digest in digests(item["subject"])}
    for path, content in files:
        assert PATIENT.encode() not in content, path
        assert known.isdisjoint(found.decode() for found in re.findall(rb"(?<![0-9a-f])[0-9a-f]{12}", content)), path
