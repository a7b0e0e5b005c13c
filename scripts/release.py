"""Check that all bundles are ready to be published, and print the commands that publish them; nothing is sent anywhere.

    python scripts/release.py [--weights DIR] [--output_dir dist]

It packages every bundle, checks versions, changelogs and model cards, prints the commands, and names all that is
missing. It needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import fire
from package_bundle import PACKAGE, ROOT, chosen_bundles, package, released_version

from dissect_monai import __version__

CARD = "docs/README.md"
CARD_SECTIONS = ("## Train", "## Limits")
CARD_WARNING = "Not a medical device"


def main(weights: str | Path | None = None, output_dir: str | Path = "dist") -> None:
    """Check all bundles, and print how to publish them.

    Args:
        weights: folder that has NAME/models/model.pt of each bundle, such as runs/demo after `make demo-all`; bundles/
            by default.
        output_dir: folder for the archives.
    """
    problems = list(changelog_problems((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__))
    for bundle in chosen_bundles("all"):
        problems += [f"{bundle.name}: {each}" for each in card_problems(bundle)]
        try:
            archive = package(bundle, Path(weights or ROOT / "bundles", bundle.name), Path(output_dir))
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        version = released_version(bundle)
        print(f"# {bundle.name} {version}: {archive}, {archive.stat().st_size / 2**20:.1f} MiB")
        print(*commands(bundle.name, version, archive), "", sep="\n")
    if problems:
        raise SystemExit("error: not ready to be published:\n" + "\n".join(f"- {each}" for each in problems))


def changelog_problems(changelog: str, version: str) -> Iterator[str]:
    """What is wrong with the entry of a version in CHANGELOG.md."""
    entry = re.search(rf"^## {re.escape(version)}\b(.*)$", changelog, re.MULTILINE)
    if entry is None:
        yield f"CHANGELOG.md must have an entry for {version}, the version in {PACKAGE}/common.py"
    elif not re.search(r"\d{4}-\d\d-\d\d", entry[1]):
        yield f"CHANGELOG.md must say when {version} was released, as in `## {version} – 2026-01-31`, got `{entry[0]}`"


def card_problems(bundle: Path) -> Iterator[str]:
    """What a reader of the model card would miss: sections and licences."""
    card = (bundle / CARD).read_text(encoding="utf-8")
    for section in CARD_SECTIONS:
        if f"\n{section}\n" not in card:
            yield f"{CARD} must have a section `{section}`"
    if CARD_WARNING not in card:
        yield f"{CARD} must say `{CARD_WARNING}`"
    for name in ("LICENSE", "docs/data_license.txt"):
        if not (bundle / name).is_file():
            yield f"{name} is missing"


def commands(name: str, version: str, archive: Path) -> list[str]:
    """What publishes one bundle; words in capitals are yours."""
    folder = f"unpacked/{name}"
    return [
        f"unzip -q {archive} -d unpacked",
        f"cp -r {folder} MODEL_ZOO/models/   # a pull request to the model zoo: docs/publishing.md",
        f"ngc registry model upload-version ORG/TEAM/{name}:{version} --source {folder}   # NGC",
        f"python -m monai.bundle push_to_hf_hub --repo ORG/{name} --name {name} --bundle_dir unpacked"
        f" --version {version}   # Hugging Face",
    ]


if __name__ == "__main__":
    fire.Fire(main)
