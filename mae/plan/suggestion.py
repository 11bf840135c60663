"""A recipe for images, devices and hours (suggest=true). Arithmetic on plain numbers, each with its reason.

1 image  size of the images, and of their patches, from the shorter side of half of them
2 model  the most expensive one of SIZES, at that size or half of it, that sees each image MIN_PASSES times
3 batch  so that there are STEPS steps, within limits; the learning rate follows from it
4 length what the hours are enough for, at most MAX_PASSES

Where the numbers come from: small models from the recipes measured in docs/results.md, others from He et al. 2022, who
trained on 1.3 million images for 800 to 1,600 passes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.flops import pretraining_flops

MIN_PASSES, MAX_PASSES = 100, 1600  # over the images
MIN_IMAGES = 100_000  # seen, repetitions counted: fewer teach even a small model little
MIN_TO_TRAIN = 32  # images
STEPS = 20_000
MAX_BATCH = 4096
SPARE = 0.97  # share of the hours for training and validating: the rest draws and saves
START_SECONDS = 20  # of a run, and of its end
VALIDATIONS = 20  # at most; pictures and checkpoints come with them
SECONDS_BETWEEN = 60  # validations, at least
VALIDATION_SHARE = 0.1  # of the time, at most
FORWARD = 0.5  # time of an image that is validated, in images that are trained on: loading is the same, no gradients


class Size(NamedTuple):
    """A file of conf/model with a decoder that suits it.

    images  training images from which it is worth its time
    """

    name: str
    images: int
    decoder_width: int
    decoder_depth: int
    decoder_num_heads: int


SIZES = {
    size.name: size
    for size in (
        Size("vit_mini", 0, 128, 1, 4),
        Size("vit_tiny", 5_000, 192, 2, 6),
        Size("vit_small", 20_000, 256, 4, 8),
        Size("vit_base", 100_000, 512, 8, 16),
        Size("vit_large", 1_000_000, 512, 8, 16),
        Size("vit_huge", 5_000_000, 512, 8, 16),
    )
}
SMALL = ("vit_mini", "vit_tiny")  # sizes whose learning rate is that of the recipes measured here

Build = Callable[[Size, int, int], MAEConfig]  # size, image size, patch size -> architecture
Rate = Callable[[MAEConfig], float]  # architecture -> images per second of all devices, their loading included


class Facts(NamedTuple):
    """What a recipe follows from.

    images        for training
    shorter_side  pixels, median
    ranks         devices
    peak          FLOP/s of all of them, as far as it is known
    hours         that the run may take
    val_images    for validation
    sizes         names in SIZES to choose from
    image_size    of the recipe, if it is given; likewise global_batch and base_lr
    """

    images: int
    shorter_side: int
    ranks: int
    peak: float
    hours: float
    val_images: int = 0
    sizes: tuple[str, ...] = tuple(SIZES)
    image_size: int | None = None
    global_batch: int | None = None


class Suggestion(NamedTuple):
    """A recipe as nested settings, and why it is so.

    size          name of a file of conf/model
    images_per_s  of all devices
    hours         that the run will take
    reasons       (what, value, why)
    doubts        sentences about what these images and hours are too little for
    """

    size: str
    config: MAEConfig
    settings: dict[str, Any]
    images_per_s: float
    hours: float
    reasons: list[tuple[str, str, str]]
    doubts: list[str]


def image_shape(shorter_side: int) -> tuple[int, int]:
    """Returns size and patch size for images with this shorter side, in pixels: nothing is enlarged, 224 is enough."""
    patch = 16 if shorter_side >= 96 else 8 if shorter_side >= 48 else 4
    return max(4 * patch, min(224, shorter_side) // patch * patch), patch


def derive(facts: Facts, build: Build, rate: Rate) -> Suggestion:
    """Derives a recipe. Raises ConfigError if there are too few images to train on."""
    if facts.images < MIN_TO_TRAIN:
        raise ConfigError(
            f"{facts.images} training images are too few to train anything on: start from published weights "
            "(docs/recipes.md), or add images"
        )
    size, config, images_per_s = choose(facts, build, rate)
    seconds = working_seconds(facts)
    validations, validated = plan_validations(facts, seconds, images_per_s)
    passes = min(MAX_PASSES, max(0.0, images_per_s * seconds - validated) / facts.images)
    if passes < 0.01:
        raise ConfigError(f"suggest.hours={facts.hours:g} show {passes:.2%} of the images once: allow more hours")
    epochs = math.floor(passes) if passes >= 20 else math.floor(passes * 10) / 10 if passes >= 1 else round(passes, 2)
    batch = facts.global_batch or choose_batch(facts, epochs, size)
    steps = max(1, round(epochs * (facts.images // batch)))
    peak = min(2.4e-3, 1e-3 * math.sqrt(batch / 32)) if size.name in SMALL else 1.5e-4 * batch / 256
    every = max(1, round(steps / validations))
    per_minute = max(1, round(images_per_s / batch * 60))
    settings = {
        "epochs": epochs,
        "max_steps": None,
        "global_batch": batch,
        "val_every": every,
        "log_every": max(1, min(50, steps // 200)),
        "pictures_every": every,
        "model": {
            "image_size": config.image_size[0],
            "patch_size": config.patch_size,
            "in_channels": config.in_channels,
            "decoder_width": config.decoder_width,
            "decoder_depth": config.decoder_depth,
            "decoder_num_heads": config.decoder_num_heads,
        },
        "optim": {"base_lr": float(f"{peak * 256 / batch:.2g}"), "warmup_epochs": float(f"{epochs * 0.05:.2g}")},
        "data": {"scale": [0.2, 1.0] if config.image_size[0] > 64 else [0.4, 1.0]},
        "checkpoint": {"every_steps": min(every, 10 * per_minute)},
    }
    hours = ((epochs * facts.images + validated) / images_per_s / SPARE + START_SECONDS) / 3600
    return Suggestion(
        size.name,
        config,
        settings,
        images_per_s,
        hours,
        _reasons(facts, size, config, settings, images_per_s, peak),
        _doubts(facts, size, epochs, hours),
    )


def working_seconds(facts: Facts) -> float:
    """Returns the time for training and validating. Raises ConfigError if none is left."""
    seconds = (facts.hours * 3600 - START_SECONDS) * SPARE
    if seconds <= 0:
        raise ConfigError(f"suggest.hours={facts.hours:g} are over before a run has started: allow more hours")
    return seconds


def plan_validations(facts: Facts, seconds: float, images_per_s: float) -> tuple[float, float]:
    """Returns how often to validate, and what that costs in all, in images that are trained on."""
    each = facts.val_images * FORWARD
    affordable = VALIDATION_SHARE * seconds * images_per_s / each if each else math.inf
    times = max(1.0, min(VALIDATIONS, seconds / SECONDS_BETWEEN, affordable))
    return times, times * each


def choose(facts: Facts, build: Build, rate: Rate) -> tuple[Size, MAEConfig, float]:
    """Returns the most expensive model that is fast enough, else the cheapest one, and its images per second."""
    side, patch = image_shape(facts.image_size or facts.shorter_side)
    side = facts.image_size or side
    sides = [side, side // 2] if side >= 14 * patch and facts.image_size is None else [side]
    allowed = [SIZES[name] for name in facts.sizes if facts.images >= SIZES[name].images or len(facts.sizes) == 1]
    found = [(size, build(size, pixels, patch)) for size in allowed for pixels in sides]
    found.sort(key=lambda entry: pretraining_flops(entry[1]), reverse=True)
    wanted = max(MIN_PASSES * facts.images, MIN_IMAGES) / working_seconds(facts)
    for size, config in found[:-1]:
        # What would be too slow at the peak need not be measured.
        if facts.peak / pretraining_flops(config) >= wanted and (images_per_s := rate(config)) >= wanted:
            return size, config, images_per_s
    return *found[-1], rate(found[-1][1])


def choose_batch(facts: Facts, epochs: float, size: Size) -> int:
    """Returns a global batch: a power of two times the devices that gives about STEPS steps."""
    least = 32 if size.name in SMALL else 256
    images = facts.images * epochs
    wanted = min(max(images / STEPS, least), MAX_BATCH, max(facts.images / 8, 1))
    each = 2 ** max(0, math.floor(math.log2(wanted / facts.ranks)))
    return each * facts.ranks


def _reasons(
    facts: Facts, size: Size, config: MAEConfig, settings: dict[str, Any], images_per_s: float, peak: float
) -> list[tuple[str, str, str]]:
    epochs, batch, side = settings["epochs"], settings["global_batch"], config.image_size[0]
    larger = next((other for other in SIZES.values() if other.images > facts.images), None)
    bound = f"{larger.name} wants {larger.images:,} images" if larger else "the largest there is"
    given = len(facts.sizes) == 1
    largest = image_shape(facts.shorter_side)[0]
    fits = f"the median shorter side is {facts.shorter_side} px, 224 is enough, and nothing is enlarged"
    if side < largest:
        fits = f"half of the {largest} px that the images allow, which these hours are too few for"
    return [
        ("image size", f"{side} px, patches of {config.patch_size}", "as given" if facts.image_size else fits),
        (
            "model",
            f"{size.name}, decoder {config.decoder_depth} x {config.decoder_width}",
            "as given"
            if given
            else f"the most expensive that these hours show each image {MIN_PASSES} times, if one can; {bound}",
        ),
        ("epochs", f"{epochs:g}", f"{facts.hours:g} h at {images_per_s:,.3g} images/s; at most {MAX_PASSES:,}"),
        (
            "batch",
            f"{batch}",
            "as given" if facts.global_batch else f"about {STEPS:,} steps, of 32 to {MAX_BATCH:,} images",
        ),
        (
            "learning rate",
            f"{peak:.2g}",
            "grows with the root of the batch, as in the recipes measured here"
            if size.name in SMALL
            else "1.5e-4 x batch / 256, of the paper",
        ),
    ]


def _doubts(facts: Facts, size: Size, epochs: float, hours: float) -> list[str]:
    doubts = []
    seen = epochs * facts.images
    if seen < MIN_IMAGES or epochs < MIN_PASSES:
        doubts.append(
            f"{epochs:g} passes, {seen:,.0f} images seen in all, are few: expect features a little above an untrained "
            "encoder's. More hours or devices help; so do published weights as the start (init_from, docs/recipes.md)"
        )
    if epochs >= MAX_PASSES:
        doubts.append(
            f"{MAX_PASSES:,} passes take {hours:.2g} of the {facts.hours:g} hours: the rest is better spent on more "
            "images than on more passes"
        )
    if facts.images < SIZES["vit_base"].images:
        doubts.append(
            f"{facts.images:,} images are few for an encoder of general use: compare it with published weights of "
            "ViT-B on your own task before relying on it (docs/recipes.md)"
        )
    return doubts
