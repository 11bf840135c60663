"""Loss of distillation: the teacher's tokens on the student's grid, compared by cosine or mean square."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


class Tokens(NamedTuple):
    """Tokens of whole images, as a teacher gives them.

    class_tokens  [B, T, E]     T may be 0
    patches       [B, h, w, E]
    """

    class_tokens: Tensor
    patches: Tensor


def match_grid(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resizes a grid of tokens bilinearly, with antialiasing where it shrinks: [B, h, w, E] -> [B, N, E] float32.

    grid  (rows, columns) of the result, N = rows * columns. The same grid gives the same values
    """
    patches = patches.float()
    if patches.shape[1:3] != grid:
        resized = F.interpolate(
            rearrange(patches, "b h w e -> b e h w"), grid, mode="bilinear", align_corners=False, antialias=True
        )
        patches = rearrange(resized, "b e h w -> b h w e")
    return patches.flatten(1, 2)


def match_class_tokens(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns class tokens to be compared one by one: as they are, or of different numbers the mean of each side."""
    if ours.shape[1] == theirs.shape[1]:
        return ours, theirs
    return ours.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)


def cosine_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """Returns the mean over tokens of 1 - cosine, between 0 and 2: [B, n, E], [B, n, E] -> []."""
    return 1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean()


def token_loss(class_tokens: Tensor, patches: Tensor, target: Tokens, grid: tuple[int, int], ids: Tensor | None):
    """Returns the cosine loss of predicted tokens: the mean of that of class tokens and that of patches.

    class_tokens  [B, T, E]  predicted; patches alone count if student or teacher has no class token
    patches       [B, K, E]  predicted
    grid                     of the student
    ids           [B, K]     numbers of the visible patches, which alone are compared; None: all
    """
    theirs = match_grid(target.patches, grid)
    if ids is not None:
        theirs = theirs.gather(1, ids[..., None].expand(-1, -1, theirs.shape[-1]))
    losses = [cosine_loss(patches, theirs)]
    if class_tokens.shape[1] and target.class_tokens.shape[1]:
        losses.append(cosine_loss(*match_class_tokens(class_tokens, target.class_tokens)))
    return torch.stack(losses).mean()


def embedding_loss(embedding: Tensor, target: Tokens) -> Tensor:
    """Returns the mean squared error of an image embedding [B, E, h, w] (Zhang et al. 2023, MobileSAM, section 3.2)."""
    ours = rearrange(embedding, "b e h w -> b (h w) e").float()
    return F.mse_loss(ours, match_grid(target.patches, (embedding.shape[2], embedding.shape[3])))
