"""Opening what is to be exported: the model, its size and the scale of its images."""

from pathlib import Path

import torch

from mae.errors import ConfigError
from mae.formats.detect import holds_sam, is_segmentation
from mae.formats.format import Export, Format
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import load_segmenter
from mae.formats.pixel_scale import scale_of
from mae.models.classifier import Classifier
from mae.models.mae import MaskedAutoencoder
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.run.checkpoint_files import newest_valid, read_own
from mae.sam.convert import to_sam
from mae.sam.encoder import SamEncoder

Size = tuple[int, int]


def open_source(path: Path, fmt: Format, image_size: Size | None, merge_into: Path | None) -> tuple[Export, int | None]:
    """The part of the model in `path` that the format holds, and the step of an own checkpoint.

    path        a file, or the folder of another library
    image_size  what the export is for; None: the size of the source, or SAM's 1024 for a converted encoder

    Raises CheckpointError when there is no model, ConfigError when the format needs another one.
    """
    run = read_own(path)["mae"] if path.suffix == ".ckpt" else None
    whole = load_segmenter(path) if is_segmentation(path) else None
    if whole is not None:
        if whole.relevance is not None:
            raise ConfigError(f"{path} was trained with task.relevance=true: no other library has its gate")
        model = _fixed_size(whole.encoder, path, fmt, image_size)
    else:
        model = _sam(path, fmt, image_size) if holds_sam(path) else _plain(path, fmt, image_size)
    scale = scale_of(path, run["recipe"] if run else None, model.config.in_channels)
    return Export(model.eval(), scale, merge_into, whole), run["step"] if run else None


def checkpoint_of(path: Path) -> Path:
    """The newest checkpoint of a run folder; any other path as it is."""
    return (newest_valid(path) or path) if path.is_dir() else path


def _sam(path: Path, fmt: Format, image_size: Size | None) -> SamEncoder:
    return _fixed_size(load_sam(path), path, fmt, image_size)


def _fixed_size(model: SamEncoder, path: Path, fmt: Format, image_size: Size | None) -> SamEncoder:
    if fmt.holds != "sam":
        raise ConfigError(f"{path} holds a SAM-style encoder: choose a --to whose description says SAM (--list)")
    if image_size not in (None, model.config.image_size):
        raise ConfigError(
            f"--image-size: {path} holds a SAM-style encoder for {model.config.image_size}, which is not resized. "
            "Leave it out, or convert the masked autoencoder at that size"
        )
    return model


def _plain(path: Path, fmt: Format, image_size: Size | None) -> Encoder | SamEncoder:
    model = load(path)
    if isinstance(model, Classifier):
        if not fmt.heads or image_size not in (None, model.config.image_size):
            raise ConfigError(
                f"{path} holds a fine-tuned classifier, which is exported whole and at its own size: choose --to timm "
                "or facebook, without --image-size. Encoders are exported from the run that it began with"
            )
        return model
    if fmt.holds == "sam":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the neck is fresh, and the same every time
            return to_sam(model, **({"image_size": image_size} if image_size else {}))
    resized = image_size not in (None, model.config.image_size)
    if fmt.holds == "autoencoder" and (resized or not isinstance(model, MaskedAutoencoder)):
        reason = "a decoder is not resized to another --image-size" if resized else f"{path} holds no decoder"
        raise ConfigError(f"this format is for whole autoencoders, and {reason}: choose a --to for encoders (--list)")
    if resized or fmt.holds == "encoder":
        return at_image_size(model, image_size or model.config.image_size)
    return model
