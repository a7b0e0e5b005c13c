"""A table of the aggregated volumes, to look at before hours are spent on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dissect_monai.common import Array, Item, rank
from dissect_monai.data.datalists import SPLITS, Datalist
from dissect_monai.data.readers import ImageFileReader
from dissect_monai.transforms.intensity import is_ct, sample_voxels
from dissect_monai.writing import aligned, write_csv

logger = logging.getLogger(__name__)
NUM_VOLUMES = 4  # of a task, that are read for their intensities


class DomainRow(NamedTuple):
    """One line of domains.csv: a task."""

    task: str
    group: str
    modality: str
    subjects: str  # training + validation + test
    images: str  # the same
    voxels: int  # of all images
    spacing: str  # median over the images, mm from left to right, posterior to anterior, inferior to superior
    shape: str  # median, voxels along the same axes
    minimum: float  # intensities, before any scaling, of a sample of the volumes
    percentile_1: float
    percentile_99: float
    maximum: float


def report_domains(datalist: Datalist, path: str | Path) -> list[DomainRow]:
    """Log a table of the tasks and write it as CSV, in the first process; warn where the values of a CT are not in HU.

    Intensities are those of up to 4 training volumes of a task; one that cannot be read is logged, and left to the data
    set to refuse or to skip. The data list is one that `aggregate` gives.
    """
    if rank():
        return []
    rows = [_row(name, datalist) for name in datalist.task_names]
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    logger.info("Aggregated %d volumes:\n%s", len(datalist.headers), aligned([DomainRow._fields, *cells]))
    for task in (row.task for row in rows if is_ct(row.modality) and row.minimum >= 0):
        logger.warning("The CT of task %s has no value below 0, so it hardly is in HU, as its window expects.", task)
    write_csv(path, DomainRow._fields, rows, nan="nan")
    return rows


def _row(task: str, datalist: Datalist) -> DomainRow:
    splits = [[item for item in getattr(datalist, split) if item["task"] == task] for split in SPLITS]
    items = [item for split in splits for item in split]
    headers = [datalist.headers[item["image"]] for item in items]
    return DomainRow(
        task,
        items[0]["group"],
        "/".join(sorted({item["modality"] for item in items})),
        " + ".join(str(len({item["subject"] for item in split})) for split in splits),
        " + ".join(str(len(split)) for split in splits),
        sum(int(np.prod(header.shape)) for header in headers),
        " x ".join(f"{value:.3g}" for value in np.median([header.spacing for header in headers], axis=0)),
        " x ".join(f"{value:.0f}" for value in np.median([header.shape for header in headers], axis=0)),
        *_intensities(splits[0]),
    )


def _intensities(items: Sequence[Item]) -> tuple[float, float, float, float]:
    """Minimum, 1 %, 99 % and maximum over volumes that are evenly spaced in the list."""
    reader = ImageFileReader(spatial_dims=3)
    chosen = np.linspace(0, len(items) - 1, min(NUM_VOLUMES, len(items))).round().astype(int)
    values: list[Array] = [np.full(1, np.nan)]
    for index in chosen:
        try:
            values.append(sample_voxels(reader.get_data(reader.read(items[index]["image"]))[0]))
        except ValueError as error:
            logger.warning("Not in the table of intensities: %s", error)
    low, first, last, high = np.nanpercentile(np.concatenate(values), [0, 1, 99, 100]).tolist()
    return low, first, last, high
