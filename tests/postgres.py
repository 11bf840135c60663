"""A PostgreSQL server on loopback, in a folder of its own, as an unprivileged user."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.slurm_cluster import free_ports

PASSWORD = "pa55/word"
START_SECONDS = 60


def programs() -> Path | None:
    """Returns the folder of the newest server; Debian's is not on the path."""
    if (found := shutil.which("postgres")) is not None:
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    return max((path.parent for path in folders), key=lambda folder: int(folder.parent.name), default=None)


class Postgres:
    """The running server."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder, self.databases = programs, folder, 0
        (port,) = free_ports(1)
        self.about = {"host": "127.0.0.1", "port": port, "user": "sweeper", "password": PASSWORD, "dbname": "postgres"}
        # It refuses to run as root.
        self.user: dict[str, Any] = {}
        if os.getuid() == 0:
            self.user = {"user": "nobody", "group": "nogroup", "extra_groups": []}

    def make(self) -> None:
        """Makes the folder of its data."""
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if self.user:
            for path in (self.folder, password):
                shutil.chown(path, "nobody", "nogroup")
        words = [self.programs / "initdb", "-D", self.folder / "data", "-U", "sweeper", "-A", "scram-sha-256"]
        words += [f"--pwfile={password}", "--no-sync", "--no-locale", "--encoding=UTF8"]
        subprocess.run(words, check=True, capture_output=True, cwd="/", **self.user)

    def start(self) -> None:
        words = [self.programs / "postgres", "-D", self.folder / "data", "-h", "127.0.0.1", "-k", "", "-F"]
        words += ["-p", str(self.about["port"])]
        with open(self.folder / "log", "ab") as log:
            self.server = subprocess.Popen(words, cwd="/", stdout=log, stderr=log, start_new_session=True, **self.user)
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.server.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            try:
                psycopg.connect(**self.about).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)

    def stop(self) -> None:
        self.server.send_signal(signal.SIGINT)  # ends the sessions of programs too
        self.server.wait(30)

    def database(self) -> str:
        """Makes an empty database and returns its URL, password included."""
        self.databases += 1
        name = f"sweeps{self.databases}"
        with psycopg.connect(**self.about, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://sweeper:{PASSWORD.replace('/', '%2F')}@127.0.0.1:{self.about['port']}/{name}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server."""
    where = programs()
    if where is None:
        pytest.skip("needs apt-get install postgresql: no server")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = Postgres(where, folder)
    try:
        server.make()
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder)
