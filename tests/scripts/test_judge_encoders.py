"""Frozen encoders of a study: the table of AUROCs and differences."""

import shlex
from pathlib import Path

import fire
import judge_encoders
import numpy as np
import pytest
from documented import lines
from helpers import small_resnet, table, write_films

from dissect_monai.networks.weights import save_weights

SETS = judge_encoders.LABELLED[:2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_films(folder, SETS, (48, 24, 24))
    return folder


@pytest.mark.parametrize("command", [line for line in lines() if "scripts/judge_encoders.py" in line])
def test_judges_recipes_and_baselines_with_paired_differences_as_documented(
    command: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = shlex.split(command)[2:]
    folder, place, select = given[0], given[given.index("--data") + 1], "--select" in given
    monkeypatch.chdir(tmp_path)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).symlink_to(data)
    Path("results").mkdir()
    small = {"NUM_DRAWS": 1, "NUM_FOLDS": 3, "NUM_SAMPLES": 20, "MIN_POSITIVES": 5, "FRACTIONS": (1.0,)}
    for name, value in (small | {"LABELLED": SETS}).items():
        monkeypatch.setattr(judge_encoders, name, value)
    monkeypatch.setattr("dissect_monai.metrics.probes.CS", (0.01, 0.1))
    network = small_resnet(widen_factor=1.0)
    settings = {"encoder": "resnet10", "image_size": 32, "spatial_dims": 2}
    save_weights(network, Path(folder, "ours") / "seed0" / "models" / "model.pt", settings)
    fire.Fire(judge_encoders.main, command=given)
    written = given[given.index("--table") + 1] if "--table" in given else f"{folder}/frozen_features.csv"
    rows = table(Path(written))
    assert {row["set"] for row in rows} == {*SETS} | (set() if select else {"cxr_adult"})
    assert {row["recipe"] for row in rows} == {"ours", "random", "pixels"}
    by_key = {tuple(row[key] for key in judge_encoders.FIELDS[:6]): row for row in rows}
    key = ("cxr_kermany", "viral against bacterial", "1", "stages")
    pairs = ("ours", ""), ("random", ""), ("ours", "random")
    values = [float(by_key[(*key, *pair)]["auroc"]) for pair in pairs]
    assert values[0] > (0.5 if select else 0.9)  # the brightness tells them apart; with fewer films, hardly
    assert values[2] == pytest.approx(values[0] - values[1], abs=2e-4)
    assert by_key[(*key, "random", "")]["seeds"] == "3"
    (path,) = Path(folder, "ours", "seed0").glob("features_cxr_kermany_*.npz")
    with np.load(path) as kept:
        assert [len(kept[name]) for name in sorted(kept) if "last" in name] == ([72] if select else [48, 24, 24])


def test_a_fraction_is_drawn_by_subject() -> None:
    items = [{"subject": str(index // 3)} for index in range(30)]
    rows = judge_encoders.chosen_rows(items, 0.2, seed=1)
    assert len(rows) == 6
    assert len({items[row]["subject"] for row in rows}) == 2


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: there is no RECIPE/seedN/models/model\.pt in .*: train the study"):
        judge_encoders.main(str(tmp_path), str(tmp_path))
