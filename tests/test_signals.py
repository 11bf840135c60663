"""Signals stop a run at a step boundary, saved, with an exit code that says that work remains."""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mae.callbacks.save_checkpoints import CheckpointConfig, SaveCheckpoints
from mae.callbacks.stop_on_signal import HANDLED, StopOnSignal
from mae.distributed.launch import relaunch_under_torchrun
from mae.run.checkpoint_files import checkpoints
from mae.run.metrics import read_metrics
from tasks.cli import unheard
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
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)], ids=lambda v: str(v)
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
    word = json.loads((tmp_path / name / "ended.json").read_text())
    assert word["state"] == "stopped" and word["sentence"].startswith(f"stopped by {signal.Signals(signum).name} after")
    # The length may change on a resume, which saves this test 100,000 steps.
    output = run([*words, f"max_steps={step + 3}"]).replace("\n", "")
    assert f"step-{step:08d}.ckpt" in output
    assert f"the schedule was made for 100,000 steps and is now for {step + 3:,}" in output
    assert newest_step(tmp_path / name) == step + 3
    assert not (tmp_path / name / "ended.json").exists()


def test_signal_in_the_middle_of_a_print_is_noted(tmp_path: Path, monkeypatch, capfd) -> None:
    """A second print inside the first raises "reentrant call": so does this stdout."""
    signals = StopOnSignal(SaveCheckpoints(tmp_path, CheckpointConfig(), None))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Reentrant(1, "w", closefd=False))))
    signals._note(signal.SIGTERM, None)
    monkeypatch.undo()
    assert signals.received == signal.SIGTERM
    assert "SIGTERM: saving at the next step" in capfd.readouterr().out


class Reentrant(io.FileIO):
    def write(self, data: Any, /) -> int:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")


class Untrained:
    received_sigterm = False


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_hangup_stops_a_run_unless_it_was_started_to_ignore_it(tmp_path: Path, monkeypatch, ignored: bool) -> None:
    handlers = {signum: signal.getsignal(signum) for signum in (*HANDLED,)}
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        relaunch_under_torchrun(2)
        signals = StopOnSignal(SaveCheckpoints(tmp_path, CheckpointConfig(), None))
        signals.on_train_start(Untrained(), None)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == (0 if ignored else signal.SIGHUP)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    handed_on = started[0][started[0].index("--signals-to-handle") + 1].split(",")
    assert ("SIGHUP" in handed_on) != ignored and "SIGTERM" in handed_on


def test_reader_that_is_gone_ends_no_program() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        heard = unheard(stream)
        assert (heard.encoding, heard.errors) == (stream.encoding, stream.errors)
        for _ in range(3):
            print("x" * 100_000, file=heard, flush=True)
    with open(os.devnull, "w") as stream:
        print("a line", file=unheard(stream), flush=True)


def test_full_pipe_that_does_not_block_gets_every_line() -> None:
    """A program at its other end may have made it non-blocking: print raises BlockingIOError then."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    said: list[bytes] = []

    def read() -> None:
        time.sleep(0.05)  # it is full by then
        while part := os.read(reading, 1 << 16):
            said.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(writing, "w") as stream:
        print("x" * 300_000, file=unheard(stream), flush=True)
    reader.join()
    os.close(reading)
    assert len(b"".join(said)) == 300_001


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_ranks_of_a_killed_torchrun_save_and_end_and_the_same_command_resumes(tmp_path: Path, built_in: Path) -> None:
    name = f"orphaned{os.getpid()}"
    words = command(tmp_path, built_in, f"name={name}", "val_every=null", "data.workers=1", "trainer.devices=2")
    process = start([*words, "max_steps=100000", "checkpoint.every_steps=100000"])
    try:
        deadline = time.monotonic() + 240
        while not read_metrics(tmp_path / name / "metrics.csv"):  # a step is behind it, which can be saved
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        wait_for_checkpoint(None, tmp_path / name)
        while called(name):
            assert time.monotonic() < deadline, "the ranks train on"
            time.sleep(0.1)
        finish(process, -signal.SIGKILL)
        saved = newest_step(tmp_path / name)
        assert f"resumed at step {saved:,}" in run([*words, f"max_steps={saved + 2}"])
    finally:
        for left in called(name):
            os.kill(left, signal.SIGKILL)
