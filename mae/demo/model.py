"""The model behind the page: opened once, asked for masks, pictures, attention and features."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.formats.load import load
from mae.formats.opened import open_weights, scale_of
from mae.models.attention_maps import attention_weights, rollout
from mae.models.config import MAEConfig, visible_patches
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import draw_masking
from mae.models.noise import uniform_noise
from mae.models.patches import patchify, unpatchify
from mae.models.pixels import Pixels
from mae.models.vit import Encoder, choose_attention
from mae.probes.features import Kind, describe
from mae.train.precision import choose_float32_products


class Painted(NamedTuple):
    """What the decoder makes of a photograph, in [0, 1].

    predicted  [1, C, H, W]  every patch as predicted
    pasted     [1, C, H, W]  with the visible patches as they are
    loss       on the hidden patches, in the scale of the training
    zero       the loss of predicting zero
    """

    predicted: Tensor
    pasted: Tensor
    loss: float
    zero: float


@dataclass(frozen=True)
class DemoModel:
    """A model for photographs, and their scale.

    path    as it was given
    step    of an own checkpoint
    assumed nobody says what the images were normalised with: the paper's values are taken
    """

    path: Path
    step: int | None
    encoder: Encoder | MaskedAutoencoder
    pixels: Pixels
    assumed: bool

    @property
    def config(self) -> MAEConfig:
        return self.encoder.config

    @property
    def decodes(self) -> bool:
        return isinstance(self.encoder, MaskedAutoencoder)

    def images(self, photo: Tensor) -> Tensor:
        """uint8 [1, C, H, W] as the encoder wants it, where the encoder is."""
        return self.pixels.normalise(photo.to(self.pixels.mean.device))

    @torch.no_grad()
    def paint(self, photo: Tensor, mask: Tensor) -> Painted:
        """The reconstruction of a photograph uint8 [1, C, H, W] under a mask [N], 1 hidden.

        Raises ConfigError where nothing or everything is hidden.
        """
        model, images = self.encoder, self.images(photo)
        assert isinstance(model, MaskedAutoencoder)
        mask = mask[None].to(images.device)
        out, whole = model(images, mask=mask), model.reconstruct(images, mask=mask)
        predicted = model.in_pixels(whole.pred, patchify(images, self.config.patch_size))
        predicted = unpatchify(predicted, self.config.patch_size, self.config.grid)
        predicted, pasted = (self.pixels.denormalise(one).clamp(0, 1).cpu() for one in (predicted, whole.images))
        return Painted(predicted, pasted, float(out.loss), float(out.target.float().square().mean()))

    @torch.no_grad()
    def attention(self, photo: Tensor, patch: int, block: int | None) -> Tensor:
        """What a patch of a photograph attends to, [h, w]: in one block, or through all of them (rollout)."""
        weights = attention_weights(self.encoder, self.images(photo))[0]
        first = int(self.config.class_token)
        looking = rollout(weights) if block is None else weights[block]
        return looking[first + patch, first:].view(self.config.grid).cpu()

    @torch.no_grad()
    def feature(self, photo: Tensor, kind: Kind) -> Tensor:
        """[1, D]"""
        return describe(self.encoder.encode(self.images(photo)), self.config.class_token, kind).cpu()


def open_model(path: Path) -> DemoModel:
    """The model in a run folder (its newest checkpoint), or in whatever `mae.load` reads, on a GPU where there is one.

    Raises CheckpointError when there is none, ConfigError when it takes no photographs.
    """
    opened = open_weights(path)
    encoder = deepcopy(load(opened))  # the file may be overwritten while the page is open
    channels = encoder.config.in_channels
    if channels not in (1, 3):
        raise ConfigError(
            f"{path} takes images of {channels} channels, and a photograph has one or three: it cannot be shown here. "
            f"python eval.py checkpoint={path} probe=reconstruct shows its own images"
        )
    scale = scale_of(opened, channels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_float32_products(device)
    choose_attention(encoder.blocks, device=device)
    if isinstance(encoder, MaskedAutoencoder):
        choose_attention(encoder.decoder_blocks, device=device)
    pixels = Pixels(scale.mean, scale.std).to(device)
    return DemoModel(path, opened.step, encoder.to(device), pixels, assumed=not scale.known)


def most_hidden(config: MAEConfig) -> int:
    """The highest mask ratio, in percent, that leaves a patch visible."""
    return max(percent for percent in range(1, 100) if visible_patches(config.patches, percent / 100))


def draw_mask(config: MAEConfig, ratio: float, kind: str, seed: int) -> Tensor:
    """A mask [N], 1 hidden; the same for the same arguments.

    ratio  share of the patches that are hidden, at most `most_hidden` percent
    """
    as_drawn = MAEConfig.model_validate(config.model_dump() | {"mask_ratio": ratio, "masking": kind})
    return draw_masking(uniform_noise(seed, 0, torch.zeros(1, dtype=torch.int64), config.patches), as_drawn).mask[0]
