"""Resampling of weights for images of another size, for other patches, and for other channels."""

from typing import Any, TypeVar

import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mae.errors import ConfigError, first_sentence
from mae.models.config import MAEConfig
from mae.models.vit import Encoder

Model = TypeVar("Model", bound=Encoder)
POSITIONS = ("pos_embed", "decoder_pos_embed")


def resample(model: Model, given: dict[str, Any]) -> Model:
    """Returns a copy of a model for other images: `given` replaces image_size, patch_size or in_channels of its config.

    If the grid of patches is another one the result has `positions: learned`, since resized sine-cosine positions are
    not the table of the new grid.

    Raises ConfigError if the fields do not fit together.
    """
    before = model.config
    try:
        after = MAEConfig.model_validate(before.model_dump() | given)
    except ValidationError as error:
        raise ConfigError(first_sentence(error)) from error
    if after.grid != before.grid:
        after = after.model_copy(update={"positions": "learned"})
    with torch.device("meta"):
        resampled = model.like(after)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name in POSITIONS:
        if name in state:
            state[name] = _resize_table(state[name], before, after)
    embedding = resize_projection(state["patch_embed.proj.weight"], after.patch_size)
    state["patch_embed.proj.weight"] = convert_channels(embedding, after.in_channels)
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in state:
            state[name] = resize_prediction(state[name], before, after)
    resampled.load_state_dict({key: value.contiguous() for key, value in state.items()}, assign=True)
    return resampled.train(model.training)


def at_image_size(encoder: Encoder, image_size: int | tuple[int, int]) -> Encoder:
    """Returns the encoder alone, without a decoder, for images of another size: see `Encoder.at`."""
    config = encoder.config
    if config.image_size != image_size and config.image_size != (image_size, image_size):
        config = config.model_copy(update={"mask_cell": 1})  # which hides nothing: cells need not divide its grid
    with torch.device("meta"):
        alone = Encoder(config)
    state = encoder.state_dict()
    alone.load_state_dict({key: state[key] for key in alone.state_dict()}, assign=True)
    return alone.train(encoder.training).at(image_size)


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resizes a grid of positions bicubically with antialiasing: [1, h, w, D] -> [1, *grid, D].

    Returns the same tensor if the grid is the same.
    """
    if positions.shape[1:3] == grid:
        return positions
    channels_first = rearrange(positions, "one h w d -> one d h w").float()
    resized = F.interpolate(channels_first, grid, mode="bicubic", align_corners=False, antialias=True)
    return rearrange(resized, "one d h w -> one h w d").to(positions.dtype)


def resize_projection(weight: Tensor, patch_size: int) -> Tensor:
    """Resizes the patch projection by the pseudo-inverse: [D, C, p, p] -> [D, C, patch_size, patch_size].

    A resized patch gives the token of the original one: exactly if patches grow, by least squares if they shrink (Beyer
    et al. 2023, FlexiViT, section 3.4). The resize R x Rᵀ of a patch x is the same along rows and columns, so its
    pseudo-inverse is one small matrix used twice.
    """
    before = weight.shape[-1]
    if before == patch_size:
        return weight
    resize = F.interpolate(
        torch.eye(before)[None, None], (patch_size, before), mode="bicubic", align_corners=False, antialias=True
    )[0, 0]
    inverse = torch.linalg.pinv(resize.double().T)
    return (inverse @ weight.double() @ inverse.T).to(weight.dtype)


def convert_channels(weight: Tensor, channels: int) -> Tensor:
    """Converts a patch projection to images of other channels: [D, C, p, p] -> [D, channels, p, p].

    To one channel the weights are summed: a grey image gives the tokens of its copies. Several channels take the
    weights of the former ones in turn, times C/channels, so that tokens keep their scale (timm does the same).
    """
    before = weight.shape[1]
    if before == channels:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [channel % before for channel in range(channels)]] * (before / channels)


def resize_prediction(values: Tensor, before: MAEConfig, after: MAEConfig) -> Tensor:
    """Resizes the layer that predicts patches, so that it predicts the resized ones: [p*p*C, ...] -> [p'*p'*C', ...].

    Rows of weights and biases are pictures of a patch: they are resized bicubically, as patches are. One channel is the
    mean of the former ones; several repeat them in turn.
    """
    p, channels = before.patch_size, after.in_channels
    pictures = rearrange(values.reshape(before.patch_values, -1), "(p q c) d -> d c p q", p=p, q=p)
    if after.patch_size != p:
        side = (after.patch_size, after.patch_size)
        pictures = F.interpolate(pictures.float(), side, mode="bicubic", align_corners=False, antialias=True)
    if channels == 1:
        pictures = pictures.mean(dim=1, keepdim=True)
    elif channels != before.in_channels:
        pictures = pictures[:, [channel % before.in_channels for channel in range(channels)]]
    flat = rearrange(pictures, "d c p q -> (p q c) d")
    return flat.reshape(-1, *values.shape[1:]).to(values.dtype)


def grid_of_positions(encoder: Encoder) -> Tensor:
    """Returns the positions of the patches, without the class token's: [1, h, w, D]."""
    positions = encoder.pos_embed.detach()[:, encoder.config.class_tokens :]
    return rearrange(positions, "one (h w) d -> one h w d", h=encoder.config.grid[0])


def _resize_table(table: Tensor, before: MAEConfig, after: MAEConfig) -> Tensor:
    """Resizes positions [1, 1+N, D], of which the class token's stays."""
    class_tokens, patches = table[:, : before.class_tokens], table[:, before.class_tokens :]
    patches = rearrange(patches, "one (h w) d -> one h w d", h=before.grid[0])
    return torch.cat([class_tokens, resize_positions(patches, after.grid).flatten(1, 2)], dim=1)
