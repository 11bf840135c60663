"""The arrows between modules point one way."""

import ast
from pathlib import Path

from tests.conftest import ROOT


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def reaches(file: Path, *modules: str) -> list[str]:
    return [name for name in imports(file) if any(name == m or name.startswith(f"{m}.") for m in modules)]


def test_data_and_mae_never_meet_and_neither_knows_hydra() -> None:
    for file in (ROOT / "mae").rglob("*.py"):
        assert not reaches(file, "data", "hydra", "omegaconf", "webdataset"), file
    for file in (ROOT / "data").rglob("*.py"):
        assert not reaches(file, "mae", "hydra", "omegaconf"), file


def test_models_know_neither_their_users_nor_lightning() -> None:
    above = [f"mae.{p.stem}" for p in (ROOT / "mae").glob("*.py") if p.stem not in ("__init__", "loss", "errors")]
    for file in (ROOT / "mae" / "models").glob("*.py"):
        assert not reaches(file, "lightning", "mae.callbacks", "mae.export", *above), file


def test_callbacks_are_known_to_the_program_only() -> None:
    for file in (ROOT / "mae").rglob("*.py"):
        if file.parent.name != "callbacks":
            assert not reaches(file, "mae.callbacks"), file
