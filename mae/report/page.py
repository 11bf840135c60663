"""The report as one HTML file with everything in it."""

from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mae.atomic import write_atomically
from mae.errors import ConfigError
from mae.report.axes import number
from mae.report.charts import feature_charts, training_charts
from mae.report.run_pictures import attention_maps, evaluation_pictures, reconstructions
from mae.report.runs import Run, differences, read_runs
from mae.report.start import describe_sampling, recipe_rows
from mae.report.summary import remarks

MAX_LISTED = 100  # bad samples per run


def write_report(paths: list[Path], out: Path | None, *, with_attention: bool = True) -> Path:
    """Writes the report of some runs and returns its path, by default report.html in the first of the folders.

    Raises ConfigError if a folder is no run, a file in it is damaged, or the report cannot be written.
    """
    runs = read_runs(paths)
    out = out or paths[0] / "report.html"
    page = render(runs, with_attention=with_attention)
    try:
        with write_atomically(out) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}). Choose another place with --out") from error
    return out


def render(runs: list[Run], *, with_attention: bool) -> str:
    """Returns the page as text."""
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
        runs=[describe(run, len(runs), with_attention) for run in runs],
        differences=differences(runs),
        training=training_charts(runs),
        features=feature_charts(runs),
        listed=MAX_LISTED,
    )


def describe(run: Run, runs: int, with_attention: bool) -> dict[str, Any]:
    """Returns one of the page's `runs` runs as the template needs it."""
    return {
        "run": run,
        "since": since(run),
        "key_numbers": key_numbers(run),
        "remarks": remarks(run.metrics, run.summary.get("floors", {})),
        "evaluation_pictures": evaluation_pictures(run, runs),
        "recipe": recipe(run),
        "environment": machine(run),
        "made": [path.relative_to(run.path) for folder in ("checkpoints", "export") for path in run.files(folder)],
        "reconstructions": reconstructions(run, runs),
        "attention": attention_maps(run) if with_attention else None,
    }


def key_numbers(run: Run) -> list[tuple[str, str, str]]:
    """Returns the numbers to see first, as far as the run has logged them: name, value, note."""
    numbers = []
    baselines = run.baselines
    note = f"best baseline {min(baselines.values()):.4f}{run.baseline_images}" if baselines else ""
    for name, title in (("val/loss", "validation loss"), ("train/loss", "training loss")):
        if name in run.series:
            numbers.append(_score(run, name, title, "{:.4f}", note))
            note = ""
    for name, title in (
        ("val/top1", "top-1"),
        ("val/first_iou", "mean IoU, first prompt"),
        ("val/last_iou", "mean IoU, last prompt"),
        ("linear/top1", "linear probe"),
        ("knn/top1", "online kNN, of a sample"),
        ("knn_average/top1", "the same of the average weights"),
        ("dense/miou", "online segmentation by neighbours, mean IoU"),
    ):
        if name in run.series:
            numbers.append(_score(run, name, title, "{:.1%}", ""))
    for name, title, form in (("images_per_s", "images per second", "{:,.0f}"), ("mfu", "MFU", "{:.0%}")):
        if values := run.metrics.get(f"perf/{name}"):
            numbers.append((title, form.format(median(values.values())), "median"))
    if (memory := run.latest("perf/memory_gb")) is not None:
        numbers.append(("memory", f"{memory:.3g} GB", "peak, on rank 0"))
    return numbers


def _score(run: Run, name: str, title: str, form: str, note: str) -> tuple[str, str, str]:
    """Returns name, last value and note of a metric; the last finite value becomes the note if it is not the last."""
    since, value = run.not_finite_since(name), run.latest(name)
    if since is None:
        assert value is not None
        return title, form.format(value), note
    before = "" if value is None else f", {form.format(value)} before"
    return title, "not finite", f"since step {since:,}{before}"


def since(run: Run) -> str:
    """Says when the run was started, and at which steps it was resumed."""
    if not run.starts:
        return ""
    began = f"started {run.starts[0]['time'][:16].replace('T', ' ')} UTC"
    steps = ", ".join(f"{step:,}" for step in run.restarts)
    return f"{began}, resumed at step{'s' if len(run.restarts) > 1 else ''} {steps}" if steps else began


def recipe(run: Run) -> list[tuple[str, str]]:
    """Returns what followed from the recipe at the last start."""
    derived = run.derived
    if not derived:
        return []
    data = derived["data"]
    return [
        ("images", f"{data.get('samples', derived['samples']):,} for training"),
        *([("sampling", describe_sampling(sampling, data["samples"]))] if (sampling := data.get("sampling")) else []),
        ("data fingerprint", data["fingerprint"]),
        ("order of the images", ", ".join(f"{name} {data[name]}" for name in ("order_version", "window", "lanes"))),
        *recipe_rows(derived),
    ]


def machine(run: Run) -> list[tuple[str, str]]:
    """Returns rows about the machine and the versions of the last start."""
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
