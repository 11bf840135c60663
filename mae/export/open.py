"""Step 1 of an export: opens a run or file once and loads the model that the format holds."""

from pathlib import Path
from typing import Any

import torch

from mae.errors import CheckpointError, ConfigError
from mae.formats.format import Export, Format
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import holds_whole_sam, load_segmenter
from mae.formats.opened import Opened, open_weights, scale_of
from mae.models.classifier import Classifier
from mae.models.mae import MaskedAutoencoder
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.run.checkpoint_files import Weights
from mae.sam.convert import to_sam
from mae.sam.encoder import SamEncoder
from mae.sam.segmenter import Segmenter

Size = tuple[int, int]
SAM_FIELDS = ("global_blocks", "window", "out_channels")  # of the encoder that a masked autoencoder is converted to


def open_export(
    path: Path,
    fmt: Format,
    image_size: Size | None,
    merge_into: Path | None,
    *,
    encoder_only: bool = False,
    half: bool = False,
    weights: Weights | None = None,
    given: dict[str, Any] | None = None,
) -> Export:
    """Loads the part of the model in `path` that the format holds.

    path          a run folder, a file, or the folder of another library
    image_size    what the export is for; None: the model's own, or SAM's 1024 for a converted encoder
    merge_into    a whole SAM of any library, whose encoder is replaced
    encoder_only  leave out the prompt encoder and mask decoder of a whole SAM
    half          whether it is written in float16
    weights       raw or average, of a checkpoint that holds both
    given         fields of MAEConfig or SamConfig that the file cannot say

    Raises CheckpointError if there is no model, ConfigError if the format needs another one.
    """
    opened, given = open_weights(path, weights=weights), given or {}
    whole, segmenter = holds_whole_sam(opened), None
    if encoder_only and not whole:
        raise ConfigError(f"--encoder-only: {opened.path} holds no whole SAM whose other parts could be left out")
    if opened.kind == "mae":
        of_sam = {name: given[name] for name in given if fmt.holds == "sam" and name in SAM_FIELDS}
        source = load(opened, **{name: value for name, value in given.items() if name not in of_sam})
        model, remarks = _fit_plain(source, opened, fmt, image_size, of_sam)
    else:
        encoder_only = encoder_only or merge_into is not None or not fmt.whole_sam
        source, segmenter = _load_sam(opened, given, encoder_only=encoder_only)
        model, remarks = _fit_sam(source, opened.path, fmt, image_size)
        if whole and segmenter is None:
            remarks.append("the prompt encoder and the mask decoder are left out")
        if segmenter is not None and model is not source:
            height, width = model.config.image_size
            segmenter = segmenter.at(height) if height == width else None  # formats of whole SAMs want square images
            model = segmenter.encoder if segmenter is not None else model
    if merge_into is not None:
        assert isinstance(model, SamEncoder)
        segmenter = _replace_encoder(merge_into, model)
    scale = scale_of(opened, model.config.in_channels)
    return Export(
        model.eval(), scale, merge_into, segmenter, opened.path, opened.step, opened.taken, half, tuple(remarks)
    )


def _load_sam(opened: Opened, given: dict[str, Any], *, encoder_only: bool) -> tuple[SamEncoder, Segmenter | None]:
    """Loads a SAM-style encoder, and the whole SAM that it is part of, unless the encoder alone is wanted.

    Raises ConfigError or CheckpointError, with the way to the encoder, if another part is no SAM's.
    """
    if opened.kind != "segmentation" and (encoder_only or not holds_whole_sam(opened)):
        return load_sam(opened, **given), None
    try:
        segmenter = load_segmenter(opened, **given)
    except (CheckpointError, ConfigError) as error:
        way_out = "" if opened.kind == "segmentation" else ". Its encoder alone: --encoder-only"
        raise type(error)(f"{error}{way_out}") from error
    if segmenter.relevance is not None:
        raise ConfigError(f"{opened.path} was trained with task.relevance=true: no other library has its gate")
    return segmenter.encoder, None if encoder_only else segmenter


def _replace_encoder(merge_into: Path, encoder: SamEncoder) -> Segmenter:
    """Returns the whole SAM in `merge_into` with another encoder.

    Raises CheckpointError naming what differs if its own encoder is of another architecture.
    """
    whole = load_segmenter(merge_into, like=encoder.config)
    theirs, ours = whole.encoder.config.model_dump(), encoder.config.model_dump()
    if differing := [f"{name} {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]:
        raise CheckpointError(f"{merge_into} has an image encoder of another architecture: {'; '.join(differing)}")
    whole.encoder = encoder
    return whole.eval()


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
    model: Encoder, opened: Opened, fmt: Format, image_size: Size | None, of_sam: dict[str, Any]
) -> tuple[Encoder | SamEncoder, list[str]]:
    """Converts or resizes a masked autoencoder, encoder or classifier for the format, and says what was left out.

    of_sam  fields of SamConfig for a conversion to one

    Raises ConfigError if the format has no place for it.
    """
    resized = image_size not in (None, model.config.image_size)
    remarks = []
    if isinstance(model, Classifier) and not fmt.heads:
        remarks.append(f"the head of {model.classes} classes is left out, for which the format has no place")
    if fmt.holds == "sam":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the neck is fresh, and the same every time
            return to_sam(model, **of_sam, **({"image_size": image_size} if image_size else {})), remarks
    if fmt.holds == "autoencoder" and (resized or not isinstance(model, MaskedAutoencoder)):
        reason = f"{opened.path} holds no decoder"
        if resized:
            reason = "a decoder is not resized to another --image-size"
        elif opened.taken == "average" and not isinstance(model, Classifier):
            reason = f"the average in {opened.path} is one of the encoder alone (--weights raw has the decoder)"
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
