"""The arrows between rooms point one way."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.pack import builtin
from tests.conftest import ROOT
from tests.processes import SMALL, completed

# Each room and the rooms of its package that it may import; errors.py and atomic.py are open to all of them. A file
# beside the rooms counts as a room of its own name.
DATA = {
    "storage": "",
    "order": "",
    "images": "",
    "parallel": "",
    "index": "storage",
    "loader": "images index order storage",
    "pack": "images index order storage parallel",
    "inspect": "images index order storage parallel",
    "config": "index storage",
    "datamodule": "config images index loader order pack storage",
    "mask_datamodule": "config images index loader order pack storage datamodule",
    "photograph_datamodule": "config images index loader order pack storage datamodule",
    "label_maps": "images index loader storage datamodule",
    "evaluation": "images index loader order storage datamodule label_maps",
    "rate": "images index loader order storage datamodule",
    "single_pass": "index loader order pack",  # of a plain folder too, whose files `pack` finds
}
MAE = {
    "models": "",
    "distributed": "",
    "run": "distributed",
    "runs": "distributed run",
    "pictures": "models",
    "train": "models run",
    "sam": "models train",
    "distill": "distributed formats models run sam train",
    "plan": "distill models sam train",
    "probes": "models pictures run train distributed",
    "callbacks": "distributed run train plan probes pictures",
    "formats": "distributed models run sam",
    "export": "formats models run sam",
    "report": "formats models run train pictures",
    "demo": "export formats models probes run sam train pictures",
    "summary": "report",  # the command that is now mae.report.summary
    "__init__": "models formats sam",  # names that are imported when they are first used
}
OPEN = {"errors", "atomic"}

# Imports of these packages inside functions: each is a door behind which a room is loaded only if it is asked for.
DOORS = {
    "train.py": "--help and the shell's completion load no torch",
    "eval.py": "--help and the shell's completion load no torch",
    "sweep.py": "--help and the shell's completion load no torch",
    "tasks/task.py": "each task by its name",
    "mae/train/optim.py": "Muon builds on AdamW, and most runs need none of it",
    "tasks/train.py": "plan=true; suggest=true; profile=true; logger=; init_from=RUN@STEP",
    "tasks/pretrain.py": "init_from=; online_probe.every=",
    "data/index/index.py": "shards that have no index yet",
    "data/index/splits.py": "images where shards are wanted",
    "data/datamodule.py": "built-in images that are not packed yet; data.mode=stream",
    "mae/callbacks/hang_watch.py": "a hang",
    "mae/distributed/launch.py": "ranks of MPI, pods or another launcher",
    "mae/callbacks/save_checkpoints.py": "checkpoint.artifacts=",
    "mae/distributed/stop.py": "a signal: asks SLURM; waits for other ranks",
    "mae/models/vit.py": "at(): models for images of another size",
    "mae/sam/encoder.py": "the kernel in place: triton comes with torch for CUDA alone",
    "mae/__init__.py": "names of the API when they are first used",
    "mae/demo/__main__.py": "--help",
}

# The rooms and files that two steps of pre-training load, no others.
PRETRAINING = {
    "data": {"config", "datamodule", "images", "index", "loader", "order", "storage", *OPEN},
    "mae": {"callbacks", "distributed", "models", "pictures", "plan", "probes", "report", "run", "train", *OPEN},
    "tasks": {"cli", "config", "errors", "pretrain", "recipe", "task", "train", "words"},
}
PARTS = {  # of rooms that others ask for
    "mae.pictures": {"draw"},
    "mae.plan": {"devices"},  # the peak rate that a utilisation is a share of
    "mae.probes": {"trivial_losses"},  # of the summary
    "mae.report": {"loss_curve", "start", "summary"},
}


def imports(file: Path) -> Iterator[str]:
    """Yields the modules that a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names a module too.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_in_functions(file: Path) -> Iterator[str]:
    """Returns modules of data, mae and tasks that functions of a file import; "…" where a variable names them."""
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    yield from (name.name for name in node.names if name.name.split(".")[0] in PRETRAINING)
                elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PRETRAINING:
                    yield str(node.module)
                elif isinstance(node, ast.Name) and node.id in ("import_module", "__import__"):
                    yield "…"


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room_of(file: Path, package: str) -> str:
    return file.relative_to(ROOT / package).parts[0].removesuffix(".py")


