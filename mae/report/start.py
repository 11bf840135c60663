"""Table at the start of a run: what follows from its recipe, its data and the number of ranks."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mae.train.schedule import describe_split

NO_RULE = ("images", "probabilities")  # of what is stored about data.sampling


def show_start(
    run: Path,
    derived: dict[str, Any],
    *,
    recipe: str | None,
    image_size: tuple[int, int],
    data: str | list[str],
    shards: int,
    validation: int,
    checkpoint: Path | None,
    start_step: int,
    init_from: str | None,
    ranks: str,
    saving: str,
    rate_change: str | None = None,
) -> None:
    """Prints the table.

    derived                 contents of derived.json
    recipe                  name of the recipe, if one was chosen
    image_size              height and width
    data                    place of the training images
    shards                  of the training images
    validation              number of images
    checkpoint, start_step  to resume from; None and 0 for a fresh start
    ranks                   nodes, ranks on each, and who started them
    saving                  size of a checkpoint, how often, how long one takes
    rate_change             of a run that resumes with another length
    """
    weights = f"warm start from {init_from} (init_from)" if init_from is not None else "random initialisation"
    if checkpoint is not None:
        weights = f"resumed at step {start_step:,} from {checkpoint}"
    table = Table(title=run.name, title_style="bold", title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    table.add_row("recipe", recipe or "none")
    table.add_row("data", data if isinstance(data, str) else ", ".join(data))
    table.add_row("image size", "{} x {} pixels".format(*image_size))
    sampling, images = derived["data"].get("sampling"), derived["data"]["samples"]
    table.add_row("images", f"{images:,} for training in {shards} shards, {validation:,} for validation")
    if sampling:
        table.add_row("sampling", describe_sampling(sampling, images))
    table.add_row("pass over the images", f"{derived['steps_per_pass']:,} steps")
    for row in recipe_rows(derived):
        table.add_row(*row)
    if rate_change is not None:
        table.add_row("rate on resuming", rate_change)
    table.add_row("weights", weights)
    table.add_row("checkpoints", saving)
    table.add_row("ranks", ranks)
    table.add_row("run folder", str(run))
    Console().print(table)


def describe_sampling(sampling: dict[str, Any], images: int) -> str:
    """Returns how many of the training images an epoch shows, and by which rule.

    sampling  as in derived.json: the rule, and "images", their number
    """
    rule = ", ".join(f"{name}={str(value).lower()}" for name, value in sampling.items() if name not in NO_RULE)
    return f"{sampling['images']:,} of {images:,} images in each epoch ({rule})"


def recipe_rows(derived: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the rows that the start table and the report share."""
    batch, peak, views = derived["global_batch"], derived["peak_lr"], derived.get("views", 1)
    parts = describe_split(batch, derived["micro_batch"], derived["ranks"], derived["accumulate"])
    length = f"{derived['epochs']:.4g} epochs" + (f", each of {views} crops of an image counted" if views > 1 else "")
    return [
        *derived["model"].items(),
        ("batch", parts),
        ("steps", f"{derived['total_steps']:,} = {length}; {derived['warmup_steps']:,} of warm-up"),
        ("learning rate", f"{peak:.3g} = {peak * 256 / batch:.3g} x {batch} / 256{_then(derived)}"),
        *((("branch", derived["branch"]),) if "branch" in derived else ()),
        ("precision", derived["precision"]),
    ]


def _then(derived: dict[str, Any]) -> str:
    """Returns what becomes of the peak rate; nothing for a run older than the choice."""
    end, steps = f"down to {derived['min_lr']:.3g}", derived["total_steps"]
    cooldown = derived.get("cooldown_steps", 0)
    falls = {
        "cosine": f", half a cosine {end}",
        "linear": f", linearly {end}",
        "wsd": f", constant to step {steps - cooldown:,}, then {cooldown:,} steps of cool-down {end}",
        "steps": "".join(f", a tenth after step {share * steps:,.0f}" for share in derived.get("milestones", ())),
    }
    return falls.get(derived.get("shape", ""), "")
