"""Figures of the numbers of probes."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"trained": "tab:blue", "untrained": "tab:grey"}


def draw_losses_over_ratio(
    losses: dict[str, dict[str, float]], baselines: dict[str, dict[str, float]], path: Path
) -> Path:
    """Plots the loss of each model over the mask ratio, with those of trivial predictors.

    losses  model -> ratio -> loss;  baselines  ratio -> predictor -> loss
    """
    figure = Figure(figsize=(6.5, 4.5), dpi=120, layout="constrained")
    plot_losses(figure.add_subplot(), losses, baselines)
    figure.savefig(path)
    return path


def plot_losses(axes: Axes, losses: dict[str, dict[str, float]], baselines: dict[str, dict[str, float]]) -> None:
    ratios = [float(ratio) for ratio in baselines]
    for name, by_ratio in losses.items():
        colour = COLOURS[name]
        axes.plot(ratios, list(by_ratio.values()), color=colour, marker="o", markersize=4, label=name)
    for number, name in enumerate(next(iter(baselines.values()))):
        values = [by_name[name] for by_name in baselines.values()]
        axes.plot(ratios, values, color="grey", linestyle=("--", ":", "-.")[number % 3], linewidth=1, label=name)
    axes.set(xlabel="share of hidden patches", ylabel="loss on hidden patches", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_suite(
    accuracies: dict[str, dict[str, float]],
    losses: dict[str, dict[str, float]],
    baselines: dict[str, dict[str, float]],
    title: str,
    path: Path,
) -> Path:
    """Plots accuracies of trained and untrained encoder side by side, and the loss over the mask ratio.

    accuracies  probe -> model -> share; either may be empty
    """
    panels = bool(accuracies) + bool(losses)
    figure = Figure(figsize=(5.5 * panels, 4.5), dpi=120, layout="constrained")
    figure.suptitle(title)
    if accuracies:
        axes = figure.add_subplot(1, panels, 1)
        for offset, (model, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
            values = [by_model[model] * 100 for by_model in accuracies.values()]
            places = [number + offset for number in range(len(values))]
            axes.bar_label(axes.bar(places, values, 0.38, color=colour, label=model), fmt="%.1f", fontsize="small")
        axes.set(ylabel="top-1 accuracy, %", ylim=(0, 105), xticks=range(len(accuracies)))
        axes.set_xticklabels(accuracies)
        axes.legend(fontsize="small", loc="upper left", ncols=2)
    if losses:
        plot_losses(figure.add_subplot(1, panels, panels), losses, baselines)
    figure.savefig(path)
    return path
