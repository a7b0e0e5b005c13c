import json
import logging
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import table

from dissect_monai.data.datalists import Datalist
from dissect_monai.data.volume_lists import aggregate
from dissect_monai.visualize import domains
from dissect_monai.visualize.domains import report_domains


def write_set(folder: Path, task: str, modality: str, low: int, spacing: float = 1.0, validation: int = 0) -> Path:
    """Three training subjects of two images each, of which the intensities start at `low` and end at `low` + 100."""
    folder.mkdir()
    items = []
    for index in range(6 + validation):
        values = np.linspace(low, low + 100, 4 * 5 * (6 + index)).reshape(4, 5, -1)
        nib.save(nib.Nifti1Image(values, np.diag([spacing, 1, 2.5, 1])), folder / f"{index}.nii.gz")
        items.append({"image": f"{index}.nii.gz", "subject": index // 2})
    lists = {"training": items[:6], "validation": items[6:]}
    spec = {**lists, "task": task, "group": "abdomen", "modality": modality}
    (folder / "dataset.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def datalist(tmp_path: Path) -> Datalist:
    return aggregate([
        write_set(tmp_path / "a", "liver", "CT", low=-50, spacing=0.5, validation=2),
        write_set(tmp_path / "b", "kidneys", "MR", low=0),
    ])  # fmt: skip


def test_rows_say_what_was_aggregated(tmp_path: Path, datalist: Datalist) -> None:
    kidneys, liver = report_domains(datalist, tmp_path / "domains.csv")
    assert liver[:8] == (
        "liver", "abdomen", "CT", "3 + 1 + 0", "6 + 2 + 0", 4 * 5 * sum(range(6, 14)), "0.5 x 1 x 2.5", "4 x 5 x 10",
    )  # fmt: skip
    assert kidneys[:4] == ("kidneys", "abdomen", "MR", "3 + 0 + 0")
    assert kidneys.spacing == "1 x 1 x 2.5"
    np.testing.assert_allclose(liver[8:], [-50, -49, 49, 50], atol=0.3)
    np.testing.assert_allclose(kidneys[8:], [0, 1, 99, 100], atol=0.3)


def test_intensities_are_those_of_a_bounded_sample(tmp_path: Path, datalist: Datalist) -> None:
    assert domains.NUM_VOLUMES < 6
    nib.save(nib.Nifti1Image(np.full((4, 5, 7), 9999.0), np.eye(4)), datalist.training[1]["image"])
    assert report_domains(datalist, tmp_path / "domains.csv")[1].maximum == 50
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), 9999.0), np.eye(4)), datalist.training[0]["image"])
    assert report_domains(datalist, tmp_path / "domains.csv")[1].maximum == 9999


def test_the_table_is_written_and_logged(tmp_path: Path, datalist: Datalist, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report_domains(datalist, tmp_path / "new" / "domains.csv")
    rows = table(tmp_path / "new" / "domains.csv")
    assert [row["task"] for row in rows] == ["kidneys", "liver"]
    assert float(rows[1]["minimum"]) == -50
    title, *lines = caplog.messages[0].splitlines()
    assert title == "Aggregated 14 volumes:"
    starts = [[found.start() for found in re.finditer(r"(?:^|(?<=  ))\S", line)] for line in lines]
    assert [len(places) for places in starts] == [12] * 3
    assert starts[0] == starts[1] == starts[2]


def test_a_ct_that_is_not_in_hu_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [write_set(tmp_path / "a", "liver", "CT", low=0), write_set(tmp_path / "b", "spine", "CT", low=-50)]
    report_domains(aggregate(folders), tmp_path / "domains.csv")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "The CT of task liver has no value below 0" in warnings[0]
