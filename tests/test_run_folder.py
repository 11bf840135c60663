"""The run folder: only files of a run are deleted, one start at a time writes, damaged bookkeeping stops nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from mae.callbacks.save_checkpoints import CheckpointConfig, SaveCheckpoints
from mae.callbacks.share_lease import ShareLease
from mae.distributed import processes
from mae.distributed.processes import Process, identify
from mae.errors import CheckpointError, ConfigError
from mae.run import lease as leases
from mae.run.checkpoint_files import checkpoint_path, checkpoints, newest_valid, set_damaged_aside, verify
from mae.run.checkpoint_writer import BackgroundCheckpointIO, write_checkpoint
from mae.run.folder import (
    PROBES,
    clear_run_folder,
    own_launch,
    read_json,
    record_start,
    refuse_foreign_folder,
    starting_point,
    write_json,
    write_settings,
)
from mae.run.lease import Lease, await_turn, hold_lease, is_in_use
from mae.run.metrics import MetricsCSV, read_metrics
from mae.run.of_weights import run_of
from mae.run.tracker_identity import wandb_id
from tasks.config import keep_image
from tasks.evaluate import AnyProbe
from tests.conftest import ROOT
from tests.machines import on_machines
from tests.test_experiments import compose

SETTINGS = "model: {}\noptim: {}\nglobal_batch: 64\n"


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what would make this process look like a rank of a cluster."""
    for name in ("MAE_LAUNCH_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mae.run.folder._git", lambda *_: "")  # each start asks git and the versions of packages
    monkeypatch.setattr("mae.run.folder.PACKAGES", ())


def begun(run: Path, *steps: int) -> Path:
    """Makes what a first start of a run leaves behind, with checkpoints after these steps."""
    run.mkdir(parents=True, exist_ok=True)
    write_settings(run, SETTINGS)
    record_start(run, 0, 1)
    for step in steps:
        write_checkpoint({"mae": {"step": step}}, checkpoint_path(run, step))
    return run


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def start(run: Path, overwrite: bool = True) -> Path | None:
    """Does what a start with resume=never does with the folder; returns the checkpoint that it resumes from."""
    checkpoint = starting_point(run, "never", overwrite)
    clear = overwrite and own_launch(run) is None
    refuse_foreign_folder(run, clear)
    run.mkdir(exist_ok=True)
    if clear:
        clear_run_folder(run)
    write_settings(run, SETTINGS)
    record_start(run, 0 if checkpoint is None else 1, 1)
    return checkpoint


# What overwrite=true deletes


@pytest.mark.parametrize("config", [None, "lr: 1\n", "", "- a list\n", "model: {}\n"])
def test_overwrite_of_a_folder_that_is_no_run_is_refused(tmp_path: Path, config: str | None) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "precious.jpg").write_bytes(b"photograph")
    if config is not None:
        (photos / "config.yaml").write_text(config)
    before = files(photos)
    with pytest.raises(
        ConfigError, match=r"photos holds .*precious\.jpg, but no config.yaml or environment.json of a run"
    ):
        start(photos)
    assert files(photos) == before


def test_start_in_a_folder_of_another_program_does_not_replace_its_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    with pytest.raises(ConfigError, match=r"is no run, and this one would replace its metrics\.csv\. Choose another"):
        refuse_foreign_folder(tmp_path, False)
    (tmp_path / "metrics.csv").unlink()
    refuse_foreign_folder(tmp_path, False)


