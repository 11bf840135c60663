"""suggest=true: a recipe of the user's own, derived once from images, devices and hours. Nothing is trained.

1 given   what the command line sets stays as it is
2 look    number, size and channels of the images; what a core loads; what a step takes
3 derive  mae/plan/suggestion.py
4 write   recipes/experiment/NAME.yaml, which experiment=NAME finds like those of conf/experiment
"""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.errors import DataError
from data.index.splits import NAMES
from data.inspect.survey import Survey, find
from data.order.samplers import spread
from data.parallel import cores
from data.rate import loading_rate
from data.storage.credentials import hide
from mae.atomic import write_atomically
from mae.distributed.launch import Topology, resolve_devices
from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.flops import pretraining_flops
from mae.plan.devices import Hardware, find_hardware, planned_precision
from mae.plan.forecast import layout
from mae.plan.step_rate import step_rate
from mae.plan.suggestion import SIZES, Facts, Size, Suggestion, derive, image_shape
from mae.plan.tables import duration
from mae.plan.training_cost import pretraining_cost
from mae.report.summary import interpreter
from tasks.config import plain_settings
from tasks.task import read_settings, task_class
from tasks.words import CONF, GROUPS, setting

FOLDER = Path("recipes") / "experiment"  # hydra.searchpath of conf/train.yaml names it
LOOKED_AT, DECODED = 256, 32  # images
# What the command line says of this start or this machine, and no recipe.
NOT_RECIPE = ("suggest", "plan", "trainer", "logger", "launcher", "runs", "resume", "overwrite", "trial", "profile")
DERIVED = ("epochs", "max_steps", "micro_batch")  # the hours and the devices decide these


def suggest(raw: DictConfig, hydra: Any) -> None:
    """Derives a recipe, writes it and says why. Raises ConfigError if it cannot be derived, or if the file exists."""
    topology = Topology.from_environment()
    if topology is not None and topology.rank != 0:
        return
    given = {word.partition("=")[0].lstrip("+~"): word for word in hydra.overrides.task}
    base = _compose(given, hydra)
    refuse_contradictions(base, given)
    settings = plain_settings(base)
    data, own_data, survey = _open_images(settings["data"], given)
    name = str(base.name) if "name" in given else default_name(data.config)
    file = FOLDER / f"{name}.yaml"
    for taken in (file, CONF / "experiment" / file.name):
        if taken.exists():
            raise ConfigError(f"{taken} is there already, and experiment={name} means it: choose another name=")

    plan, stated = settings["plan"], {key: OmegaConf.select(base, key) for key in given if key.startswith("model.")}
    devices = settings["trainer"].get("devices", 1)
    ranks = plan["gpus"] or (topology.ranks if topology else resolve_devices(devices))
    memory, tflops = plan["memory"], plan["tflops"]
    precision = planned_precision(settings["precision"], plan["gpu"], memory is not None and tflops is not None)
    hardware = find_hardware(plan["gpu"], precision, memory, tflops)
    loading = loading_rate(data) if plan["gpu"] is None else None
    facts = Facts(
        images=len(data.order),
        shorter_side=_median(survey),
        ranks=ranks,
        # A product that is measured on a busy machine may be slower than a step.
        peak=ranks * hardware.flops * (2 if hardware.measured else 1),
        hours=settings["suggest"]["hours"],
        val_images=0 if data.val_index is None else len(data.val_index),
        sizes=(hydra.runtime.choices["model"],) if "model" in given else tuple(SIZES),
        image_size=stated.get("model.image_size"),
        global_batch=base.global_batch if "global_batch" in given else None,
    )
    build = partial(_build, channels=len(data.config.mean), stated=stated)
    rate = partial(_rate, hardware=hardware, ranks=ranks, precision=precision, mfu=plan["mfu"], loading=loading)
    suggestion = derive(facts, build, partial(rate, measure=plan["gpu"] is None))
    micro_batch = choose_micro_batch(suggestion, hardware, ranks, precision)
    recipe = {"name": name, "seed": 0, **suggestion.settings, "micro_batch": micro_batch}
    recipe["data"] = {"path": data.config.path, "val_path": data.config.val_path, **own_data, **recipe["data"]}
    _add_given(recipe, base, given)
    _check(base, recipe, ranks)

    machine = f"{ranks} x {hardware.name}" if hardware.kind == "cuda" else f"{cores()} CPU cores"
    about = f"{facts.images:,} images of {data.config.path}, {machine}, {facts.hours:g} hours"
    _write(file, recipe, suggestion, [*_groups(given, hydra, suggestion)], hide(about))
    _show(suggestion, file, hide(about), loading)
    kept = [word for key, word in given.items() if key.partition(".")[0] in ("trainer", "logger", "runs")]
    start = shlex.join([sys.argv[0], setting("experiment", name), *kept])
    mfu = min(1.0, suggestion.images_per_s * pretraining_flops(suggestion.config) / (ranks * hardware.flops))
    print(f"start       {interpreter()} {start}")
    print(f"plan        {interpreter()} {start} plan=true plan.mfu={max(mfu, 0.001):.2g}")


