"""Signals stop a run at a step boundary, saved, with an exit code that says that work remains."""

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.distributed import DistStoreError, HashStore

import tasks.train
from mae.callbacks.save_checkpoints import CheckpointConfig, SaveCheckpoints
from mae.callbacks.stop_on_signal import StopOnSignal
from mae.distributed import stop
from mae.distributed.launch import Topology, relaunch_under_torchrun
from mae.distributed.restarts import journal_of_end
from mae.distributed.stop import HANDLED, program, stop_at_once
from mae.run.checkpoint_files import checkpoints
from mae.run.metrics import MetricsCSV, read_metrics
from tasks.cli import unheard
from tasks.errors import readable_errors
from tasks.pretrain import Pretrain
from tests.processes import SMALL, command, finish, processes_of, ranks_of, run, start, wait_for_checkpoint
from tests.test_experiments import compose

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
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)],
    ids=str,
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
    monkeypatch.setattr(program, "in_training", True)
    signals.pid = os.getpid()
    signals._note(signal.SIGTERM, None)
    monkeypatch.undo()
    assert signals.received == signal.SIGTERM
    assert "SIGTERM: saving at the next step" in capfd.readouterr().out


class Reentrant(io.FileIO):
    def write(self, data: Any, /) -> int:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_hangup_stops_a_run_unless_it_was_started_to_ignore_it(tmp_path: Path, monkeypatch, ignored: bool) -> None:
    handlers = {signum: signal.getsignal(signum) for signum in (*HANDLED,)}
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        relaunch_under_torchrun(2)
        signals = StopOnSignal(SaveCheckpoints(tmp_path, CheckpointConfig(), None))
        signals.on_train_start(None, None)  # type: ignore[arg-type]
        signals.on_before_optimizer_step(None, None, None)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == (0 if ignored else signal.SIGHUP)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        program.in_training = False
    handed_on = started[0][started[0].index("--signals-to-handle") + 1].split(",")
    assert ("SIGHUP" in handed_on) != ignored and "SIGTERM" in handed_on


class Signal(pl.Callback):
    """Signals the process in the first forward pass, which may compile for minutes."""

    def on_before_backward(self, trainer: pl.Trainer, module, loss) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


