"""Results of a finished run, as summary.json and as a few lines: python -m mae.report.summary runs/NAME"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from mae.run.checkpoint_files import checkpoint_path
from mae.run.folder import write_json
from mae.run.metrics import by_name, not_finite_since, read_metrics
from mae.train.schedule import Schedule

RANKME_FALL = 0.9  # of its highest value: what is below has fallen, not wavered
PROBE_SHARE = 0.1  # of the time: an online probe that takes more is said
TITLES = {"val/first_iou": "first IoU", "val/last_iou": "last IoU"}  # with the first and last answer to the prompts


def summarise(run: Path, schedule: Schedule, step: int, more: dict[str, Any]) -> dict[str, Any]:
    """Writes summary.json and returns it: last values and median speed from metrics.csv, and `more` of the task.

    step  that the run has reached; a time limit may end it before the last

    A last value that is not finite is null, and "not_finite" has the step since when.
    """
    series = by_name(read_metrics(run / "metrics.csv"))
    latest = {name: value if isfinite(value := values[max(values)]) else None for name, values in series.items()}
    finite = {name: {at: value for at, value in values.items() if isfinite(value)} for name, values in series.items()}
    speed = {name: median(series[f"perf/{name}"].values()) for name in ("images_per_s", "data_wait", "mfu")}
    not_finite = {name: since for name in series if (since := not_finite_since(series[name])) is not None}
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
        "skipped_steps": int(latest["guard/skipped"] or 0),
        "not_finite": not_finite,
        "checkpoint": str(checkpoint_path(run, step)),
        **more,
        "remarks": remarks({name: values for name, values in finite.items() if values}, more.get("floors", {})),
    }
    write_json(run / "summary.json", summary)
    return summary


def main_results(summary: dict[str, Any]) -> dict[str, str]:
    """Returns label -> fact: losses, baselines, other validation metrics (shares of 1), speed, checkpoint."""
    validation = f", val {_score(summary, 'val/loss', '.4f')}" if _has(summary, "val/loss") else ""
    results = {"loss": f"train {_score(summary, 'train/loss', '.4f')}{validation}"}
    if "floors" in summary:
        results["baselines"] = ", ".join(f"{name} {value:.4f}" for name, value in summary["floors"].items())
        if count := summary.get("floor_images"):
            results["baselines"] += f" (on {count:,} image{'s' if count > 1 else ''})"
    for name in summary:
        if name.startswith("val/") and name != "val/loss":
            results[TITLES.get(name, name.removeprefix("val/"))] = _score(summary, name, ".2%")
    results["speed"] = f"{summary['images_per_s']:,.0f} images/s, MFU {summary['mfu']:.0%}"
    if "branch" in summary:
        results["branch"] = f"of {summary['branch']}"
    return results | {"checkpoint": summary["checkpoint"]}


def remarks(metrics: Mapping[str, Mapping[int, float]], baselines: Mapping[str, float]) -> list[str]:
    """Returns a sentence for each thing about a run that its user may not want.

    metrics    name -> step -> value
    baselines  losses of trivial predictors
    """
    said = []
    loss = "val/loss" if "val/loss" in metrics else "train/loss"
    if baselines and loss in metrics:
        name, best = min(baselines.items(), key=lambda entry: entry[1])
        if (value := _last(metrics[loss])) > best:
            said.append(
                f"{loss} ended at {value:.4f}, above the {best:.4f} of {name}: the model paints no better than that. "
                "Train longer, or try another optim.base_lr"
            )
    if ranks := metrics.get("rank/rankme"):
        step = max(ranks, key=lambda step: ranks[step])
        if _last(ranks) < RANKME_FALL * ranks[step]:
            said.append(
                f"RankMe fell from {ranks[step]:.1f} at step {step:,} to {_last(ranks):.1f}: the features use fewer "
                "dimensions than they did. Compare checkpoints with probes before training on"
            )
    if (share := _last(metrics.get("perf/probe_share", {0: 0.0}))) > PROBE_SHARE:
        said.append(
            f"the online probe took {share:.0%} of the time: raise online_probe.every, or lower "
            "online_probe.train_images"
        )
    return said


def _last(values: Mapping[int, float]) -> float:
    return values[max(values)]


def interpreter() -> str:
    """Returns the word that calls this Python from here: `python` if it is that, else its path, quoted."""
    for name in ("python", "python3"):
        if (found := shutil.which(name)) and os.path.abspath(found) == os.path.abspath(sys.executable):
            return name
    inside = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if inside.startswith(os.pardir) else inside)


def _has(summary: dict[str, Any], name: str) -> bool:
    return summary.get(name) is not None or name in summary.get("not_finite", {})


def _score(summary: dict[str, Any], name: str, form: str) -> str:
    """Returns the last value of a metric, or since when it is not finite."""
    if (since := summary.get("not_finite", {}).get(name)) is not None:
        return f"not finite since step {since:,}"
    return format(summary[name], form)


def say_closing(summary: dict[str, Any], pictures: Sequence[Path], next_steps: dict[str, str]) -> None:
    """Prints the main results, one label and fact a line, what is to be noted, and how to go on."""
    lines = [*main_results(summary).items()]
    if there := [str(path) for path in pictures if path.is_file()]:
        lines.append(("pictures", ", ".join(there)))
    lines += [("note", remark) for remark in summary["remarks"]]
    for label, fact in [*lines, *next_steps.items()]:
        print(f"{label:10}  {fact}")


if __name__ == "__main__":
    from mae.report.show_summary import main

    sys.exit(main())
