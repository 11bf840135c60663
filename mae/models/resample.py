"""Resampling of weights: positions for another grid of patches, the projection for another patch size."""

import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mae.errors import ConfigError, first_sentence
from mae.models.config import MAEConfig
from mae.models.vit import Encoder


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


def at_image_size(encoder: Encoder, image_size: int | tuple[int, int]) -> Encoder:
    """Returns the encoder for images of another size: the same weights, positions resized bicubically.

    The result has `positions: learned`, since resized sine-cosine positions are not the table of the new grid.

    Raises ConfigError if the size is not a multiple of the patch size.
    """
    try:
        config = MAEConfig.model_validate(encoder.config.model_dump() | {"image_size": image_size})
    except ValidationError as error:
        raise ConfigError(first_sentence(error)) from error
    state = encoder.state_dict()
    if config.grid != encoder.config.grid:
        config = config.model_copy(update={"positions": "learned"})
        positions = resize_positions(grid_of_positions(encoder), config.grid).flatten(1, 2)
        state["pos_embed"] = torch.cat([encoder.pos_embed.detach()[:, : int(config.class_token)], positions], dim=1)
    with torch.device("meta"):
        resized = Encoder(config)
    resized.load_state_dict({key: state[key].clone() for key in resized.state_dict()}, assign=True)
    return resized.train(encoder.training)


def grid_of_positions(encoder: Encoder) -> Tensor:
    """Returns the positions of the patches, without the class token's: [1, h, w, D]."""
    positions = encoder.pos_embed.detach()[:, int(encoder.config.class_token) :]
    return rearrange(positions, "one (h w) d -> one h w d", h=encoder.config.grid[0])
