"""What several tests share: where real images lie, a browser, and what may be skipped."""

import os
import shutil
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hydra.core.hydra_config import HydraConfig

from data.storage import credentials
from tests.forked import parent

# Before torch is imported, and for the processes that tests start: `make test` runs two tests side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
DATASETS = Path(os.environ.get("MAE_DATASETS", ROOT.parent / "shared" / "datasets"))

# Where .ci/run has installed what tests use, a test is skipped for want of these alone.
REQUIRE_PROGRAMS = os.environ.get("REQUIRE_PROGRAMS") == "1"
MAY_BE_ABSENT = ("no real images", "may not mount")

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_configure(config: pytest.Config) -> None:
    """Lets all workers fork their programs from one parent, which imports while they collect."""
    if config.getoption("numprocesses", None):
        parent()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _not_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _not_skipped((yield))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Prints why a test is run once more (`make test-slow`): otherwise only its name would be seen."""
    if report.outcome == "rerun":
        print(f"\n{report.nodeid} is run once more, after\n{report.longreprtext}")


def _not_skipped(report: Report) -> Report:
    """With REQUIRE_PROGRAMS=1 a test that is skipped for want of a program or a package has failed."""
    if REQUIRE_PROGRAMS and report.skipped and not any(reason in str(report.longrepr) for reason in MAY_BE_ABSENT):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Returns the folder of real images; tests that need it skip where there is none."""
    if not DATASETS.is_dir():
        pytest.skip(f"no real images: {DATASETS} does not exist (set MAE_DATASETS)")
    return DATASETS


@pytest.fixture(scope="session")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the built-in images are packed once for all tests (data.root)."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def browser() -> Any:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium or google-chrome on the path")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def fresh_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the credentials, as in a process that was given none; restores what run_program changes."""
    for name in ("_secrets", "_names"):
        monkeypatch.setattr(credentials, name, defaultdict(dict))
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    for name in ("HYDRA_FULL_ERROR", credentials.PASSED_ON):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
