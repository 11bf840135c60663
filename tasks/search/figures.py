"""Figures of a sweep: every trial as a line over its settings, and how much each setting mattered."""

from math import isfinite, log
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from mae.atomic import write_atomically

LETTERS = 24  # of a value


def draw_trials(trials: list[FrozenTrial], objective: str, lower_is_better: bool, path: Path) -> None:
    """Draws a line per complete trial through its settings to its objective, the best one wider and on top."""
    trials = sorted(
        (trial for trial in trials if trial.value is not None and isfinite(trial.value)),
        key=lambda trial: trial.value or 0,
        reverse=lower_is_better,
    )
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    columns = [_places(trials, name) for name in names]
    values = [trial.value or 0.0 for trial in trials]
    columns.append((_spread(values), _marks(values)))
    figure = Figure(figsize=(2.6 * len(columns) + 1, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    # The end of viridis is hardly seen on white.
    scale, colours = Normalize(min(values), max(values)), colormaps["viridis_r" if lower_is_better else "viridis"]
    for number, value in enumerate(values):
        share = float(scale(value)) if max(values) > min(values) else 0.5
        best = number == len(values) - 1
        axes.plot(
            [places[number] for places, _ in columns],
            color=colours((1 - share if lower_is_better else share) * 0.85),
            linewidth=3 if best else 1.2,
            marker="o",
            markersize=6 if best else 3,
        )
    for column, (_, marks) in enumerate(columns):
        axes.axvline(column, color="grey", linewidth=0.8, alpha=0.5, zorder=0)
        for place, text in marks:
            axes.annotate(
                text,
                (column, place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )
    axes.set(
        xlim=(-0.1, len(columns) - 0.6), ylim=(-0.06, 1.06), yticks=[], title=f"{len(trials)} trials, the best one wide"
    )
    axes.set_xticks(range(len(columns)), [*names, objective])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _save(figure, path)


def draw_importances(importances: dict[str, float], objective: str, path: Path) -> None:
    """Draws the share of the objective's variance that each setting explains, the largest on top."""
    figure = Figure(figsize=(6.5, 1.2 + 0.45 * len(importances)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    names = sorted(importances, key=lambda name: importances[name])
    bars = axes.barh(names, [importances[name] for name in names], color="tab:blue", height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize="small")
    axes.set(xlabel=f"share of the variance of {objective}", xlim=(0, 1.1))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with write_atomically(path) as temporary:  # another sweep.py may end at the same moment
        figure.savefig(temporary, format="png")


def _places(trials: list[FrozenTrial], name: str) -> tuple[list[float], list[tuple[float, str]]]:
    """Returns the height of each trial's value of a setting in [0, 1], NaN without it, and labels at some heights."""
    given = [trial.params.get(name) for trial in trials]
    distribution = next(trial.distributions[name] for trial in trials if name in trial.distributions)
    if isinstance(distribution, CategoricalDistribution):
        choices = [choice for choice in distribution.choices if choice in given]
        heights = [index / max(1, len(choices) - 1) for index in range(len(choices))]
        places = [heights[choices.index(value)] if value in choices else float("nan") for value in given]
        return places, [(height, _short(choice)) for height, choice in zip(heights, choices, strict=True)]
    numbers = [float("nan") if value is None else float(value) for value in given]
    logarithmic = bool(getattr(distribution, "log", False))
    return _spread([log(number) for number in numbers] if logarithmic else numbers), _marks(numbers, logarithmic)


def _spread(numbers: list[float]) -> list[float]:
    """Maps the lowest number to 0 and the highest to 1; one in the middle if they are the same."""
    known = [number for number in numbers if isfinite(number)]
    low, high = min(known), max(known)
    return [(number - low) / (high - low) if high > low else 0.5 + 0 * number for number in numbers]


def _marks(numbers: list[float], logarithmic: bool = False) -> list[tuple[float, str]]:
    """Returns heights and labels of the lowest and the highest number and of three between them."""
    known = [number for number in numbers if isfinite(number)]
    low, high = min(known), max(known)
    if low == high:
        return [(0.5, f"{low:.3g}")]
    marks = []
    for height in (0, 0.25, 0.5, 0.75, 1):
        value = low * (high / low) ** height if logarithmic else low + (high - low) * height
        marks.append((height, f"{value:.3g}"))
    return marks


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LETTERS else f"…{text[1 - LETTERS :]}"