def _compose(given: dict[str, str], hydra: Any) -> DictConfig:
    """Returns the settings without a recipe, under those that are given."""
    words = [word if key in GROUPS else f"++{word.lstrip('+')}" for key, word in given.items()]
    words += [] if "data" in given else ["data=shards"]
    loader = GlobalHydra.instance().config_loader()
    base = loader.load_configuration(
        hydra.job.config_name, [*hydra.overrides.hydra, *words, "~experiment"], RunMode.RUN
    )
    OmegaConf.set_struct(base, False)
    base.pop("hydra", None)
    return base


def refuse_contradictions(base: DictConfig, given: dict[str, str]) -> None:
    """Raises ConfigError if something that is given contradicts a suggestion, or lacks."""
    if base.suggest.hours is None:
        raise ConfigError("suggest=true needs suggest.hours: how long the training may take, such as suggest.hours=8")
    if base.data.path is None:
        raise ConfigError("suggest=true needs data.path: the folder of your shards, as python -m data.pack writes it")
    if base.data.mode == "stream":
        raise ConfigError("suggest=true counts images, and data.mode=stream has no number: leave it out, or index them")
    if base.task.name != "pretrain":
        raise ConfigError(f"suggest=true writes recipes of pre-training: for task={base.task.name} see docs/recipes.md")
    if "experiment" in given:
        raise ConfigError(f"suggest=true writes a recipe, and {given['experiment']} is one: leave out either")
    if derived := [given[key] for key in DERIVED if key in given]:
        raise ConfigError(f"{derived[0]} follows from suggest.hours and the devices: leave it out, or edit the recipe")
    if not isinstance(size := OmegaConf.select(base, "model.image_size"), int):
        raise ConfigError(f"model.image_size={size}: suggest=true derives square images. Edit the recipe it writes")


