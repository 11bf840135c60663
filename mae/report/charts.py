"""Line charts of metrics over steps, as data for a template that draws SVG of any width."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from mae.models.loss import CHANGES_THE_LOSS
from mae.report.axes import Mark, axis, number, spread_evenly, step_ticks, thin
from mae.report.runs import MetricValues, Run, differences

TABLE_ROWS = 40  # per line, in the table below a chart
MAX_DOTS = 60  # a line of no more points shows each of them
SAME_BASELINE = 0.05  # relative difference below which runs share a baseline


class Panel(NamedTuple):
    """A chart to draw: its metrics, and how they are shown.

    percent    metrics are shares of 1, shown in percent
    from_zero  the axis begins at zero
    """

    title: str
    names: tuple[str, ...]
    note: str = ""
    unit: str = ""
    percent: bool = False
    from_zero: bool = True


TRAINING = (
    Panel(
        "Loss",
        ("train/loss", "val/loss"),
        "Grey lines: baselines, what predictors without parameters reach.",
        from_zero=False,
    ),
    Panel("Learning rate", ("train/lr",)),
    Panel("Images per second", ("perf/images_per_s",), "Over all ranks, without validation and saving."),
    Panel("Waiting for data", ("perf/data_wait",), "Share of the time in which nothing was computed.", "%", True),
    Panel("Model FLOPs utilisation", ("perf/mfu",), "Share of what the devices could multiply.", "%", True),
    Panel("Memory", ("perf/memory_gb",), "The most until then, on rank 0.", "GB"),
    Panel("Time for probes", ("perf/probe_share",), "Share of the time since the last start.", "%", True),
    Panel("Skipped steps", ("guard/skipped",), "Steps whose loss or gradient was not finite."),
)
FEATURES = (
    Panel("Top-1 accuracy", ("knn/top1", "linear/top1", "val/top1"), "", "%", True, False),
    Panel("Top-5 accuracy", ("val/top5",), "", "%", True, False),
    Panel("RankMe", ("rank/rankme",), "Effective rank of the features.", from_zero=False),
    Panel("Mean intersection over union", ("val/miou",), "", "%", True, False),
)


@dataclass(frozen=True)
class Line:
    """One metric of one run.

    colour  its number
    dashed  for the second metric of a chart of several runs
    points  all values by step
    path    SVG path in a square of 1000 by 1000
    shown   steps and values that the cursor reads
    """

    label: str
    colour: int
    dashed: bool
    points: MetricValues
    path: str
    shown: tuple[list[int], list[float]]

    @property
    def dotted(self) -> bool:
        return len(self.points) <= MAX_DOTS


@dataclass(frozen=True)
class Chart:
    """One chart; the places of marks are percent of the axes, `end` is the last step."""

    panel: Panel
    lines: list[Line]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    baselines: list[Mark]
    restarts: list[Mark]
    end: int

    @property
    def summary(self) -> str:
        """Describes the chart for a screen reader."""
        described = []
        for line in self.lines:
            values = line.points.values()
            first, last = next(iter(values)), next(reversed(values))
            described.append(
                f"{line.label} from {number(first)} to {number(last)}, between {number(min(values))} and "
                f"{number(max(values))}"
            )
        return f"{self.panel.title}{f' in {self.panel.unit}' if self.panel.unit else ''}: {'; '.join(described)}"

    @property
    def data(self) -> list[dict[str, Any]]:
        """Returns what the cursor shows, for page.js."""
        return [{"label": line.label, "colour": line.colour, "points": line.shown} for line in self.lines]

    @property
    def table(self) -> list[tuple[int, list[str]]]:
        """Returns some of the steps with the value of every line there."""
        steps = sorted(set(chain.from_iterable(spread_evenly(list(line.points), TABLE_ROWS) for line in self.lines)))
        return [
            (step, [number(line.points[step]) if step in line.points else "" for line in self.lines]) for step in steps
        ]


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Draws loss, speed, and all other logged metrics that are not about features."""
    known = set(chain.from_iterable(panel.names for panel in TRAINING + FEATURES))
    logged = dict.fromkeys(chain.from_iterable(run.metrics for run in runs))
    others = tuple(Panel(name, (name,), from_zero=False) for name in logged if name not in known)
    return _charts(TRAINING + others, runs)


def feature_charts(runs: Sequence[Run]) -> list[Chart]:
    """Draws the metrics of probes and of predictions."""
    return _charts(FEATURES, runs)


def _charts(panels: Iterable[Panel], runs: Sequence[Run]) -> list[Chart]:
    charts = [_chart(panel, runs) for panel in panels]
    return [chart for chart in charts if chart is not None]


def _chart(panel: Panel, runs: Sequence[Run]) -> Chart | None:
    """Draws a panel. Returns None if no run logged its metrics, or if no step was skipped."""
    scale = 100 if panel.percent else 1
    found = [
        (run, name, {step: value * scale for step, value in run.metrics[name].items()})
        for run in runs
        for name in panel.names
        if name in run.metrics
    ]
    values = list(chain.from_iterable(points.values() for *_, points in found))
    if not values or ("guard/skipped" in panel.names and not any(values)):
        return None
    baselines = []
    if "train/loss" in panel.names:
        baselines = _baselines(runs)
        panel = panel._replace(note=_loss_note(runs, panel.note if baselines else ""))
    end = max(max(run.step for run in runs), 1)
    low, high, y_ticks = axis(chain(values, (value for _, value in baselines), [0.0] if panel.from_zero else []))
    several, first = len(runs) > 1, panel.names[0]
    lines = []
    for run, name, points in found:
        of_run = f"{run.label} {name}" if len(panel.names) > 1 else run.label
        thinned = thin(list(points.items()))
        places = (f"{1000 * step / end:.1f} {1000 * (high - value) / (high - low):.1f}" for step, value in thinned)
        lines.append(
            Line(
                label=of_run if several else name,
                colour=runs.index(run) if several else panel.names.index(name),
                dashed=several and name != first,
                points=points,
                path="M" + "L".join(places),
                shown=([step for step, _ in thinned], [float(f"{value:.5g}") for _, value in thinned]),
            )
        )
    restarts = [
        Mark(round(100 * step / end, 2), f"{run.label} resumed at step {step:,}", runs.index(run))
        for run in runs
        for step in run.restarts
        if step <= end
    ]
    marks = [Mark(round(100 * (value - low) / (high - low), 2), name) for name, value in baselines]
    return Chart(panel, lines, step_ticks(end), y_ticks, marks, restarts, end)


def _loss_note(runs: Sequence[Run], note: str) -> str:
    """Adds to the note of the loss chart which settings make the losses of these runs incomparable."""
    differing = [name for name, _ in differences(runs) if name in CHANGES_THE_LOSS]
    warning = f"Not to be compared between runs that differ in {' or '.join(differing)}." if differing else ""
    return f"{note} {warning}".strip()


def _baselines(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Returns name and value of the trivial losses; runs whose values nearly agree share one."""
    baselines: list[tuple[str, float]] = []
    for run in runs:
        for name, value in run.summary.get("floors", {}).items():
            if not any(name == other and abs(value - at) < SAME_BASELINE * at for other, at in baselines):
                baselines.append((name, value))
    names = [name for name, _ in baselines]
    return [(f"{name} ({value:.3g})" if names.count(name) > 1 else name, value) for name, value in baselines]
