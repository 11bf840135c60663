"""The model behind the page: reconstruction, attention and feature of a photograph."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.formats.load import load
from mae.formats.opened import Opened, open_weights, scale_of
from mae.models.attention_maps import attention_weights, rollout
from mae.models.config import MAEConfig, visible_patches
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import draw_masking
from mae.models.noise import uniform_noise
from mae.models.patches import patchify, unpatchify
from mae.models.pixels import Pixels
from mae.models.vit import Encoder
from mae.probes.features import Kind, describe
from mae.run.checkpoint_files import Weights
from mae.train.precision import choose_float32_products


class PhotoReconstruction(NamedTuple):
    """Decoder output for a photograph, in [0, 1].

    predicted  [1, C, H, W]  every patch as predicted
    pasted     [1, C, H, W]  with the visible patches as they are
    loss       on the hidden patches, in the scale of training
    zero_loss  of predicting zero
    """

    predicted: Tensor
    pasted: Tensor
    loss: float
    zero_loss: float


@dataclass(frozen=True)
class DemoModel:
    """A model and the normalisation of its images.

    path     as it was given
    step     of a checkpoint of this project, else None
    encoder  or the whole autoencoder if there is a decoder
    assumed  the normalisation is not on record, ImageNet's is assumed
    bits     of the values that it was trained on, 8 or 16
    """

    path: Path
    step: int | None
    encoder: Encoder | MaskedAutoencoder
    pixels: Pixels
    assumed: bool
    bits: int = 8

    @property
    def config(self) -> MAEConfig:
        return self.encoder.config

    @property
    def decodes(self) -> bool:
        return isinstance(self.encoder, MaskedAutoencoder)

    def images(self, photo: Tensor) -> Tensor:
        """Normalises a photograph uint8 or uint16 [1, C, H, W] on the model's device."""
        return self.pixels.normalise(photo.to(self.pixels.mean.device))

    @torch.no_grad()
    def reconstruct(self, photo: Tensor, mask: Tensor) -> PhotoReconstruction:
        """Reconstructs a photograph uint8 [1, C, H, W] under a mask [N], 1 hidden.

        Raises ConfigError if nothing or everything is hidden.
        """
        model, images = self.encoder, self.images(photo)
        assert isinstance(model, MaskedAutoencoder)
        mask = mask[None].to(images.device)
        out, whole = model(images, mask=mask), model.reconstruct(images, mask=mask)
        predicted = model.in_pixels(whole.pred, patchify(images, self.config.patch_size))
        predicted = unpatchify(predicted, self.config.patch_size, self.config.grid)
        predicted, pasted = (self.pixels.denormalise(one).clamp(0, 1).cpu() for one in (predicted, whole.images))
        return PhotoReconstruction(predicted, pasted, float(out.loss), float(out.target.float().square().mean()))

    @torch.no_grad()
    def attention(self, photo: Tensor, patch: int, block: int | None) -> Tensor:
        """Returns the attention of one patch to all others [h, w], in one block or, if None, through all (rollout)."""
        weights = attention_weights(self.encoder, self.images(photo))[0]
        first = self.config.class_tokens
        rows = rollout(weights) if block is None else weights[block]
        return rows[first + patch, first:].view(self.config.grid).cpu()

    @torch.no_grad()
    def feature(self, photo: Tensor, kind: Kind) -> Tensor:
        """Returns the pooled feature [1, D] of a photograph."""
        return describe(self.encoder.encode(self.images(photo)), self.config.class_tokens, kind).cpu()


def open_model(path: Path, weights: Weights | None = None, *, opened: Opened | None = None, **given: Any) -> DemoModel:
    """Loads the newest checkpoint of a run folder, or whatever `mae.load` reads, onto a GPU if there is one.

    weights  raw or average, of a checkpoint that holds both
    opened   what lies at the path, if it is open already
    given    fields of MAEConfig that the file cannot say, as in `mae.load`

    Raises CheckpointError if there is no model, ConfigError if its images have other channels than a photograph.
    """
    opened = opened or open_weights(path, weights=weights)
    encoder = deepcopy(load(opened, **given))  # the file may be overwritten while the page is open
    channels = encoder.config.in_channels
    if channels not in (1, 3):
        raise ConfigError(
            f"{path} takes images of {channels} channels, and a photograph has one or three: it cannot be shown here. "
            f"python eval.py checkpoint={path} probe=reconstruct shows its own images"
        )
    scale = scale_of(opened, channels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_float32_products(device)
    pixels = Pixels(scale.mean, scale.std).to(device)
    return DemoModel(path, opened.step, encoder.to(device), pixels, assumed=not scale.known, bits=scale.bits)


def max_mask_percent(config: MAEConfig) -> int:
    """Returns the highest mask ratio, in percent, that leaves a patch visible."""
    cells = config.patches // config.mask_cell**2
    return max(percent for percent in range(1, 100) if visible_patches(cells, percent / 100))


def draw_mask(config: MAEConfig, ratio: float, kind: str, seed: int) -> Tensor:
    """Draws a mask [N], 1 hidden, as a pure function of its arguments.

    ratio  share of hidden patches, at most `max_mask_percent`
    """
    cell = config.mask_cell if kind == "random" else 1
    masking = MAEConfig.model_validate(config.model_dump() | {"mask_ratio": ratio, "masking": kind, "mask_cell": cell})
    return draw_masking(uniform_noise(seed, 0, torch.zeros(1, dtype=torch.int64), config.patches), masking).mask[0]
