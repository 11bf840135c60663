"""The interface of a foreign format: what it is given to write, and how its library is asked for a comparison."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from mae.errors import CheckpointError, ConfigError
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.vit import Encoder
from mae.run.checkpoint_files import Weights
from mae.sam.encoder import SamConfig, SamEncoder
from mae.sam.segmenter import Segmenter

Need = Literal["a class token", "one class token", "square images", "three channels", "a decoder of self-attention"]


class Scale(NamedTuple):
    """Mean and deviation per channel in units of 1, the largest value.

    known  the source says so; otherwise those of the paper are assumed
    bits   of the values that the model was trained on, 8 or 16
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    known: bool
    bits: int = 8


@dataclass(frozen=True)
class Export:
    """A model to be exported.

    model       in evaluation mode, on the CPU
    scale       the mean and deviation that the model's images are normalised with
    segmenter   the whole SAM that `model` is the encoder of, if the format has a place for it
    merge_into  the file or folder whose encoder was replaced in `segmenter`
    path, step  the file or folder that it comes from, and the step of an own checkpoint
    weights     raw or average, of a checkpoint that holds both; else None
    half        the weights are written in float16, and computed with
    remarks     what of the source is resized or left out, a sentence each
    """

    model: Encoder | SamEncoder
    scale: Scale
    merge_into: Path | None = None
    segmenter: Segmenter | None = None
    path: Path | None = None
    step: int | None = None
    weights: Weights | None = None
    half: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def encoder(self) -> Encoder:
        assert isinstance(self.model, Encoder)
        return self.model

    @property
    def sam(self) -> SamEncoder:
        assert isinstance(self.model, SamEncoder)
        return self.model

    @property
    def sam_weights(self) -> dict[str, Tensor]:
        """Returns the weights of the whole SAM, or of the encoder alone, under the names of `Segmenter`."""
        if self.segmenter is None:
            return self.sam.state_dict(prefix="encoder.")
        return self.segmenter.state_dict()

    def features(self, images: Tensor) -> Tensor:
        """Returns all tokens of a plain encoder, the image embedding of a SAM-style one."""
        return self.sam(images) if isinstance(self.model, SamEncoder) else self.encoder.encode(images)

    def outputs(self, images: Tensor) -> Tensor:
        """Returns what a graph computes: the scores of a classifier, else the features."""
        return self.model(images) if isinstance(self.model, Classifier) else self.features(images)


class Comparison(NamedTuple):
    """Outputs of the peer and of the exported model for the same input.

    of  what they are, if not what the format says
    """

    theirs: Tensor
    ours: Tensor
    of: str = ""


@dataclass(frozen=True)
class Format:
    """A foreign format: how to write it, and how to compare it with the library that reads it, its peer.

    sentence  for the list of formats
    peer      the module that reads the format
    write     (export, path) writes the file or folder, and returns what the card says of how to load it
    suffix    what --out ends in; empty for a folder
    compare   (export, path, images [1, C, H, W]) loads it strictly with the peer and runs it; None for a peer that is
              never at hand
    compared  the outputs that are compared
    holds     what it has a place for: whole autoencoders, encoders, either, or SAM-style encoders
    read_back `mae.load` or `mae.load_sam` understands it
    heads     it has a place for the head of a classifier too
    halves    it can be written in half precision
    whole_sam it has a place for the prompt encoder and the mask decoder too
    needs     modules without which it cannot be written
    """

    sentence: str
    peer: str
    write: Callable[[Export, Path], dict[str, Any]]
    suffix: str = ""
    compare: Callable[[Export, Path, Tensor], Iterable[Comparison]] | None = None
    compared: str = "features of all tokens"
    holds: Literal["autoencoder", "encoder", "either", "sam"] = "encoder"
    read_back: bool = True
    heads: bool = False
    halves: bool = False
    whole_sam: bool = False
    needs: tuple[str, ...] = ()


def require(config: MAEConfig | SamConfig, library: str, *needs: Need) -> None:
    """Raises ConfigError if `library` has no place for such a model."""
    has = {
        "a class token": isinstance(config, SamConfig) or config.class_tokens > 0,
        "one class token": isinstance(config, SamConfig) or config.class_tokens == 1,
        "square images": config.image_size[0] == config.image_size[1],
        "three channels": config.in_channels == 3,
        "a decoder of self-attention": isinstance(config, SamConfig) or config.decoder == "self",
    }
    lacking = [need for need in needs if not has[need]]
    if lacking:
        this = config.model_dump_json(include={"class_tokens", "image_size", "in_channels", "decoder"})
        raise ConfigError(
            f"{library} knows only models with {' and '.join(lacking)}, and this one has {this}: choose another --to"
        )


def refuse_other_keys(peer: str, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Raises CheckpointError if keys are on one side only, naming them."""
    sides = {"missing": sorted(missing), "left over": sorted(left_over)}
    complaints = [f"{side}: {', '.join(keys[:8])}" for side, keys in sides.items() if keys]
    if complaints:
        raise CheckpointError(f"{peer}'s model and the export do not have the same keys; {'; '.join(complaints)}")
