"""Patchify and back. Values inside a patch are ordered (row, column, channel), as in the published weights."""

from einops import rearrange
from torch import Tensor


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
