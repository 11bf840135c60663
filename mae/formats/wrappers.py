"""Finds a model's weights in what was saved round them.

Training programs save a state dict inside others (`model`, `state_dict`, `teacher`, `module` of DeepSpeed, …), under
the name of an attribute (`model.`, `backbone.`, `sam.`, …), and with parts that wrappers of torch put into names
(`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, …). Only the last have to be known: a Vision Transformer lies where
its patch projection lies.

1 walk    all dictionaries that hold tensors; parts of names that torch's wrappers add are taken out
2 find    the patch projection in them: what stands before it, attribute and dictionaries, is a wrapper
3 choose  of several models the moving average or its teacher, as timm does; others are refused
4 say     what was unwrapped, and what else the file holds
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError

# Parts of names that wrap a module: DDP and DeepSpeed, torch.compile, FSDP, activation checkpointing, Lightning.
INSIDE = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# The patch projection of timm, of transformers' SAM and of its ViT, and what of the name before it is no wrapper's.
PROJECTIONS = {
    "patch_embed.proj.weight": "image_encoder.",
    "patch_embed.projection.weight": "vision_encoder.",
    "embeddings.patch_embeddings.projection.weight": "vit.",
}
AVERAGES = {"ema", "average", "averaged", "teacher", "target"}
# Beside the parameters of a model, and no feature's: the counter of torch's AveragedModel, transformers' pooler.
NO_FEATURES = ("n_averaged", "pooler.", "vit.pooler.")
DEEPEST = 5


@dataclass(frozen=True)
class Unwrapped:
    """Weights of one model.

    weights    under the names of the library that they are of
    wrappers   what was taken off, outermost first
    unused     what else is there: entries of the dictionaries, and tensors of other parts, counted
    arguments  settings of the program that saved the file, by its own names
    """

    weights: dict[str, Tensor]
    wrappers: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def remark(self) -> str:
        """Returns what was unwrapped and what was not used, in one line; empty if there is neither."""
        said = [f"unwrapped {', '.join(self.wrappers)}"] if self.wrappers else []
        if self.unused:
            more = f" and {len(self.unused) - 12} more" if len(self.unused) > 12 else ""
            said.append(f"not used: {', '.join(self.unused[:12])}{more}")
        return "; ".join(said)


@dataclass(frozen=True)
class Found:
    """A model in a state dict: the keys of the dictionaries round it, the prefix of its parameters, and those of other
    models whose names begin with it.
    """

    place: tuple[str, ...]
    prefix: str
    state: dict[str, Tensor]
    inner: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ".".join((*self.place, self.prefix)).strip(".") or "the top"

    @property
    def averaged(self) -> bool:
        return not AVERAGES.isdisjoint(re.split(r"[._]", self.name.lower()))

    @property
    def weights(self) -> dict[str, Tensor]:
        named = {
            key.removeprefix(self.prefix): value
            for key, value in self.state.items()
            if key.startswith(self.prefix) and not key.startswith(self.inner)
        }
        return {name: value for name, value in named.items() if not name.startswith(NO_FEATURES)}


def unwrap(tree: Any) -> Unwrapped:
    """Returns the weights of the model in `tree`, whatever is round them.

    Without a Vision Transformer the largest state dict is returned as it is, for the loaders to name its keys.

    Raises CheckpointError if there is no state dict, several models, or the weights lie in other files.
    """
    states = list(state_dicts(tree))
    found = [
        Found(place, prefix, state, tuple(other for other in there if other != prefix and other.startswith(prefix)))
        for place, state in states
        for there in [prefixes(state)]
        for prefix in there
    ]
    if not found:
        if not states:
            raise CheckpointError(
                f"holds no state dict, which is weights by the names of their parameters, but {_kind(tree)}"
            )
        place, state = max(states, key=lambda entry: len(entry[1]))
        found = [Found(place, "", state)]
    chosen = _choose(found)
    _refuse_incomplete(chosen)
    return Unwrapped(
        chosen.weights,
        [*chosen.place, *_parts_inside(tree, chosen), *([chosen.prefix] if chosen.prefix else [])],
        _unused(tree, chosen),
        _arguments(tree),
    )


def state_dicts(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yields each dictionary that holds tensors by name, and the keys that lead to it."""
    if not isinstance(tree, dict) or len(place) > DEEPEST:
        return
    tensors = {_bare(key): value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in tree.items():
        if isinstance(key, str):
            yield from state_dicts(value, (*place, key))


def prefixes(state: dict[str, Tensor]) -> list[str]:
    """Returns what stands before the parameters of each Vision Transformer; of a SAM, before all of its parts."""
    found = {}
    for key in state:
        for projection, part in PROJECTIONS.items():
            if f".{key}".endswith(f".{projection}"):
                prefix = key.removesuffix(projection)
                root = prefix.removesuffix("encoder.")
                if f".{prefix}".endswith(f".{part}"):
                    prefix = prefix.removesuffix(part)
                elif f".{prefix}".endswith(".encoder.") and any(
                    key.startswith(f"{root}mask_decoder.") for key in state
                ):
                    prefix = root  # a SAM under our names
                found[prefix] = None
    return list(found)


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in INSIDE)


