"""Warm start of a student: init_from= of task=distill."""

from pathlib import Path

from mae.distill.student import SamStudent, Student
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import fit_encoder, holds_whole_sam, load_segmenter
from mae.formats.opened import MeanAndDeviation, Opened, open_weights, other_scale
from mae.formats.warm_start import channel_sentence, initialise_from, unsaid_heads
from mae.run.checkpoint_files import Weights
from mae.sam.convert import to_sam
from mae.sam.encoder import SamConfig, SamEncoder

CONVERTED = ("image_size", "patch_size", "window", "global_blocks", "out_channels")  # fields of a SAM-style encoder


def initialise_student(
    model: Student | SamStudent, path: Path, pixels: MeanAndDeviation, weights: Weights | None = None
) -> list[str]:
    """Copies the encoder in `path` into a fresh student of the same architecture; its head stays as it is.

    path     a masked autoencoder, encoder or classifier; for a SAM-style student also a SAM or its encoder
    pixels   mean and deviation of the new run's images, compared with those of the weights
    weights  raw or average, of a checkpoint that holds both
    returns  what was resampled or left out, a sentence each

    Raises CheckpointError or ConfigError naming what does not fit.
    """
    if isinstance(model, Student):
        return initialise_from(model, path, pixels, weights)
    opened, config = open_weights(path, weights=weights), model.config
    source = _load(opened, config)
    given = source.config
    source = fit_encoder(source, config, path)
    model.load_state_dict(source.state_dict())
    said = ["left out: its prompt encoder and mask decoder"] if holds_whole_sam(opened) else []
    if given.image_size != config.image_size:
        sizes = "{} x {} -> {} x {} pixels".format(*given.image_size, *config.image_size)
        said.append(f"images of {sizes}: positions, and relative positions of global blocks, are resized")
    if given.in_channels != config.in_channels:
        said.append(channel_sentence(given.in_channels, config.in_channels))
    return said + other_scale(opened, pixels)


def _load(opened: Opened, config: SamConfig) -> SamEncoder:
    """Loads a SAM-style encoder, or converts a masked autoencoder's to the fields of `config`."""
    if opened.kind == "segmentation":
        return load_segmenter(opened).encoder
    if opened.kind == "sam":
        return load_sam(opened, like=config)
    source = load(opened, decoder_num_heads=1, **unsaid_heads(opened, config))
    return to_sam(source, **{name: getattr(config, name) for name in CONVERTED})
