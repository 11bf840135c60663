"""A sweep from its settings to the table of its trials."""

import fcntl
import signal
from types import FrameType

import optuna
from omegaconf import DictConfig, OmegaConf

from mae.errors import ConfigError
from tasks.errors import readable_errors
from tasks.search.config import SweepConfig
from tasks.search.results import show_results
from tasks.search.study import open_study, search
from tasks.search.trials import stop_running


@readable_errors()
def launch(raw: DictConfig) -> None:
    """All trials that are missing, then the table of all of them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = SweepConfig.model_validate(OmegaConf.to_container(raw.sweep, resolve=True, throw_on_missing=True))
    study = open_study(config)
    with open(config.folder / "sweep.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{config.folder} is being worked on by another sweep.py: wait for it or stop it"
            ) from None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, _stop)
        try:
            search(config, study, lambda sentence: print(f"{sentence}\n", end="", flush=True))  # threads: one write
        finally:
            show_results(config, study)


def _stop(signum: int, frame: FrameType | None) -> None:
    print(f"\n{signal.Signals(signum).name}: trials save and stop; the same command goes on from there", flush=True)
    stop_running(signum)
