"""A plan as tables on the screen."""

from rich.console import Console
from rich.table import Table

from mae.plan.forecast import RESERVE, Forecast
from mae.sam.encoder import SIZES
from mae.sam.flops import sam_flops

GIB = 2**30


def show_forecast(plan: Forecast, title: str) -> None:
    """Prints what the run would take."""
    console = Console()
    console.print(_numbers(plan, title))
    console.print(_layouts(plan))
    for line in _remarks(plan):
        console.print(line)


def _numbers(plan: Forecast, title: str) -> Table:
    table = Table(title=f"plan of {title}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    work, hardware = plan.work, plan.hardware
    parts = ", ".join(f"{part} {count:,}" for part, count in work.parameters.items())
    table.add_row("parameters", f"{sum(work.parameters.values()):,}: {parts}")
    table.add_row(
        "FLOPs per image and step",
        f"{_giga(work.flops)} by formula; as computed here {_giga(work.executed)} by formula, {_giga(work.kept.flops)} "
        f"by torch's counter, {_giga(work.recomputed.flops)} with recompute",
    )
    batch = plan.micro_batch * plan.ranks * plan.accumulate
    table.add_row("batch", f"{batch:,} = {plan.micro_batch} x {plan.ranks} devices x {plan.accumulate} accumulated")
    source = "measured by a matrix product" if hardware.measured else "data sheet"
    table.add_row(
        "device",
        f"{plan.ranks} x {hardware.name}: {hardware.flops / 1e12:,.4g} TFLOP/s ({source}), "
        f"{hardware.memory / GIB:.0f} GiB; {plan.precision}, {plan.mfu:.0%} of the peak",
    )
    if plan.images is None:
        table.add_row("length", "unknown without data: set data.path, or plan.samples to the number of training images")
    else:
        compute = plan.images * work.flops
        table.add_row("length", f"{plan.images:,} images seen, {compute:.3g} FLOP")
    table.add_row("disk", _disk(plan))
    return table


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.5g} G"


def _disk(plan: Forecast) -> str:
    stored = plan.stored
    shards = "" if stored.shards is None else f"{stored.shards:,} shards"
    shards += "" if stored.shard_bytes is None else f" of {stored.shard_bytes / GIB:,.3g} GiB in all"
    shards += "; " if shards else ""
    each = stored.checkpoint_bytes / GIB
    return f"{shards}{stored.checkpoints} checkpoints of {each:.3g} GiB (one of them while it is written)"


def _layouts(plan: Forecast) -> Table:
    """A column for every strategy."""
    table = Table(title=f"each device, GiB at micro-batch {plan.micro_batch}", title_justify="left")
    table.add_column("")
    for layout in plan.layouts:
        table.add_column(f"{layout.strategy}\n{'recompute' if layout.recompute else ''}", justify="right")
    for part in ("weights", "gradients", "optimiser", "gathered", "activations"):
        table.add_row(part, *(f"{getattr(layout, part) / GIB:.2f}" for layout in plan.layouts))
    room = plan.hardware.memory * (1 - RESERVE)
    table.add_row("total", *(f"{x.total / GIB:.2f}{'' if x.total <= room else ', too much'}" for x in plan.layouts))
    table.add_section()
    table.add_row("largest micro-batch", *(f"{layout.largest_micro_batch:,}" for layout in plan.layouts))
    table.add_row("images/s, all devices", *(_number(layout.images_per_s) for layout in plan.layouts))
    days = [plan.days(layout) for layout in plan.layouts]
    if plan.images is not None:
        table.add_row("days", *(_number(value) for value in days if value is not None))
    return table


def _remarks(plan: Forecast) -> list[str]:
    lines = [
        f"recompute: blocks keep their input only and are computed again in the backward pass. {RESERVE:.0%} of the "
        "memory stay free for libraries and for gaps between allocations; the data is assumed to keep up."
    ]
    if "neck" in plan.work.parameters:
        huge = SIZES["sam_huge"]
        lines.append(
            "SAM-H at 1024 x 1024 is often quoted with about 180 GFLOPs, which is the order of a plain ViT-H at 224. "
            f"Its image encoder makes {sam_flops(huge, pad=True) / 2e12:.2f} T multiply-adds, two FLOPs each, forward "
            f"in segment-anything, and {sam_flops(huge) / 2e12:.2f} T here, where padded tokens are not projected."
        )
    return lines


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