SAVED = "after its last step, which is saved: run the same command to finish"
LOST = "before its first step: nothing is lost, run the same command again"
PHASES = {  # function of tasks.train -> what is said when a signal comes as it begins
    "task_class": LOST,
    "await_turn": LOST,
    "match_recipe": LOST,
    "build_trainer": LOST,
    "record_run": LOST,
    "build_callbacks": LOST,
    "first step": LOST,
    "on_train_end": SAVED,
    "finish": SAVED,
}
SLOW = dict.fromkeys(
    ("task_class", "match_recipe", "build_trainer", "record_run", "build_callbacks", "finish"), pytest.mark.slow
)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restores the handlers of signals, which the end of a program leaves ignored."""
    before = {signum: signal.getsignal(signum) for signum in HANDLED}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)
    program.__init__()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("phase", [pytest.param(phase, marks=SLOW.get(phase, ())) for phase in PHASES])
def test_signal_outside_of_the_training_loop_ends_the_run_at_once(
    tmp_path: Path, built_in: Path, monkeypatch, capfd, phase: str
) -> None:
    """With the code of a run that is told to stop, and the newest checkpoint as it was."""
    owner = {"on_train_end": SaveCheckpoints, "finish": Pretrain}.get(phase, tasks.train)
    if phase != "first step":
        original = getattr(owner, phase)

        def signalled(*values: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*values)

        monkeypatch.setattr(owner, phase, signalled)
    words = [*SMALL, f"runs={tmp_path}", f"data.root={built_in}", "name=told", "max_steps=1", "data.workers=0"]
    with pytest.raises(SystemExit) as end, stop_at_once(), readable_errors():
        tasks.train.train(compose(*words), Topology(), [Signal()] if phase == "first step" else [])

    assert end.value.code == 143
    sentence = f"stopped by SIGTERM {PHASES[phase]}"
    assert sentence in capfd.readouterr().out
    run = tmp_path / "told"
    assert len(checkpoints(run)) == (PHASES[phase] == SAVED)
    assert not (run / "lease.json").exists()
    if (run / "config.yaml").exists():  # it is a run folder
        assert json.loads((run / "ended.json").read_text())["sentence"] == sentence


def test_run_that_waits_for_the_folder_is_stopped_at_once(tmp_path: Path, built_in: Path) -> None:
    lease = {"token": "t", "host": "elsewhere", "pid": 1, "time": "2026-01-01", "processes": [[1, 1, 1]]}
    (tmp_path / "leased").mkdir()
    (tmp_path / "leased" / "lease.json").write_text(json.dumps(lease))
    process = start(command(tmp_path, built_in, *ENDLESS, "name=leased"))
    assert process.stdout is not None
    while "is in use" not in process.stdout.readline():
        assert process.poll() is None
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    output = finish(process, 130)
    assert time.monotonic() - begun < stop.KEPT_SECONDS
    assert "stopped by SIGINT before its first step: nothing is lost" in output and "Traceback" not in output
    assert [path.name for path in (tmp_path / "leased").iterdir()] == ["lease.json"]


@pytest.mark.usefixtures("handlers")
def test_crash_in_training_stays_one_whatever_signals_follow(tmp_path: Path, built_in: Path, monkeypatch) -> None:
    """srun and torchrun send SIGTERM to the ranks beside one that has crashed, which meet errors of their own."""

    class Crash(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, module, loss) -> None:
            raise ZeroDivisionError

    monkeypatch.setattr(MetricsCSV, "finalize", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    words = [*SMALL, f"runs={tmp_path}", f"data.root={built_in}", "name=crashed", "max_steps=1", "data.workers=0"]
    with pytest.raises(ZeroDivisionError), stop_at_once(), readable_errors():
        tasks.train.train(compose(*words), Topology(), [Crash()])
    assert json.loads((tmp_path / "crashed" / "ended.json").read_text())["state"] == "failed"
    os.kill(os.getpid(), signal.SIGTERM)  # as it exits


@pytest.mark.usefixtures("handlers")
def test_signal_ends_a_process_whose_main_thread_a_library_keeps(monkeypatch, capfd) -> None:
    """Keeps it as one does that waits for other ranks in C++."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(stop, "KEPT_SECONDS", 0.1)
    monkeypatch.setattr(stop, "LEAVE_SECONDS", 0.1)
    with pytest.raises((SystemExit, DistStoreError)), stop_at_once():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        HashStore().wait(["what no rank sets"], timedelta(seconds=0.5))
    assert codes[0] == 143
    assert "stopped by SIGUSR1" in capfd.readouterr().out


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("sender", "noted"), [("scancel", False), ("time limit", True)])
def test_batch_script_learns_of_a_stop_only_if_no_crash_may_be_its_cause(
    tmp_path: Path, monkeypatch, sender: str, noted: bool
) -> None:
    """srun sends SIGTERM to all ranks when one has crashed, and a rank that starts cannot tell."""
    said = "JobState=RUNNING" if sender == "scancel" else "JobState=COMPLETING Reason=TimeLimit"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho {said} Restarts=0 PreemptTime=None\n")
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "MAE_JOURNAL": str(tmp_path / "journal"),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end, stop_at_once(), journal_of_end():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    assert (tmp_path / "journal").exists() == noted


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
    settings = command(tmp_path, built_in, *ENDLESS, "name=impatient", "data.workers=0")[2:]
    words = [sys.executable, "-m", "tests.hanging_run", json.dumps([["step", 0, 3, 600]]), *settings]
    process = start(words, TORCHELASTIC_RESTART_COUNT="0")
    assert process.stdout is not None
    for awaited in ("stands still after step 3", "SIGINT: saving at the next step"):
        while awaited not in process.stdout.readline():
            assert process.poll() is None
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
