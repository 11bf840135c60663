"""One sweep: from the settings of sweep.py to the table of its trials.

1 open      validate SweepConfig; open the study; refuse another search space, and a second sweep.py in the folder
2 search    trials that a killed sweep left behind, then new ones, `jobs` at a time
3 trial     an ordinary run of train.py, then the probe that the objective names    tasks/search/trials.py
4 results   results.csv, figures, the best trial                                    tasks/search/results.py
"""

import fcntl
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import FrameType

import optuna
from omegaconf import DictConfig
from optuna.trial import Trial, TrialState

from mae.distributed.rank_zero import say_at_once
from mae.errors import ConfigError, RunEnded
from tasks.config import plain_settings, validate
from tasks.errors import readable_errors
from tasks.search.config import SweepConfig
from tasks.search.results import show_results
from tasks.search.trials import TrialFailed, run_trial, stop_running
from tasks.words import choose_one

MIN_ENDED_TRIALS = 4  # before these have ended, failures are no rate
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@readable_errors()
def launch(raw: DictConfig) -> None:
    """Runs the trials that are missing, and shows the results of all of them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = plain_settings(raw)
    if settings.get("sweep") is None:
        reason = choose_one("sweep")
        raise ConfigError(reason)
    config = validate(SweepConfig, settings["sweep"])
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
            search(config, study)
        finally:
            show_results(config, study)


def _stop(signum: int, frame: FrameType | None) -> None:
    say_at_once(f"\n{signal.Signals(signum).name}: the trials save and stop; run the same command to resume")
    stop_running(signum)


def _say(sentence: str) -> None:
    """Prints a line in one write: threads print at the same time."""
    print(f"{sentence}\n", end="", flush=True)


def open_study(config: SweepConfig) -> optuna.Study:
    """Opens the study of a sweep in its storage. Raises ConfigError if it was begun with another search space."""
    if config.storage is None and "?" in str(config.folder.resolve()):
        raise ConfigError(
            f"the folder {config.folder} has a question mark, at which the address of the study in it ends: choose "
            "another sweep.sweeps= or sweep.name=, or set sweep.storage"
        )
    config.folder.mkdir(parents=True, exist_ok=True)
    # With sampler=grid it draws nothing: `search` enqueues every trial.
    sampler = optuna.samplers.RandomSampler(config.seed)
    if config.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(seed=config.seed, constant_liar=True)
    study = optuna.create_study(
        storage=config.storage or f"sqlite:///{config.folder.resolve() / 'study.db'}",
        study_name=config.name,
        load_if_exists=True,
        direction=config.direction,
        sampler=sampler,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=config.prune_after),
    )
    stored = study.user_attrs.get("space")
    space = {name: str(distribution) for name, distribution in config.distributions.items()}
    if stored not in (None, space):
        raise ConfigError(
            f"{config.folder} was begun with another space ({stored}): choose another sweep.name, or restore that space"
        )
    study.set_user_attr("space", space)
    return study


def search(config: SweepConfig, study: optuna.Study) -> None:
    """Runs what is left of the trials, `config.jobs` at a time.

    Trials that a killed sweep left behind come first, under their own numbers and in their own folders.

    Raises RunEnded if more than `max_failure_rate` of the trials have failed.
    """
    if config.sampler == "grid":
        for values in product(*config.space.values()):  # pyright: ignore[reportArgumentType]
            study.enqueue_trial(dict(zip(config.space, values, strict=True)), skip_if_exists=True)
    wanted = config.n_trials or len(study.get_trials(deepcopy=False))
    left_behind = _left_behind(config, study)
    turn = threading.Lock()

    def next_trial() -> Trial | None:
        with turn:
            if left_behind:
                return left_behind.pop(0)
            begun = study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING))
            refuse_too_many_failures(config, study)
            return study.ask(config.distributions) if len(begun) < wanted else None

    def work() -> None:
        while (trial := next_trial()) is not None:
            _run(config, study, trial)

    with ThreadPoolExecutor(config.jobs) as pool:
        for worker in [pool.submit(work) for _ in range(config.jobs)]:
            worker.result()
    refuse_too_many_failures(config, study)


def _left_behind(config: SweepConfig, study: optuna.Study) -> list[Trial]:
    """Returns the trials that were running when the sweep was killed, with the settings that they had not drawn yet."""
    trials = [Trial(study, trial._trial_id) for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
    for trial in trials:
        for name, distribution in config.distributions.items():
            trial._suggest(name, distribution)  # a setting that the trial has keeps its value
    return trials


def _run(config: SweepConfig, study: optuna.Study, trial: Trial) -> None:
    """Runs a trial and tells the study its value, or that it was pruned or failed, and why."""
    folder = config.trial_folder(trial.number)
    settings = [f"{name}={value}" for name, value in trial.params.items()]
    _say(f"{folder.name}: {' '.join(settings)}")
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)  # before the sweep was killed

    def should_prune(step: int, value: float) -> bool:
        if step not in reported:
            trial.report(value, step)
        return trial.should_prune()

    try:
        value = run_trial(config, folder, settings, should_prune)
    except (optuna.TrialPruned, TrialFailed) as end:
        pruned = isinstance(end, optuna.TrialPruned)
        trial.set_user_attr("reason", str(end))
        study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
        _say(f"{folder.name}{'' if pruned else ' failed'}: {end}")
    else:
        study.tell(trial, value)
        _say(f"{folder.name}: {config.objective} {value:.4f}")


def refuse_too_many_failures(config: SweepConfig, study: optuna.Study) -> None:
    """Raises RunEnded if more than `max_failure_rate` of the ended trials have failed."""
    ended = study.get_trials(deepcopy=False, states=ENDED)
    failed = [trial for trial in ended if trial.state == TrialState.FAIL]
    if len(ended) >= MIN_ENDED_TRIALS and len(failed) / len(ended) > config.max_failure_rate:
        raise RunEnded(
            f"{len(failed)} of {len(ended)} trials have failed, more than max_failure_rate={config.max_failure_rate}; "
            f"the last: {failed[-1].user_attrs['reason']} (see {config.trial_folder(failed[-1].number)}.log)"
        )
