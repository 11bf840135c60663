"""The study of a sweep: its trials in Optuna's storage, a file of the sweep's folder or a database server."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from data.storage.credentials import reveal
from mae.distributed.rank_zero import say
from mae.errors import ConfigError
from tasks.search.config import SweepConfig
from tasks.search.trials import stopping

NETWORKED = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse.", "9p", "afs")
RETRY_SECONDS, PATIENCE_SECONDS = 1.0, 600.0


def open_study(config: SweepConfig) -> optuna.Study:
    """Opens the study of a sweep in its storage.

    Raises ConfigError if it cannot be opened, or its trials are others than those asked for.
    """
    if config.storage is None and "?" in str(config.folder.resolve()):
        raise ConfigError(
            f"the folder {config.folder} has a question mark, at which the address of the study in it ends: choose "
            "another sweep.sweeps= or sweep.name=, or set sweep.storage"
        )
    if config.storage in ("sqlite://", "sqlite:///:memory:"):
        raise ConfigError(f"sweep.storage={config.storage} keeps nothing: leave it out, or name a file or a server")
    # With sampler=grid it draws nothing: `search` enqueues every trial.
    sampler = optuna.samplers.RandomSampler(config.seed)
    if config.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(seed=config.seed, constant_liar=True)
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        study = _create_or_load(config, sampler)
    except (OSError, SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
        raise ConfigError(
            f"the study cannot be opened in {config.storage or config.folder / 'study.db'} "
            f"({' '.join(str(error).split())[:200]}): choose another sweep.sweeps or sweep.storage, or restore the file"
        ) from error
    refuse_other_study(config, study)
    return study


def _create_or_load(config: SweepConfig, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    for last in (False, False, True):
        try:
            storage = optuna.storages.RDBStorage(address(config), engine_settings(config))
            study = optuna.create_study(
                storage=storage,
                study_name=config.name,
                load_if_exists=True,
                direction=config.direction,
                sampler=sampler,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=config.prune_after),
            )
        except (ProgrammingError, IntegrityError):  # another sweep.py makes the same tables
            if last:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            event.listen(storage.engine, "do_connect", connect_patiently)
            return study
    raise AssertionError


def open_engine(config: SweepConfig) -> Engine:
    """Opens the database of a study once more, for what is not Optuna's."""
    engine = create_engine(address(config), **engine_settings(config))
    event.listen(engine, "do_connect", connect_patiently)
    return engine


def engine_settings(config: SweepConfig) -> dict[str, Any]:
    """Returns the settings of SQLAlchemy: a lost connection is noticed before it is used, or within a minute."""
    timeouts = {"timeout": 60.0} if address(config).startswith("sqlite") else {}
    if address(config).startswith("postgresql+psycopg:"):
        timeouts = {"connect_timeout": 30, "tcp_user_timeout": 60_000}
    return {"pool_pre_ping": True, "connect_args": timeouts}


def connect_patiently(dialect: Any, record: Any, words: Any, settings: Any) -> Any:
    """Connects to a server that did answer when the sweep began, and may be away for PATIENCE_SECONDS."""
    began, said = time.monotonic(), False
    while True:
        try:
            return dialect.connect(*words, **settings)
        except dialect.loaded_dbapi.OperationalError:
            if time.monotonic() - began > PATIENCE_SECONDS or stopping.is_set():
                raise
            if not said:
                say("the database of the study does not answer: trying again for ten minutes")
            said = True
            time.sleep(RETRY_SECONDS)


def address(config: SweepConfig) -> str:
    """Returns the URL of the database for SQLAlchemy, with its password."""
    if config.storage is None:
        return f"sqlite:///{config.folder.resolve() / 'study.db'}"
    scheme, separator, rest = reveal(config.storage).partition("://")
    return f"{'postgresql+psycopg' if scheme in ('postgres', 'postgresql') else scheme}{separator}{rest}"


@contextmanager
def hold_database(config: SweepConfig) -> Iterator[None]:
    """Keeps a second sweep.py away from a database in a file within the block; a server takes several.

    Raises ConfigError if there is another one, or its file system has no locks.
    """
    if not address(config).startswith("sqlite"):
        yield
        return
    path = Path((make_url(address(config)).database or "").removeprefix("file:")).absolute()
    name = "sweep.lock" if config.storage is None else f"{path.name}.{config.name}.lock"
    several = "Several at a time take a server: sweep.storage=postgresql://... (docs/sweeps.md)"
    if kind := network_file_system(path):
        say(f"{path} lies on {kind}, where SQLite and its locks may not work for several machines. {several}")
    with open(path.with_name(name), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{config.folder} is being worked on by another sweep.py: wait for it or stop it. {several}"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): put it on a local disk. {several}"
            ) from error
        yield


def network_file_system(path: Path) -> str | None:
    """Returns the kind of the network file system that a path is on; None if it is a local one, or not known."""
    best = ("", "")
    for line in mounts().splitlines():
        _, place, kind, *_ = line.split(" ")
        place = place.encode().decode("unicode_escape")
        if path.is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, kind)
    return best[1] if best[1].startswith(NETWORKED) else None


def mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text()
    except OSError:
        return ""


def refuse_other_study(config: SweepConfig, study: optuna.Study) -> None:
    """Notes what the trials of a study have in common. Raises ConfigError if it is something else already.

    A study that is older than these notes takes those of now.
    """
    direction = study.direction.name.lower()
    notes: dict[str, Any] = {
        "direction": config.direction,
        "space": {name: str(distribution) for name, distribution in config.distributions.items()},
        "objective": config.objective,
        "prune_by": config.prune_by,
        "settings": config.fixed,
        "evaluation": config.evaluation,
    }
    for name, given in notes.items():
        stored = direction if name == "direction" else study.user_attrs.get(name)
        if stored is None and name == "prune_by" and given is not None and _was_pruned(study):
            stored = f"{given}, in the direction of the objective" if config.better(given) != direction else given
        if stored not in (None, given) and (name, given) != ("prune_by", None):
            raise ConfigError(
                f"{config.folder} was begun with another {name} ({stored}): choose another sweep.name, or restore it"
            )
    for name, given in notes.items():
        if given is not None and study.user_attrs.get(name) != given:
            study.set_user_attr(name, given)


def _was_pruned(study: optuna.Study) -> bool:
    return any(trial.intermediate_values for trial in study.get_trials(deepcopy=False))
