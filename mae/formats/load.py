"""`mae.load`: a masked autoencoder, its encoder or a classifier from any file or folder that holds one.

1 open      the file or folder, once                                   opened.py
2 describe  the architecture, and the weights under our names          facebook.py, hf_vitmae.py, hf_vit.py, timm*.py
3 build     the model on the meta device, without values
4 assign    the weights to it: every key, of the same shape, and nothing left over
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mae.distributed.rank_zero import say
from mae.errors import CheckpointError, ConfigError, first_sentence
from mae.formats import hf_pixio, hf_vitmae, mmpretrain, timm_folder
from mae.formats.facebook import PROBE_HEAD, has_decoder, infer_config, may_be_of, plain_head
from mae.formats.opened import Opened, class_names_of, open_weights
from mae.formats.timm import join_class_tokens
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import Encoder
from mae.run.checkpoint_files import Weights

RESAMPLED = ("image_size", "patch_size", "in_channels")
OTHER_LOADERS = {"sam": ("a SAM-style encoder", "mae.load_sam"), "segmentation": ("a whole SAM", "mae.load_segmenter")}


def load(path: str | Path | Opened, *, weights: Weights | None = None, **given: Any) -> MaskedAutoencoder | Encoder:
    """Loads the model in `path`, in evaluation mode on the CPU.

    path   an own checkpoint or run folder, a facebookresearch/mae .pth, a Hugging Face ViTMAE or ViT folder, a timm
           folder, a file of their weights by torch.save or safetensors in whatever a training program wraps round
           them, or any of them already opened
    weights  of a run with task.ema: "raw", or "average", which in pre-training is one of the encoder; None: those that
             the run validated
    given  fields of MAEConfig that the file cannot say or that shall differ: num_heads, norm_pix, mask_ratio, ...; for
           another image_size, patch_size or in_channels the weights are resampled, as by `Encoder.at`
    returns a MaskedAutoencoder; an Encoder if the file holds no decoder, as the published files for fine-tuning do; a
            Classifier, which is an Encoder, if it holds a head, as the published fine-tuned files do

    Prints what was unwrapped, what of the file was not used, and that `norm_pix` is assumed where nothing says it.

    Raises CheckpointError if the file is missing, damaged or holds something else (missing and left-over keys are
    named), ConfigError if `given` does not fit.
    """
    opened = open_weights(path, weights=weights)
    if opened.kind in OTHER_LOADERS:
        what, loader = OTHER_LOADERS[opened.kind]
        raise CheckpointError(
            f"{opened.path} holds {what} and no masked autoencoder: start task=segment from it, measure it with "
            f"eval.py probe=segment, or read it with {loader}"
        )
    if unknown := [name for name in given if name not in MAEConfig.model_fields]:
        raise ConfigError(f"{opened.path}: unknown setting {unknown[0]}={given[unknown[0]]!r} of its model")
    resampled = {name: given.pop(name) for name in RESAMPLED if name in given}
    try:
        described, state = describe(opened)
        if "image_size" not in described and may_be_of(state, resampled.get("image_size")):
            given["image_size"] = resampled.pop("image_size")
        if "positions" in described:
            config = MAEConfig.model_validate(described | given)
        else:
            # Other libraries do not say whether positions are the fixed table; the weights do.
            config = infer_config(state, described | given)
        resampled = {} if _replaced(config, resampled) == config else resampled
    except ValidationError as error:
        raise ConfigError(f"{opened.path}: {first_sentence(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{opened.path}: {error}") from error
    with torch.device("meta"):
        if "head.weight" in state:
            pool = "patches" if "fc_norm.weight" in state else "class_token"
            model = Classifier(config, len(state["head.weight"]), pool)
            model.class_names = class_names_of(opened, model.classes)
        else:
            model = MaskedAutoencoder(config) if has_decoder(state) else Encoder(config)
    load_strictly(model, state, opened.path, copy=not isinstance(path, Opened))
    for name, parameter in model.named_parameters():
        # `assign` makes every parameter trainable; the fixed tables are not.
        fixed = name in ("pos_embed", "decoder_pos_embed") and model.config.positions == "sincos"
        parameter.requires_grad_(not fixed)
    if isinstance(model, MaskedAutoencoder) and "norm_pix" not in described | given:
        say(f"{opened.path} does not say whether it was trained with norm_pix: true is assumed (else norm_pix=false)")
    model.eval()
    return model.at(**resampled) if resampled else model


def _replaced(config: MAEConfig, fields: dict[str, Any]) -> MAEConfig:
    return MAEConfig.model_validate(config.model_dump() | fields)


def describe(opened: Opened) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the fields of MAEConfig that the file says, and the weights under our names."""
    if opened.run is not None:
        return opened.run["recipe"]["model"], opened.weights
    fields, weights = opened.fields, opened.weights
    if opened.path.is_dir():
        kind = opened.settings.get("model_type")
        if "architecture" in opened.settings:
            fields = timm_folder.read(opened.settings)
        elif kind in hf_vitmae.KINDS:
            fields = hf_vitmae.read(opened.settings, weights)
        elif kind == hf_pixio.KIND:
            fields = hf_pixio.read(opened.settings)
        else:
            raise CheckpointError(f"this is a model of type {kind}: only vit_mae, vit, pixio and timm's vit_* are read")
    if "reg_token" in weights and fields.get("class_tokens", 1) > 1:
        weights = join_class_tokens(weights)
    elif hf_pixio.of_pixio(weights):
        weights = hf_pixio.to_our_names(weights)
    elif hf_vitmae.of_transformers(weights):
        weights = hf_vitmae.to_our_names(weights)
    elif mmpretrain.PROJECTION in weights:
        weights = mmpretrain.to_our_names(weights)
    return fields, weights if PROBE_HEAD not in weights else plain_head(weights)


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path, copy: bool) -> None:
    """Assigns weights in float32 to a model on the meta device.

    copy  do so even if they need no conversion, because a mapped tensor changes or vanishes with its file

    Raises CheckpointError naming the keys that differ, or the parameters that are not finite.
    """
    own = model.state_dict()
    complaints = [f"{key} is missing" for key in own if key not in state]
    complaints += [f"{key} is left over" for key in state if key not in own]
    complaints += [
        f"{key} has shape {tuple(state[key].shape)} where the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if complaints:
        more = f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(complaints[:8])}{more}")
    float32 = {key: value.to(torch.float32, copy=copy).contiguous() for key, value in state.items()}
    refuse_not_finite(float32, path)
    model.load_state_dict(float32, assign=True)


def refuse_not_finite(weights: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError naming the parameters that hold an infinite value or NaN."""
    if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{path} holds weights that are not finite, in {len(broken)} of {len(weights)} parameters: "
            f"{', '.join(broken[:8])}. They overflowed in half precision or the training diverged: take an earlier file"
        )
