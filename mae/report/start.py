"""Table at the start of a run: what follows from its recipe, its data and the number of ranks."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mae.train.schedule import Schedule


def show_start(
    run: Path,
    schedule: Schedule,
    model: dict[str, str],
    *,
    shards: int,
    validation: int,
    base_lr: float,
    precision: str,
    checkpoint: Path | None,
    start_step: int,
    init_from: str | None,
) -> None:
    """Prints the table.

    model                   rows about it
    shards                  of the training images
    validation              number of images
    checkpoint, start_step  to resume from; None and 0 for a fresh start
    """
    weights = f"warm start from {init_from} (init_from)" if init_from is not None else "random initialisation"
    if checkpoint is not None:
        weights = f"resumed at step {start_step:,} from {checkpoint}"
    table = Table(title=run.name, title_style="bold", title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    table.add_row("images", f"{schedule.samples:,} for training in {shards} shards, {validation:,} for validation")
    for row in model.items():
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
    table.add_row("weights", weights)
    table.add_row("run folder", str(run))
    Console().print(table)
