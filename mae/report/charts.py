"""Line charts of metrics over steps, as data for a template that draws SVG of any width."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple

from mae.models.loss import CHANGES_THE_LOSS
from mae.report.axes import Mark, axis, number, spread_evenly, step_ticks, thin
from mae.report.runs import MetricValues, Run, differences

COLOURS, DASHES = 8, 10  # in page.css: more runs than colours differ in their dash patterns as well
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
    Panel("Top-1 accuracy", ("knn/top1", "knn_average/top1", "linear/top1", "val/top1"), "", "%", True, False),
    Panel("Top-5 accuracy", ("val/top5",), "", "%", True, False),
    Panel(
        "Segmentation, mean IoU", ("dense/miou", "dense_average/miou"), "By the nearest patch tokens.", "%", True, False
    ),
    Panel("RankMe", ("rank/rankme", "rank_average/rankme"), "Effective rank of the features.", from_zero=False),
    Panel(
        "Mean IoU of the masks",
        ("val/first_iou", "val/last_iou"),
        "Intersection over union with the first and the last answer to the prompts of an object.",
        "%",
        True,
        False,
    ),
)


@dataclass(frozen=True)
class Line:
    """One metric of one run.

    colour  its number
    dash    number of its dash pattern, 0: none
    points  all finite values by step
    path    SVG path in a square of 1000 by 1000, interrupted where values are not finite
    gaps    the first step of each stretch of values that are not finite
    shown   steps and values that the cursor reads
    """

    label: str
    colour: int
    dash: int
    points: MetricValues
    path: str
    gaps: list[int]
    shown: tuple[list[int], list[float]]

    @property
    def dots(self) -> str:
        """Returns an SVG path with a dot at each point of a line of few, else an empty one."""
        if len(self.points) > MAX_DOTS or not self.path:
            return ""
        return "M" + self.path[1:].replace("M", "L").replace("L", "h.01M") + "h.01"


@dataclass(frozen=True)
class Chart:
    """One chart; the places of marks are percent of the axes, `end` is the last step."""

    panel: Panel
    lines: list[Line]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    baselines: list[Mark]
    restarts: list[Mark]
    gaps: list[Mark]
    end: int

    @property
    def summary(self) -> str:
        """Describes the chart for a screen reader."""
        described = []
        for line in self.lines:
            if values := list(line.points.values()):
                described.append(
                    f"{line.label} from {number(values[0])} to {number(values[-1])}, between {number(min(values))} and "
                    f"{number(max(values))}"
                )
        described += [mark.label for mark in self.gaps]
        return f"{self.panel.title}{f' in {self.panel.unit}' if self.panel.unit else ''}: {'; '.join(described)}"

    @property
    def data(self) -> list[dict[str, Any]]:
        """Returns what the cursor shows, for page.js."""
        return [
            {"label": line.label, "colour": line.colour, "points": line.shown} for line in self.lines if line.points
        ]

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
    logged = dict.fromkeys(chain.from_iterable(run.series for run in runs))
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
        (run, name, {step: value * scale for step, value in run.series[name].items()})
        for run in runs
        for name in panel.names
        if name in run.series
    ]
    if not found or ("guard/skipped" in panel.names and not any(any(points.values()) for *_, points in found)):
        return None
    baselines = []
    if "train/loss" in panel.names:
        baselines = _baselines(runs)
        panel = panel._replace(note=_loss_note(runs, panel.note if baselines else ""))
    end = max(max(run.step for run in runs), 1)
    values = [value for *_, points in found for value in points.values() if isfinite(value)]
    low, high, y_ticks = axis([*values, *(value for _, value in baselines), *([0.0] if panel.from_zero else [])])
    several = len(runs) > 1
    lines = []
    for run, name, points in found:
        of_run = f"{run.label} {name}" if len(panel.names) > 1 else run.label
        finite = {step: value for step, value in points.items() if isfinite(value)}
        gaps, number_of_run = _gaps(points), runs.index(run)
        thinned = thin(list(finite.items()))
        lines.append(
            Line(
                label=of_run if several else name,
                colour=number_of_run % COLOURS if several else panel.names.index(name),
                dash=(number_of_run // COLOURS * len(panel.names) + panel.names.index(name)) % DASHES if several else 0,
                points=finite,
                path=_path(
                    [(1000 * step / end, 1000 * (high - y) / (high - low)) for step, y in thinned],
                    [1000 * gap / end for gap in gaps],
                ),
                gaps=gaps,
                shown=([step for step, _ in thinned], [float(f"{value:.5g}") for _, value in thinned]),
            )
        )
    restarts = [
        Mark(round(100 * step / end, 2), f"{run.label} resumed at step {step:,}", runs.index(run) % COLOURS)
        for run in runs
        for step in run.restarts
        if step <= end
    ]
    marks = [Mark(round(100 * (value - low) / (high - low), 2), name) for name, value in baselines]
    return Chart(panel, lines, step_ticks(end), y_ticks, marks, restarts, _gap_marks(lines, end), end)


def _gaps(points: MetricValues) -> list[int]:
    """Returns the first step of each stretch of values that are not finite."""
    gaps, before = [], True
    for step, value in points.items():
        if before and not isfinite(value):
            gaps.append(step)
        before = isfinite(value)
    return gaps


def _gap_marks(lines: Sequence[Line], end: int) -> list[Mark]:
    """Returns a mark for each stretch of values that are not finite; those at one place share one."""
    marks: dict[float, Mark] = {}
    for line in lines:
        for step in line.gaps:
            last = not any(later >= step for later in line.points)
            place = round(100 * step / end, 1)
            label = f"{line.label} not finite {'since' if last else 'at'} step {step:,}"
            marks.setdefault(place, Mark(place, label, line.colour))
    return list(marks.values())


def _path(places: Sequence[tuple[float, float]], gaps: Sequence[float]) -> str:
    """Returns an SVG path through the places (x, y), interrupted where a gap (x) lies between two of them."""
    path, before = "", -1.0
    for x, y in places:
        joined = path and not any(before < gap < x for gap in gaps)
        path, before = f"{path}{'L' if joined else 'M'}{x:.1f} {y:.1f}", x
    return path


def _loss_note(runs: Sequence[Run], note: str) -> str:
    """Adds to the note of the loss chart which settings make the losses of these runs incomparable."""
    differing = [name for name, _ in differences(runs) if name in CHANGES_THE_LOSS]
    warning = f"Not to be compared between runs that differ in {' or '.join(differing)}." if differing else ""
    return f"{note} {warning}".strip()


def _baselines(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Returns name and value of the trivial losses; runs whose values nearly agree share one."""
    baselines: list[tuple[str, float]] = []
    for run in runs:
        for name, value in run.baselines.items():
            if not any(name == other and abs(value - at) < SAME_BASELINE * at for other, at in baselines):
                baselines.append((name, value))
    return [(f"{name} ({number(value)})", value) for name, value in baselines]
