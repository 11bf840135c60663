"""python -m mae.runs: how all runs below a folder stand, told from their files alone."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from mae.distributed.processes import identify, machine
from mae.distributed.stop import Stopped
from mae.errors import ConfigError, RunEnded
from mae.run.folder import clear_run_folder, refuse_foreign_folder, write_json
from mae.run.lease import NAME as LEASE
from mae.run.lease import hold_lease
from mae.run.metrics import MetricsCSV
from mae.runs import __main__ as program
from mae.runs import signs_of_life
from mae.runs.__main__ import main
from mae.runs.best import BestValues
from mae.runs.metrics_tail import read_tail
from mae.runs.read import KILLED
from mae.runs.signs_of_life import SignsOfLife
from mae.runs.table import duration
from tasks.errors import last_word
from tests.conftest import ROOT

DEAD = (machine(), os.getpid(), 1)
ELSEWHERE = (5, 1, 1)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(signs_of_life, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(signs_of_life, "POLL_SECONDS", 0.01)
    yield


def begun(run: Path, steps: int = 20, total: int = 50) -> Path:
    """Makes the folder of a run that has logged so many steps."""
    run.mkdir(parents=True)
    write_json(run / "environment.json", {"starts": [{}]})
    (run / "config.yaml").write_text("model: {}\noptim: {}\nglobal_batch: 64\n")
    write_json(run / "derived.json", {"total_steps": total, "global_batch": 64})
    log = MetricsCSV(run / "metrics.csv")
    for step in range(10, steps + 1, 10):
        log.log_metrics({"train/loss": 1 / step, "perf/images_per_s": 640.0}, step)
    return run


def leased(run: Path, *processes: tuple[int, int, int], **more: Any) -> Path:
    contents = {"token": "t", "host": "node17", "pid": 1, "time": "2026-01-01", "job": "4123", "processes": processes}
    write_json(run / LEASE, contents | more)
    return run


def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """Returns the runs that --json tells, by name."""
    assert main([str(folder), "--json"]) == 0
    return {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}


def test_state_of_each_run_follows_from_what_its_end_has_left(
    tmp_path: Path, capsys, fast: None, fresh_credentials: None
) -> None:
    with hold_lease(begun(tmp_path / "here"), 0, 1, None):
        write_json(begun(tmp_path / "finished") / "summary.json", {"step": 50, "total_steps": 50})
        write_json(begun(tmp_path / "limit") / "summary.json", {"step": 20, "total_steps": 50})
        leased(begun(tmp_path / "killed"), DEAD)
        leased(begun(tmp_path / "silent"), ELSEWHERE)
        begun(tmp_path / "old")
        for name, error in (("stopped", Stopped(15, 20)), ("failed", DataError("no\nimages at s3://me:secret@host/x"))):
            with pytest.raises(type(error)), last_word(begun(tmp_path / name), 0):
                raise error
        runs = told(tmp_path, capsys)
    assert {name: run["state"] for name, run in runs.items()} == {
        "here": "running",
        "finished": "finished",
        "limit": "stopped",
        "killed": "ended",
        "silent": "ended",
        "old": "ended",
        "stopped": "stopped",
        "failed": "failed",
    }
    assert runs["here"]["host"] and runs["here"]["seconds_left"] == 30 * 64 / 640
    assert (runs["killed"]["host"], runs["killed"]["job"]) == ("node17", "4123")
    assert runs["killed"]["sentence"].startswith("without a word: killed")
    assert "not recorded" in runs["old"]["sentence"] and "max_time" in runs["limit"]["sentence"]
    assert runs["stopped"]["sentence"].startswith("stopped by SIGTERM after step 20, checkpoint saved")
    assert runs["failed"]["sentence"] == "no images at s3://hidden@host/x"
    assert all(run["step"] in (20, 50) and 0 <= run["age_seconds"] < 60 for run in runs.values())


def test_run_of_another_machine_is_running_while_its_lease_changes(tmp_path: Path, monkeypatch, fast: None) -> None:
    run, signs = leased(begun(tmp_path / "far"), ELSEWHERE), SignsOfLife()
    os.utime(run / LEASE, (0, 0))  # clocks of other machines mean nothing
    assert signs.look(run) is None
    leased(run, ELSEWHERE, renewal="1")
    os.utime(run / LEASE, (0, 0))
    assert signs.look(run) is True and signs.watch([run]) == {run: True}
    time.sleep(0.06)
    assert signs.look(run) is False
    assert SignsOfLife().watch([run]) == {run: False}
    leased(run, ELSEWHERE, DEAD, tuple(identify(os.getpid())))
    assert SignsOfLife().look(run) is True  # a rank of it is here


@pytest.mark.parametrize("contents", ["", "\0\0\0", "[1]", "{"])
def test_damaged_files_are_named_and_the_other_runs_are_shown(tmp_path: Path, capsys, fast: None, contents) -> None:
    run = begun(tmp_path / "broken")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000040.ckpt").touch()
    (run / "eval").mkdir()
    for name in ("config.yaml", "environment.json", "derived.json", "summary.json", "eval/knn.json", LEASE):
        (run / name).write_text(contents)
    (run / "metrics.csv").write_bytes(b"step,train/loss\n10,0.5\n20,x\n\0\0\0\n30")
    begun(tmp_path / "whole")
    runs = told(tmp_path, capsys)
    assert runs["whole"]["damaged"] == []
    damaged = " ".join(runs["broken"]["damaged"])
    for name in ("derived.json", "summary.json", "knn.json"):
        assert f"{name} is damaged: " in damaged
    assert "metrics.csv: 2 of its last lines cannot be read" in damaged
    assert (runs["broken"]["step"], runs["broken"]["train_loss"], runs["broken"]["total_steps"]) == (40, 0.5, None)
    (run / "ended.json").write_text(contents)
    assert told(tmp_path, capsys)["broken"]["state"] == "failed"  # as little as a full disk has let through


def test_foreign_folders_are_passed_over_and_counted_and_links_are_followed_once(tmp_path: Path, capsys) -> None:
    begun(tmp_path / "sweep" / "a")
    (tmp_path / "latest").symlink_to(tmp_path / "sweep" / "a")
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path)
    begun(tmp_path / "elsewhere" / "b").rename(tmp_path / "b")
    (tmp_path / "linked").mkdir()
    for name in ("photos/x/y", "hydra/.hydra"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "hydra" / "config.yaml").write_text("lr: 1\n")
    (tmp_path / "hydra" / "metrics.csv").write_text("step\n1\n")
    assert main([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["b", "sweep/a"]
    assert found["passed_over"] == 4  # elsewhere, linked, photos, hydra
    assert set(told(tmp_path / "b", capsys)) == {"b"}


@pytest.mark.parametrize("width", [80, 200])
def test_table_fits_the_terminal_whatever_the_names(tmp_path: Path, capsys, monkeypatch, width: int) -> None:
    for name in ("[red]x[/red]", "a\x1b[2J\nb", "ü" * 60, ":smile:", os.fsdecode(b"\xff")):
        leased(begun(tmp_path / name, total=2_000_000), DEAD, host="gpu-node-17.cluster.example.org", job="41234567_12")
    write_json(begun(tmp_path / "best") / "summary.json", {"step": 50, "total_steps": 50})
    (tmp_path / "best" / "eval").mkdir()
    for probe, top1 in (("knn", 0.512), ("linear", 0.761)):
        write_json(tmp_path / "best" / "eval" / f"{probe}.json", {"trained": {"top1": top1}})
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert max(map(len, said.splitlines())) <= width and "\x1b" not in said
    assert "[red]x[/red]" in said and ":smile:" in said and "76.1% linear" in said
    assert r"a\x1b[2J\nb" in said.replace(" ", "") or width == 80
    assert ("left" in said) == (width == 200)


def test_table_in_a_file_has_a_line_for_each_run(tmp_path: Path, capsys) -> None:
    leased(begun(tmp_path / ("long" * 20), total=2_000_000), DEAD, host="gpu-node-17.cluster.example.org")
    assert main([str(tmp_path)]) == 0
    heading, run, sentence, counts = capsys.readouterr().out.splitlines()
    assert run.startswith("long" * 20) and "ended on gpu-node-17" in run and "20/2,000,000" in run and "age" in heading
    assert sentence == f"{'long' * 20}  ended: {KILLED}" and counts == "1 run: 1 ended"
    fail(begun(tmp_path / "told"), Stopped(15, 20))
    assert main([str(tmp_path)]) == 0
    assert "\ntold  stopped by SIGTERM after step 20" in capsys.readouterr().out


def test_watch_goes_on_until_ctrl_c(tmp_path: Path, capsys, monkeypatch) -> None:
    begun(tmp_path / "one")
    looks = iter([lambda: begun(tmp_path / "two"), lambda: (_ for _ in ()).throw(KeyboardInterrupt)])
    monkeypatch.setattr(program.time, "sleep", lambda _: next(looks)())
    assert main([str(tmp_path), "--watch", "5"]) == 0
    said = capsys.readouterr().out
    assert "1 run: 1 ended" in said and "2 runs: 2 ended" in said


def test_watch_shows_as_many_runs_as_fit_on_the_screen(tmp_path: Path, capsys, monkeypatch) -> None:
    for number in range(30):
        begun(tmp_path / f"r{number:02d}")
    monkeypatch.setattr(program.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    for name, value in (("COLUMNS", "100"), ("LINES", "20"), ("TTY_COMPATIBLE", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    assert main([str(tmp_path), "--watch"]) == 0
    said = capsys.readouterr().out
    assert "r00, r01, r02 and 5 others  ended: before" in said
    assert "r07" in said and "r08" not in said and "22 more that do not fit" in said and "30 runs: 30 ended" in said


def test_folder_without_runs_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "gone")]) == 2
    assert "gone is no folder" in capsys.readouterr().err
    (tmp_path / "photos").mkdir()
    assert main([str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_best_values_are_those_of_all_steps_with_the_first_step_that_has_them(tmp_path: Path, capsys) -> None:
    run = begun(tmp_path / "run")
    log = MetricsCSV(run / "metrics.csv", resumed_step=20)
    for step, top1, loss in ((30, 0.4, 0.9), (40, 0.6, 0.5), (50, 0.6, 0.7), (60, float("nan"), float("-inf"))):
        log.log_metrics({"knn/top1": top1, "val/loss": loss}, step)
        log.log_metrics({"train/loss": 0.1}, step)
    with open(run / "metrics.csv", "a") as file:
        file.write("70,0.8,5\n80,x,y,z,0.99\n90,0.1")  # cut off; damaged; under way
    told_of = told(tmp_path, capsys)["run"]
    assert (told_of["score"], told_of["scored_by"], told_of["score_step"]) == (0.6, "online kNN", 40)
    assert (told_of["best_val_loss"], told_of["best_val_loss_step"]) == (0.5, 40)
    (run / "eval").mkdir()
    write_json(run / "eval" / "knn.json", {"trained": {"top1": 0.7}})
    told_of = told(tmp_path, capsys)["run"]
    assert (told_of["score"], told_of["scored_by"], told_of["score_step"]) == (0.7, "knn", None)


def test_values_that_were_seen_are_not_read_again(tmp_path: Path) -> None:
    path, values = tmp_path / "metrics.csv", BestValues({"knn/top1": 1, "val/loss": -1})
    path.write_text("step,knn/top1\n10,0.5\n20,0.")
    assert values.look(path) == {"knn/top1": (0.5, 10)}
    with open(path, "r+b") as file:
        file.write(b"step,knn/top1\n10,0.9\n")  # in its place, unseen
        file.seek(0, 2)
        file.write(b"8\n")
    assert values.look(path) == {"knn/top1": (0.8, 20)}
    (tmp_path / "resumed.csv").write_text("step,val/loss,knn/top1\n10,0.3,0.6\n")
    (tmp_path / "resumed.csv").rename(path)
    assert values.look(path) == {"knn/top1": (0.6, 10), "val/loss": (0.3, 10)}


def test_newest_values_are_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,knn/top1,val/loss\n0,9,9,9\n")
    with open(path, "r+b") as file:  # a hole of a terabyte
        file.seek(1 << 40)
        file.write(b"\n1000,0.9,0.4,\n" + b"".join(b"%d,0.%d,,\n" % (step, step) for step in range(1001, 9000)))
        file.write(b"9000,nan")
    step, values, damaged = read_tail(path, {"train/loss": 2, "knn/top1": 1, "val/loss": 1, "val/top1": 1})
    assert (step, values, damaged) == (8999, {"train/loss": [0.8999, 0.8998], "knn/top1": [0.4]}, 0)


def test_program_loads_no_torch() -> None:
    script = "import sys, mae.runs.__main__; sys.exit(bool({'torch', 'lightning', 'yaml', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_duration_has_one_unit() -> None:
    shown = [duration(seconds) for seconds in (0, 119, 150, 7300, 200_000, -300)]
    assert shown == ["0 s", "119 s", "2 min", "2 h", "2 d", "-5 min"]


# What a run leaves behind


def word(run: Path) -> dict[str, Any] | None:
    return json.loads((run / "ended.json").read_text()) if (run / "ended.json").exists() else None


def fail(run: Path, error: BaseException, rank: int = 0, has_lease: bool = True) -> dict[str, Any] | None:
    with pytest.raises(type(error)), last_word(run, rank, has_lease=has_lease):
        raise error
    return word(run)


def test_last_word_is_that_of_the_rank_that_met_the_cause(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = begun(tmp_path / "run")
    assert fail(run, RunEnded("on all ranks, of which rank 0 knows more"), rank=1) is None
    with pytest.raises(RuntimeError), last_word(run, 0):
        said = fail(run, OSError(errno.ENOSPC, "No space left on device"), rank=1)
        assert said and said["sentence"].startswith("rank 1: No space left on device. Make room")
        raise RuntimeError("connection closed by peer")
    assert word(run) == said and said["job"] == "77" and said["state"] == "failed"
    said = fail(run, RuntimeError("CUDA error:\n device-side assert" + "x" * 5000))
    assert said and said["sentence"].startswith("RuntimeError: CUDA error: device-side assertxxx")
    assert len(said["sentence"]) == 1000
    with last_word(run, 0):
        assert word(run) is None
    assert word(run) is None


def test_refused_start_leaves_its_sentence_unless_another_may_write(tmp_path: Path) -> None:
    refusal = ConfigError("data.path=/mnt/images does not exist")
    run = begun(tmp_path / "run")
    fail(run, Stopped(15, 20))
    said = fail(run, refusal, has_lease=False)
    assert said and said["sentence"] == str(refusal)
    (run / "ended.json").unlink()
    with hold_lease(run, 0, 1, None):
        assert fail(run, refusal, has_lease=False) is None
    write_json(run / "summary.json", {"step": 50})
    assert fail(run, refusal, has_lease=False) is None
    (tmp_path / "photos").mkdir()
    assert fail(tmp_path / "photos", RunEnded("x"), has_lease=False) is None
    assert fail(tmp_path / "gone", refusal, has_lease=False) is None


def test_overwrite_removes_the_last_word(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    assert fail(run, RunEnded("x"))
    refuse_foreign_folder(run, True)
    clear_run_folder(run)
    assert word(run) is None
