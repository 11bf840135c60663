"""What the exporter knows of a foreign format, and what a format is given to write."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from mae.errors import CheckpointError, ConfigError
from mae.formats.pixel_scale import Scale
from mae.models.config import MAEConfig
from mae.models.vit import Encoder
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.segmenter import Segmenter

Need = Literal["a class token", "square images", "three channels", "a decoder of self-attention"]


@dataclass(frozen=True)
class Export:
    """What is exported.

    model       in evaluation mode, on the CPU
    scale       the mean and deviation that the model's images are normalised with
    merge_into  a whole SAM whose encoder is replaced
    segmenter   the whole SAM that `model` is the encoder of
    """

    model: Encoder | SamEncoder
    scale: Scale
    merge_into: Path | None = None
    segmenter: Segmenter | None = None

    @property
    def encoder(self) -> Encoder:
        assert isinstance(self.model, Encoder)
        return self.model

    @property
    def sam(self) -> SamEncoder:
        assert isinstance(self.model, SamEncoder)
        return self.model

    def features(self, images: Tensor) -> Tensor:
        """All tokens of a plain encoder, the image embedding of a SAM-style one."""
        return self.sam(images) if isinstance(self.model, SamEncoder) else self.encoder.encode(images)


class Comparison(NamedTuple):
    """The same question put to the peer and to the source."""

    theirs: Tensor
    ours: Tensor


@dataclass(frozen=True)
class Format:
    """A foreign format: how to write it, and how the peer's own library answers from it.

    sentence  for the list of formats
    suffix    what --out ends in; empty for a folder
    peer      the module that reads the format
    compared  what of the model the comparison covers
    write     (source, path) writes the file or folder, and returns what the card says of how to load it
    answers   (source, path, images [1, C, H, W]) loads it strictly with the peer and runs it; None for a peer that is
              never at hand
    holds     what it has a place for: whole autoencoders, encoders, either, or SAM-style encoders
    read_back `mae.load` or `mae.load_sam` understands it
    heads     it has a place for the head of a classifier too
    merges    a whole SAM can be given, into which the encoder goes
    needs     modules without which it cannot be written
    """

    sentence: str
    suffix: str
    peer: str
    compared: str
    write: Callable[[Export, Path], dict[str, Any]]
    answers: Callable[[Export, Path, Tensor], Iterable[Comparison]] | None
    holds: Literal["autoencoder", "encoder", "either", "sam"] = "encoder"
    read_back: bool = True
    heads: bool = False
    merges: bool = False
    needs: tuple[str, ...] = ()


def require(config: MAEConfig | SamConfig, library: str, *needs: Need) -> None:
    """Raises ConfigError when `library` has no place for such a model."""
    has = {
        "a class token": isinstance(config, SamConfig) or config.class_token,
        "square images": config.image_size[0] == config.image_size[1],
        "three channels": config.in_channels == 3,
        "a decoder of self-attention": isinstance(config, SamConfig) or config.decoder == "self",
    }
    lacking = [need for need in needs if not has[need]]
    if lacking:
        this = config.model_dump_json(include={"class_token", "image_size", "in_channels", "decoder"})
        raise ConfigError(
            f"{library} knows only models with {' and '.join(lacking)}, and this one has {this}: choose another --to"
        )


def refuse_other_keys(peer: str, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Raises CheckpointError naming the keys that are on one side only."""
    sides = {"missing": sorted(missing), "left over": sorted(left_over)}
    complaints = [f"{side}: {', '.join(keys[:8])}" for side, keys in sides.items() if keys]
    if complaints:
        raise CheckpointError(f"{peer}'s model and the export do not have the same keys; {'; '.join(complaints)}")
