"""The image of the Dockerfile is built, and any user trains in it with folders of the host. Needs root, a network."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mae.run.checkpoint_files import checkpoints, step_of
from tests.conftest import ROOT
from tests.image import PROGRAMS, ROOM, Container, Image
from tests.processes import SMALL, wait_for_checkpoint

EXTRAS = "remote,sam,mlflow,tensorboard"
RUN = ("experiment=digits_tiny", *SMALL, "name=a", "data.workers=1")
CACHES = """
import os, torch, matplotlib.pyplot
from importlib.util import find_spec
from data.storage.cache import cache_root
assert torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).tolist() == [1, 1, 1]
os.makedirs(cache_root())
assert os.path.expanduser("~") == "/home/mae"
print(os.getuid(), torch.version.cuda, *sorted(os.listdir("/home/mae")))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # one build takes five minutes of the two cores


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs apt-get install buildah debootstrap: no {', '.join(missing)}")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("may not mount the root of an image")
    folder = tmp_path_factory.mktemp("image")
    if (free := shutil.disk_usage(folder).free) < ROOM:
        pytest.skip(f"needs {ROOM / 1e9:.0f} GB for the image, and {folder} has {free / 1e9:.0f}")
    image, began = Image(folder), time.monotonic()
    try:
        image.build(EXTRAS=EXTRAS, COMMIT="0123abc")
        print(f"\nimage built in {time.monotonic() - began:.0f} s")
        yield image
    finally:
        image.close()


def folders(tmp_path: Path, owner: int, group: int, mode: int) -> dict[str, Path]:
    """Makes the folders of data and runs of a user of the host; returns them by their places in the image."""
    made = {f"/mae/{name}": tmp_path / name for name in ("datasets", "runs")}
    for folder in made.values():
        folder.mkdir()
        os.chown(folder, owner, group)
        folder.chmod(mode)
    return made


@pytest.mark.parametrize(
    ("user", "groups", "owner", "mode", "read_only"),
    [
        pytest.param("1000:1000", "", (1000, 1000), 0o755, False, id="docker run --user"),
        pytest.param(None, "2000", (0, 2000), 0o2775, True, id="fsGroup and a read-only root"),
    ],
)
def test_any_user_trains_in_mounted_folders_is_stopped_by_sigterm_and_resumes(
    image: Image, tmp_path: Path, user: str | None, groups: str, owner: tuple[int, int], mode: int, read_only: bool
) -> None:
    mounts = folders(tmp_path, *owner, mode)
    run = tmp_path / "runs" / "a"
    words = [*RUN, "max_steps=100000", "val_every=null", "checkpoint.every_steps=20"]
    container = Container(image, words, user=user, groups=groups, mounts=mounts, read_only=read_only)
    wait_for_checkpoint(container.process, run)
    container.stop()
    assert "stopped by SIGTERM" in container.finish(143)

    saved = checkpoints(run)[0]
    step = step_of(saved)
    assert step > 20 and saved.stat().st_uid == int((user or "10001:10001").split(":")[0])
    words = [*RUN, f"max_steps={step + 5}", "val_every=null"]
    output = Container(image, words, user=user, groups=groups, mounts=mounts, read_only=read_only).finish()
    assert f"step {step + 5}/{step + 5}" in output and "not writable" not in output
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [(start["step"], start["git"]) for start in starts] == [(0, "0123abc"), (step, "0123abc")]
    assert (tmp_path / "datasets" / "built_in" / "digits").is_dir()


def test_two_ranks_without_mounts_train_as_the_image_s_own_user_and_end_with_process_1(image: Image) -> None:
    container = Container(image, [*RUN, "max_steps=100000", "trainer.devices=2"])
    assert container.process.stdout is not None
    said = ""
    while "step 1/" not in said:
        line = container.process.stdout.readline()
        assert line, said
        said += line
    container.stop()
    assert "torchrun" in said and "stopped by SIGTERM" in container.finish(1)  # torchrun's own code


def test_folder_of_another_user_is_refused_with_its_place(image: Image, tmp_path: Path) -> None:
    mounts = folders(tmp_path, 1000, 1000, 0o755)
    said = Container(image, RUN, mounts=mounts).finish(2)
    assert "datasets/built_in/digits cannot be created (Permission denied)" in said and "Traceback" not in said


def test_caches_of_a_user_without_a_name_are_writable_and_extras_are_there(image: Image) -> None:
    script = f"{CACHES}assert all(map(find_spec, ('mlflow', 'pycocotools', 's3fs', 'tensorboard', 'transformers')))"
    output = Container(image, ["-c", script], user="4321:4321", entrypoint=["tini", "--", "python"]).finish()
    assert output.split() == ["4321", str(torch.version.cuda), ".cache", ".config"]


def test_image_holds_the_code_alone(image: Image) -> None:
    asked = "import os; print(*sorted(os.listdir('/mae')))"
    found = Container(image, ["-c", asked], entrypoint=["python"]).finish().split()
    programs = {path.name for path in ROOT.glob("*.py")}
    assert set(found) == programs | {
        *("conf", "data", "mae", "tasks", "datasets", "runs", "sweeps", "__pycache__"),
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    }
