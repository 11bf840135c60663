"""Step 1 of an export: opens a run or file once and loads the model that the format holds."""

from pathlib import Path

import torch

from mae.errors import ConfigError
from mae.formats.format import Export, Format
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import open_weights, scale_of
from mae.models.classifier import Classifier
from mae.models.mae import MaskedAutoencoder
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.sam.convert import to_sam
from mae.sam.encoder import SamEncoder

Size = tuple[int, int]


def open_export(
    path: Path, fmt: Format, image_size: Size | None, merge_into: Path | None, half: bool = False
) -> Export:
    """Loads the part of the model in `path` that the format holds.

    path        a run folder, a file, or the folder of another library
    image_size  what the export is for; None: the model's own, or SAM's 1024 for a converted encoder
    half        whether it is written in float16

    Raises CheckpointError if there is no model, ConfigError if the format needs another one.
    """
    opened = open_weights(path)
    segmenter = load_segmenter(opened) if opened.kind == "segmentation" else None
    if segmenter is not None and segmenter.relevance is not None:
        raise ConfigError(f"{opened.path} was trained with task.relevance=true: no other library has its gate")
    if opened.kind == "mae":
        source = load(opened)
        model, remarks = _fit_plain(source, opened.path, fmt, image_size)
    else:
        source = segmenter.encoder if segmenter is not None else load_sam(opened)
        model, remarks = _fit_sam(source, opened.path, fmt, image_size)
        if segmenter is not None and model is not source:
            height, width = model.config.image_size
            segmenter = segmenter.at(height) if height == width else None  # formats of whole SAMs want square images
    scale = scale_of(opened, model.config.in_channels)
    return Export(model.eval(), scale, merge_into, segmenter, opened.path, opened.step, half, tuple(remarks))


def _fit_sam(model: SamEncoder, path: Path, fmt: Format, image_size: Size | None) -> tuple[SamEncoder, list[str]]:
    """Resizes a SAM-style encoder. Raises ConfigError if the format is not for one."""
    if fmt.holds != "sam":
        raise ConfigError(f"{path} holds a SAM-style encoder: choose a --to whose description says SAM (--list)")
    if image_size in (None, model.config.image_size):
        return model, []
    return model.at(image_size), [
        "positions, and relative positions of global blocks, are resized from {} x {} pixels".format(
            *model.config.image_size
        )
    ]


def _fit_plain(
    model: Encoder, path: Path, fmt: Format, image_size: Size | None
) -> tuple[Encoder | SamEncoder, list[str]]:
    """Converts or resizes a masked autoencoder, encoder or classifier for the format, and says what was left out.

    Raises ConfigError if the format has no place for it.
    """
    resized = image_size not in (None, model.config.image_size)
    remarks = []
    if isinstance(model, Classifier) and not fmt.heads:
        remarks.append(f"the head of {model.classes} classes is left out, for which the format has no place")
    if fmt.holds == "sam":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the neck is fresh, and the same every time
            return to_sam(model, **({"image_size": image_size} if image_size else {})), remarks
    if fmt.holds == "autoencoder" and (resized or not isinstance(model, MaskedAutoencoder)):
        reason = "a decoder is not resized to another --image-size" if resized else f"{path} holds no decoder"
        raise ConfigError(f"this format is for whole autoencoders, and {reason}: choose a --to for encoders (--list)")
    if resized:
        remarks.append("positions are resized bicubically from {} x {} pixels".format(*model.config.image_size))
    if isinstance(model, Classifier):
        return (model.at(image_size) if resized else model), remarks
    if resized or fmt.holds == "encoder":
        if isinstance(model, MaskedAutoencoder) and fmt.holds == "either":
            remarks.append("the decoder is left out: it keeps the size that it was trained at")
        return at_image_size(model, image_size or model.config.image_size), remarks
    return model, remarks
