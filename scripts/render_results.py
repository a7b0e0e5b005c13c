"""Write the README's results table from results/results.csv; with --check, only say whether it is up to date.

python scripts/render_results.py [--check]
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import fire

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin (scripts/render_results.py) -->", "<!-- results: end -->"
COLUMNS = {
    "last stage": "{protocol}/findings/linear/last/auroc",
    "all stages": "{protocol}/findings/linear/stages/auroc",
    "k-NN, last": "{protocol}/findings/knn/last/auroc",
    "k-NN, all": "{protocol}/findings/knn/stages/auroc",
    "AP or PA, last": "{protocol}/shortcut/linear/last/auroc",
    "AP or PA, all": "{protocol}/shortcut/linear/stages/auroc",
}
PROTOCOLS = {
    "labels_100": "test split, 100 % of the training labels",
    "labels_10": "test split, 10 %",
    "labels_5": "test split, 5 %",
    "cross_validation": "5-fold cross-validation over all labelled images, folds by subject",
}


def latest(rows: Iterable[dict[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """The newest row of each recipe and metric; the file is only appended to."""
    return {(row["recipe"], row["metric"]): row for row in rows}


def cell(row: dict[str, str] | None) -> str:
    """Mean ± std over seeds, or a difference with its interval."""
    if row is None:
        return "–"
    mean = float(row["mean"])
    if ".." in row["std"]:
        low, high = (float(end) for end in row["std"].split(".."))
        return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"{mean:.3f} ± {float(row['std']):.3f}"


def table(rows: dict[tuple[str, str], dict[str, str]], protocol: str, recipes: Sequence[str]) -> list[str]:
    """Markdown lines of one protocol; empty if it was not run."""
    metrics = {title: metric.format(protocol=protocol) for title, metric in COLUMNS.items()}
    present = {
        title: metric for title, metric in metrics.items() if any((recipe, metric) in rows for recipe in recipes)
    }
    if not present:
        return []
    lines = [f"**{PROTOCOLS[protocol]}**", "", f"| | {' | '.join(present)} |", "|---" * (len(present) + 1) + "|"]
    for recipe in recipes:
        found = [rows.get((recipe, _pixels(recipe, metric))) for metric in present.values()]
        if any(found):
            lines.append(f"| {recipe} | {' | '.join(cell(row) for row in found)} |")
    return [*lines, ""]


def _pixels(recipe: str, metric: str) -> str:
    # Pixels have one kind of features, shown in the columns of the last stage.
    return metric.replace("/last/", "/pca/") if recipe == "pixels" else metric


def render() -> str:
    """All tables of results/results.csv as Markdown."""
    with open(ROOT / "results" / "results.csv", newline="", encoding="utf-8") as file:
        rows = latest(csv.DictReader(file))
    recipes = list(dict.fromkeys(recipe for recipe, _ in rows))
    lines = [line for protocol in PROTOCOLS for line in table(rows, protocol, recipes)]
    if rows:
        row = list(rows.values())[-1]
        lines.append(f"{row['n']} seeds, commit {row['commit']}, {row['date']}, {row['hardware']}: `{row['command']}`")
    return "\n".join(lines)


def main(check: bool = False) -> None:
    """Rewrite the part of README.md between the two markers.

    Args:
        check: change nothing, and fail if the README is out of date.
    """
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: README.md must hold the markers {BEGIN} and {END}.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if check and new != text:
        raise SystemExit("error: README.md does not show results/results.csv: run `make results`.")
    if not check:
        readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    fire.Fire(main)