def rooms_imported(file: Path, package: str) -> set[str]:
    names = (name.split(".") for name in imports(file))
    inside = {parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == package}
    # `from data.images import jpeg` gives data.images and data.images.jpeg; `from mae import load` the room __init__.
    return inside - {room_of(file, package)}


@pytest.mark.parametrize(("package", "allowed"), [("data", DATA), ("mae", MAE)])
def test_rooms_import_only_the_rooms_below_them(package: str, allowed: dict[str, str]) -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {package}.{room}"
        for file in files(package)
        if room_of(file, package) not in OPEN
        for room in rooms_imported(file, package) - OPEN
        if room not in allowed.get(room_of(file, package), "").split()
    ]
    assert not wrong


@pytest.mark.parametrize(("package", "allowed"), [("data", DATA), ("mae", MAE)])
def test_table_of_rooms_is_complete_and_acyclic(package: str, allowed: dict[str, str]) -> None:
    rooms = {room_of(file, package) for file in files(package)} - OPEN
    assert rooms - {"__init__"} == set(allowed) - {"__init__"}
    below: set[str] = set()
    for _ in allowed:
        below |= {room for room, others in allowed.items() if set(others.split()) <= below}
    assert below == set(allowed)


def test_data_and_mae_import_neither_each_other_nor_hydra() -> None:
    for package, others in (("mae", {"data", "tasks", "webdataset"}), ("data", {"mae", "tasks"})):
        for file in files(package):
            tops = {name.split(".")[0] for name in imports(file)}
            assert not tops & (others | {"hydra", "omegaconf"}), file


def test_models_do_not_import_lightning() -> None:
    for file in (ROOT / "mae" / "models").glob("*.py"):
        assert "lightning" not in {name.split(".")[0] for name in imports(file)}, file


def test_functions_import_rooms_only_in_the_listed_files() -> None:
    programs = [ROOT / name for name in ("train.py", "eval.py", "sweep.py")]
    for file in [*programs, *files("data"), *files("mae"), *files("tasks")]:
        found = sorted(set(imports_in_functions(file)))
        assert bool(found) == (str(file.relative_to(ROOT)) in DOORS), f"{file} imports {found} inside functions"


def test_pretraining_loads_only_its_own_rooms(tmp_path: Path, built_in: Path) -> None:
    builtin.ensure("digits", built_in)  # otherwise the run packs them
    script = tmp_path / "script.py"
    # A forked program has our modules from its parent: it imports them anew.
    script.write_text(
        "import os, runpy, sys\n"
        "sys.path[0] = os.getcwd()\n"
        "for name in list(sys.modules):\n"
        "    if name.partition('.')[0] in ('data', 'mae', 'tasks'):\n"
        "        del sys.modules[name]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "print('loaded', *sys.modules)\n"
    )
    words = [*SMALL, f"runs={tmp_path}", f"data.root={built_in}", "max_steps=2", "data.workers=0"]
    done = completed([sys.executable, str(script), *words])
    assert done.returncode == 0, done.stderr
    loaded = [name.split(".") for name in done.stdout.splitlines()[-1].split() if name.split(".")[0] in PRETRAINING]
    for package, rooms in PRETRAINING.items():
        assert {parts[1] for parts in loaded if parts[0] == package and len(parts) > 1} == rooms
    for room, modules in PARTS.items():
        assert {parts[2] for parts in loaded if ".".join(parts[:2]) == room and len(parts) > 2} == modules
    found = [ROOT.joinpath(*parts) for parts in loaded]
    sources = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in found]
    assert sum(len(source.read_text().splitlines()) for source in [ROOT / "train.py", *sources]) <= 11745
