"""Loss curve of a run as a picture, for a look without the report."""

from pathlib import Path

from matplotlib.figure import Figure

from mae.run.metrics import by_name, not_finite_since, read_metrics


def draw_loss_curve(run: Path, baselines: dict[str, float], loss: str = "loss on hidden patches") -> Path:
    """Draws training and validation loss over steps, with the baselines as lines, to loss.png in the run folder."""
    series = by_name(read_metrics(run / "metrics.csv"))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("train/loss", "tab:blue"), ("val/loss", "tab:orange")):
        if points := series.get(name):
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points.items(), strict=True), color=colour, label=name, marker=marker, ms=3, lw=1)
            if (since := not_finite_since(points)) is not None:
                axes.axvline(since, color="tab:red", lw=1, label=f"{name} not finite since step {since:,}")
    for number, (name, value) in enumerate(baselines.items()):
        axes.axhline(
            value, color="grey", linestyle=("--", ":", "-.")[number % 3], linewidth=1, label=f"{name}: {value:.3f}"
        )
    axes.set(xlabel="step", ylabel=loss, title=run.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path = run / "loss.png"
    figure.savefig(path)
    return path
