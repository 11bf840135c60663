"""Prints a forecast as tables."""

from rich.console import Console
from rich.table import Table

from mae.plan.forecast import MEMORY_RESERVE, Forecast
from mae.sam.encoder import SIZES
from mae.sam.flops import sam_flops

GIB = 2**30


def show_forecast(forecast: Forecast, title: str) -> None:
    """Prints the forecast of the run with this name."""
    console = Console()
    console.print(_numbers(forecast, title))
    console.print(_layouts(forecast))
    for line in _remarks(forecast):
        console.print(line)


def _numbers(forecast: Forecast, title: str) -> Table:
    table = Table(title=f"plan of {title}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    cost, hardware = forecast.cost, forecast.hardware
    parts = ", ".join(f"{part} {count:,}" for part, count in cost.parameters.items())
    table.add_row("parameters", f"{sum(cost.parameters.values()):,}: {parts}")
    table.add_row(
        "FLOPs per image and step",
        f"{_giga(cost.flops)} by formula; as computed here {_giga(cost.executed)} by formula, {_giga(cost.kept.flops)} "
        f"by torch's counter, {_giga(cost.recomputed.flops)} with recompute",
    )
    batch = forecast.micro_batch * forecast.ranks * forecast.accumulate
    table.add_row(
        "batch", f"{batch:,} = {forecast.micro_batch} x {forecast.ranks} devices x {forecast.accumulate} accumulated"
    )
    source = "measured by a matrix product" if hardware.measured else "data sheet"
    table.add_row(
        "device",
        f"{forecast.ranks} x {hardware.name}: {hardware.flops / 1e12:,.4g} TFLOP/s ({source}), "
        f"{hardware.memory / GIB:.0f} GiB; {forecast.precision}, {forecast.mfu:.0%} of the peak",
    )
    if forecast.images is None:
        table.add_row("length", "unknown without data: set data.path, or plan.samples to the number of training images")
    else:
        compute = forecast.images * cost.flops
        table.add_row("length", f"{forecast.images:,} images seen, {compute:.3g} FLOP")
    table.add_row("disk", _disk(forecast))
    return table


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.5g} G"


def _disk(forecast: Forecast) -> str:
    shards = "" if forecast.shards is None else f"{forecast.shards:,} shards"
    shards += "" if forecast.shard_bytes is None else f" of {forecast.shard_bytes / GIB:,.3g} GiB in all"
    shards += "; " if shards else ""
    each = forecast.checkpoint_bytes / GIB
    return f"{shards}{forecast.checkpoints} checkpoints of {each:.3g} GiB (one of them being written)"


def _layouts(forecast: Forecast) -> Table:
    """Returns memory and speed, a column per strategy and per activation checkpointing or not."""
    table = Table(title=f"each device, GiB at micro-batch {forecast.micro_batch}", title_justify="left")
    table.add_column("")
    for layout in forecast.layouts:
        table.add_column(f"{layout.strategy}\n{'recompute' if layout.recompute else ''}", justify="right")
    for part in ("weights", "gradients", "optimiser", "gathered", "activations"):
        table.add_row(part, *(f"{getattr(layout, part) / GIB:.2f}" for layout in forecast.layouts))
    room = forecast.hardware.memory * (1 - MEMORY_RESERVE)
    table.add_row("total", *(f"{x.total / GIB:.2f}{'' if x.total <= room else ', too much'}" for x in forecast.layouts))
    table.add_section()
    table.add_row("largest micro-batch", *(f"{layout.largest_micro_batch:,}" for layout in forecast.layouts))
    table.add_row("images/s, all devices", *(_number(layout.images_per_s) for layout in forecast.layouts))
    days = [forecast.days(layout) for layout in forecast.layouts]
    if forecast.images is not None:
        table.add_row("days", *(_number(value) for value in days if value is not None))
    return table


def _remarks(forecast: Forecast) -> list[str]:
    lines = [
        f"recompute: activation checkpointing of all blocks. {MEMORY_RESERVE:.0%} of the memory stay free for "
        "libraries and gaps between allocations; the data is assumed to keep up."
    ]
    if "neck" in forecast.cost.parameters:
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
