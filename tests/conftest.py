"""What several tests share: where real images lie, and small models."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data import builtin
from tests.runs import Launcher

ROOT = Path(__file__).resolve().parent.parent
DATASETS = Path(os.environ.get("MAE_DATASETS", ROOT.parent / "shared" / "datasets"))


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real images; tests that need it skip where it is not to be had."""
    if not DATASETS.is_dir():
        pytest.skip(f"no real images: {DATASETS} does not exist (set MAE_DATASETS)")
    return DATASETS


@pytest.fixture(scope="session")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the built-in images are packed once for all tests (data.root)."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def _launcher(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Iterator[Launcher]:
    builtin.ensure("digits", built_in)
    launcher = Launcher(tmp_path_factory.mktemp("logs"), built_in)
    yield launcher
    launcher.close()


@pytest.fixture
def start(_launcher: Launcher) -> Iterator[Launcher]:
    """Starts train.py as a process (see tests/runs.py); nothing of it outlives the test."""
    yield _launcher
    _launcher.clean()
