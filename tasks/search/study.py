"""Which trials there are, and what becomes of each."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import optuna
from optuna.trial import Trial, TrialState

from mae.errors import ConfigError, RunEnded
from tasks.search.config import SweepConfig
from tasks.search.trials import TrialFailed, TrialPruned, run_trial

ENOUGH = 4  # ended trials, before which their failures are no rate


def open_study(config: SweepConfig) -> optuna.Study:
    """The study of a sweep, as its storage remembers it. Raises ConfigError when it was begun with another space."""
    config.folder.mkdir(parents=True, exist_ok=True)
    sampler = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=config.seed, constant_liar=True),
        "random": lambda: optuna.samplers.RandomSampler(config.seed),
        "grid": lambda: optuna.samplers.RandomSampler(config.seed),  # every trial is given, nothing is left to draw
    }[config.sampler]()
    study = optuna.create_study(
        storage=config.storage or f"sqlite:///{config.folder.resolve() / 'study.db'}",
        study_name=config.name,
        load_if_exists=True,
        direction=config.direction,
        sampler=sampler,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=config.prune_after),
    )
    begun = study.user_attrs.get("space")
    space = {name: str(distribution) for name, distribution in config.distributions.items()}
    if begun not in (None, space):
        raise ConfigError(
            f"{config.folder} was begun with another space ({begun}). Choose another sweep.name, or go on with that one"
        )
    study.set_user_attr("space", space)
    return study


def search(config: SweepConfig, study: optuna.Study, say: Callable[[str], None]) -> None:
    """Runs what is left of the trials, `config.jobs` at a time.

    Trials that a killed sweep left behind come first, under their own numbers and in their own folders.

    Raises RunEnded when more than `max_failure_rate` of the trials have failed.
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
            begun = study.get_trials(deepcopy=False, states=(*_ENDED, TrialState.RUNNING))
            refuse_too_many_failures(config, study)
            return study.ask(config.distributions) if len(begun) < wanted else None

    def work() -> None:
        while (trial := next_trial()) is not None:
            _run(config, study, trial, say)

    with ThreadPoolExecutor(config.jobs) as pool:
        for worker in [pool.submit(work) for _ in range(config.jobs)]:
            worker.result()
    refuse_too_many_failures(config, study)


def _left_behind(config: SweepConfig, study: optuna.Study) -> list[Trial]:
    """The trials that were under way when the sweep was killed.

    One that was killed between its beginning and its last setting gets now what is missing.
    """
    trials = [Trial(study, trial._trial_id) for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
    for trial in trials:
        for name, distribution in config.distributions.items():
            trial._suggest(name, distribution)  # of a setting that it has: no other
    return trials


_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def _run(config: SweepConfig, study: optuna.Study, trial: Trial, say: Callable[[str], None]) -> None:
    folder = config.trial_folder(trial.number)
    settings = [f"{name}={value}" for name, value in trial.params.items()]
    say(f"{folder.name}: {' '.join(settings)}")

    told = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)  # before the sweep was broken off

    def pruned(step: int, value: float) -> bool:
        if step not in told:
            trial.report(value, step)
        return trial.should_prune()

    try:
        value = run_trial(config, folder, settings, pruned)
    except TrialPruned as end:
        trial.set_user_attr("reason", str(end))
        study.tell(trial, state=TrialState.PRUNED)
        say(f"{folder.name}: {end}")
    except TrialFailed as end:
        trial.set_user_attr("reason", str(end))
        study.tell(trial, state=TrialState.FAIL)
        say(f"{folder.name} failed: {end}")
    else:
        study.tell(trial, value)
        say(f"{folder.name}: {config.objective} {value:.4f}")


def refuse_too_many_failures(config: SweepConfig, study: optuna.Study) -> None:
    """Raises RunEnded when too large a share of the trials has failed."""
    ended = study.get_trials(deepcopy=False, states=_ENDED)
    failed = [trial for trial in ended if trial.state == TrialState.FAIL]
    if len(ended) >= ENOUGH and len(failed) / len(ended) > config.max_failure_rate:
        raise RunEnded(
            f"{len(failed)} of {len(ended)} trials have failed, more than max_failure_rate={config.max_failure_rate}; "
            f"the last: {failed[-1].user_attrs['reason']} (see {config.trial_folder(failed[-1].number)}.log)"
        )
