"""Table of runs: those that need a look first."""

from collections import Counter
from math import isfinite

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mae.runs.read import Run

ORDER = ("failed", "ended", "running", "stopped", "finished")
COLOURS = {"failed": "red", "ended": "red", "running": "green", "stopped": "yellow", "finished": ""}
NAMES_SHOWN = 3  # of runs that share a sentence
LINES_BESIDE = 4  # heading, those that do not fit, counts, cursor
WIDE = 110  # characters from which on the lowest validation loss and the time left have columns
UNITS = ((86400 * 2, 86400, "d"), (3600 * 2, 3600, "h"), (120, 60, "min"), (0, 1, "s"))  # from, seconds, name


def show(runs: list[Run], passed_over: int, unreadable: list[str], width: int, lines: int | None = None) -> Group:
    """Returns the table, the sentences of runs that have some, and the counts.

    width  characters of the terminal
    lines  of the terminal, where no more than fits is shown and the others are counted; None: all, however long
    """
    runs = sorted(runs, key=lambda run: (ORDER.index(run.state), run.name))
    shown = runs if lines is None else _fitting(runs, lines - LINES_BESIDE)
    parts: list[RenderableType] = [_table(shown, width >= WIDE)]
    said: dict[str, list[str]] = {}
    for run in shown:
        for sentence in _sentences(run):
            said.setdefault(sentence, []).append(run.name)
    for sentence, names in said.items():
        others = f" and {len(names) - NAMES_SHOWN} others" if len(names) > NAMES_SHOWN else ""
        text = Text(printable(f"{', '.join(names[:NAMES_SHOWN])}{others}  {sentence}"))
        if lines is not None:
            text.truncate(width, overflow="ellipsis")
        parts.append(text)
    if len(shown) < len(runs):
        parts.append(Text(f"{len(runs) - len(shown)} more that do not fit on this screen"))
    states = Counter(run.state for run in runs)
    counts = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
    parts.append(Text(f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {counts or 'none'}{_passed_over(passed_over)}"))
    parts += [Text(f"cannot be read: {printable(folder)}", "red") for folder in unreadable]
    return Group(*parts)


def _sentences(run: Run) -> list[str]:
    said = run.sentence or ""
    return [*([said if said.startswith(run.state) else f"{run.state}: {said}"] if said else []), *run.damaged]


def _fitting(runs: list[Run], lines: int) -> list[Run]:
    """Returns the first runs, as many as fit with their sentences, and one at least."""
    for count, run in enumerate(runs):
        lines -= 1 + len(_sentences(run))
        if lines < 0 and count:
            return runs[:count]
    return runs


def _passed_over(count: int) -> str:
    return f"; {count} folder{'s' if count > 1 else ''} without a run passed over" if count else ""


def _table(runs: list[Run], wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0) if wide else (0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", overflow="fold", min_width=10)
    for title in ("step", "loss", *(("best val loss",) if wide else ())):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("best score", overflow="fold")
    for title in ("img/s", *(("left",) if wide else ()), "age"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        total = f"/{run.total_steps:,}" if run.total_steps is not None else ""
        cells = [printable(run.name), "", f"{run.step:,}{total}", number(run.train_loss)]
        cells += [number(run.best_val_loss) + _at(run.best_val_loss_step)] if wide else []
        cells.append(f"{run.score:.1%} {run.scored_by}{_at(run.score_step)}" if run.score is not None else "")
        cells.append(f"{run.images_per_s:,.0f}" if run.images_per_s is not None else "")
        cells += [duration(run.seconds_left)] if wide else []
        cells.append(duration(run.age_seconds))
        texts = [Text(cell) for cell in cells]
        texts[1] = Text(run.state, COLOURS[run.state]).append(printable(_place(run)), "default")
        table.add_row(*texts)
    return table


def _at(step: int | None) -> str:
    return f" at {step:,}" if step is not None else ""


def _place(run: Run) -> str:
    """Says on which machine and in which job the run is, or was."""
    if run.state == "finished" or not run.host:
        return ""
    return f" on {run.host}" + (f", job {run.job}" if run.job else "")


def number(value: float | None) -> str:
    """Returns a loss in six characters."""
    if value is None:
        return ""
    if not isfinite(value):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Returns a time in its largest unit; a negative one is of a clock that is ahead."""
    if seconds is None:
        return ""
    unit, name = next((unit, name) for least, unit, name in UNITS if abs(seconds) >= least)
    return f"{seconds / unit:.0f} {name}"


def printable(text: str) -> str:
    """Returns a text whose control characters, and others that are not printed, are written as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
