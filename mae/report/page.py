"""Puts the report together: one HTML file with everything in it."""

from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mae.atomic import write_atomically
from mae.errors import ConfigError
from mae.report.axes import number
from mae.report.charts import feature_charts, training_charts
from mae.report.gather import Run, differences, evaluations, gather
from mae.report.run_pictures import attention, reconstructions

LISTED = 100  # bad samples


class Figure(NamedTuple):
    """A number at the top of the page."""

    name: str
    value: str
    note: str = ""


def write_report(paths: list[Path], out: Path | None, *, with_attention: bool = True) -> Path:
    """Writes the report of some runs and returns the file, by default report.html in the first of the folders.

    Raises ConfigError when a folder is no run, a file in it is damaged, or the report cannot be written.
    """
    runs = gather(paths)
    out = out or paths[0] / "report.html"
    page = render(runs, with_attention=with_attention)
    try:
        with write_atomically(out) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}). Choose another place with --out") from error
    return out


def render(runs: list[Run], *, with_attention: bool) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("mae.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    here = files("mae.report")
    return environment.get_template("page.html").render(
        style=Markup(here.joinpath("page.css").read_text()),
        script=Markup(here.joinpath("page.js").read_text()),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=[described(run, len(runs), with_attention) for run in runs],
        differences=differences(runs),
        training=training_charts(runs),
        features=feature_charts(runs),
        listed=LISTED,
    )


def described(run: Run, runs: int, with_attention: bool) -> dict[str, Any]:
    """One run as the template wants it."""
    return {
        "run": run,
        "since": since(run),
        "figures": key_figures(run),
        "evaluations": evaluations(run),
        "recipe": recipe(run),
        "environment": machine(run),
        "made": [path.relative_to(run.path) for folder in ("checkpoints", "export") for path in run.files(folder)],
        "reconstructions": reconstructions(run, runs),
        "attention": attention(run) if with_attention else None,
    }


def key_figures(run: Run) -> list[Figure]:
    """The numbers to see first; those that the run has."""
    figures = []
    floors = run.summary.get("floors")
    floor = f"trivial predictors reach {min(floors.values()):.4f}" if floors else ""
    for name, title in (("val/loss", "validation loss"), ("train/loss", "training loss")):
        if (value := run.latest(name)) is not None:
            figures.append(Figure(title, f"{value:.4f}", floor))
            floor = ""
    for name, title in (
        ("val/top1", "top-1"),
        ("val/miou", "mean IoU"),
        ("linear/top1", "linear probe"),
        ("knn/top1", "nearest neighbours"),
    ):
        if (value := run.latest(name)) is not None:
            figures.append(Figure(title, f"{value:.1%}"))
    for name, title, form in (("images_per_s", "images per second", "{:,.0f}"), ("mfu", "MFU", "{:.0%}")):
        if values := run.metrics.get(f"perf/{name}"):
            figures.append(Figure(title, form.format(median(values.values())), "median"))
    if (memory := run.latest("perf/memory_gb")) is not None:
        figures.append(Figure("memory", f"{memory:.3g} GB", "at most, on rank 0"))
    return figures


def since(run: Run) -> str:
    """When it began, and where it had to go on."""
    if not run.starts:
        return ""
    began = f"started {run.starts[0]['time'][:16].replace('T', ' ')} UTC"
    steps = ", ".join(f"{step:,}" for step in run.restarts)
    return f"{began}, restarted at step{'s' if len(run.restarts) > 1 else ''} {steps}" if steps else began


def recipe(run: Run) -> list[tuple[str, str]]:
    """What the run does, as its start-up table says it."""
    plan = run.derived
    if not plan:
        return []
    data = plan["data"]
    batch = f"{plan['micro_batch']} x {plan['ranks']} ranks x {plan['accumulate']} accumulated"
    return [
        ("images", f"{plan['samples']:,} for training"),
        ("data fingerprint", data["fingerprint"]),
        ("order of the images", ", ".join(f"{name} {data[name]}" for name in ("order_version", "window", "lanes"))),
        *plan["model"].items(),
        ("batch", f"{plan['global_batch']} = {batch}"),
        ("steps", f"{plan['total_steps']:,} = {plan['epochs']:.4g} epochs; {plan['warmup_steps']:,} of warm-up"),
        ("learning rate", f"{plan['peak_lr']:.3g} at its peak"),
        ("precision", plan["precision"]),
    ]


def machine(run: Run) -> list[tuple[str, str]]:
    """Where the run was started last, and with what."""
    found = run.environment
    if not found:
        return []
    return [
        ("GPUs", ", ".join(found["gpus"]) or "none"),
        ("processors", f"{found['cpus']}, of which torch used {found['threads']}"),
        ("platform", found["platform"]),
        ("Python", found["python"]),
        *found["packages"].items(),
    ]
