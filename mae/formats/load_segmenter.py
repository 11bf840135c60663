"""`mae.load_segmenter`: a whole SAM from any file or folder that holds one; the warm start of a segmentation run."""

from pathlib import Path
from typing import Any

from torch import Tensor

from mae.errors import CheckpointError, ConfigError
from mae.formats.load import load, load_strictly, refuse_not_finite
from mae.formats.load_sam import load_sam
from mae.formats.opened import MeanAndDeviation, Opened, open_weights, other_scale
from mae.formats.sam_names import PARTS, to_our_names
from mae.formats.warm_start import channel_sentence, unsaid_heads
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.run.checkpoint_files import Weights
from mae.sam.config import SegmentConfig, build_segmenter, set_trainable
from mae.sam.convert import to_sam
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.lora import merge_lora
from mae.sam.segmenter import Segmenter

WIDTH_SHOWN = "mask_decoder.iou_token.weight"  # [1, out_channels]


def load_segmenter(
    path: str | Path | Opened, *, weights: Weights | None = None, like: SamConfig | None = None, **given: Any
) -> Segmenter:
    """Loads the whole SAM in `path`, in evaluation mode on the CPU, its LoRA weights merged.

    path         a run of task=segment or its checkpoint, a segment-anything .pth, the folder of a Hugging Face
                 SamModel, the same weights as safetensors or in whatever a training program wraps round them, or any
                 of them already opened
    weights      of a run with task.ema: "raw" or "average", the default
    like, given  as in `load_sam`

    Raises CheckpointError if there is none, ConfigError if `given` does not fit.
    """
    opened, copy = open_weights(path, weights=weights), not isinstance(path, Opened)
    if opened.kind == "segmentation":
        if given:
            raise ConfigError(f"{opened.path} is a run's and says its own settings: leave out {', '.join(given)}")
        return _load_own(opened, copy)
    if opened.kind == "mae":
        raise CheckpointError(
            f"{opened.path} holds no SAM but a masked autoencoder or its encoder: measure it with eval.py probe=suite, "
            "train a SAM from it with task=segment init_from=, or read it with mae.load"
        )
    encoder, rest = load_sam(opened, like=like, **given), prompt_and_mask_weights(opened)
    if not rest:
        raise CheckpointError(f"{opened.path} holds a SAM-style encoder without a prompt encoder and a mask decoder")
    model = Segmenter(encoder)
    load_strictly(model, rest | encoder.state_dict(prefix="encoder."), opened.path, copy)
    return model.eval()


def _load_own(opened: Opened, copy: bool) -> Segmenter:
    assert opened.run is not None
    recipe = opened.run["recipe"]
    task = SegmentConfig.model_validate(recipe["task"])
    model = build_segmenter(MAEConfig.model_validate(recipe["model"]), task, BlocksConfig())
    set_trainable(model, task)
    load_strictly(model, opened.weights, opened.path, copy)
    if task.encoder == "lora":
        merge_lora(model.encoder)
    return model.eval()


def holds_whole_sam(opened: Opened) -> bool:
    """Returns whether there is a prompt encoder or a mask decoder beside the encoder of a SAM."""
    parts = any(key.startswith(PARTS) for key in opened.weights)
    return opened.kind == "segmentation" or (opened.kind == "sam" and parts)


def prompt_and_mask_weights(opened: Opened) -> dict[str, Tensor]:
    """Returns prompt encoder and mask decoder of a SAM of another library, under our names; empty if it has none."""
    parts = {key: value for key, value in to_our_names(opened.weights).items() if key.startswith(PARTS)}
    refuse_not_finite(parts, opened.path)
    return parts