def _open_images(stated: dict[str, Any], given: dict[str, str]) -> tuple[ShardDataModule, dict[str, Any], Survey]:
    """Returns the images at the size to train on, settings that their channels and bits need, and what was looked at.

    Raises DataError if none of them can be read.
    """
    config = DataConfig.model_validate(stated)
    data = _module(config, 32)
    index = data.train_index.without_downloads()
    survey = Survey()
    for number, sample in enumerate(spread(len(index), LOOKED_AT).tolist()):
        survey.add(find(sample, partial(index.read, sample), decode=number % (LOOKED_AT // DECODED) == 0))
    if not survey.sides:
        raise DataError(f"none of {survey.read} images of {config.path} can be read: {survey.faults[0][1]}")
    colours, bits = survey.colours(), 16 if 16 in survey.ranges else 8
    own: dict[str, Any] = {}
    chosen = {"data", "data.mean", "data.std", "data.bits"} & given.keys()
    if colours and not chosen and (len(colours[0]) != 3 or bits == 16):
        mean, std = ([float(f"{value:.4g}") for value in values] for values in colours)
        own = {"mean": mean, "std": [max(value, 1e-3) for value in std], "bits": bits}
    return _module(config.model_copy(update=own), image_shape(_median(survey))[0]), own, survey


def _module(config: DataConfig, side: int) -> ShardDataModule:
    channels = len(config.mean)
    return ShardDataModule(
        config, image_size=(side, side), channels=channels, seed=0, global_batch=config.views_per_image,
        micro_batch=config.views_per_image,
    )  # fmt: skip


def _median(survey: Survey) -> int:
    sides = sorted(survey.sides.elements())
    return sides[len(sides) // 2]


def default_name(config: DataConfig) -> str:
    """Returns the name of a recipe for these images: that of their folder."""
    path = config.path[0] if isinstance(config.path, list) else str(config.path)
    parts = [part for part in Path(path).absolute().parts if part != "/"]
    folders = [part for part in parts if not re.search(r"[*?{\[]|\.tar$", part) and part.lower() not in NAMES]
    return re.sub(r"[^\w.+=,@-]", "-", folders[-1]) if folders else "mine"


def _build(size: Size, pixels: int, patch: int, *, channels: int, stated: dict[str, Any]) -> MAEConfig:
    """Returns the architecture of a file of conf/model with its decoder, under what is stated."""
    shared, own = (OmegaConf.load(CONF / "model" / f"{name}.yaml") for name in ("mae", size.name))
    decoder = {f"decoder_{field}": getattr(size, f"decoder_{field}") for field in ("width", "depth", "num_heads")}
    shape = {"image_size": pixels, "patch_size": patch, "in_channels": channels}
    fields: Any = OmegaConf.to_container(OmegaConf.merge(shared, own, decoder, shape))
    fields.pop("defaults", None)
    return MAEConfig.model_validate(fields | {key.removeprefix("model."): value for key, value in stated.items()})


def _rate(
    config: MAEConfig,
    *,
    hardware: Hardware,
    ranks: int,
    precision: str,
    mfu: float,
    loading: float | None,
    measure: bool,
) -> float:
    """Returns images per second of all devices, loading included; of a device that is not here by its data sheet."""
    if not measure:
        return ranks * hardware.flops * mfu / pretraining_flops(config)
    measured = step_rate(config, torch.device(hardware.kind), precision)
    if hardware.kind == "cpu":  # Training and loading share the cores, however many ranks there are.
        return measured if loading is None else 1 / (1 / measured + 1 / (loading * cores()))
    return ranks * measured if loading is None else min(ranks * measured, loading * cores())


def choose_micro_batch(suggestion: Suggestion, hardware: Hardware, ranks: int, precision: str) -> int | None:
    """Returns the largest divisor of a device's share of the batch that fits its memory; None if all of it does."""
    share = suggestion.settings["global_batch"] // ranks
    cost = pretraining_cost(suggestion.config, precision, torch.device(hardware.kind))
    strategy = "one device" if ranks == 1 else "DDP"
    fits = layout(
        strategy, False, cost, hardware, ranks=ranks, micro_batch=share, global_batch=ranks * share, mfu=0.4
    ).largest_micro_batch
    return None if fits >= share else max(size for size in range(1, max(fits, 1) + 1) if share % size == 0)


def _add_given(recipe: dict[str, Any], base: DictConfig, given: dict[str, str]) -> None:
    """Writes settings of the command line into the recipe, but for those of a start or a machine."""
    for key in given:
        if key in GROUPS or key.partition(".")[0] in NOT_RECIPE or key in ("name", "data.path", "data.val_path"):
            continue
        *parents, last = key.split(".")
        node = recipe
        for parent in parents:
            node = node.setdefault(parent, {})
        value = OmegaConf.select(base, key)
        node[last] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _check(base: DictConfig, recipe: dict[str, Any], ranks: int) -> None:
    """Raises ConfigError or ValidationError if a run with this recipe would be refused."""
    config = read_settings(OmegaConf.create(OmegaConf.to_container(OmegaConf.merge(base, recipe))))  # pyright: ignore
    _ = task_class("pretrain")(config, Topology(ranks=ranks, devices=ranks)).schedule


def _groups(given: dict[str, str], hydra: Any, suggestion: Suggestion) -> Iterator[str]:
    yield f"override /model: {suggestion.size}"
    yield f"override /data: {hydra.runtime.choices['data'] if 'data' in given else 'shards'}"
    if "optim" in given:
        yield f"override /optim: {hydra.runtime.choices['optim']}"


def _write(file: Path, recipe: dict[str, Any], suggestion: Suggestion, groups: list[str], about: str) -> None:
    """Writes the recipe, its reasons in comments."""
    comments = [
        f"python train.py experiment={file.stem}",
        f"Suggested on {date.today()} for {about}. Yours to edit. Not yet run.",
        *(f"{what}: {value}; {why}" for what, value, why in suggestion.reasons),
    ]
    lines = [line for comment in comments for line in textwrap.wrap(comment, 117, break_long_words=False)]
    head = ["@package _global_", *lines]
    body = OmegaConf.to_yaml(OmegaConf.create(recipe))
    defaults = "".join(f"  - {group}\n" for group in groups)
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(file) as temporary:
        temporary.write_text("".join(f"# {line}\n" for line in head) + f"defaults:\n{defaults}\n{body}")


def _busy(measured: bool) -> list[str]:
    """Says if other programs took the cores while speed was measured here."""
    load = os.getloadavg()[0] - 1
    if not measured or load < cores():
        return []
    return [
        f"other programs keep this machine busy ({load:.0f} want its {cores()} cores): alone it is faster than "
        "measured. Ask again when it is idle"
    ]


def _show(suggestion: Suggestion, file: Path, about: str, loading: float | None) -> None:
    """Prints the recipe with its reasons, what it is too little for, and the file."""
    table = Table(title=f"suggestion for {about}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for row in suggestion.reasons:
        table.add_row(*row)
    speed = f"{suggestion.images_per_s:,.3g} images/s"
    table.add_row("time", f"about {duration(suggestion.hours)}", speed + (
        f" measured here in steps of the model; one core loads {loading:,.0f}" if loading else ", expected"
    ))  # fmt: skip
    console = Console()
    console.print(table)
    for doubt in (*suggestion.doubts, *_busy(loading is not None)):
        console.print(f"note        {doubt}", soft_wrap=True, markup=False, highlight=False)
    print(f"written     {file}")
