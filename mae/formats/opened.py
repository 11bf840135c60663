"""Opens a file or folder of weights once, and tells from what it holds which loader reads it.

1 find    of a run folder, the newest checkpoint whose checksums hold       mae/run/checkpoint_files.py
2 read    bytes → contents; tensors stay in the file until they are used     weight_file.py
3 unwrap  contents → the weights of one model                                wrappers.py
4 tell    an autoencoder, a SAM of another library, or a segmentation run: from the recipe, config.json or the keys
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from math import isclose, prod
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mae.distributed.rank_zero import say
from mae.errors import CheckpointError, ConfigError
from mae.formats.facebook import PROBE_HEAD, count_class_tokens
from mae.formats.format import Scale
from mae.formats.huggingface import read_settings
from mae.formats.weight_file import NAMES, Contents, read_file, read_folder
from mae.formats.wrappers import Unwrapped, unwrap
from mae.models.config import FORMER, MAEConfig
from mae.run.checkpoint_files import Weights, newest_valid

MeanAndDeviation = tuple[tuple[float, ...], tuple[float, ...]]  # per channel, in units of 1
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Theirs, ours: settings of facebookresearch/mae that MAEConfig has too; the heads are in exports from here.
ARGUMENTS = {
    "norm_pix_loss": "norm_pix",
    "mask_ratio": "mask_ratio",
    "num_heads": "num_heads",
    "decoder_num_heads": "decoder_num_heads",
}
NECK = "neck.0.weight"  # of a SAM-style encoder, in each library's names
HF_NECK = "neck.conv1.weight"
DISTILLATION_HEAD = "distillation_head."  # of a student (mae/distill/student.py): no part of its encoder
PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Opened:
    """Weights, and what is said beside them.

    A model that is loaded from a path owns its weights. One that is loaded from what is opened leaves them in the file,
    which nobody may overwrite meanwhile, and takes half the memory.

    path      the file or folder; of a run its newest valid checkpoint
    kind      "mae": autoencoder, encoder or classifier, for `load`; "sam": SAM or its encoder from another library, or
              a SAM-style student's of task=distill, for `load_sam` and `load_segmenter`; "segmentation": own checkpoint
              of task=segment, for `load_segmenter`
    weights   under the names of the library that they are of; of an own checkpoint those of the model
    settings  config.json of a folder, label_names of a .safetensors file written here, pretrained_cfg; else empty
    fields    of MAEConfig, as a file says them: its metadata, or the arguments in a training checkpoint
    run       step, recipe and names of the classes of an own checkpoint
    taken     which weights of an own checkpoint that holds their average too; None: it holds one model
    usual     these are the weights that are taken unless others are asked for
    remark    what was unwrapped and what else the file holds; empty if nothing
    """

    path: Path
    kind: Literal["mae", "sam", "segmentation"]
    weights: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] | None = None
    taken: Weights | None = None
    usual: bool = True
    remark: str = ""

    @property
    def step(self) -> int | None:
        return self.run["step"] if self.run is not None else None


def open_weights(path: str | Path | Opened, *, weights: Weights | None = None, announce: bool = True) -> Opened:
    """Opens a run folder, a checkpoint, or a file or folder of another library. Returns what is already open as it is.

    weights   of a run with task.ema: "raw" or "average"; None: those that the run validated, which are the raw ones of
              pre-training and the average of fine-tuning and segmentation
    announce  print what was unwrapped and what was not used

    Raises CheckpointError if it is missing or damaged, holds no weights, or a folder without checkpoints and without
    config.json; ConfigError if it does not hold the `weights` that are asked for.
    """
    if isinstance(path, Opened):
        if weights not in (None, path.taken):
            raise ConfigError(f"weights={weights}, but {path.path} is open already: say it where it is opened")
        return path
    path = Path(path)
    if path.name in NAMES and (path.parent / "config.json").is_file():
        path = path.parent  # what config.json says belongs to the weights
    if (path / "config.json").is_file():
        opened = _open_folder(path)
    else:
        opened = _open_newest(path, weights) if path.is_dir() else _open_file(path, weights)
    if weights is not None and opened.run is None:
        raise ConfigError(
            f"weights={weights} is for checkpoints of a run, which may hold an average of their weights, and {path} "
            "holds one model. Leave it out"
        )
    if announce and opened.remark:
        say(f"{opened.path}: {opened.remark}")
    return opened


def _open_newest(folder: Path, weights: Weights | None) -> Opened:
    """Opens the newest checkpoint, the next if a run that is under way deletes it meanwhile."""
    while True:
        file = _newest(folder)
        try:
            return _open_file(file, weights)
        except CheckpointError:
            if file.exists():
                raise


def _newest(folder: Path) -> Path:
    """Returns the file to read of a folder without config.json: a run's newest valid checkpoint, DeepSpeed's weights.

    Raises CheckpointError naming what the folder holds instead.
    """
    newest = newest_valid(folder)
    if newest is not None:
        return newest
    if (folder / "latest").is_file():  # DeepSpeed
        states = folder / (folder / "latest").read_text().strip() / "mp_rank_00_model_states.pt"
        if states.is_file():
            return states
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} is a sharded checkpoint of torch.distributed.checkpoint (FSDP), whose index is code: if you "
            f"trust it, python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} merged.pth merges it"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter of peft without the model that it changes: merge the two with "
            "PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(FOLDER)"
        )
    there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    raise CheckpointError(
        f"{folder} is neither a run with checkpoints nor a Hugging Face or timm folder with a config.json; it holds "
        f"{', '.join(there[:8]) or 'nothing'}"
    )


def _open_folder(folder: Path) -> Opened:
    settings, contents = read_settings(folder / "config.json"), read_folder(folder)
    library_name = settings.get("architecture") or settings.get("model_type") or ""
    unwrapped = _unwrapped(folder, contents)
    kind = "sam" if library_name.startswith("sam") else "mae"
    return Opened(folder, kind, unwrapped.weights, settings, remark=_remark(unwrapped, contents))


def _open_file(path: Path, weights: Weights | None) -> Opened:
    contents = read_file(path)
    tree = contents.tree
    if isinstance(tree, dict) and isinstance(tree.get("mae"), dict) and "recipe" in tree["mae"]:
        return _open_own(path, tree, weights)
    unwrapped = _unwrapped(path, contents)
    found, settings = dict(unwrapped.weights), {}
    said = _said(contents)
    if isinstance(said.get("label_names"), list):
        settings["label_names"] = said["label_names"]
    kind = "sam" if any(key.endswith((NECK, HF_NECK)) for key in found) else "mae"
    if kind == "sam" and "pixel_mean" in found and "pixel_std" in found:
        settings["pretrained_cfg"] = _pixels(found.pop("pixel_mean"), found.pop("pixel_std"))
    own = isinstance(said.get("config"), dict) and said["config"].keys() <= {*MAEConfig.model_fields, *FORMER}
    fields = said["config"] if own else _fields(unwrapped)
    return Opened(path, kind, found, settings, fields, remark=_remark(unwrapped, contents))


def _open_own(path: Path, tree: dict[str, Any], weights: Weights | None) -> Opened:
    """Opens a checkpoint of a run. The average of a whole model was validated; that of an encoder alone was not.

    Raises ConfigError if the average is asked for, and the run kept none.
    """
    task = tree["mae"]["recipe"].get("task", {})
    kind = "segmentation" if task.get("name") == "segment" else "sam" if task.get("student") == "sam" else "mae"
    raw, average = (_part_of(tree["state_dict"], name) for name in ("model", "average"))
    if not average:
        if weights == "average":
            raise ConfigError(
                f"weights=average, but {path} holds no average of the weights: its run had no task.ema. Leave it out"
            )
        return Opened(path, kind, raw, run=tree["mae"])
    validated: Weights = "average" if average.keys() == raw.keys() else "raw"
    taken = weights or validated
    said = {"raw": "the raw weights; weights=average takes", "average": "the average of the weights; weights=raw takes"}
    other = {"raw": "their average", "average": "the raw ones"}
    return Opened(
        path,
        kind,
        average if taken == "average" else raw,
        run=tree["mae"],
        taken=taken,
        usual=taken == validated,
        remark="" if weights else f"{said[taken]} {other[taken]}",
    )


def _said(contents: Contents) -> dict[str, Any]:
    """Returns the metadata of safetensors that is JSON: an export's, where other programs write other things."""
    said = {}
    for name, text in contents.said.items():
        with suppress(ValueError):
            said[name] = json.loads(text)
    return said


