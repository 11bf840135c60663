"""The results of a sweep: results.csv, the best trial, and two figures."""

import csv
import shlex

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from mae.atomic import write_atomically
from tasks.search.config import SweepConfig
from tasks.search.figures import draw_importances, draw_trials
from tasks.words import setting


def show_results(config: SweepConfig, study: optuna.Study) -> None:
    """Writes SWEEPS/NAME/results.csv and the figures, and prints the best trial."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    _write_table(config, trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    said = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items() if count)
    print(f"{config.folder}: {len(trials)} trials ({said}); {config.folder / 'results.csv'}")
    if not complete:
        return
    best = study.best_trial
    settings = " ".join(setting(name, value) for name, value in best.params.items())
    print(f"best: {config.objective} {best.value:.4f} with {settings}")
    folder = config.trial_folder(best.user_attrs.get("same_as", best.number))
    print(f"next: python eval.py {shlex.quote(setting('checkpoint', str(folder)))} probe=linear")
    if len(complete) > 1:
        _draw(config, study)


def _write_table(config: SweepConfig, trials: list[FrozenTrial]) -> None:
    with write_atomically(config.folder / "results.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", config.objective, *config.space, "seconds", "reason"])
        for trial in trials:
            seconds = round(trial.duration.total_seconds()) if trial.duration else ""
            values = [trial.params.get(name, "") for name in config.space]
            reason = trial.user_attrs.get("reason", "")  # why a trial is not complete
            # Optuna's value of a trial that is not complete is the one that it was pruned by.
            value = trial.value if trial.state == TrialState.COMPLETE else ""
            name = config.trial_folder(trial.number).name
            writer.writerow([name, trial.state.name.lower(), value, *values, seconds, reason])


def _draw(config: SweepConfig, study: optuna.Study) -> None:
    """Writes parallel_coordinates.png, and importance.png if the trials differ in value."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    lower_is_better = study.direction == optuna.study.StudyDirection.MINIMIZE
    draw_trials(complete, config.objective, lower_is_better, config.folder / "parallel_coordinates.png")
    if len({trial.value for trial in complete}) > 1:
        draw_importances(get_param_importances(study), config.objective, config.folder / "importance.png")
