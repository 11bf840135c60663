"""One sweep: from the settings of sweep.py to the table of its trials.

1 open      validate SweepConfig; open the study; refuse other values than it holds    tasks/search/study.py
2 search    trials that a killed sweep left behind, then new ones, `jobs` at a time; equal settings run once
3 claim     of several sweep.py with one study, each trial has one owner               tasks/search/claims.py
4 trial     an ordinary run of train.py, then the probe that the objective names       tasks/search/trials.py
5 results   results.csv, figures, the best trial                                       tasks/search/results.py
"""

import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import optuna
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from data.storage.credentials import pass_on
from mae.distributed.rank_zero import say_at_once
from mae.distributed.requeue import requeue
from mae.errors import ConfigError, RunEnded
from mae.run.metrics import read_metrics
from tasks.config import plain_settings, validate
from tasks.errors import readable_errors
from tasks.search.claims import Claims, hold_claims
from tasks.search.config import SweepConfig, SweepSettings
from tasks.search.results import show_results
from tasks.search.study import hold_database, open_engine, open_study
from tasks.search.trials import POLL_SECONDS, TrialFailed, leave, received, run_trial, stop_running, stopping
from tasks.words import setting

IDLE_SECONDS = 5.0  # between two looks at the trials of others
MIN_ENDED_TRIALS = 4  # before these have ended, failures are no rate
turn = threading.Lock()  # of this sweep's workers to claim
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
    try:
        with hold_database(config), hold_claims(open_engine(config), study._study_id) as claims:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(signum, _stop)
            try:
                search(config, study, claims)
            finally:
                show_results(config, study)
    except SystemExit:  # after the claims are released
        if received:
            requeue(received[0], agreed=True)  # if the sweep is a SLURM job itself
        raise
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise RunEnded(
            f"the database of the study does not answer ({' '.join(str(error.__cause__ or error).split())[:200]}). "
            "Runs that are under way go on by themselves; the same command resumes"
        ) from error


def _stop(signum: int, frame: FrameType | None) -> None:
    say_at_once(f"\n{signal.Signals(signum).name}: runs save and stop, jobs go on; run the same command to resume")
    stop_running(signum)


def _say(sentence: str) -> None:
    """Prints a line in one write: threads print at the same time."""
    print(f"{sentence}\n", end="", flush=True)


def search(config: SweepConfig, study: optuna.Study, claims: Claims) -> None:
    """Runs what is left of the trials, `config.jobs` at a time; beside it others may do the same with the same study.

    Trials that a killed sweep left behind come first, under their own numbers and in their own folders.

    Raises RunEnded if more than `max_failure_rate` of the trials have failed, or all that have ended; SystemExit if the
    sweep was told to stop.
    """

    ended = threading.Event()  # a worker has found no trial, or an error: others begin none

    def work() -> None:
        try:
            while (trial := next_trial(config, study, claims, ended)) is not None:
                try:
                    _run(config, study, claims, trial)
                finally:
                    claims.release(trial.number)
        finally:
            ended.set()

    with ThreadPoolExecutor(config.jobs) as pool:
        for worker in [pool.submit(work) for _ in range(config.jobs)]:
            worker.result()
    if stopping.is_set():
        leave()
    refuse_too_many_failures(config, study, at_least=1)


def next_trial(config: SweepConfig, study: optuna.Study, claims: Claims, ended: threading.Event) -> Trial | None:
    """Returns a trial that is this sweep's to run: one that was left behind, else a new one; None if none is left.

    While the last trials are others', it waits: one of these may die. All trials have ended when the sweep ends well.
    """
    looks = 0
    while not (stopping.is_set() or ended.is_set()):
        refuse_too_many_failures(config, study)
        with turn:
            begun, others = _claim(config, study, claims, again=looks > 0)
        if begun is not None or not others:
            return begun
        if looks == 1:
            hosts = ", ".join(sorted(set(others)))
            _say(f"other sweep.py, on {hosts}, run the last trials ({len(others)}): waiting for them")
        looks += 1
        ended.wait(IDLE_SECONDS)
    return None