def test_overwrite_removes_what_a_run_writes_and_names_the_rest(tmp_path: Path, capfd) -> None:
    run = begun(tmp_path / "run", 1, 2)
    ours = ["metrics.csv", "wandb_id.txt", "summary.json.0a1b2c3d.tmp", "environment.json.damaged", "eval/knn.json"]
    ours += ["eval/features/x.pt", "reconstructions/step-00000001.png", "checkpoints/step-00000003.ckpt.damaged-2"]
    ours += ["wandb/offline-run-20260101_000000-abc/run-abc.wandb", "tensorboard/events.out.tfevents.1.host.2.0"]
    foreign = ["notes.txt", "export/model.safetensors", "checkpoints/last.ckpt", "eval/mine.json", "eval/plot.png"]
    for name in (*ours, *foreign):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    assert start(run) is None
    assert files(run) == {*foreign, "config.yaml", "environment.json"}
    said = capfd.readouterr().out
    assert "keeps export/, notes.txt, checkpoints/last.ckpt, eval/mine.json, eval/plot.png, which no run" in said


def test_overwrite_knows_the_results_of_each_probe() -> None:
    assert {get_args(probe.model_fields["name"].annotation)[0] for probe in get_args(AnyProbe)} == {*PROBES}


@pytest.mark.parametrize("linked", ["run", "checkpoints"])
def test_overwrite_keeps_links_to_another_disk(tmp_path: Path, linked: str) -> None:
    scratch = tmp_path / "scratch"
    link = tmp_path / "run" if linked == "run" else tmp_path / "run" / "checkpoints"
    link.parent.mkdir(exist_ok=True)
    scratch.mkdir()
    link.symlink_to(scratch)
    run = begun(tmp_path / "run", 1)
    assert start(run) is None
    assert link.is_symlink() and scratch.is_dir() and not checkpoints(run)


def test_checkpoints_linked_from_another_run_are_refused(tmp_path: Path) -> None:
    other, run = begun(tmp_path / "other", 1), begun(tmp_path / "run")
    (run / "checkpoints").symlink_to(other / "checkpoints")
    with pytest.raises(ConfigError, match="is a link into the run"):
        start(run)
    assert len(checkpoints(other)) == 1


def test_folder_that_links_nowhere_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"cannot be written \(a link that leads nowhere\)"):
        Lease(tmp_path / "run", 0, 1).take(None)


def test_names_of_dots_are_refused() -> None:
    for setting in ("name=.", "name='..'", "name='...'", "trial='..'"):
        with pytest.raises(ValueError, match=r"'?\.+'? names no folder of its own"):
            compose(setting)


# Restarts


