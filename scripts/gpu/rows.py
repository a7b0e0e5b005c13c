"""Results of one part of scripts/gpu/run.py, written at once; for pytest a plugin that writes those of the tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: Any) -> None:
    """Write a JSON file, whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.tmp")
    half.write_text(json.dumps(content, indent=1), encoding="utf-8")
    half.replace(path)


class Rows:
    """Rows of a JSON file, whole after each."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: Any, holds: bool | None = None, **more: Any) -> None:
        """Write a row: what was measured, its value, and whether a limit that it has is kept."""
        self.rows.append({"what": what, "value": value, "holds": holds, **more})
        write(self.path, self.rows)


def pytest_configure(config: Any) -> None:
    """Results go to the file of the environment, by the process that the others report to."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(TestRows(os.environ["GPU_RESULTS"]))


class TestRows(Rows):
    """A row for each test, with what it has recorded."""

    __test__ = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write what became of a test."""
        if report.when == "call" or report.outcome != "passed":
            name, seconds = report.nodeid.rpartition("/")[2], round(report.duration, 1)
            more = dict(report.user_properties)
            if report.failed and (crash := getattr(report.longrepr, "reprcrash", None)):
                more["error"] = crash.message[:2000]  # the log may be cut off before its summary
            self.add(name, report.outcome, report.outcome == "passed", seconds=seconds, **more)
