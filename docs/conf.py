"""The documentation site. `make docs` needs no network; with DOCS_ONLINE=1 it links to torch, monai and numpy, too."""

import os
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dissect_monai import __version__  # noqa: E402 (the package of this folder, installed or not)

project = "dissect-monai"
author = "The dissect-monai authors"
project_copyright = f"{date.today().year} {author}"
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["jupyter_execute", "_build"]
html_theme = "furo"
html_title = f"dissect-monai {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_js_files = ["keyboard.js", "sort.js"]
html_theme_options = {"source_directory": "docs/"}
html_show_sphinx = False

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # the tests run the notebook
default_role = "code"
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
if os.environ.get("DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "torch": ("https://pytorch.org/docs/stable", None),
        "monai": ("https://docs.monai.io/en/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }

# Files of the repository that a page of the site includes: links to them are links to that page.
INCLUDED = {"benchmarks/README.md": "benchmarks.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
INCLUDED |= {f"bundles/{path.name}/docs/knobs.md": f"knobs/{path.name}.md" for path in ROOT.glob("bundles/*")}


def link_inside(app: Any, page: str, source: list[str]) -> None:
    """Rewrite links to included files, and give the benchmarks' page its text, whose links are to files beside it."""
    if page == "benchmarks":
        source[0] = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").replace("](../docs/", "](")
        source[0] = re.sub(r"\]\((\w+\.py)", r"](../benchmarks/\1", source[0])
    up = "../" * page.count("/")
    for file, target in INCLUDED.items():
        source[0] = source[0].replace(f"](../{up}{file}", f"]({up}{target}")


def escape_stars(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Shapes such as (B, *spatial) are no emphasis."""
    lines[:] = [re.sub(r"(?<![*`\\])\*(?=\w)", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    """Connect both, the second before napoleon."""
    app.connect("source-read", link_inside)
    app.connect("autodoc-process-docstring", escape_stars, priority=400)
