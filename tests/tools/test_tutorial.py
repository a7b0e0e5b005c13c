"""The tutorial runs from its first cell to its last, with fewer images and epochs, in a kernel of its own."""

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

SMALLER = {"epochs = 10": "epochs = 2", "192, num_validation=96, num_test=192": "96, num_validation=32, num_test=32"}


@pytest.mark.slow
def test_the_tutorial_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    whole = nbformat.writes(notebook)
    assert whole.count('"image/png"') == 2, "the site shows the outputs that the notebook holds: run it before a commit"
    for text, smaller in SMALLER.items():
        assert text in whole
        for cell in notebook.cells:
            cell.source = cell.source.replace(text, smaller)
    done = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert done.cells[-2].outputs[-1]["data"]["text/plain"] == "True"  # a report has been written
