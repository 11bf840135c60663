"""Prints a forecast as tables."""

import math

from rich.console import Console
from rich.table import Table

from mae.plan.forecast import MEMORY_RESERVE, Forecast
from mae.sam.encoder import SIZES
from mae.sam.flops import sam_flops
from mae.train.schedule import describe_split

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
        f"{_giga(cost.flops)} by formula, of the published model: images/s, time and price follow from it. As computed "
        f"here {_giga(cost.executed)} by formula, {_giga(cost.kept.flops)} by torch's counter, "
        f"{_giga(cost.recomputed.flops)} with recompute, which takes longer in proportion",
    )
    if cost.update:
        share = cost.update / (cost.update + cost.flops * forecast.global_batch)
        table.add_row("Muon", f"{_giga(cost.update)} FLOPs an update, shared by all devices: {share:.1%} of a step")
    sizes = (forecast.global_batch, forecast.micro_batch, forecast.ranks, forecast.accumulate)
    table.add_row("batch", describe_split(*sizes, "devices"))
    source = "measured by a matrix product" if hardware.measured else "data sheet"
    table.add_row(
        "device",
        f"{forecast.ranks} x {hardware.name}: {hardware.flops / 1e12:,.4g} TFLOP/s ({source}), "
        f"{hardware.memory / GIB:.0f} GiB; {forecast.precision}, {forecast.mfu:.0%} of the peak",
    )
    if forecast.ranks > 1:
        between = f", {forecast.network / 1e9:,.3g} GB/s to another" if forecast.ranks > forecast.node else ""
        table.add_row("network", f"{hardware.link / 1e9:,.3g} GB/s from a device to the next in a node{between}")
    table.add_row("recommended", _recommended(forecast))
    if forecast.sampling is not None:
        table.add_row("sampling", forecast.sampling)
    if forecast.images is None:
        table.add_row("length", "unknown without data: set data.path, or plan.samples to the number of training images")
    else:
        compute = forecast.images * cost.flops
        table.add_row("length", f"{forecast.images:,} images seen, {compute:.3g} FLOP")
    table.add_row("data", _data(forecast))
    table.add_row("disk", _disk(forecast))
    return table


def _recommended(forecast: Forecast) -> str:
    """Returns the fastest layout that fits, as settings."""
    best = forecast.recommended
    if best is None:
        return "nothing fits: a smaller model, smaller images, or devices of more memory"
    words = [f"micro_batch={best.micro_batch}", f"blocks.recompute={'all' if best.recompute else 'none'}"]
    words = words if forecast.ranks == 1 else [f"trainer.strategy={best.strategy.lower()}", *words]
    hours = forecast.hours(best)
    time = "" if hours is None else f", {duration(hours)}"
    return f"{' '.join(words)}: {_number(best.images_per_s)} images/s{time}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.5g} G"


def _data(forecast: Forecast) -> str:
    """Returns the rate at which each node has to load images, beside that of the loader."""
    fastest = max(forecast.layouts, key=lambda layout: layout.images_per_s)
    rate = forecast.budget(fastest)["node_images_per_s"]
    assert rate is not None
    size = forecast.image_bytes
    read = f", {rate * size / 1e6:,.3g} MB/s" if size else ""
    node = "this device" if forecast.ranks == 1 else f"each node of {forecast.node} devices"
    needed = f"{node} needs {_number(rate)} images/s{read}"
    if forecast.loading is None:
        return f"{needed}; what the loader does is measured where data.path is a folder on this machine"
    cores = math.ceil(rate / forecast.loading)
    return (
        f"{needed}; the loader does {_number(forecast.loading)} on one core of this machine: {cores:,} "
        f"core{'s' if cores > 1 else ''} (data.workers of all its ranks)"
    )


def _disk(forecast: Forecast) -> str:
    shards = "" if forecast.shards is None else f"{forecast.shards:,} shards"
    shards += "" if forecast.shard_bytes is None else f" of {forecast.shard_bytes / GIB:,.3g} GiB in all"
    shards += "; " if shards else ""
    each = forecast.cost.checkpoint_bytes / GIB
    kept = f"{shards}{forecast.checkpoints} checkpoints of {each:.3g} GiB (one of them being written)"
    if forecast.saving is None:
        return f"{kept}; nothing can be written where the run will be"
    return f"{kept}; {forecast.saving:.2g} s to write one on this machine, from a copy in the memory of rank 0's host"


def _layouts(forecast: Forecast) -> Table:
    """Returns memory and speed, a column per strategy and per activation checkpointing or not."""
    table = Table(title=f"each device, GiB at micro-batch {forecast.micro_batch}", title_justify="left")
    table.add_column("")
    for layout in forecast.layouts:
        table.add_column(f"{layout.strategy}\n{'recompute' if layout.recompute else ''}", justify="right")
    frozen = ("frozen",) if forecast.cost.frozen else ()
    for part in ("weights", "gradients", "optimiser", "average", *frozen, "gathered", "activations"):
        table.add_row(part, *(f"{getattr(layout, part) / GIB:.2f}" for layout in forecast.layouts))
    room = forecast.hardware.memory * (1 - MEMORY_RESERVE)
    table.add_row("total", *(f"{x.total / GIB:.2f}{'' if x.total <= room else ', too much'}" for x in forecast.layouts))
    table.add_section()
    table.add_row("largest micro-batch", *(f"{layout.largest_micro_batch:,}" for layout in forecast.layouts))
    if forecast.ranks > 1:
        table.add_row("waiting for others", *(f"{layout.waiting:.0%}" for layout in forecast.layouts))
    table.add_row("images/s, all devices", *(_number(layout.images_per_s) for layout in forecast.layouts))
    budgets = [forecast.budget(layout) for layout in forecast.layouts]
    rows = {
        "time": ("hours", duration),
        f"{_unit(forecast)}-hours": ("device_hours", _number),
        "price": ("price", _number),
    }
    for title, (name, form) in rows.items():
        values = [budget[name] for budget in budgets]
        if None not in values:
            table.add_row(title, *(form(value) for value in values if value is not None))
    return table


def _unit(forecast: Forecast) -> str:
    return "GPU" if forecast.hardware.kind == "cuda" else "device"


def duration(hours: float) -> str:
    """Returns a length of time in its two largest units: 12 d 4 h, 7 h 40 min, 12 min, 40 s."""
    minutes = round(hours * 60)
    if hours * 60 < 2:
        return f"{max(1, round(hours * 3600))} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(hours) // 24:,} d {round(hours) % 24} h"


def _remarks(forecast: Forecast) -> list[str]:
    lines = [
        f"recompute: activation checkpointing of all blocks. {MEMORY_RESERVE:.0%} of the memory stay free for "
        "libraries and gaps between allocations. Time and price hold if the data keeps up, and leave out validation "
        f"and interruptions; {forecast.mfu:.0%} of the peak is plan.mfu, not a measurement."
    ]
    if half := forecast.hardware.half:
        lines.append(
            f"{forecast.hardware.name} does not multiply bfloat16, so that precision=auto is 32-true there. "
            f"precision=16-mixed has a peak of {half / 1e12:,.4g} TFLOP/s in place of "
            f"{forecast.hardware.flops / 1e12:,.4g}: plan it beside this."
        )
    if forecast.cost.taken is not None:
        lines.append(forecast.cost.taken)
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