RESTARTS = {
    "torchrun": ({"TORCHELASTIC_RUN_ID": "a1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RUN_ID": "b2"}),
    "torchrun after a node was lost": ({"TORCHELASTIC_RUN_ID": "a1"}, {}, {"TORCHELASTIC_RUN_ID": "b2"}),
    "torchrun without an id": ({"TORCHELASTIC_RUN_ID": "none"}, {}, {"TORCHELASTIC_RUN_ID": "b2"}),
    "SLURM": ({"SLURM_JOB_ID": "7"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "8"}),
    "SLURM array": (
        {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
        {"SLURM_RESTART_COUNT": "2", "SLURM_JOB_ID": "11"},
        {"SLURM_ARRAY_TASK_ID": "3"},
    ),
    "torchrun in a SLURM job": (
        {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "none"},
        {"TORCHELASTIC_RESTART_COUNT": "1"},
        {"SLURM_JOB_ID": "8", "TORCHELASTIC_RUN_ID": "c"},
    ),
    "an id of one's own": ({"MAE_LAUNCH_ID": "x", "SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}, {"MAE_LAUNCH_ID": "y"}),
}


@pytest.mark.parametrize("case", RESTARTS)
def test_restart_goes_on_with_what_its_own_launch_has_begun(tmp_path: Path, monkeypatch, capfd, case: str) -> None:
    first, again, another = RESTARTS[case]
    run = begun(tmp_path / "run", 9)  # of an earlier launch: overwritten by the first start, and only by that
    for name, value in first.items():
        monkeypatch.setenv(name, value)
    assert start(run) is None and not checkpoints(run)
    write_checkpoint({"mae": {"step": 1}}, checkpoint_path(run, 1))
    for name, value in again.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        assert start(run) == checkpoint_path(run, 1)
    assert start(run, overwrite=False) == checkpoint_path(run, 1)
    assert "was begun by this very launch" in capfd.readouterr().out
    for name, value in another.items():
        monkeypatch.setenv(name, value)
    assert start(run) is None and not checkpoints(run)


def test_restart_overwrites_if_its_first_start_did_not_get_so_far(tmp_path: Path, monkeypatch) -> None:
    run = begun(tmp_path / "run", 9)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(run) is None and not checkpoints(run)


def test_clearing_that_is_killed_is_finished_by_the_restart(tmp_path: Path, monkeypatch) -> None:
    run = begun(tmp_path / "run", 1, 2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("mae.run.folder.write_json", lambda *_: exit("killed"))
    with pytest.raises(SystemExit):
        clear_run_folder(run)
    monkeypatch.undo()
    assert start(run) is None and files(run) == {"config.yaml", "environment.json"}


def test_second_run_in_one_slurm_job_overwrites(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = tmp_path / "run"
    start(run)
    write_checkpoint({"mae": {"step": 1}}, checkpoint_path(run, 1))
    assert start(run) is None and not checkpoints(run)


def test_new_container_of_a_pod_is_a_restart_and_a_second_program_in_it_is_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    run = tmp_path / "run"
    start(run)
    write_checkpoint({"mae": {"step": 1}}, checkpoint_path(run, 1))
    # The kernel gives the number of a PID namespace again as soon as it is free: process 1 is another one.
    monkeypatch.setattr("mae.distributed.restarts.identify", lambda pid: Process(processes.machine(), pid, 5))
    assert start(run) == checkpoint_path(run, 1)
    monkeypatch.undo()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert start(run) is None


def test_counted_restart_without_an_id_resumes_where_rank_0_is_on_another_machine(tmp_path: Path, monkeypatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    start(run)
    write_checkpoint({"mae": {"step": 1}}, checkpoint_path(run, 1))
    monkeypatch.setattr("mae.distributed.restarts.identify", lambda pid: Process(1, pid, 3))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(run) == checkpoint_path(run, 1)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")  # the other machine is gone
    assert start(run) == checkpoint_path(run, 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # a machine has joined, or another launch
    with pytest.raises(ConfigError, match="Give torchrun an --rdzv-id"):
        start(run)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert start(run) is None


def test_ranks_whose_torchrun_have_restarted_unequally_belong_to_one_start(tmp_path: Path, monkeypatch) -> None:
    """One that has joined later has restarted nothing: its ranks would wait for the lease of their own rank 0."""
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "node0", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with hold_lease(tmp_path / "run", 0, 2, None):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert not is_in_use(tmp_path / "run", rank=1)
        monkeypatch.setenv("MASTER_PORT", "29502")
        assert is_in_use(tmp_path / "run", rank=1)


def test_restart_resumes_if_environment_json_is_damaged(tmp_path: Path, monkeypatch) -> None:
    run = begun(tmp_path / "run", 3)
    (run / "environment.json").write_text('{"starts"')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert starting_point(run, "never", True) == checkpoint_path(run, 3)


# One start at a time


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(leases, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)


def test_second_start_is_refused_while_the_first_goes_on(tmp_path: Path, fast: None) -> None:
    said = rf"in use: process {os.getpid()} on \S+ has been writing there since 20"
    with hold_lease(tmp_path, 0, 1, await_turn(tmp_path, 0)), pytest.raises(ConfigError, match=said):
        await_turn(tmp_path, 0)
    assert await_turn(tmp_path, 0) is None and not files(tmp_path)


def test_second_start_waits_for_the_first_to_end(tmp_path: Path, fast: None, monkeypatch, capfd) -> None:
    with hold_lease(tmp_path, 0, 1, None) as first:
        monkeypatch.setattr(time, "sleep", lambda _: first.release())
        assert await_turn(tmp_path, 0) is None
    assert "Waiting until it ends" in capfd.readouterr().out


@pytest.mark.parametrize("contents", ["of another machine", "", "\0\0\0\0", "[1]", '{"token": "x", "processes": 7}'])
def test_lease_that_nobody_renews_is_taken_after_a_minute(tmp_path: Path, fast: None, contents: str) -> None:
    (tmp_path / leases.NAME).write_text(contents)
    if contents == "of another machine":
        lease = {"token": "x", "host": "node3", "pid": 1, "time": "", "ranks": 1, "processes": [[5, 1, 1]]}
        write_json(tmp_path / leases.NAME, lease)
    left_behind = await_turn(tmp_path, 0)
    assert left_behind is not None
    with hold_lease(tmp_path, 0, 1, left_behind):
        pass


def test_lease_of_a_dead_process_of_this_machine_needs_no_wait(tmp_path: Path, monkeypatch) -> None:
    script = "import os, pathlib, sys; from mae.run.lease import *; Lease(pathlib.Path(sys.argv[1]), 0, 1).take(None); "
    script += "os._exit(9)"
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT)
    assert done.returncode == 9 and (tmp_path / leases.NAME).exists()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    with hold_lease(tmp_path, 0, 1, await_turn(tmp_path, 0)):
        pass


def test_lease_counts_as_dead_only_if_all_ranks_have_ended(tmp_path: Path, fast: None) -> None:
    with hold_lease(tmp_path, 0, 2, None) as lease:
        lease.release()  # a killed rank 0 renews nothing
        mine = list(identify(os.getpid()))
        for processes, waits in (
            ([[*mine[:2], 1], [*mine[:2], 2]], 0),
            ([[*mine[:2], 1], mine], 1),
            ([], 1),
        ):
            write_json(tmp_path / leases.NAME, lease.contents | {"processes": processes})
            began = time.monotonic()
            await_turn(tmp_path, 0)
            assert (time.monotonic() - began > 0.2) == waits


def test_of_two_starts_at_once_only_one_takes_the_lease(tmp_path: Path) -> None:
    for left_behind in (None, b"of a dead start"):  # both have waited for it
        if left_behind is not None:
            (tmp_path / leases.NAME).write_bytes(left_behind)
        with hold_lease(tmp_path, 0, 1, left_behind) as first:
            taken = (tmp_path / leases.NAME).read_bytes()
            with pytest.raises(ConfigError, match=f"in use: process {os.getpid()} on"):
                Lease(tmp_path, 0, 1).take(left_behind)
            assert (tmp_path / leases.NAME).read_bytes() == taken
            first.look()
        assert not files(tmp_path)


def test_process_counts_as_dead_only_where_it_can_be_seen(monkeypatch) -> None:
    gone = Process(processes.machine(), os.getpid(), 1)
    assert processes.is_dead(gone)
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError))  # hidepid, another user's
    assert not processes.is_dead(gone)
    monkeypatch.setattr(os, "getpid", lambda: 1)  # unshare --pid without a /proc of its own
    assert processes.machine.__wrapped__() == 0


def test_run_folder_that_another_machine_writes_is_refused_until_that_machine_is_gone(
    tmp_path: Path, fast: None
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()

    def first(run: Path) -> str:
        with hold_lease(run, 0, 1, await_turn(run, 0)):
            (run / "goes on").touch()
            while (run / "goes on").exists():
                time.sleep(0.01)
            shutil.copy(run / leases.NAME, run / "left")
        shutil.move(run / "left", run / leases.NAME)  # as if this machine had lost its power
        (run / "gone").touch()
        return ""

    def second(run: Path) -> str:
        while not (run / "goes on").exists():
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="in use: process") as refused:
            await_turn(run, 0)
        (run / "goes on").unlink()
        while not (run / "gone").exists():
            time.sleep(0.01)
        began, left_behind = time.monotonic(), await_turn(run, 0)
        with hold_lease(run, 0, 1, left_behind):
            assert left_behind is not None and time.monotonic() - began > 0.2
        return str(refused.value)

    _, said = on_machines(2, shared, lambda number, folder: (second if number else first)(folder / "run"))
    assert "goes on. Wait until it has ended" in said
    assert files(shared / "run") == {"gone"}


def test_other_rank_renews_the_lease_when_rank_0_is_gone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a1")
    with hold_lease(tmp_path, 0, 2, None) as first, hold_lease(tmp_path, 1, 2, None) as second:
        second.share(first.contents["token"], [])
        for _ in range(2):
            first.look()
            before = (tmp_path / leases.NAME).read_bytes()
            second.look()
            assert (tmp_path / leases.NAME).read_bytes() == before
        second.look()
        assert (tmp_path / leases.NAME).read_bytes() != before
        assert await_turn(tmp_path, rank=1) is not None  # of its own rank 0: no reason to wait
    assert not files(tmp_path)


def test_start_whose_lease_was_taken_over_ends_before_it_renews_or_saves(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(os, "_exit", exit)
    with hold_lease(tmp_path, 0, 1, None) as lease:
        write_json(tmp_path / leases.NAME, lease.contents | {"token": "other", "host": "node3"})
        for step in (lease.look, lambda: ShareLease(lease).on_save_checkpoint(Saved(1), None, {})):  # type: ignore
            with pytest.raises(SystemExit, match="2"):
                step()
            assert re.search("was taken over while this start stood still: .* node3", capfd.readouterr().err)
    assert "node3" in (tmp_path / leases.NAME).read_text()


def test_rank_ends_when_its_launcher_is_killed() -> None:
    """Rank and launcher as torchrun has them: the rank leads a session, a script may stand in between."""
    rank = (
        "import os, time; from mae.distributed import processes\n"
        "processes.end_with_launcher(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    launcher = (
        "import subprocess, sys, time\n"
        "words = ['sh', '-c', '\"$0\" -c \"$1\"; true', sys.executable, sys.argv[1]]\n"
        "subprocess.Popen(words, start_new_session=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher, rank], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.communicate()


# Damaged files


class Saved:
    """What SaveCheckpoints asks of Lightning's trainer, at one step."""

    loggers: tuple = ()
    is_global_zero = True

    def __init__(self, step: int) -> None:
        self.global_step = step
        self.strategy = self

    checkpoint_io: BackgroundCheckpointIO

    def save_checkpoint(self, path: Path) -> None:
        self.checkpoint_io.save_checkpoint({"mae": {"step": self.global_step}}, path)

    def reduce_boolean_decision(self, decision: bool) -> bool:
        return decision


def save_whole(run: Path, step: int, config: CheckpointConfig) -> None:
    trainer, saving = Saved(step), SaveCheckpoints(run, config, None)
    saving.setup(trainer, None, "fit")  # type: ignore[arg-type]
    saving.save(trainer)  # type: ignore[arg-type]
    saving.finish(trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoint_just_saved_outlives_a_damaged_newer_one(tmp_path: Path, keep: int) -> None:
    run = begun(tmp_path / "run", 400, 500)
    newest = checkpoint_path(run, 500)
    newest.write_bytes(newest.read_bytes()[:100])
    save_whole(run, 450, CheckpointConfig(keep=keep))
    assert checkpoint_path(run, 450) in checkpoints(run), "deleted what was just saved"
    with pytest.warns(UserWarning, match=r"step-00000500\.ckpt is damaged; it is kept as step-00000500\.ckpt\.damaged"):
        set_damaged_aside(run, 450)
    assert [path.stem for path in checkpoints(run)] == ["step-00000450", "step-00000400"][:keep]
    assert newest_valid(run) == checkpoint_path(run, 450)


def test_checkpoint_that_cannot_be_read_counts_as_no_damage(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", 1)
    checkpoint_path(run, 2).mkdir()
    with pytest.warns(UserWarning, match=r"skipped: .*2\.ckpt cannot be read \(Is a directory\)"):
        assert newest_valid(run) == checkpoint_path(run, 1)
    set_damaged_aside(run, 1)
    assert len(checkpoints(run)) == 2
    checkpoint_path(run, 1).unlink()
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match=r"\(Is a directory\): start again"),
    ):
        newest_valid(run)


def test_newest_checkpoint_of_a_run_that_saves_meanwhile_is_found(tmp_path: Path, monkeypatch) -> None:
    run = begun(tmp_path / "run", 1)

    def verify_later(path: Path) -> None:
        monkeypatch.undo()
        write_checkpoint({}, checkpoint_path(run, 2))
        path.unlink()
        verify(path)

    monkeypatch.setattr("mae.run.checkpoint_files.verify", verify_later)
    assert newest_valid(run) == checkpoint_path(run, 2)
    with pytest.raises(ConfigError, match=r"2\.ckpt was saved by another start while this one began at step 1"):
        set_damaged_aside(run, 1)


def test_run_that_goes_on_is_not_finished(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", 1)
    (run / "summary.json").write_text("{}")
    record_start(run, 1, 1)
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("contents", ["", "\0\0\0", '{"starts": [{"ti', "[]", "null", '{"gpus": []}'])
def test_damaged_environment_json_is_set_aside(tmp_path: Path, contents: str) -> None:
    run = begun(tmp_path / "run")
    (run / "environment.json").write_text(contents)
    with pytest.warns(UserWarning, match=r"environment\.json is damaged; it is kept as environment\.json\.damaged"):
        record_start(run, 5, 1)
    assert [entry["step"] for entry in json.loads((run / "environment.json").read_text())["starts"]] == [5]
    assert (run / "environment.json.damaged").read_text() == contents
    (run / "environment.json").write_text(contents)
    with pytest.warns(UserWarning, match=r"environment\.json\.damaged-2"):
        assert read_json(run / "environment.json", "starts") == {}


def test_config_yaml_of_another_program_makes_no_run_of_foreign_weights(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: vit\n")
    assert run_of(tmp_path / "weights.pth") is None


@pytest.mark.parametrize("contents", ["", "\0\0\0", "model: [1, 2", "!foreign {a: 1}"])
def test_damaged_config_yaml_is_set_aside(tmp_path: Path, contents: str) -> None:
    run = begun(tmp_path / "run")
    (run / "config.yaml").write_text(contents)
    refuse_foreign_folder(run, False)
    config = compose(f"runs={tmp_path}", "name=run")
    assert keep_image(config) == config
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged or gone\. The same train\.py command"):
        run_of(checkpoint_path(run, 1))
    with pytest.warns(UserWarning, match=r"config\.yaml is damaged"):
        write_settings(run, SETTINGS)
    assert (run / "config.yaml").read_text() == SETTINGS
    assert (run / "config.yaml.damaged").read_text() == contents


@pytest.mark.parametrize("contents", ["", "\0\0\0\0\0\0\0\0", "ab\0\0"])
def test_damaged_tracker_id_is_set_aside(tmp_path: Path, monkeypatch, contents: str) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "wandb_id.txt").write_text(contents)
    with pytest.warns(UserWarning, match=r"wandb_id\.txt is damaged; it is kept .* the tracker begins another run"):
        assert wandb_id(tmp_path).isalnum()
    assert files(tmp_path) == {"wandb_id.txt.damaged"}


@pytest.mark.parametrize(
    ("damage", "kept"), [(lambda data: data[:-3] + b"\0\0\n", 2), (lambda data: b"\0" * 12 + data[12:], 0)]
)
def test_damaged_metrics_csv_keeps_its_whole_rows_and_a_copy(tmp_path: Path, damage, kept: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,train/loss\n1,0.5\n2,0.4\n3,0.3\n")
    assert MetricsCSV(path, 3).experiment == path and files(tmp_path) == {"metrics.csv"}
    data = damage(path.read_bytes())
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"metrics\.csv is damaged; .* its {kept} whole rows go on"):
        MetricsCSV(path, 3).log_metrics({"train/loss": 0.2}, 4)
    assert len(read_metrics(path)) == kept + 1
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == data
