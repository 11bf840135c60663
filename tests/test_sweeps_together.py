"""Several sweep.py with one study: each trial has one owner, whatever ends a sweep."""

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, create_engine, update

from mae.distributed.processes import Process
from mae.errors import ConfigError
from tasks.search import sweep
from tasks.search.claims import CLAIMS, SILENT_SECONDS, Claims
from tasks.search.config import SweepConfig
from tasks.search.study import hold_database, network_file_system, open_engine, open_study
from tests.postgres import Postgres, postgres
from tests.processes import Process as Started
from tests.processes import finish, kill, start
from tests.test_sweep import FIELDS, RATES, STAND_IN, command, table

__all__ = ["postgres"]


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").database().replace("://", "+psycopg://")
    engine = create_engine(url)
    yield engine
    engine.dispose()


def on_another_machine(engine: Engine) -> Claims:
    claims = Claims(engine, 1)
    claims.process = claims.process._replace(machine=7)
    return claims


def test_claim_has_one_owner_until_that_is_silent_or_dead(engine: Engine) -> None:
    here, there, dead = Claims(engine, 1), on_another_machine(engine), Claims(engine, 1)
    dead.process = Process(here.process.machine, here.process.pid, here.process.started - 1)

    assert here.take(0) and not there.take(0) and not here.take(0)
    assert there.take(1) and not here.take(1) and Claims(engine, 2).take(1)
    assert dead.take(2) and here.holders().keys() == {0, 1}
    assert there.take(2) and not dead.holds(2)

    silence(engine, there)
    assert here.holders().keys() == {0}
    there.renew()
    assert here.holders().keys() == {0, 1, 2} and not here.take(1)
    silence(engine, there)
    assert here.take(1) and not there.holds(1) and there.holds(2)
    there.release()
    assert here.holders().keys() == {0, 1} and here.mine == {0, 1}


def silence(engine: Engine, claims: Claims) -> None:
    """Has the claims of a sweep.py been renewed a long time ago."""
    with engine.begin() as connection:
        then = CLAIMS.c.renewed - timedelta(seconds=SILENT_SECONDS + 1)
        if engine.dialect.name == "sqlite":
            row = connection.execute(CLAIMS.select().where(CLAIMS.c.owner == claims.owner)).first()
            assert row is not None
            then = row.renewed - timedelta(seconds=SILENT_SECONDS + 1)
        connection.execute(update(CLAIMS).where(CLAIMS.c.owner == claims.owner).values(renewed=then))


def opened(tmp_path: Path, **changes: Any) -> tuple[SweepConfig, optuna.Study, Claims]:
    config = SweepConfig.model_validate(FIELDS | {"sweeps": str(tmp_path)} | changes)
    study = open_study(config)
    return config, study, Claims(open_engine(config), study._study_id)


def test_trials_without_a_living_owner_alone_are_adopted(tmp_path: Path) -> None:
    """A trial that is claimed and not yet written keeps nobody waiting for long."""
    config, study, here = opened(tmp_path, space={"optim.base_lr": [0.1, 0.2, 0.3, 0.4]})
    there = on_another_machine(here.engine)
    claimed = [sweep._claim(config, study, claims)[0] for claims in (there, here)]
    assert [trial and trial.params["optim.base_lr"] for trial in claimed] == [0.1, 0.2]
    assert there.take(2)
    assert sweep._claim(config, study, here) == (None, [there.holders()[0]] * 2)
    fourth, _ = sweep._claim(config, study, here, again=True)
    assert fourth is not None and (fourth.number, fourth.params["optim.base_lr"]) == (3, 0.4)

    adopted = []
    for number in (2, 0):
        there.release(number)
        adopted.append(sweep._claim(config, study, here)[0])
    assert [trial and (trial.number, trial.params["optim.base_lr"]) for trial in adopted] == [(2, 0.3), (0, 0.1)]
    for trial in (adopted[0], fourth):
        assert trial is not None
        study.tell(trial, 1.0)
        here.release(trial.number)
    assert sweep._claim(config, study, here, again=True) == (None, [])  # the others are this sweep's own
    assert len(study.trials) == 4


def test_trial_that_ended_between_two_looks_is_not_begun_again(tmp_path: Path) -> None:
    config, study, here = opened(tmp_path)
    trial, _ = sweep._claim(config, study, here)
    assert trial is not None
    study.tell(trial, 1.0)
    assert sweep._begin(config, study, trial.number) is None


