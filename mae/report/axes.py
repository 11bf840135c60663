"""Axes with round ticks, and fewer points where there are more than can be seen."""

from collections.abc import Iterable
from math import ceil, floor, log10
from typing import NamedTuple

BUCKETS = 300  # a line has at most twice as many points


class Mark(NamedTuple):
    """A tick, a trivial loss or a restart: its place on the axis in percent."""

    place: float
    label: str
    colour: int = 0


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most two points for each of BUCKETS stretches of the line: the lowest and the highest, ends included."""
    if len(points) <= 2 * BUCKETS:
        return points
    kept = {0, len(points) - 1}
    for bucket in range(BUCKETS - 1):  # one less, for the ends
        stretch = range(bucket * len(points) // (BUCKETS - 1), (bucket + 1) * len(points) // (BUCKETS - 1))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def spread(steps: list[int], at_most: int) -> list[int]:
    """So many of them, evenly spread, the first and the last always among them."""
    if len(steps) <= at_most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (at_most - 1))] for i in range(at_most)]


def axis(values: Iterable[float]) -> tuple[float, float, list[Mark]]:
    """Ends of an axis that holds the values, and ticks at round numbers."""
    values = list(values)
    low, high = min(values), max(values)
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    step = round_step(high - low)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    ticks = [Mark(round(100 * (i - first) / (last - first), 2), number(i * step)) for i in range(first, last + 1)]
    return first * step, last * step, ticks


def step_ticks(end: int) -> list[Mark]:
    """Ticks of the axis of steps, which ends at the last one whether it is round or not."""
    step = max(1, round(round_step(end)))
    return [Mark(round(100 * tick / end, 2), number(tick)) for tick in range(0, end + 1, step)]


def round_step(span: float) -> float:
    """The distance of ticks, a round number, so that there are three to five of them."""
    power = 10.0 ** floor(log10(span / 4))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / 4 * (1 - 1e-9))


def number(value: float) -> str:
    """Four digits, or all of a large whole number."""
    value = float(f"{value:.4g}") if abs(value) < 10_000 else value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
