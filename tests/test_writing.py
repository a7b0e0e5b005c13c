from pathlib import Path
from typing import NamedTuple

import pytest

from dissect_monai.common import Interval
from dissect_monai.writing import columns, metric_name, metrics_by_name, write_csv

NAN = float("nan")


class Row(NamedTuple):
    structure: str
    values: tuple[int, ...]
    dice: Interval
    n: int | None


@pytest.mark.parametrize("nan", ["", "nan"])
def test_a_table_has_four_decimals_and_three_columns_for_an_interval(tmp_path: Path, nan: str) -> None:
    rows = [Row("liver", (2, 3), Interval(0.5, 0.25, NAN), None), Row("a,b", (), Interval(1.0, NAN, 1 / 3), 3)]
    write_csv(tmp_path / "new" / "table.csv", columns(Row), rows, nan)
    assert (tmp_path / "new" / "table.csv").read_text().splitlines() == [
        "structure,values,dice,dice_low,dice_high,n",
        f"liver,2 3,0.5000,0.2500,{nan},",
        f'"a,b",,1.0000,{nan},0.3333,3',
    ]


def test_metrics_are_named_without_blanks_and_commas() -> None:
    name = metric_name("auroc", "Mass, large")
    assert metrics_by_name({name: Interval(0.5, 0.25, 0.75)}) == {
        "auroc_Mass_large": 0.5, "auroc_Mass_large_low": 0.25, "auroc_Mass_large_high": 0.75,
    }  # fmt: skip
