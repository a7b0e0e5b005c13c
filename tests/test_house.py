"""The package is a house: every room imports from the floors below it alone."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "dissect_monai"
FLOORS = [
    {"common"}, {"phantoms"}, {"writing", "inferers"}, {"data", "transforms", "networks"}, {"metrics", "losses"},
    {"visualize"}, {"handlers"}, {"knobs"}, {"bundle"},
]  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_modules(path: Path, package: Path) -> Iterator[str]:
    """Modules of the package that a file imports, at its top or deep inside, such as "data.readers"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [node.module or "", *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        for name in names:
            module = name.removeprefix(f"{package.name}.").replace(".", "/")
            if name.startswith(f"{package.name}.") and ((package / f"{module}.py").is_file()):
                yield module.replace("/", ".")


def arrows(package: Path) -> dict[str, set[str]]:
    """For every module of the package, the modules of it that it imports; `__init__` files are left out."""
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): set(imported_modules(path, package))
        for path in files
    }


def faults(graph: dict[str, set[str]]) -> list[str]:
    """Arrows that run up or between two rooms of one floor, and a circle if there is one."""
    found = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if module.split(".")[0] != other.split(".")[0] and FLOOR[other.split(".")[0]] >= FLOOR[module.split(".")[0]]
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"circle: {' → '.join(error.args[1])}")
    return found


def test_every_import_runs_down_and_none_in_a_circle() -> None:
    graph = arrows(PACKAGE)
    assert {module.split(".")[0] for module in graph} == FLOOR.keys()
    assert not faults(graph)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("from dissect_monai.handlers.training import go", "data.lists imports handlers.training"),
        ("def late():\n    import dissect_monai.networks.nets", "data.lists imports networks.nets"),
        ("from dissect_monai.data import splits", "circle: "),
    ],
)
def test_an_arrow_up_sideways_or_in_a_circle_is_found(tmp_path: Path, line: str, fault: str) -> None:
    files = {"data/lists": line, "data/splits": "from dissect_monai.data.lists import go"}
    for name, content in {**files, "handlers/training": "", "networks/nets": ""}.items():
        path = tmp_path / "dissect_monai" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (found,) = faults(arrows(tmp_path / "dissect_monai"))
    assert found.startswith(fault)
