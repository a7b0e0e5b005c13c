"""The knobs of the bundles: names, defaults and allowed values, from configs and rules; meanings from docs/knobs.json.

python scripts/knobs.py BUNDLE          # prints its tables
python scripts/knobs.py all [--check]   # writes them to docs/knobs.md of every bundle
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fire
from monai.bundle import ConfigParser
from package_bundle import chosen_bundles

from dissect_monai.knobs import RULES, is_disabled

ROOT = Path(__file__).resolve().parent.parent
STANDARD = ("train", "evaluate", "inference")
KNOBS = {name: rule.says for name, rule in RULES.items()}
HEAD = "| knob | default | on phantoms | may be | meaning |\n|---|---|---|---|---|"


def main(bundle: str, check: bool = False) -> None:
    """Print the knobs of a bundle, or write those of all to their docs.

    Args:
        bundle: its name, or "all".
        check: with "all", change nothing, and fail if a page is out of date or a meaning is missing or left over.
    """
    try:
        pages = {folder / "docs" / "knobs.md": page(folder) for folder in chosen_bundles(bundle)}
        if bundle == "all":
            refuse_leftovers()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for path, text in pages.items():
        if bundle != "all":
            print(text, end="")
        elif check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            raise SystemExit(f"error: {path.relative_to(ROOT)} is not what the configs say: run `make results`.")
        elif not check:
            path.write_text(text, encoding="utf-8")


def page(bundle: Path) -> str:
    """Markdown of all knobs of a bundle, a table for each config.

    Raises:
        ValueError: naming the knobs that have no meaning in docs/knobs.json.
    """
    others = {path.stem for path in (bundle / "configs").glob("*.json")} - {*STANDARD, "metadata"}
    lines = [
        f"# Knobs of `{bundle.name}`",
        "",
        "Made by `scripts/knobs.py` from the configs. A knob is a top-level key of a config, and is set by its name:",
        "`--max_epochs 50`. Anything else in a config can be overridden by its id: `--train#augment#rotation 5`.",
    ]
    for name in (*STANDARD, *sorted(others)):
        rows = list(table(bundle, name))
        if rows:
            title = f"`{name}.json`" if name in STANDARD else f"`{name}.json` over `train.json`"
            lines += ["", f"## {title}", "", HEAD, *rows]
    return "\n".join(lines) + "\n"


def table(bundle: Path, name: str) -> Iterator[str]:
    """A line for each knob of a config; of one that goes over train.json, for those that it changes."""
    folder, section = bundle / "configs", f"{bundle.name}/{name}"
    own = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    knobs = [each for each in own if each in KNOBS]
    if name not in STANDARD and knobs == ["device"]:
        return  # of several processes, each has its own
    files = [folder / f"{each}.json" for each in dict.fromkeys(("train" if name not in STANDARD else name, name))]
    missing = [each for each in knobs if not is_disabled(own[each]) and meaning(section, each) is None]
    if missing:
        raise ValueError(f"docs/knobs.json has no meaning of {', '.join(missing)} of {section}.json: write it.")
    for knob in knobs:
        if is_disabled(own[knob]):
            yield f"| `{knob}` | refused | | | |"
            continue
        default, demo = defaults(files, knob, section)
        yield f"| `{knob}` | {default} | {'' if demo in default else demo} | {KNOBS[knob]} | {meaning(section, knob)} |"


def defaults(files: list[Path], knob: str, section: str) -> tuple[str, str]:
    """What a knob is without being given, on images of one's own and on phantoms."""
    values, raw = [], None
    for dataset_dir in ("DIR", None):
        parser = ConfigParser()
        parser.read_config([str(file) for file in files])
        raw = parser[knob]
        if isinstance(raw, dict) or (isinstance(raw, str) and raw[:1] in "@$"):
            texts = meanings()["defaults"]
            text = texts.get(f"{section}:{knob}", texts.get(knob))
            if text is not None:
                return text, text
            parser.update({"dataset_dir": dataset_dir})
            if "train" not in (file.stem for file in files):
                parser.update({"settings": {}})  # as without weights
            with patch("torch.multiprocessing.cpu_count", return_value=2**10):
                values.append(shown(parser.get_parsed_content(knob)))
        else:
            values.append(shown(raw))
    if "@settings.get(" in str(raw):
        return "that of the weights", "that of the weights"
    if "@pretraining.get(" in str(raw):
        values[0] = f"that of `pretrained`, else {values[0]}"
    return values[0], values[1]


def shown(value: Any) -> str:
    """A value as it is given on the command line."""
    return f"`{value if value is None or isinstance(value, str) else json.dumps(value)}`"


@cache
def meanings() -> dict[str, dict[str, str]]:
    """docs/knobs.json: meanings for all bundles, by kind of config, by bundle and by config; and texts of defaults."""
    content: dict[str, dict[str, str]] = json.loads((ROOT / "docs" / "knobs.json").read_text(encoding="utf-8"))
    return content


def meaning(section: str, knob: str) -> str | None:
    """What a knob means in a config, such as cxr_classify/train: the most special text that is written."""
    bundle, _, config = section.partition("/")
    found = (meanings().get(each, {}).get(knob) for each in (section, bundle, config, "meanings"))
    return next((text for text in found if text is not None), None)


def refuse_leftovers() -> None:
    """Refuse meanings of knobs that there are not."""
    left = {knob for name, texts in meanings().items() if name != "defaults" for knob in texts if knob not in KNOBS}
    if left:
        raise ValueError(f"docs/knobs.json has a meaning of {', '.join(sorted(left))}, which no rule knows: remove it.")


if __name__ == "__main__":
    fire.Fire(main)
