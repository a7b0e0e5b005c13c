"""What is carried to a machine without a network, and what runs there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pack
import pytest
import run
from helpers import read, write_films
from judge_encoders import LABELLED
from PIL import Image

from dissect_monai import read_datalist, read_segmentation
from dissect_monai.phantoms.volumes import write_volume_phantoms

SIZE = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X-rays of 16 bits and of 8, one set without labels, and volumes."""
    folder = tmp_path_factory.mktemp("data")
    write_films(folder, LABELLED, (48, 24, 24))
    (ct,) = write_volume_phantoms(folder, 4, 2, 0, image_size=24, tasks=["abdomen_ct"])
    ct.rename(folder / "ct_btcv")
    return folder


@pytest.fixture(scope="module")
def packed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "pack"
    pack.main(["--data", str(data), "--out", str(out), "--no_wheels", "--image_size", str(SIZE)])
    return out


def test_the_pack_gives_back_small_data_sets(data: Path, packed: Path, tmp_path: Path) -> None:
    manifest = run.read_pack(packed)
    assert manifest is not None
    assert manifest["files"]["films.zip"]["images"] == dict.fromkeys(sorted([*LABELLED, "cxr_adult"]), 96)
    assert manifest["left_out"] == {"mr_acdc": f"it is not in {data}"}
    for _ in range(2):  # the second time it is there already
        run.unpack(packed, tmp_path)
    for name in (*LABELLED, "cxr_adult"):
        before, after = (read_datalist(str(folder / name)) for folder in (data, tmp_path / "data"))
        assert after.label_names == before.label_names
        for old, new in zip(before.items(), after.items(), strict=True):
            places = {"image": "", "origin": ""}
            assert {**old, **places} == {**new, **places}
            assert Image.open(new["image"]).size == (SIZE, SIZE)
    before, after = (read_segmentation(str(folder / "ct_btcv")) for folder in (data, tmp_path / "data"))
    assert after.class_names == before.class_names
    for old, new in zip(before.items(), after.items(), strict=True):
        image, label = nib.load(new["image"]), nib.load(new["label"])
        assert image.get_data_dtype() == label.get_data_dtype() == np.uint8
        assert sorted(map(float, image.header.get_zooms())) == [3, 3, 4]
        values = np.asarray(nib.load(old["image"]).dataobj).clip(*pack.CT_WINDOW)
        assert np.asarray(image.dataobj).mean() == pytest.approx(values.mean(), abs=15)
        assert {*np.unique(label.dataobj)} <= {*np.unique(nib.load(old["label"]).dataobj)}


def test_a_changed_file_is_refused(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "films.zip").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"error: .*films\.zip is not what .*manifest\.json says: carry the pack over"):
        run.read_pack(tmp_path)


def test_what_passes_the_limit_is_left_out_and_named(data: Path, tmp_path: Path, capsys: Any) -> None:
    pack.main(
        ["--data", str(data), "--out", str(tmp_path / "p"), "--no_wheels", "--image_size", "8", "--limit_mib", "0.2"]
    )
    manifest = read(tmp_path / "p" / "manifest.json")
    assert [*manifest["files"]] == ["films.zip"]
    assert "with which the pack passes 0.2 MiB" in manifest["left_out"]["ct_btcv.zip"]
    assert "left out: " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["films.zip", "manifest.json"]


