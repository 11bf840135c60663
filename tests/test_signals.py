"""Signals stop a run at a step boundary, saved, with an exit code that says that work remains."""

import os
import signal
import time
from pathlib import Path

import pytest

from mae.run.checkpoint_files import checkpoints
from tests.processes import command, finish, processes_of, ranks_of, run, start, wait_for_checkpoint

ENDLESS = ("max_steps=100000", "checkpoint.every_steps=5", "val_every=null", "log_every=1000")


def called(name: str) -> list[int]:
    """Returns the processes of a run that torchrun itself has started; loader workers share its command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0") if folder.name.isdigit() else []
        except OSError:
            continue
        if f"name={name}".encode() in words:
            found.append(int(folder.name))
    return found


def newest_step(folder: Path) -> int:
    return int(checkpoints(folder)[0].stem.removeprefix("step-"))


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)], ids=lambda v: str(v)
)
def test_signalled_run_saves_stops_and_resumes(tmp_path: Path, built_in: Path, signum, code) -> None:
    name = f"signalled{int(signum)}"
    words = command(tmp_path, built_in, *ENDLESS, f"name={name}", "data.workers=1")
    process = start(words)
    wait_for_checkpoint(process, tmp_path / name)
    os.killpg(process.pid, signum)  # as Ctrl-C reaches the whole group, loader workers included
    output = finish(process, code)
    step = newest_step(tmp_path / name)
    assert f"stopped by {signal.Signals(signum).name} after step {step}" in output
    assert not processes_of(process)
    # The length may change on a resume, which saves this test 100,000 steps.
    assert f"step-{step:08d}.ckpt" in run([*words, f"max_steps={step + 3}"]).replace("\n", "")
    assert newest_step(tmp_path / name) == step + 3


def test_second_ctrl_c_stops_the_run_without_a_save(tmp_path: Path, built_in: Path) -> None:
    slow_steps = ("model.width=256", "model.depth=12", "global_batch=1024", "micro_batch=1024", "name=impatient")
    process = start(command(tmp_path, built_in, *ENDLESS, *slow_steps, "data.workers=0"))
    deadline = time.monotonic() + 90
    while not (tmp_path / "impatient" / "metrics.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    finish(process, -signal.SIGINT)
    assert not checkpoints(tmp_path / "impatient")


def test_two_ranks_stop_together_if_one_is_signalled(tmp_path: Path, built_in: Path) -> None:
    words = command(tmp_path, built_in, *ENDLESS, "name=pair", "data.workers=0", ranks=2)
    process = start(words)
    wait_for_checkpoint(process, tmp_path / "pair")
    _, second = ranks_of(process)
    os.kill(second, signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    step = newest_step(tmp_path / "pair")
    assert f"stopped by SIGUSR1 after step {step}" in output
    assert not processes_of(process)
    run([*words, f"max_steps={step + 2}"])
    assert newest_step(tmp_path / "pair") == step + 2


def test_signal_to_torchrun_stops_and_saves_its_ranks(tmp_path: Path, built_in: Path) -> None:
    """trainer.devices=2 starts torchrun itself, all that a scheduler knows; it hands signals on to whole groups."""
    name = f"led{os.getpid()}"
    process = start(command(tmp_path, built_in, *ENDLESS, f"name={name}", "data.workers=1", "trainer.devices=2"))
    try:
        wait_for_checkpoint(process, tmp_path / name)
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(timeout=180) == 1  # torchrun's own code; its ranks end with 143
        time.sleep(0.2)
        assert not called(name)
    finally:
        for left in called(name):
            os.kill(left, signal.SIGKILL)
    output = finish(process, code=1)
    assert "starting 2 ranks with torchrun" in output
    assert f"stopped by SIGUSR1 after step {newest_step(tmp_path / name)}" in output
