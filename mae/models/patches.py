"""Patchify and back. Values inside a patch are ordered (row, column, channel), as in the published weights."""

import torch
from einops import rearrange
from torch import Tensor

from mae.errors import ConfigError


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patches, row by row.

    images   [B, C, H, W]  H and W multiples of the patch size
    returns  [B, N, p*p*C]
    """
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Puts patches together to images, the inverse of `patchify`.

    patches  [B, N, p*p*C]  N = grid rows x grid columns
    returns  [B, C, H, W]
    """
    h, w = grid
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=patch_size, q=patch_size)


def require_images(images: Tensor, channels: int, dtype: torch.dtype) -> None:
    """Raises ConfigError unless images are [B, C, H, W] with a model's channels and of its dtype (autocast: any float).

    Equal numbers of patches hide a wrong size, and broadcasting hides missing channels: neither is an error of torch.
    """
    shape = tuple(images.shape)
    if images.ndim != 4:
        way_out = ": add the batch as images[None]" if images.ndim == 3 else ""
        raise ConfigError(
            f"images have the shape {shape}, and the model takes [batch, channels, height, width]{way_out}"
        )
    if shape[1] != channels:
        if shape[3] == channels:
            raise ConfigError(f"images have the shape {shape}, with the channels last: use images.permute(0, 3, 1, 2)")
        grey = f"repeat grey images (images.expand(-1, {channels}, -1, -1)), or " if shape[1] == 1 else ""
        raise ConfigError(
            f"images have {shape[1]} channels, and the model takes {channels}: {grey}"
            f"convert the weights with model.at(in_channels={shape[1]})"
        )
    if not images.is_floating_point():
        raise ConfigError(
            f"images are {images.dtype}, and the model takes normalised floats: subtract the mean and divide by the "
            "deviation of its training images, times 255 for bytes"
        )
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        raise ConfigError(
            f"images are {images.dtype}, and the weights {dtype}: use images.to({dtype}), or torch.autocast"
        )


def require_size(images: Tensor, image_size: tuple[int, int], patch_size: int) -> None:
    """Raises ConfigError unless images [B, C, H, W] are of the model's size, (height, width)."""
    height, width = images.shape[-2:]
    if (height, width) == image_size:
        return
    way_out = "resize them"
    if height % patch_size == width % patch_size == 0:
        way_out = f"resize them, or take model.at(({height}, {width})), whose positions are interpolated"
    raise ConfigError(
        f"images are {height} x {width} pixels, and the model is for {image_size[0]} x {image_size[1]} (height x "
        f"width): {way_out}"
    )


def interpolate_hidden(values: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolates values of hidden patches from all visible ones, by the inverse fourth power of the distance.

    values  [B, N, D];  mask  [B, N], 1 hidden
    """
    places = torch.cartesian_prod(*(torch.arange(n, dtype=values.dtype, device=values.device) for n in grid))
    weights = torch.cdist(places, places).pow(-4).fill_diagonal_(0) * (1 - mask[:, None])
    return torch.where(mask[..., None].bool(), weights @ values / weights.sum(-1, keepdim=True), values)
