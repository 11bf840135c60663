"""Claims: which sweep.py works on which trial. They lie in the database of the study, beside Optuna's tables.

1 take     claims a trial that nobody works on; of several sweep.py that try, one gets it
2 renew    a thread renews the claims of this sweep.py every RENEW_SECONDS
3 holds    before a result is told: False if another sweep.py has taken the trial over
4 release  the trial has ended, or is left to others

Nobody works on a trial without a claim, nor on one whose owner was a process of this machine and has ended, or has not
renewed its claim for SILENT_SECONDS by the clock of the database.
"""

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    DateTime,
    Engine,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from mae.distributed.processes import Process, identify, is_dead

RENEW_SECONDS = 10.0
SILENT_SECONDS = 60.0

CLAIMS = Table(
    "mae_sweep_claims",
    MetaData(),
    Column("study", Integer, primary_key=True, autoincrement=False),  # Optuna's id
    Column("trial", Integer, primary_key=True, autoincrement=False),  # its number
    Column("owner", String(16), nullable=False),  # one start of sweep.py
    Column("host", String(255), nullable=False),
    Column("machine", BigInteger, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", BigInteger, nullable=False),
    Column("renewals", Integer, nullable=False),
    Column("renewed", DateTime(timezone=True), nullable=False),
)


class Claims:
    """The claims of one sweep.py on the trials of a study."""

    def __init__(self, engine: Engine, study: int) -> None:
        self.engine, self.study = engine, study
        self.owner, self.process = secrets.token_hex(8), identify(os.getpid())
        self.mine: set[int] = set()  # claimed and not given up, lost ones included
        self.ended = threading.Event()
        try:
            CLAIMS.create(engine, checkfirst=True)
        except DBAPIError:  # another sweep.py has made it since
            CLAIMS.create(engine, checkfirst=True)

    def take(self, trial: int) -> bool:
        """Claims a trial. Returns False if somebody works on it."""
        if taken := self._take(trial):
            self.mine.add(trial)
        return taken

    def _take(self, trial: int) -> bool:
        machine, pid, started = self.process
        mine = {"owner": self.owner, "host": socket.gethostname(), "machine": machine, "pid": pid, "started": started}
        mine |= {"renewals": 0, "renewed": func.now()}
        try:
            with self.engine.begin() as connection:
                claim = connection.execute(_with_time().where(self._of(trial))).first()
                if claim is None:
                    connection.execute(insert(CLAIMS).values(study=self.study, trial=trial, **mine))
                    return True
                if claim.owner == self.owner:
                    return trial not in self.mine  # the database did not say that it was taken
                if _lives(claim):
                    return False
                unchanged = (CLAIMS.c.owner == claim.owner) & (CLAIMS.c.renewals == claim.renewals)
                return connection.execute(update(CLAIMS).where(self._of(trial), unchanged).values(mine)).rowcount == 1
        except IntegrityError:  # another sweep.py was faster
            return False

    def holders(self) -> dict[int, str]:
        """Returns the trials that somebody works on, this sweep.py included, and the machine on which they do."""
        with self.engine.connect() as connection:
            claims = connection.execute(_with_time().where(CLAIMS.c.study == self.study)).all()
        return {claim.trial: claim.host for claim in claims if _lives(claim)}

    def renew(self, *which: ColumnElement[bool]) -> int:
        """Renews the claims of this sweep.py, or those among them that are asked for. Returns how many there are."""
        renewal = {"renewals": CLAIMS.c.renewals + 1, "renewed": func.now()}
        with self.engine.begin() as connection:
            return connection.execute(update(CLAIMS).where(self._is_mine(), *which).values(renewal)).rowcount

    def holds(self, trial: int) -> bool:
        """Renews the claim on a trial. Returns False if another sweep.py has it by now: this one has stood still."""
        return self.renew(CLAIMS.c.trial == trial) == 1

    def release(self, *trials: int) -> None:
        """Gives up the claims on these trials, or all."""
        which = [CLAIMS.c.trial.in_(trials)] if trials else []
        self.mine.difference_update(trials or set(self.mine))
        with self.engine.begin() as connection:
            connection.execute(delete(CLAIMS).where(self._is_mine(), *which))

    def _of(self, trial: int) -> ColumnElement[bool]:
        return (CLAIMS.c.study == self.study) & (CLAIMS.c.trial == trial)

    def _is_mine(self) -> ColumnElement[bool]:
        return (CLAIMS.c.study == self.study) & (CLAIMS.c.owner == self.owner)

    def keep(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with suppress(SQLAlchemyError):  # a server that is away for a moment
                self.renew()


def _with_time() -> Any:
    return select(CLAIMS, func.now().label("now"))


def _lives(claim: Row) -> bool:
    if is_dead(Process(claim.machine, claim.pid, claim.started)):
        return False
    return claim.now - claim.renewed <= timedelta(seconds=SILENT_SECONDS)


@contextmanager
def hold_claims(engine: Engine, study: int) -> Iterator[Claims]:
    """Renews the claims of this sweep.py within the block, and gives them up at its end."""
    claims = Claims(engine, study)
    thread = threading.Thread(target=claims.keep, name="claims", daemon=True)
    thread.start()
    try:
        yield claims
    finally:
        claims.ended.set()
        thread.join(RENEW_SECONDS)
        with suppress(SQLAlchemyError):  # they end by themselves
            claims.release()
