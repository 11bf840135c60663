"""The bar of a run on terminals of several widths."""

import io

import pytest
from rich.console import Console

from mae.callbacks.progress import numbers, progress_bar

LATEST = {
    "train/loss": 0.43215,
    "perf/images_per_s": 12_345.6,
    "perf/data_wait": 0.02,
    "perf/mfu": 0.38,
    "perf/memory_gb": 71.2,
    "val/loss": 0.41234,
    "guard/skipped": 3.0,
}


def shown_at(width: int) -> str:
    """Returns the line of a run half-way, as a terminal of this width shows it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    bar = progress_bar(console)
    bar.add_task("", total=1_250_000, completed=625_000, numbers=numbers(LATEST))
    with console.capture() as captured:
        console.print(bar.get_renderable())
    lines = captured.get().splitlines()
    assert len(lines) == 1 and len(lines[0].rstrip()) <= width
    return lines[0]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_progress_keeps_step_total_bar_and_time_left_at_each_width(width: int) -> None:
    line = shown_at(width)
    assert "step  625000/1250000 " in line and line.count("━") >= 5  # half of the bar
    assert "-:--:-- left" in line and "…" not in line


def test_progress_drops_utilisation_then_memory_then_speed_as_the_terminal_narrows() -> None:
    dropped = {
        width: {word for word in ("MFU", "GB", "images/s") if word not in shown_at(width)} for width in (80, 160)
    }
    assert dropped == {80: {"MFU", "GB", "images/s"}, 160: set()}
    order = [
        {word for word in ("MFU", "GB", "images/s") if word not in shown_at(width)} for width in range(160, 60, -1)
    ]
    assert [len(one) for one in order] == sorted(len(one) for one in order)
    assert {"MFU"} in order and {"MFU", "GB"} in order
    assert "3 skipped" in shown_at(80) and "loss 0.4321" in shown_at(80)
