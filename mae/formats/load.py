"""`mae.load`: a model from any file or folder that holds a masked autoencoder."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mae.errors import CheckpointError, ConfigError, first_sentence
from mae.formats import hf_vit as vit
from mae.formats import hf_vitmae as vitmae
from mae.formats import timm, timm_folder
from mae.formats.facebook import has_decoder, infer_config
from mae.formats.huggingface import read_settings
from mae.models.classifier import classifier_for, has_head
from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import Encoder
from mae.run.checkpoint_files import newest_valid, read

# Settings of MAEConfig that leave no trace in the weights.
UNSEEN = ("num_heads", "decoder_num_heads", "norm_pix", "mask_ratio", "masking", "predicted", "image_size")


def load(path: str | Path, **given: Any) -> MaskedAutoencoder | Encoder:
    """The model in `path`, in evaluation mode on the CPU.

    path   an own checkpoint or run folder, a facebookresearch/mae .pth ({"model": ...} or bare), a Hugging Face
           ViTMAE or ViT folder, a timm folder, or a .safetensors file of a plain Vision Transformer of timm
    given  fields of MAEConfig that the file cannot say or that shall differ: num_heads, norm_pix, mask_ratio, ...
    returns a MaskedAutoencoder; an Encoder when the file holds no decoder, as the published files for fine-tuning do; a
            Classifier, which is an Encoder, when it holds a head, as the published fine-tuned files do

    Raises CheckpointError when the file is missing, damaged or holds something else (missing and left-over keys are
    named), ConfigError when `given` does not fit.
    """
    path = Path(path)
    described, state = _read_any(path)
    try:
        if described is None:
            config = infer_config(state, given)
        elif "positions" in described:
            config = MAEConfig.model_validate(described | given)
        else:
            # Other libraries do not say whether positions are the fixed table; the weights do.
            config = infer_config(state, described | given)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_sentence(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = _empty(config, state)
    load_strictly(model, state, path)
    for name, parameter in model.named_parameters():
        # `assign` makes every parameter trainable; the fixed tables are not.
        fixed = name in ("pos_embed", "decoder_pos_embed") and model.config.positions == "sincos"
        parameter.requires_grad_(not fixed)
    return model.eval()


def _empty(config: MAEConfig, state: dict[str, Tensor]) -> MaskedAutoencoder | Encoder:
    if has_head(state):
        return classifier_for(state, config)
    return MaskedAutoencoder(config) if has_decoder(state) else Encoder(config)


def initialise_from(model: MaskedAutoencoder, path: Path) -> None:
    """Warm start: the weights in `path` (any format of `load`) into a fresh model of the same architecture.

    A file with an encoder only leaves the decoder as it is. Raises CheckpointError naming what does not fit.
    """
    # What the weights cannot say, such as the number of heads, is the model's to say.
    source = load(path, **{name: getattr(model.config, name) for name in UNSEEN})
    own = model.state_dict()
    state = source.state_dict()
    differing = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
    if isinstance(source, MaskedAutoencoder):
        differing += [key for key in own if key not in state]
    if differing:
        raise CheckpointError(f"init_from={path} is of another architecture: {', '.join(differing[:8])} differ")
    model.load_state_dict(state, strict=False)


def _read_any(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What the file says of the architecture (None: nothing), and the weights under our names."""
    if path.suffix == ".safetensors":
        return timm.read(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _read_folder(path)
        newest = newest_valid(path)
        if newest is None:
            raise CheckpointError(
                f"{path} is neither a run with checkpoints nor a Hugging Face folder with a config.json"
            )
        path = newest
    contents = read(path)
    if "mae" in contents:
        recipe = contents["mae"]["recipe"]
        if recipe.get("task", {}).get("name") == "segment":
            raise CheckpointError(f"{path} holds a whole SAM: read it with mae.load_segmenter, not with mae.load")
        return recipe["model"], model_weights(contents)
    weights = contents.get("model", contents)
    return None, {key.removeprefix("module.").replace("_orig_mod.", ""): value for key, value in weights.items()}


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder in the manner of the hub, whose config.json says what it holds."""
    settings = read_settings(path)
    if "architecture" in settings:
        return timm_folder.read(path, settings)
    kind = settings.get("model_type")
    if kind == "vit_mae":
        return vitmae.read(path, settings)
    if kind == "vit":
        return vit.read(path, settings)
    raise CheckpointError(f"{path} holds a model of type {kind}: only vit_mae, vit and timm's vit_* are read")


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of an own checkpoint under the names of the model; the moving average where the run kept one."""
    weights = {key.replace("_orig_mod.", ""): value for key, value in checkpoint["state_dict"].items()}
    prefix = "average." if any(key.startswith("average.") for key in weights) else "model."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """The weights in float32 into a model on the meta device; raises CheckpointError naming every key that differs."""
    own = model.state_dict()
    complaints = [f"{key} is missing" for key in own if key not in state]
    complaints += [f"{key} is left over" for key in state if key not in own]
    complaints += [
        f"{key} has shape {tuple(state[key].shape)} where the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if complaints:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(complaints[:8])}")
    model.load_state_dict({key: value.float().contiguous() for key, value in state.items()}, assign=True)