def _choose(found: list[Found]) -> Found:
    averages = [model for model in found if model.averaged]
    # The teacher of a distillation is another model, and not the average of its student.
    candidates = averages if averages and all(_alike(averages[0].weights, other.weights) for other in found) else found
    first = candidates[0]
    others = [other for other in candidates[1:] if not _same(first.weights, other.weights)]
    if others:
        names = ", ".join(model.name for model in (first, *others))
        raise CheckpointError(
            f"holds several models, under {names}, and nothing says which is meant: save the one that you want in a "
            "file of its own"
        )
    return max(candidates, key=lambda model: len(model.weights))


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Returns whether two models have the same blocks, and the same shapes of all that both have."""
    blocks = [{key for key in weights if "blocks." in key or "layer" in key} for weights in (one, other)]
    return blocks[0] == blocks[1] and all(one[key].shape == other[key].shape for key in one.keys() & other.keys())


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Returns whether one module was saved under two names: what both have is equal, and that is all of one of them."""
    shared = one.keys() & other.keys()
    whole = len(shared) == min(len(one), len(other))
    return whole and all(one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in shared)


def _refuse_incomplete(chosen: Found) -> None:
    if empty := [key for key, value in chosen.weights.items() if value.numel() == 0]:
        raise CheckpointError(
            f"holds {len(empty)} empty parameters ({', '.join(empty[:3])}, …): DeepSpeed's ZeRO-3 keeps them in files "
            "of the optimizer. Merge them with the zero_to_fp32.py beside the checkpoint"
        )
    if any(key.endswith("flat_param") for key in chosen.state):
        raise CheckpointError(
            "holds parameters that FSDP has flattened (flat_param), whose names and shapes are lost: save the full "
            "state dict, as StateDictType.FULL_STATE_DICT does"
        )


def _enclosing(tree: Any, chosen: Found) -> Iterator[tuple[dict[Any, Any], str | None]]:
    """Yields each dictionary from the outermost to that of the model, and the key that leads on from it."""
    for key in chosen.place:
        yield tree, key
        tree = tree[key]
    yield tree, None


def _parts_inside(tree: Any, chosen: Found) -> list[str]:
    *_, (holder, _) = _enclosing(tree, chosen)
    parts = {part for key in holder if isinstance(key, str) for part in key.split(".") if part in INSIDE}
    return sorted(f"{part}." for part in parts)


def _unused(tree: Any, chosen: Found) -> list[str]:
    names = []
    for holder, key in _enclosing(tree, chosen):
        # Tensors beside a dictionary that leads on belong to something else too.
        names += [
            str(other)
            for other in holder
            if other != key and (key is not None or not isinstance(holder[other], Tensor))
        ]
    names = [name for name in names if name != "args"]
    outside = chosen.state.keys() - {chosen.prefix + name for name in chosen.weights}
    counted = Counter(key.split(".")[0] for key in chosen.state if key in outside)
    return names + [f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in counted.items()]


def _arguments(tree: Any) -> dict[str, Any]:
    """Returns the settings in a training checkpoint: `args` of facebookresearch/mae, Lightning's `hyper_parameters`."""
    for name in ("args", "hyper_parameters"):
        said = tree.get(name) if isinstance(tree, dict) else None
        if isinstance(said, dict | Namespace):
            return dict(said if isinstance(said, dict) else vars(said))
    return {}


def _kind(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"a dictionary with {', '.join(map(str, list(tree)[:5])) or 'nothing'}"
    return f"an object of class {type(tree).__name__}"