def _claim(
    config: SweepConfig, study: optuna.Study, claims: Claims, *, again: bool = False
) -> tuple[Trial | None, list[str]]:
    """Returns a trial that was claimed and begun, or on which machines others work on the last ones.

    A new trial is claimed by its number before it is written, so that nobody writes one too many.

    again  it was looked before: who has claimed a trial that is still not written may be dead, and keeps nobody waiting
    """
    while True:
        trials, holders = study.get_trials(deepcopy=False), claims.holders()
        left = [trial.number for trial in trials if trial.state == TrialState.RUNNING]
        left += [trial.number for trial in trials if trial.state == TrialState.WAITING and trial.number < config.wanted]
        left += [len(trials)] if len(trials) < config.wanted else []
        free = next((number for number in left if number not in holders and claims.take(number)), None)
        if free is None and again and len(trials) < config.wanted:
            study.enqueue_trial({})  # left waiting for its owner, or for the one after
            continue
        if free is None:
            return None, [holders.get(number, "?") for number in left if number not in claims.mine]
        if (begun := _begin(config, study, free)) is not None:
            return begun, []
        claims.release(free)


def _begin(config: SweepConfig, study: optuna.Study, number: int) -> Trial | None:
    """Begins or resumes a trial that was claimed, and draws the settings that it has not yet; None if it has ended."""
    trials, storage = study.get_trials(deepcopy=False), study._storage
    if number == len(trials):
        study.enqueue_trial({})
        trials = study.get_trials(deepcopy=False)
    trial = trials[number]
    if trial.state.is_finished():
        return None
    if number < len(config.points) and not (trial.params or trial.system_attrs.get("fixed_params")):
        storage.set_trial_system_attr(trial._trial_id, "fixed_params", config.points[number])
    if trial.state == TrialState.WAITING:
        storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    begun = Trial(study, trial._trial_id)
    for name, distribution in config.distributions.items():
        begun._suggest(name, distribution)  # a setting that the trial has keeps its value
    return begun


def _run(config: SweepConfig, study: optuna.Study, claims: Claims, trial: Trial) -> None:
    """Runs a trial and tells the study its value, or that it was pruned or failed, and why."""
    folder = config.trial_folder(trial.number)
    settings = _words(trial)
    _say(f"{folder.name}: {' '.join(settings)}")
    if (same := _of_same_settings(study, claims, trial)) is not None:
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

    def tell(state: TrialState, value: float | None, sentence: str, reason: str | None = None) -> None:
        if not claims.holds(trial.number):
            _say(f"{folder.name} is another sweep.py's by now: this one has stood still, and tells nothing of it")
            return
        if reason is not None:
            trial.set_user_attr("reason", reason)
        study.tell(trial, value, state)
        _say(f"{folder.name}{sentence}")

    job = trial.user_attrs.get("job", {})
    try:
        value = run_trial(
            config, folder, settings, should_prune, job, lambda record: trial.set_user_attr("job", record)
        )
    except optuna.TrialPruned as end:
        tell(TrialState.PRUNED, None, f": {end}", str(end))
    except TrialFailed as end:
        tell(TrialState.FAIL, None, f" failed: {end}", str(end))
    else:
        tell(TrialState.COMPLETE, value, f": {config.objective} {value:.4f}")
        if config.prune_by is not None and not reported:
            names = {name for row in read_metrics(folder / "metrics.csv") for name in row} - {"step"}
            _say(
                f"{folder.name} logged no {config.prune_by}, so that it prunes no trial: sweep.prune_by takes one of "
                f"{', '.join(sorted(names))}; knn/top1 needs online_probe.every"
            )


def _words(trial: Trial | FrozenTrial) -> list[str]:
    return [setting(name, value) for name, value in trial.params.items()]


def _of_same_settings(study: optuna.Study, claims: Claims, trial: Trial) -> FrozenTrial | None:
    """Returns a complete or pruned trial with the same settings; waits for an earlier one that runs. None if none is.

    A run follows from its settings bit for bit, so that another one would give the same value.
    """
    while not stopping.is_set():
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        same = [other for other in others if sorted(_words(other)) == sorted(_words(trial))]
        if done := [other for other in same if other.state in (TrialState.COMPLETE, TrialState.PRUNED)]:
            return min(done, key=lambda other: ("same_as" in other.user_attrs, other.number))
        earlier = [other for other in same if other.state == TrialState.RUNNING and other.number < trial.number]
        if not earlier or not claims.holders().keys() & {other.number for other in earlier}:
            return None
        time.sleep(POLL_SECONDS)
    leave()


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