def test_equal_settings_of_a_trial_that_nobody_works_on_are_not_waited_for(tmp_path: Path) -> None:
    config, study, here = opened(tmp_path, sampler="tpe", n_trials=2, space={"optim.base_lr": [0.1]})
    left_behind, _ = sweep._claim(config, study, here)
    second, _ = sweep._claim(config, study, here)
    assert left_behind is not None and second is not None
    here.release(left_behind.number)
    assert sweep._of_same_settings(study, here, second) is None


def test_result_of_a_trial_that_was_taken_over_is_not_told(tmp_path: Path, monkeypatch, capsys) -> None:
    config, study, here = opened(tmp_path)
    trial, _ = sweep._claim(config, study, here)
    assert trial is not None

    def run_trial(*words: Any) -> float:
        silence(here.engine, here)
        assert on_another_machine(here.engine).take(trial.number)
        return 1.0

    monkeypatch.setattr(sweep, "run_trial", run_trial)
    sweep._run(config, study, here, trial)
    assert study.trials[0].state == TrialState.RUNNING
    assert "trial-0000 is another sweep.py's by now" in capsys.readouterr().out


def test_second_sweep_on_a_file_is_refused_and_pointed_at_a_server(tmp_path: Path, monkeypatch, capsys) -> None:
    for storage in (None, f"sqlite:///{tmp_path}/all.db"):
        config, _, _ = opened(tmp_path, storage=storage)
        with hold_database(config):
            other = config.model_copy(update={"sweeps": str(tmp_path / ("here" if storage else ""))})
            refused = pytest.raises(
                ConfigError, match=r"is being worked on by another sweep\.py.*storage=postgresql://"
            )
            with refused, hold_database(other):
                pass
            with hold_database(config.model_copy(update={"storage": "postgresql://server/x"})):
                pass
    monkeypatch.setattr(
        "tasks.search.study.mounts", lambda: f"/dev/a / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\n"
    )
    assert network_file_system(Path("/elsewhere")) is None
    with hold_database(config):
        assert f"{tmp_path}/all.db lies on nfs4, where SQLite and its locks may not work" in capsys.readouterr().out


def test_server_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, postgres: Postgres, capsys) -> None:
    config, study, claims = opened(tmp_path, storage=postgres.database())
    trial, _ = sweep._claim(config, study, claims)
    assert trial is not None
    postgres.stop()
    again = threading.Timer(0.3, postgres.start)
    again.start()
    assert claims.holds(trial.number)
    study.tell(trial, 1.0)
    again.join()
    assert "does not answer: trying again for ten minutes" in capsys.readouterr().out
    claims.engine.dispose()
    study._storage._backend.engine.dispose()  # pyright: ignore[reportAttributeAccessIssue]


def pids(storage: str) -> set[int]:
    """Returns the processes that have claims on trials; none before the first of them has made the table."""
    with psycopg.connect(storage) as connection:
        if connection.execute("SELECT to_regclass('mae_sweep_claims')").fetchone() == (None,):
            return set()
        return {pid for (pid,) in connection.execute("SELECT pid FROM mae_sweep_claims").fetchall()}


def wait_until_both_work(storage: str, sweeps: list[Started]) -> None:
    while pids(storage) != {process.pid for process in sweeps}:
        for process in sweeps:
            assert process.poll() is None, finish(process, None)
        time.sleep(0.02)


def trials_of(storage: str) -> list[FrozenTrial]:
    held = optuna.storages.RDBStorage(storage.replace("://", "+psycopg://"))
    try:
        return optuna.load_study(study_name="rates", storage=held).trials
    finally:
        held.remove_session()
        held.engine.dispose()


def assert_each_once(folder: Path, storage: str) -> None:
    """Compares what a study holds with one complete trial for each combination, none trained twice."""
    trials = trials_of(storage)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * len(RATES)
    assert [trial.params["optim.base_lr"] for trial in trials] == RATES
    assert min(trials, key=lambda trial: trial.value or 0).params == {"optim.base_lr": 0.003}
    for number in range(len(RATES)):
        steps = (folder / "rates" / f"trial-{number:04d}" / "metrics.csv").read_text().splitlines()[1:]
        assert [int(line.split(",")[0]) for line in steps] == list(range(1, 21))
    assert [row["state"] for row in table(folder)] == ["complete"] * len(RATES)


@pytest.mark.slow
def test_two_sweeps_on_postgresql_one_killed_run_each_combination_once(tmp_path: Path, postgres: Postgres) -> None:
    storage = postgres.database()
    words = command(tmp_path, launch=STAND_IN, storage=storage, jobs=1)
    gate = tmp_path / "gate"
    killed, other = (start(words, WAIT_FOR=str(gate)) for _ in range(2))
    wait_until_both_work(storage, [killed, other])
    kill(killed)
    gate.touch()
    finish(other)
    assert_each_once(tmp_path, storage)
    assert not pids(storage)
