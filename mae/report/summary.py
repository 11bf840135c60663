"""Results of a finished run, as summary.json and as a few lines: python -m mae.report.summary runs/NAME"""

import json
import shlex
import sys
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from mae.run.checkpoint_files import checkpoint_path
from mae.run.folder import write_json
from mae.run.metrics import read_metrics
from mae.train.schedule import Schedule


def summarise(run: Path, schedule: Schedule, step: int, more: dict[str, Any]) -> dict[str, Any]:
    """Writes summary.json and returns it: last values and median speed from metrics.csv, and `more` of the task.

    step  that the run has reached; a time limit may end it before the last
    """
    rows = read_metrics(run / "metrics.csv")
    latest = {name: float(row[name]) for row in rows for name in row if isfinite(float(row[name]))}
    speed = {
        name: median(float(row[f"perf/{name}"]) for row in rows if f"perf/{name}" in row)
        for name in ("images_per_s", "data_wait", "mfu")
    }
    summary: dict[str, Any] = {
        "name": run.name,
        "step": step,
        "total_steps": schedule.total_steps,
        "epochs": schedule.epochs * step / schedule.total_steps,
        "train/loss": latest["train/loss"],
        "val/loss": latest.get("val/loss"),
        **{name: value for name, value in latest.items() if name.startswith("val/")},
        **speed,
        "memory_gb": latest["perf/memory_gb"],
        "skipped_steps": int(float(latest["guard/skipped"])),
        "checkpoint": str(checkpoint_path(run, step)),
        **more,
    }
    write_json(run / "summary.json", summary)
    return summary


def main_results(summary: dict[str, Any]) -> dict[str, str]:
    """Returns label -> fact: losses, baselines, other validation metrics (shares of 1), speed, checkpoint."""
    validation = f", val {summary['val/loss']:.4f}" if summary["val/loss"] is not None else ""
    results = {"loss": f"train {summary['train/loss']:.4f}{validation}"}
    if "floors" in summary:
        results["baselines"] = ", ".join(f"{name} {value:.4f}" for name, value in summary["floors"].items())
    for name, value in summary.items():
        if name.startswith("val/") and name != "val/loss":
            results[name.removeprefix("val/")] = f"{value:.2%}"
    results["speed"] = f"{summary['images_per_s']:,.0f} images/s, MFU {summary['mfu']:.0%}"
    return results | {"checkpoint": summary["checkpoint"]}


def say_closing(run: Path, summary: dict[str, Any], evaluation: str) -> None:
    """Prints the main results, one label and fact a line, and the commands to run next."""
    report = f"python -m mae.report {shlex.quote(str(run))}"
    for label, fact in (main_results(summary) | {"next": evaluation, "": report}).items():
        print(f"{label:10}  {fact}")


def main() -> int:
    """Prints the results of a finished run as a table, those of its probes beside them."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "summary.json").is_file():
        print("usage: python -m mae.report.summary RUN, a finished run (with a summary.json)", file=sys.stderr)
        return 2
    run = Path(sys.argv[1])
    summary = json.loads((run / "summary.json").read_text())
    table = Table(title=str(run), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in main_results(summary).items():
        table.add_row(*row)
    for probe in ("knn", "linear", "attentive"):
        file = run / "eval" / f"{probe}.json"
        if file.is_file():
            result = json.loads(file.read_text())
            trained, untrained = result["trained"]["top1"], result["untrained"]["top1"]
            table.add_row(f"{probe} accuracy", f"{trained:.1%} trained, {untrained:.1%} untrained")
    for name in ("reconstruction", "loss_curve"):
        if name in summary:
            table.add_row(name.replace("_", " "), summary[name])
    for exported in sorted((run / "export").glob("*.safetensors")):
        table.add_row("exported model", str(exported))
    if (run / "report.html").is_file():
        table.add_row("report", str(run / "report.html"))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
