"""The recipe of a run (experiment=): refused where it is not what was asked for, said where it overrules a group."""

import shlex
import sys
from collections.abc import Iterator
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data.storage.credentials import hide
from mae.distributed.rank_zero import say
from mae.errors import ConfigError
from mae.report.summary import interpreter
from tasks.words import choose_one

STATED = ("task", "model", "data", "optim")  # groups whose values a recipe states
SIZE = ("model.width", "model.depth", "model.num_heads", "model.patch_size")  # what a file of conf/model states
FITTING = {  # for data of one's own; for pre-training suggest=true writes one
    "finetune": "finetune_base (ViT-B at 224 pixels), experiment=cifar10_finetune (32 pixels, minutes on a CPU)",
    "distill": "distill_small (ViT-S at 224 pixels), experiment=distill_tiny (112 pixels, minutes on a CPU)",
    "segment": "sa1b_segment_base (ViT-B at 1024 pixels), experiment=coco_sa1b_tiny (128 pixels, minutes on a CPU)",
}


def chosen_recipe(raw: DictConfig, hydra: Any) -> str | None:
    """Returns the recipe that Hydra composed `raw` with, and says which of its values stay beside chosen groups.

    Raises ConfigError if it is the default one for data of the user's own, or if it changes the size of model=.
    """
    choices = hydra.runtime.choices
    recipe = choices.get("experiment")
    named = {word.partition("=")[0].lstrip("+~") for word in hydra.overrides.task}
    if left_out := [group for group in STATED if group in named and group not in choices]:
        reason = choose_one(left_out[0])
        raise ConfigError(reason)
    own_data = [name for name in ("data.path", "data.val_path") if OmegaConf.select(raw, name) is not None]
    if own_data and hydra.job.config_name == "train" and "experiment" not in named:
        fitting = FITTING.get(OmegaConf.select(raw, "task.name"))
        words = [*hydra.overrides.task, *([] if "data.path" in own_data else ["data.path=FOLDER"])]
        line = f"{interpreter()} {shlex.join([sys.argv[0], *words, 'suggest=true', 'suggest.hours=8'])}"
        way = (
            f"Add experiment={fitting}"
            if fitting
            else f"`{line}` writes one for these images, this machine and 8 hours"
        )
        raise ConfigError(
            f"{own_data[0]} without a recipe: the default one, {recipe}, is made for digits of 32 pixels. {way}; or "
            f"choose one of conf/experiment. experiment={recipe} resumes a run that was begun without a recipe"
        )
    chosen = [group for group in STATED if group in named]
    if recipe is None or not chosen:
        return recipe
    groups = " ".join(f"{group}={choices[group]}" for group in chosen)
    stays = _stated_by_recipe(raw, hydra)
    if sizes := [f"{name}={value}" for name, value in stays.items() if name in SIZE and "model" in chosen]:
        raise ConfigError(
            f"{groups}, but experiment={recipe} states {', '.join(sizes)} of its own. Say which is meant by setting "
            "these too, or take them out of the recipe: a size is a file of conf/model"
        )
    if stays:
        values = hide(", ".join(f"{name}={value}" for name, value in stays.items()))
        say(f"{groups} beside experiment={recipe}: of the recipe stay {values}")
    return recipe


def _stated_by_recipe(raw: DictConfig, hydra: Any) -> dict[str, Any]:
    """Returns the values of STATED that would be others without the recipe, under the same groups and settings."""
    stated = tuple(f"{group}." for group in STATED)
    own = [word for word in hydra.overrides.task if word.lstrip("+~").startswith(stated)]
    groups = [f"{group}={hydra.runtime.choices[group]}" for group in STATED if group in hydra.runtime.choices]
    loader = GlobalHydra.instance().config_loader()
    overrides = [*hydra.overrides.hydra, *groups, *own, "~experiment"]
    without = loader.load_configuration(hydra.job.config_name, overrides, RunMode.RUN)
    before = dict(value for group in STATED for value in _values(without.get(group), group))
    after = dict(value for group in STATED for value in _values(raw.get(group), group))
    return {name: value for name, value in after.items() if before.get(name) != value}


def _values(node: DictConfig | None, prefix: str) -> Iterator[tuple[str, Any]]:
    plain: Any = OmegaConf.to_container(node, resolve=False) if node is not None else {}
    yield from ((f"{prefix}.{name}", value) for name, value in plain.items())
