"""Step 1 of an export: opens a run or file once and loads the model that the format holds."""

from pathlib import Path

import torch

from mae.errors import ConfigError
from mae.formats.format import Export, Format
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import Opened, open_weights, scale_of
from mae.models.classifier import Classifier
from mae.models.mae import MaskedAutoencoder
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.sam.convert import to_sam
from mae.sam.encoder import SamEncoder

Size = tuple[int, int]


def open_export(path: Path, fmt: Format, image_size: Size | None, merge_into: Path | None) -> Export:
    """Loads the part of the model in `path` that the format holds.

    path        a run folder, a file, or the folder of another library
    image_size  what the export is for; None: the model's own, or SAM's 1024 for a converted encoder

    Raises CheckpointError if there is no model, ConfigError if the format needs another one.
    """
    opened = open_weights(path)
    segmenter = load_segmenter(opened) if opened.kind == "segmentation" else None
    if segmenter is not None and segmenter.relevance is not None:
        raise ConfigError(f"{opened.path} was trained with task.relevance=true: no other library has its gate")
    if opened.kind == "mae":
        model = _load_plain(opened, fmt, image_size)
    else:
        model = segmenter.encoder if segmenter is not None else load_sam(opened)
        _refuse_sam(model, opened.path, fmt, image_size)
    scale = scale_of(opened, model.config.in_channels)
    return Export(model.eval(), scale, merge_into, segmenter, opened.path, opened.step)


def _refuse_sam(model: SamEncoder, path: Path, fmt: Format, image_size: Size | None) -> None:
    """Raises ConfigError if the format is not for SAM-style encoders, or the encoder would have to be resized."""
    if fmt.holds != "sam":
        raise ConfigError(f"{path} holds a SAM-style encoder: choose a --to whose description says SAM (--list)")
    if image_size not in (None, model.config.image_size):
        raise ConfigError(
            f"--image-size: {path} holds a SAM-style encoder for {model.config.image_size}, which is not resized. "
            "Leave it out, or convert the masked autoencoder at that size"
        )


def _load_plain(opened: Opened, fmt: Format, image_size: Size | None) -> Encoder | SamEncoder:
    """Loads a masked autoencoder, encoder or classifier; converts or resizes it for the format.

    Raises ConfigError if the format has no place for it.
    """
    model = load(opened)
    resized = image_size not in (None, model.config.image_size)
    if isinstance(model, Classifier):
        if not fmt.heads or resized:
            raise ConfigError(
                f"{opened.path} holds a fine-tuned classifier, which is exported whole and at its own size: choose "
                "--to timm, timm-folder, hf-vit or facebook, without --image-size. Encoders are exported from the run "
                "that it began with"
            )
        return model
    if fmt.holds == "sam":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the neck is fresh, and the same every time
            return to_sam(model, **({"image_size": image_size} if image_size else {}))
    if fmt.holds == "autoencoder" and (resized or not isinstance(model, MaskedAutoencoder)):
        reason = "a decoder is not resized to another --image-size" if resized else f"{opened.path} holds no decoder"
        raise ConfigError(f"this format is for whole autoencoders, and {reason}: choose a --to for encoders (--list)")
    if resized or fmt.holds == "encoder":
        return at_image_size(model, image_size or model.config.image_size)
    return model