def _unwrapped(path: Path, contents: Contents) -> Unwrapped:
    try:
        return unwrap(contents.tree)
    except CheckpointError as error:
        refused = ""
        if contents.refused:
            refused = (
                f". Objects of {', '.join(contents.refused[:8])} in it need code to be built, which a file of weights "
                "is never given here: where that code is, save model.state_dict()"
            )
        raise CheckpointError(f"{path} {error}{refused}") from error


def _remark(unwrapped: Unwrapped, contents: Contents) -> str:
    said = [unwrapped.remark] if unwrapped.remark else []
    if PROBE_HEAD in unwrapped.weights:
        said.append("a linear probe: the BatchNorm before its linear layer is merged into that layer")
    if contents.refused:
        said.append(f"left closed, because they need code: objects of {', '.join(contents.refused[:8])}")
    return "; ".join(said)


def _fields(unwrapped: Unwrapped) -> dict[str, Any]:
    """Returns the fields of MAEConfig that the arguments in a training checkpoint say."""
    arguments = unwrapped.arguments
    plain = {name: value for name, value in arguments.items() if isinstance(value, bool | int | float | list | tuple)}
    fields = {ours: plain[theirs] for theirs, ours in ARGUMENTS.items() if theirs in plain}
    size, weights = plain.get("input_size"), unwrapped.weights
    sides = (size, size) if isinstance(size, int) else size
    if isinstance(sides, list | tuple) and {"pos_embed", PATCHES} <= weights.keys():
        positions = weights["pos_embed"].shape[1] - count_class_tokens(weights)
        # Of a program that resizes positions, the argument is not the size of the model.
        if prod(side // weights[PATCHES].shape[-1] for side in sides) == positions:
            fields["image_size"] = tuple(sides)
    return fields


def _pixels(mean: Tensor, std: Tensor) -> dict[str, list[float]]:
    """Returns mean and deviation in units of 1 from the buffers of a SAM, which are usually in units of 1/255."""
    unit = 255 if float(std.max()) > 2 else 1
    return {"mean": (mean.flatten() / unit).tolist(), "std": (std.flatten() / unit).tolist()}


def _part_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Returns the weights of a module in an own checkpoint; an earlier version compiled blocks under other names."""
    named = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    own = {key.removeprefix(f"{name}."): value for key, value in named.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in own.items() if not key.startswith(DISTILLATION_HEAD)}


def class_names_of(opened: Opened, classes: int) -> list[str]:
    """Returns the names of a classifier's classes by label, as run or folder say them; [] if they do not say all."""
    if opened.run is not None:
        names = opened.run.get("classes", [])
    else:
        names = opened.settings.get("label_names", opened.settings.get("id2label", []))
    if isinstance(names, dict):
        names = [names[key] for label in range(classes) if (key := str(label)) in names]
    # transformers calls them LABEL_0 … where nobody has named the classes.
    unnamed = len(names) != classes or names == [f"LABEL_{label}" for label in range(classes)]
    return [] if unnamed else list(map(str, names))


def scale_of(opened: Opened, channels: int) -> Scale:
    """Returns the mean and deviation of a model's images: those of the run or folder, else ImageNet's."""
    if opened.run is not None:
        said: dict[str, Any] = opened.run["recipe"].get("data", {})
    elif (file := opened.path / "preprocessor_config.json").is_file():
        preprocessing = read_settings(file)
        said = {"mean": preprocessing.get("image_mean"), "std": preprocessing.get("image_std")}
    else:
        said = opened.settings.get("pretrained_cfg", {})
    if said.get("mean") and said.get("std"):
        return Scale(tuple(said["mean"]), tuple(said["std"]), known=True, bits=said.get("bits", 8))
    # Every published masked autoencoder was trained with these; further channels go through the three in turn.
    mean, std = (tuple(values[channel % 3] for channel in range(channels)) for values in IMAGENET)
    return Scale(mean, std, known=False)


def other_scale(opened: Opened, pixels: MeanAndDeviation | None) -> list[str]:
    """Says that a warm start normalises its images otherwise than the weights were trained on; nothing if it does not.

    pixels  mean and deviation of the new run; None: not compared
    """
    if pixels is None:
        return []
    mean, std = pixels
    theirs = scale_of(opened, len(mean))
    before, now = (*theirs.mean, *theirs.std), (*mean, *std)
    if len(before) == len(now) and all(isclose(*pair, abs_tol=1e-4) for pair in zip(before, now, strict=True)):
        return []
    there = scale_words(theirs.mean, theirs.std)
    here = f"{plain_list(mean)} and {plain_list(std)}"
    if not theirs.known:
        return [f"it does not say its mean and deviation, for published weights usually {there}; this run has {here}"]
    return [f"its images had {there}, and this run's have {here}: other inputs to the same weights, unless it is meant"]


def scale_words(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Returns mean and deviation as words of a command line."""
    return f"data.mean={plain_list(mean)} data.std={plain_list(std)}"


def plain_list(values: tuple[float, ...]) -> str:
    """Returns numbers as a command line takes them: [0.485,0.456,0.406]."""
    return f"[{','.join(f'{value:g}' for value in values)}]"
