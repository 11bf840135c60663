"""One sweep: from the settings of sweep.py to the table of its trials.

1 open      validate SweepConfig; open the study; refuse other values than it holds, and a second sweep.py in the folder
2 search    trials that a killed sweep left behind, then new ones, `jobs` at a time; equal settings run once
3 trial     an ordinary run of train.py, then the probe that the objective names    tasks/search/trials.py
4 results   results.csv, figures, the best trial                                    tasks/search/results.py
"""

import fcntl
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import FrameType
from typing import Any

import optuna
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from data.storage.credentials import pass_on, reveal
from mae.distributed.rank_zero import say_at_once
from mae.errors import ConfigError, RunEnded
from mae.run.metrics import read_metrics
from tasks.config import plain_settings, validate
from tasks.errors import readable_errors
from tasks.search.config import SweepConfig, SweepSettings
from tasks.search.results import show_results
from tasks.search.trials import POLL_SECONDS, TrialFailed, run_trial, stop_running, stopping
from tasks.words import setting

MIN_ENDED_TRIALS = 4  # before these have ended, failures are no rate
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@readable_errors()
def launch(raw: DictConfig) -> None:
    """Runs the trials that are missing, and shows the results of all of them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = validate(SweepSettings, plain_settings(raw)).sweep
    pass_on()  # to the programs of the trials
    if config.launch and shutil.which(config.launch[0]) is None:
        raise ConfigError(
            f"sweep.launch={config.launch}: there is no program {config.launch[0]} here. Each word of the command is "
            "an entry of the list, as in [srun, --nodes=1]"
        )
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
    """Opens the study of a sweep in its storage.

    Raises ConfigError if it cannot be opened, or its trials are others than those asked for.
    """
    if config.storage is None and "?" in str(config.folder.resolve()):
        raise ConfigError(
            f"the folder {config.folder} has a question mark, at which the address of the study in it ends: choose "
            "another sweep.sweeps= or sweep.name=, or set sweep.storage"
        )
    # With sampler=grid it draws nothing: `search` enqueues every trial.
    sampler = optuna.samplers.RandomSampler(config.seed)
    if config.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(seed=config.seed, constant_liar=True)
    storage = reveal(config.storage) if config.storage else f"sqlite:///{config.folder.resolve() / 'study.db'}"
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=storage,
            study_name=config.name,
            load_if_exists=True,
            direction=config.direction,
            sampler=sampler,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=config.prune_after),
        )
    except (OSError, SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
        raise ConfigError(
            f"the study cannot be opened in {config.storage or config.folder / 'study.db'} "
            f"({' '.join(str(error).split())[:200]}): choose another sweep.sweeps or sweep.storage, or restore the file"
        ) from error
    refuse_other_study(config, study)
    return study


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
        if given is not None:
            study.set_user_attr(name, given)


def _was_pruned(study: optuna.Study) -> bool:
    return any(trial.intermediate_values for trial in study.get_trials(deepcopy=False))


def search(config: SweepConfig, study: optuna.Study) -> None:
    """Runs what is left of the trials, `config.jobs` at a time.

    Trials that a killed sweep left behind come first, under their own numbers and in their own folders.

    Raises RunEnded if more than `max_failure_rate` of the trials have failed, or all that have ended.
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
    refuse_too_many_failures(config, study, at_least=1)


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
    settings = _words(trial)
    _say(f"{folder.name}: {' '.join(settings)}")
    if (same := _of_same_settings(study, trial)) is not None:
        name = config.trial_folder(same.number).name
        trial.set_user_attr("same_as", same.number)
        trial.set_user_attr("reason", f"same settings as {name}")
        study.tell(trial, same.value if same.state == TrialState.COMPLETE else None, same.state)
        _say(f"{folder.name}: same settings as {name}, which is {same.state.name.lower()}")
        return
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)  # before the sweep was killed
    # Optuna prunes in the direction of the objective.
    sign = 1 if config.prune_by is None or config.better(config.prune_by) == config.direction else -1

    def should_prune(step: int, value: float) -> bool:
        if step not in reported:
            trial.report(sign * value, step)
            reported.add(step)
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
        if config.prune_by is not None and not reported:
            names = {name for row in read_metrics(folder / "metrics.csv") for name in row} - {"step"}
            _say(
                f"{folder.name} logged no {config.prune_by}, so that it prunes no trial: sweep.prune_by takes one of "
                f"{', '.join(sorted(names))}; knn/top1 needs online_probe.every"
            )


def _words(trial: Trial | FrozenTrial) -> list[str]:
    return [setting(name, value) for name, value in trial.params.items()]


def _of_same_settings(study: optuna.Study, trial: Trial) -> FrozenTrial | None:
    """Returns a complete or pruned trial with the same settings; waits for an earlier one that runs. None if none is.

    A run follows from its settings bit for bit, so that another one would give the same value.
    """
    while not stopping.is_set():
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        same = [other for other in others if sorted(_words(other)) == sorted(_words(trial))]
        if done := [other for other in same if other.state in (TrialState.COMPLETE, TrialState.PRUNED)]:
            return min(done, key=lambda other: ("same_as" in other.user_attrs, other.number))
        if not any(other.state == TrialState.RUNNING and other.number < trial.number for other in same):
            return None
        time.sleep(POLL_SECONDS)
    return None


def refuse_too_many_failures(config: SweepConfig, study: optuna.Study, at_least: int = MIN_ENDED_TRIALS) -> None:
    """Raises RunEnded if more than `max_failure_rate` of the ended trials have failed, or all of them.

    at_least  ended trials before their share counts
    """
    ended = study.get_trials(deepcopy=False, states=ENDED)
    failed = [trial for trial in ended if trial.state == TrialState.FAIL]
    if len(ended) < at_least or not failed:
        return
    last = f"{failed[-1].user_attrs.get('reason')} (see {config.trial_folder(failed[-1].number)}.log)"
    if len(failed) / len(ended) > config.max_failure_rate:
        raise RunEnded(
            f"{len(failed)} of {len(ended)} trials have failed, more than max_failure_rate={config.max_failure_rate}; "
            f"the last: {last}"
        )
    if len(failed) == len(ended) and at_least == 1:
        raise RunEnded(f"all {len(ended)} trials have failed; the last: {last}")
