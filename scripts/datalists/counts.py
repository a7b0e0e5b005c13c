"""What make_datalist.py prints at its end: images, subjects and labels of every split."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from datalists.source import Record

Splits = Mapping[str, Sequence[Record]]


def print_findings(splits: Splits, label_names: Sequence[str]) -> None:
    """Print a table of what each split holds; warn of empty splits and of findings that one cannot evaluate."""
    empty = [split for split in ("validation", "test") if not splits[split]]
    splits = {split: records for split, records in splits.items() if records}
    rows = []
    lacking = defaultdict(list)
    for index, name in enumerate(label_names):
        rows.append([name])
        for split, records in splits.items():
            count = Counter(record.label[index] if record.label else None for record in records)
            rows[-1].append(f"{count[1]} / {count[0]} / {count[None]}")
            for value, word in {1: "positives", 0: "negatives"}.items():
                if not count[value]:
                    lacking[split, word].append(name)
    print_table(splits, rows)
    if label_names:
        print("(positive / negative / unknown)")
        for split in empty:
            print(f"warning: {split} has no images, but cxr_classify needs validation and test.", file=sys.stderr)
    for (split, word), names in sorted(lacking.items()):
        print(f"warning: {split} has no {word} of {', '.join(names)}.", file=sys.stderr)


def print_structures(splits: Splits, labels: Mapping[int, str]) -> None:
    """Print how many subjects of each split show each structure; warn of splits that lack one."""
    splits = {split: records for split, records in splits.items() if records}
    shown = {
        split: Counter(value for _, value in {(record.group, value) for record in records for value in record.values})
        for split, records in splits.items()
    }
    print_table(splits, [[name, *(str(count[value]) for count in shown.values())] for value, name in labels.items()])
    if labels:
        print("(structures: subjects whose label map shows them)")
    for split, count in shown.items():
        lacking = [name for value, name in labels.items() if not count[value]]
        if lacking:
            print(f"warning: {split} has no {', '.join(lacking)}.", file=sys.stderr)


def print_table(splits: Splits, rows: Sequence[Sequence[str]]) -> None:
    """Print the numbers of images and subjects of each split, then the rows; the first cells to the left."""
    lines = [
        ["", *splits],
        ["images", *(str(len(records)) for records in splits.values())],
        ["subjects", *(str(len({record.group for record in records})) for records in splits.values())],
        *rows,
    ]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    for name, *cells in lines:
        print(name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), sep="  ")
