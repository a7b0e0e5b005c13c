import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which its products are not deterministic

import pytest
import torch
from helpers import RECIPES, ROOT, TASKS, TINY_BUNDLE, Recipe, write

from dissect_monai.phantoms.volumes import write_volume_phantoms
from dissect_monai.phantoms.xray import write_xray_phantoms

GPU_DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")  # "cpu" rehearses them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no worker is left alone with one in the end; those of a GPU where there is one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if GPU_DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """Of the tests that are marked gpu."""
    return torch.device(GPU_DEVICE)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On tensors this small threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle, run from the folder above `bundles`."""
    folder = tmp_path / "bundles" / "tiny"
    write(folder / "configs" / "train.json", TINY_BUNDLE)
    write(folder / "configs" / "metadata.json", {"version": "0.1.0"})
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of all processes that run these tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def dataset_dir(shared_dir: Path) -> Path:
    """Phantoms, few and small."""
    return write_xray_phantoms(shared_dir / "xrays", 24, 16, 16, image_size=32)


@pytest.fixture(scope="session")
def volume_dirs(shared_dir: Path) -> list[Path]:
    """Phantoms of three tasks in two groups, few and small."""
    return write_volume_phantoms(shared_dir / "volumes", 4, 2, 2, image_size=32, tasks=TASKS)


@pytest.fixture(scope="session")
def recipe_of(dataset_dir: Path, volume_dirs: list[Path], shared_dir: Path) -> Callable[[str], Recipe]:
    """The recipe of a name; `RECIPES` has them all."""
    return partial(Recipe, xrays=dataset_dir, volumes=volume_dirs, folder=shared_dir)


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest, recipe_of: Callable[[str], Recipe]) -> Recipe:
    """Each of them in turn."""
    return recipe_of(request.param)


@pytest.fixture
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the README runs its commands."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def _images_are_nowhere() -> Iterator[None]:
    """For lists of images that do not exist: what they hold follows from their paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dissect_monai.data.identity.content_digest", lambda image: f"{image:>16}")
        yield
