"""What make_datalist.py prints at its end: images, subjects and labels of every split."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from datalist_source import Record

Splits = Mapping[str, Sequence[Record]]


def print_findings(splits: Splits, label_names: Sequence[str]) -> None:
    """Print a table of what each split holds; warn of empty splits and of findings that one cannot evaluate."""
    empty = [split for split in ("validation", "test") if not splits[split]]
    splits = {split: records for split, records in splits.items() if records}
    lines = heading(splits)
    lacking = defaultdict(list)
    for index, name in enumerate(label_names):
        lines.append([name])
        for split, records in splits.items():
            labels = [record.label for record in records]
            count = Counter(label[index] if isinstance(label, list) else None for label in labels)
            lines[-1].append(f"{count[1]} / {count[0]} / {count[None]}")
            for value, word in {1: "positives", 0: "negatives"}.items():
                if not count[value]:
                    lacking[split, word].append(name)
    print_table(lines)
    if label_names:
        print("(positive / negative / unknown)")
        for split in empty:
            print(f"warning: {split} has no images, but cxr_classify needs validation and test.", file=sys.stderr)
    for (split, word), names in sorted(lacking.items()):
        print(f"warning: {split} has no {word} of {', '.join(names)}.", file=sys.stderr)


def print_structures(splits: Splits, labels: Mapping[int, str]) -> None:
    """Print how many subjects of each split show each structure; warn of splits that lack one."""
    splits = {split: records for split, records in splits.items() if records}
    lines = heading(splits)
    for value, name in labels.items():
        shown = [len({record.group for record in records if value in record.values}) for records in splits.values()]
        lines.append([name, *map(str, shown)])
    print_table(lines)
    if labels:
        print("(structures: subjects whose label map shows them)")
    for column, split in enumerate(splits, start=1):
        lacking = [line[0] for line in lines[3:] if line[column] == "0"]
        if lacking:
            print(f"warning: {split} has no {', '.join(lacking)}.", file=sys.stderr)


def heading(splits: Splits) -> list[list[str]]:
    """The lines that every table starts with."""
    return [
        ["", *splits],
        ["images", *(str(len(records)) for records in splits.values())],
        ["subjects", *(str(len({record.group for record in records})) for records in splits.values())],
    ]


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells, the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *cells in lines:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print(first.ljust(widths[0]), *right, sep="  ")
