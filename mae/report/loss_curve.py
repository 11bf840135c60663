"""Loss curve of a run as a picture, for a look without the report."""

from pathlib import Path

from matplotlib.figure import Figure

from mae.run.metrics import read_metrics


def draw_loss_curve(run: Path, baselines: dict[str, float], loss: str = "loss on hidden patches") -> Path:
    """Draws training and validation loss over steps, with the baselines as lines, to loss.png in the run folder."""
    rows = read_metrics(run / "metrics.csv")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("train/loss", "tab:blue"), ("val/loss", "tab:orange")):
        points = [(int(row["step"]), float(row[name])) for row in rows if name in row]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), color=colour, label=name, marker=marker, markersize=3, linewidth=1)
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