def test_refuses_a_folder_without_data_sets_and_one_that_is_full(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: --data must be a folder of data sets"):
        pack.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: --out must be a new or empty folder"):
        pack.main(["--data", str(data), "--out", str(tmp_path)])


OK = "import json, os, pathlib; pathlib.Path(os.environ['GPU_RESULTS']).write_text(json.dumps([{}]))"
ROW = {"what": "speed", "value": 2.5, "holds": True}
SCRIPTS = {
    "tests": "raise RuntimeError('broken')",
    "benches": f"{OK.format(ROW)}; import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)",
    "pretraining": OK.format(ROW),
}


def run_small(folder: Path, packed: Path, *parts: str) -> int:
    """The exit status."""
    options = ["--pack", str(packed), "--out", str(folder / "out"), "--work", str(folder / "work")]
    with pytest.raises(SystemExit) as ended:
        run.main([*options, "--device", "cpu", "--budget", "small", *(["--parts", ",".join(parts)] if parts else [])])
    return int(ended.value.code or 0)


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(run, "command_of", lambda part, args: [sys.executable, "-c", SCRIPTS[part]])
    monkeypatch.setattr(run, "FACTS", "print('{\"device\": null}')")
    monkeypatch.setattr(run, "REHEARSAL", 1)
    assert run_small(tmp_path, packed, "pretraining", "tests", "benches") == 1
    said = capsys.readouterr().out.splitlines()[-5:]
    shown = [line.rpartition(",")[0] for line in said if line[0] != " "]
    assert shown == ["tests: exit status 1", "benches: stopped after 1 s", "pretraining: ok"]
    assert sum("speed" in line and "2.5 holds" in line for line in said) == 2
    assert "RuntimeError: broken" in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    monkeypatch.setitem(SCRIPTS, "tests", "pass")
    assert run_small(tmp_path, packed, "pretraining", "tests") == 0
    monkeypatch.setitem(SCRIPTS, "benches", "pass")
    assert run_small(tmp_path, tmp_path / "none") == 0
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("There is no pack in") for line in said)
    assert [line.split(":")[0] for line in said[-2:]] == ["tests", "benches"]


def test_refuses_a_part_that_it_does_not_have_and_one_without_images(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="error: --parts must be of tests, benches, pretraining, segmentation, slices, got x"
    ):
        run.main(["--pack", str(tmp_path), "--parts", "tests,x"])
    with pytest.raises(SystemExit, match=r"error: pretraining need\(s\) the images of a pack"):
        run.main(["--pack", str(tmp_path), "--parts", "tests,pretraining"])


@pytest.mark.slow
def test_the_rehearsal_trains_judges_and_segments(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status = run_small(tmp_path, packed, "pretraining", "segmentation")
    assert status == 0, (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")[-3000:]
    rows = {part: read(tmp_path / "out" / f"{part}.json") for part in ("pretraining", "segmentation")}
    arms = ["VQ", "without_VQ", "BYOL", "VQ_without_RSNA"]
    trained = [row["what"] for row in rows["pretraining"][:5]]
    assert trained == [*(f"{arm}: knn_auroc_stages" for arm in arms), "random: steps"]
    judged = [row["what"] for row in rows["pretraining"][5:]]
    assert len(judged) == 30
    assert judged[0] == "cxr_kermany, viral against bacterial, 100%, last: VQ"
    assert [row["what"].split(":")[0] for row in rows["segmentation"]] == [
        "HSSL",
        "scratch_2_subjects_draw0",
        "HSSL_2_subjects_draw0",
    ]
    assert rows["segmentation"][1]["steps"] == rows["segmentation"][2]["steps"] > 0
    assert all(0 <= row["value"] <= 1 for row in rows["segmentation"][1:])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"pretraining_{arm}.zip" for arm in arms} < names
    assert len(names) <= 9


@pytest.mark.slow
def test_the_rehearsal_leaves_the_weights_of_slices(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in pack.SLICES:
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(data / "ct_btcv")
    pack.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "pack"), "--no_wheels", "--slices"])
    monkeypatch.chdir(tmp_path)
    status = run_small(tmp_path, tmp_path / "pack", "slices")
    assert status == 0, (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")[-3000:]
    rows = read(tmp_path / "out" / "slices.json")
    assert [row["steps"] for row in rows] == [2] * 6
    for row in rows:
        recipe = row["what"].split(":")[0]
        with ZipFile(
            tmp_path / "out" / f"slices_{recipe.replace(', ', '_').replace(' ', '_').replace('-', '_')}.zip"
        ) as archive:
            assert {*archive.namelist()} == {f"{recipe}/seed0/models/model.{end}" for end in ("pt", "json")}
