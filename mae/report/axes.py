"""Axes of charts: round ticks, and lines thinned to what can be seen."""

from collections.abc import Iterable
from math import ceil, floor, log10
from typing import NamedTuple

BUCKETS = 300  # a line has at most twice as many points
ROUNDING = 1e-9  # of the largest value
LARGEST = 1e100  # what is beyond is drawn there


class Mark(NamedTuple):
    """A tick, baseline or restart; `place` is percent of the axis."""

    place: float
    label: str
    colour: int = 0


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Keeps the lowest and the highest point of each of BUCKETS stretches of a line, and its ends."""
    if len(points) <= 2 * BUCKETS:
        return points
    kept = {0, len(points) - 1}
    for bucket in range(BUCKETS - 1):  # one less, for the ends
        stretch = range(bucket * len(points) // (BUCKETS - 1), (bucket + 1) * len(points) // (BUCKETS - 1))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def spread_evenly(steps: list[int], at_most: int) -> list[int]:
    """Returns at most so many of the steps, evenly spread, with the first and the last."""
    if len(steps) <= at_most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (at_most - 1))] for i in range(at_most)]


def axis(values: Iterable[float]) -> tuple[float, float, list[Mark]]:
    """Returns both ends of an axis that holds the finite values, and its ticks at round numbers.

    Values that differ by rounding alone are drawn as one.
    """
    values = [max(-LARGEST, min(LARGEST, value)) for value in values] or [0.0]
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size < 1 / LARGEST:
        low, high = 0.0, 1.0
    elif high - low <= ROUNDING * size:
        low, high = low - size / 2, high + size / 2
    distance = tick_distance(high - low)
    first, last = floor(low / distance + 1e-9), ceil(high / distance - 1e-9)
    at = [i * distance for i in range(first, last + 1)]
    labels = next(labels for digits in range(4, 18) if len(set(labels := [number(x, digits) for x in at])) == len(at))
    places = [round(100 * i / (last - first), 2) for i in range(len(at))]
    return first * distance, last * distance, [Mark(*mark) for mark in zip(places, labels, strict=True)]


def step_ticks(end: int) -> list[Mark]:
    """Returns round ticks of an axis of steps, which ends at `end` whether that is round or not."""
    distance = max(1, round(tick_distance(end)))
    return [Mark(round(100 * step / end, 2), number(step)) for step in range(0, end + 1, distance)]


def tick_distance(span: float) -> float:
    """Returns a round distance between ticks that makes three to five of them."""
    power = 10.0 ** floor(log10(span / 4))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / 4 * (1 - 1e-9))


def number(value: float, digits: int = 4) -> str:
    """Formats a number with four digits or more, or all of those before the point."""
    value = float(f"{value:.{digits}g}") if abs(value) < 10_000 or digits > 4 else value
    return f"{value:,.0f}" if abs(value) >= 1000 and digits == 4 else f"{value:,.{digits}g}"
