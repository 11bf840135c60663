"""Warm starts: the weights of any file in a model of another image size, patch size, number of channels or decoder.

1 load      the source, with the settings of the model that its file does not say
2 refuse    another architecture, naming the settings that differ
3 resample  what depends on image size, patch size and channels     mae/models/resample.py
4 copy      what both have; a line each says what was resampled, left out, or starts from random weights
"""

from pathlib import Path
from typing import Any

from mae.errors import CheckpointError, ConfigError
from mae.formats.facebook import may_be_of
from mae.formats.load import describe, load
from mae.formats.opened import MeanAndDeviation, Opened, open_weights, other_scale
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder
from mae.models.resample import POSITIONS
from mae.models.vit import Encoder
from mae.run.checkpoint_files import Weights
from mae.sam.encoder import SamConfig

OBJECTIVE = ("norm_pix", "mask_ratio")
ENCODER = ("width", "depth", "num_heads", "hidden", "class_tokens")
DECODER = ("decoder", "decoder_width", "decoder_depth", "decoder_num_heads")


def initialise_from(
    model: Encoder, path: Path, pixels: MeanAndDeviation | None = None, weights: Weights | None = None
) -> list[str]:
    """Copies the weights in `path` (any format of `load`) into a fresh model of the same widths, depths and heads.

    A model without a decoder, such as a student, takes the encoder alone; what the file lacks stays as it is.

    Image size, patch size and channels may differ: the weights are resampled. Sine-cosine positions stay the model's
    own table, which is exact for any grid.

    pixels   mean and deviation of the new run's images, compared with those of the weights; None: not compared
    weights  raw or average, of a checkpoint that holds both; an average of pre-training has no decoder
    returns  what was not copied as it is, a sentence each

    Raises CheckpointError or ConfigError naming what does not fit.
    """
    config, decoder = model.config, isinstance(model, MaskedAutoencoder)
    opened = open_weights(path, weights=weights)
    source = load(opened, **unsaid(opened, config))
    refuse_other_architecture(source, config, path, decoder)
    if config.positions == "sincos" and source.config.positions == "learned":
        raise ConfigError(
            f"init_from={path} has learned positions, and model.positions=sincos replaces them by the fixed table: set "
            "model.positions=learned"
        )
    resampled = source.at(config.image_size, patch_size=config.patch_size, in_channels=config.in_channels)
    own, state = model.state_dict(), resampled.state_dict()
    tables = POSITIONS if config.positions == "sincos" else ()
    model.load_state_dict(
        {key: value for key, value in state.items() if key in own and key not in tables}, strict=False
    )
    return differences(source, config, decoder) + other_scale(opened, pixels)


def unsaid(opened: Opened, config: MAEConfig) -> dict[str, Any]:
    """Returns the settings of `config` that a file says nothing of, as fields for `load`."""
    said, state = describe(opened)
    given = {name: getattr(config, name) for name in OBJECTIVE}
    # At another width the model is refused, and any number will do to name the width.
    given |= unsaid_heads(opened, config) or {"num_heads": 1}
    decoder = state.get("decoder_pred.weight")
    if decoder is not None:
        given["decoder_num_heads"] = config.decoder_num_heads if decoder.shape[1] == config.decoder_width else 1
    if may_be_of(state, config.image_size):
        given["image_size"] = config.image_size
    return {name: value for name, value in given.items() if name not in said}


def unsaid_heads(opened: Opened, config: MAEConfig | SamConfig) -> dict[str, Any]:
    """Returns the number of heads of `config` if a file of the same width says nothing of it."""
    said, state = describe(opened)
    embedding = state.get("patch_embed.proj.weight")
    unsaid = "num_heads" not in said and embedding is not None and len(embedding) == config.width
    return {"num_heads": config.num_heads} if unsaid else {}


def refuse_other_architecture(source: Encoder, config: MAEConfig, path: Path, decoder: bool = True) -> None:
    """Raises CheckpointError naming the settings of the architecture that differ, and those that would fit.

    decoder  False: the encoder's alone count
    """
    theirs, ours = ({**one.model_dump(), "hidden": int(one.width * one.mlp_ratio)} for one in (source.config, config))
    names = ENCODER + (DECODER if decoder and isinstance(source, MaskedAutoencoder) else ())
    differing = [name for name in names if theirs[name] != ours[name]]
    if "width" in differing:
        differing = [name for name in differing if name not in ("num_heads", "hidden")]
    if "decoder_width" in differing:
        differing = [name for name in differing if name != "decoder_num_heads"]
    if differing:
        named = ["mlp_ratio" if name == "hidden" else name for name in differing]
        listed = ", ".join(f"{name} {_plain(theirs[name])} there and {_plain(ours[name])} here" for name in named)
        settings = " ".join(f"model.{name}={_plain(theirs[name])}" for name in named)
        way_out = ""
        if all(name in DECODER for name in named):
            way_out = f", or take its encoder alone: python -m mae.export {path} --to timm --out encoder.safetensors"
        raise CheckpointError(f"init_from={path} is of another architecture: {listed}. Set {settings}{way_out}")


def differences(source: Encoder, config: MAEConfig, decoder: bool = True) -> list[str]:
    """Returns what a warm start resamples, leaves out, or starts from random weights, a sentence each.

    decoder  whether the model has one
    """
    before, whole = source.config, isinstance(source, MaskedAutoencoder)
    said = resampling(before, config, whole and decoder)
    if not decoder:
        said += ["left out: its decoder"] if whole else []
    elif not whole:
        said.append("there is no decoder in it: the decoder starts from random weights")
    elif before.norm_pix != config.norm_pix:
        said.append(f"its decoder was trained with norm_pix={_plain(before.norm_pix)}: another target")
    if isinstance(source, Classifier):
        said.append(f"left out: its head of {source.classes} classes")
        if source.pool == "patches":
            said.append("its norm is that of pooled patches, and left out: the norm of the tokens starts afresh")
    return said


def resampling(before: MAEConfig, after: MAEConfig, decoder: bool) -> list[str]:
    """Returns which weights `Encoder.at` resamples between two architectures, a sentence each."""
    said = []
    if before.image_size != after.image_size or before.grid != after.grid:
        sizes = ["{} x {} pixels in {} x {} patches".format(*one.image_size, *one.grid) for one in (before, after)]
        positions = "made anew from sines and cosines" if after.positions == "sincos" else "resized bicubically"
        positions = "as they are" if before.grid == after.grid else positions
        said.append(f"images of {sizes[0]} -> {sizes[1]}: positions are {positions}")
    if before.patch_size != after.patch_size:
        predicted = ", the prediction of pixels bicubically" if decoder else ""
        said.append(
            f"patch size {before.patch_size} -> {after.patch_size}: the patch embedding is resized by "
            f"pseudo-inverse{predicted}"
        )
    if before.in_channels != after.in_channels:
        said.append(channel_sentence(before.in_channels, after.in_channels))
    return said


def channel_sentence(before: int, after: int) -> str:
    """Says how the patch embedding is converted to images of other channels."""
    how = "summed" if after == 1 else f"repeated in turn, times {before}/{after}"
    return f"channels {before} -> {after}: the weights of the patch embedding are {how}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