def initialise_segmenter(
    model: Segmenter,
    path: Path,
    pixels: MeanAndDeviation | None = None,
    weights: Weights | None = None,
    *,
    decoder: bool = True,
) -> list[str]:
    """Warm start of a fresh model, before LoRA is added to it.

    path     a masked autoencoder or classifier, a SAM-style encoder, or a whole SAM, whose other parts are taken too
    pixels   mean and deviation of the new run's images, compared with those of the weights; None: not compared
    weights  raw or average, of a checkpoint that holds both
    decoder  take prompt encoder and mask decoder of a whole SAM too; else they come from elsewhere
    returns  what was resampled or left out, or starts from random weights, a sentence each

    Raises CheckpointError or ConfigError if the encoder in it is of another architecture.
    """
    opened = open_weights(path, weights=weights)
    encoder, rest, said = _load_parts(opened, model)
    if opened.kind == "sam" and decoder and not rest:
        said.append("it is an encoder alone: prompt encoder and mask decoder start from random weights")
    config, given = model.encoder.config, encoder.config
    encoder = fit_encoder(encoder, config, path)
    if given.image_size != config.image_size:
        sizes = "{} x {} -> {} x {} pixels".format(*given.image_size, *config.image_size)
        said.append(f"images of {sizes}: positions, and relative positions of global blocks, are resized")
    if given.in_channels != config.in_channels:
        said.append(channel_sentence(given.in_channels, config.in_channels))
    said += other_scale(opened, pixels)
    model.encoder.load_state_dict(encoder.state_dict())
    if rest and decoder:
        _assign_parts(model, rest, f"init_from={path}")
    return said


def initialise_decoder(model: Segmenter, path: Path) -> None:
    """Gives a fresh model the prompt encoder and the mask decoder of a whole SAM.

    path  a segment-anything .pth, the folder of a SamModel, or a run of task=segment

    Raises CheckpointError if there are none, or other ones than the model has.
    """
    opened = open_weights(path)
    if opened.kind == "segmentation":
        parts = {key: value for key, value in opened.weights.items() if key.startswith(PARTS)}
    else:
        parts = prompt_and_mask_weights(opened) if opened.kind == "sam" else {}
    if not parts:
        raise CheckpointError(
            f"task.decoder_from={path} holds no prompt encoder and mask decoder: give a whole SAM, which is a .pth of "
            "segment-anything, the folder of a SamModel, or a run of task=segment"
        )
    _assign_parts(model, parts, f"task.decoder_from={path}")


def _assign_parts(model: Segmenter, parts: dict[str, Tensor], source: str) -> None:
    """Loads prompt encoder and mask decoder. Raises CheckpointError if they are not those of the model."""
    own = {key: value.shape for key, value in model.state_dict().items() if key.startswith(PARTS)}
    differing = [key for key in own.keys() | parts.keys() if key not in parts or own.get(key) != parts[key].shape]
    if not differing:
        model.load_state_dict(parts, strict=False)
        return
    channels, shown = model.encoder.config.out_channels, parts.get(WIDTH_SHOWN)
    if shown is not None and shown.shape[1] != channels:
        way = f"set task.out_channels={shown.shape[1]} as there, which is {channels} here"
    else:
        way = f"{', '.join(sorted(differing)[:8])} differ"
    raise CheckpointError(f"{source} has another prompt encoder or mask decoder: {way}")


def _load_parts(opened: Opened, model: Segmenter) -> tuple[SamEncoder, dict[str, Tensor], list[str]]:
    """Returns the encoder in a file, converted to SAM style if need be, the weights of the other parts, and remarks."""
    config = model.encoder.config
    if opened.kind == "segmentation":
        whole = load_segmenter(opened)
        said = (
            ["left out: the gate of task.relevance"] if whole.relevance is not None and model.relevance is None else []
        )
        rest = {key: value for key, value in whole.state_dict().items() if key.startswith(PARTS)}
        if whole.relevance is not None and model.relevance is not None:
            model.relevance.load_state_dict(whole.relevance.state_dict())
        return whole.encoder, rest, said
    if opened.kind == "sam":
        return load_sam(opened, like=config), prompt_and_mask_weights(opened), []
    fields = ("image_size", "patch_size", "window", "global_blocks", "out_channels")
    source = load(opened, **unsaid_heads(opened, config))
    said = [f"left out: its head of {source.classes} classes"] if isinstance(source, Classifier) else []
    return to_sam(source, **{name: getattr(config, name) for name in fields}), {}, said


def fit_encoder(encoder: SamEncoder, config: SamConfig, path: Path) -> SamEncoder:
    """Returns an encoder for a start from `path`, resampled to the size and channels of `config`.

    Raises ConfigError if anything else differs.
    """
    found = encoder.config
    if (found.image_size, found.in_channels) != (config.image_size, config.in_channels):
        encoder = encoder.at(config.image_size, in_channels=config.in_channels)
    if encoder.config != config:
        theirs, ours = encoder.config.model_dump(), config.model_dump()
        differing = [f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]
        raise ConfigError(
            f"init_from={path} has another encoder: {', '.join(differing)}. Set model= and task. as there"
        )
    return encoder
