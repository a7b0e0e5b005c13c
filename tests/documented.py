"""The commands of all READMEs, of all pages of the docs, and of the Makefile, found by parsing."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from helpers import ROOT

PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "bundles/*/docs/*.md", "benchmarks/*.md", "Makefile")
    for page in sorted(ROOT.glob(pattern))
    if "_build" not in page.parts
]
RUNS = "python -m monai.bundle "
RUN = f"{RUNS}run --config_file"


@cache
def lines() -> dict[str, list[Path]]:
    """All lines of bash, commands in sentences, and lines of the Makefile that run a bundle, with their pages."""
    found: dict[str, list[Path]] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name == "Makefile":
            folders = dict(re.findall(r"^(\w+) \??= (\S+)$", text, re.MULTILINE))
            for name, folder in {**folders, "RUN": RUN}.items():
                text = text.replace(f"$({name})", folder)
            texts = re.findall(rf"^\t({RUN} .*)", text, re.MULTILINE)
        else:
            blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
            texts = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
            outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
            texts += re.findall(r"`((?:python|make|pip|tensorboard|\.venv/bin/\S+) [^`]+)`", outside)
        for line in texts:
            if command := re.sub(r"""\s+#[^'"]*$""", "", line).strip():
                found.setdefault(" ".join(command.split()), []).append(page)
    return found
