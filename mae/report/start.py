"""What a run will really do, as a table at its start."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mae.train.schedule import Schedule


def show_start(
    run: Path,
    schedule: Schedule,
    model: list[tuple[str, str]],
    *,
    shards: int,
    validation: int,
    base_lr: float,
    precision: str,
    source: str,
) -> None:
    """The derived numbers.

    model       rows about it
    shards      of the training images
    validation  images
    source      where the weights come from
    """
    table = Table(title=run.name, title_style="bold", title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    table.add_row("images", f"{schedule.samples:,} for training in {shards} shards, {validation:,} for validation")
    for row in model:
        table.add_row(*row)
    parts = f"{schedule.micro_batch} x {schedule.ranks} ranks x {schedule.accumulate} accumulated"
    table.add_row("batch", f"{schedule.global_batch} = {parts}")
    crops = f", each of {schedule.views} crops of an image counted" if schedule.views > 1 else ""
    table.add_row(
        "steps", f"{schedule.total_steps:,} = {schedule.epochs:.4g} epochs{crops}; {schedule.warmup_steps:,} of warm-up"
    )
    table.add_row("pass over the images", f"{schedule.steps_per_pass:,} steps")
    table.add_row("learning rate", f"{schedule.peak_lr:.3g} = {base_lr:.3g} x {schedule.global_batch} / 256")
    table.add_row("precision", precision)
    table.add_row("starts from", source)
    table.add_row("run folder", str(run))
    Console().print(table)
