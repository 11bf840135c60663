"""Opens a file or folder of weights once, and tells from what it holds which loader reads it.

1 find  of a run folder, the newest checkpoint whose checksums hold        mae/run/checkpoint_files.py
2 map   tensors stay in the file until they are used; those of the optimiser never are
3 tell  an autoencoder, a SAM of another library, or a segmentation run: from the recipe, config.json or the keys
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mae.errors import CheckpointError
from mae.formats import timm
from mae.formats.format import Scale
from mae.formats.huggingface import read_settings, read_weights
from mae.run.checkpoint_files import newest_valid, read

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Opened:
    """Weights, and what is said beside them.

    A model that is loaded from a path owns its weights. One that is loaded from what is opened leaves them in the file,
    which nobody may overwrite meanwhile, and takes half the memory.

    path      the file or folder; of a run its newest valid checkpoint
    kind      "mae": autoencoder, encoder or classifier, for `load`; "sam": SAM or its encoder from another library, for
              `load_sam` and `load_segmenter`; "segmentation": own checkpoint of task=segment, for `load_segmenter`
    weights   under the names in the file; of an own checkpoint those of the model
    settings  config.json of a folder, or MAEConfig and label_names in a .safetensors file written here; else empty
    run       step, recipe and names of the classes of an own checkpoint
    """

    path: Path
    kind: Literal["mae", "sam", "segmentation"]
    weights: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] | None = None

    @property
    def step(self) -> int | None:
        return self.run["step"] if self.run is not None else None


def open_weights(path: str | Path | Opened) -> Opened:
    """Opens a run folder, a checkpoint, or a file or folder of another library. Returns what is already open as it is.

    Raises CheckpointError if it is missing or damaged, or a folder without checkpoints and without config.json.
    """
    if isinstance(path, Opened):
        return path
    path = Path(path)
    if (path / "config.json").is_file():
        settings = read_settings(path)
        library_name = settings.get("architecture") or settings.get("model_type") or ""
        return Opened(path, "sam" if library_name.startswith("sam") else "mae", read_weights(path), settings)
    if path.is_dir():
        newest = newest_valid(path)
        if newest is None:
            raise CheckpointError(
                f"{path} is neither a run with checkpoints nor a Hugging Face folder with a config.json"
            )
        path = newest
    if path.suffix == ".safetensors":
        settings, weights = timm.read(path)
        return Opened(path, "mae", weights, settings)
    contents = read(path)
    if isinstance(contents, dict) and "mae" in contents:
        task = contents["mae"]["recipe"].get("task", {}).get("name")
        kind = "segmentation" if task == "segment" else "mae"
        return Opened(path, kind, model_weights(contents["state_dict"]), run=contents["mae"])
    state = contents.get("model", contents) if isinstance(contents, dict) else contents
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path} holds no state dict: weights by the names of their parameters")
    weights = {key.removeprefix("module.").replace("_orig_mod.", ""): value for key, value in state.items()}
    return Opened(path, "sam" if any(key.endswith("neck.0.weight") for key in weights) else "mae", weights)


def model_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the model's weights in an own checkpoint: the moving average if the run kept one."""
    weights = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    prefix = "average." if any(key.startswith("average.") for key in weights) else "model."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


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
        said = opened.run["recipe"].get("data", {})
    elif (file := opened.path / "preprocessor_config.json").is_file():
        preprocessing = json.loads(file.read_text())
        said = {"mean": preprocessing.get("image_mean"), "std": preprocessing.get("image_std")}
    else:
        said = opened.settings.get("pretrained_cfg", {})
    if said.get("mean") and said.get("std"):
        return Scale(tuple(said["mean"]), tuple(said["std"]), known=True, bits=said.get("bits", 8))
    # Every published masked autoencoder was trained with these; further channels go through the three in turn.
    mean, std = (tuple(values[channel % 3] for channel in range(channels)) for values in IMAGENET)
    return Scale(mean, std, known=False)
