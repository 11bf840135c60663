"""The results of a finished run as a table: python -m mae.report.summary runs/NAME"""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mae.errors import ConfigError
from mae.report.summary import main_results
from mae.run.folder import read_mapping


def _read(path: Path) -> dict[str, Any]:
    """Reads a summary.json. Raises ConfigError if it is damaged."""
    summary = read_mapping(path)
    try:
        if summary is not None:
            main_results(summary)
            return summary
        reason = "it holds no object"
    except KeyError as error:
        reason = f"{error} is missing"
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise ConfigError(f"{path} is damaged: {reason}. The same train.py command writes it anew")


def _accuracies(path: Path) -> list[float]:
    """Returns the accuracies of the trained and the untrained encoder. Raises ConfigError if the file is damaged."""
    result = read_mapping(path) or {}
    try:
        return [float(result[model]["top1"]) for model in ("trained", "untrained")]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged. Delete it, or run eval.py again") from error


def _dense(path: Path) -> dict[str, str]:
    """Returns head -> mean IoU, or δ1 of depth, of the encoders. Raises ConfigError if the file is damaged."""
    result = read_mapping(path) or {}
    try:
        score, title = ("miou", "mean IoU") if "miou" in result["trained"] else ("delta1", "δ1")
        models = [model for model in ("trained", "untrained") if model in result]
        return {
            f"dense {head}, {title}": ", ".join(f"{float(result[model][score][head]):.1%} {model}" for model in models)
            for head in result["trained"][score]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged. Delete it, or run eval.py again") from error


def main() -> int:
    """Prints the results of a finished run as a table, those of its probes beside them."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "summary.json").is_file():
        print("usage: python -m mae.report.summary RUN, a finished run (with a summary.json)", file=sys.stderr)
        return 2
    run = Path(sys.argv[1])
    try:
        summary = _read(run / "summary.json")
        accuracies = [
            (f"{probe} accuracy{of}", "{:.1%} trained, {:.1%} untrained".format(*_accuracies(file)))
            for probe in ("knn", "linear", "attentive")
            for of, folder in (("", run / "eval"), (" of the average", run / "eval" / "average"))
            if (file := folder / f"{probe}.json").is_file()
        ]
        if (dense := run / "eval" / "dense.json").is_file():
            accuracies += _dense(dense).items()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=str(run), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in [*main_results(summary).items(), *accuracies]:
        table.add_row(*row)
    for name in ("reconstruction", "loss_curve"):
        if name in summary:
            table.add_row(name.replace("_", " "), str(summary[name]))
    for exported in sorted((run / "export").glob("*.safetensors")):
        table.add_row("exported model", str(exported))
    if (run / "report.html").is_file():
        table.add_row("report", str(run / "report.html"))
    Console().print(table)
    return 0
