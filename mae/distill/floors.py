"""Losses of trivial predictors in distillation: what a student reaches that has not looked at the image."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.distill.loss import Tokens, match_grid


def trivial_cosine_losses(batches: Iterable[Tokens], grid: tuple[int, int], class_tokens: int) -> dict[str, float]:
    """Returns the losses, as in `token_loss`, of the best constant tokens.

    "one token" has one class token and one patch for all images and places, "mean of each place" a patch for each
    place. The constant with the highest mean cosine to some vectors is the mean of their directions, and that cosine is
    its length.

    batches       the teacher's tokens
    grid          of the student
    class_tokens  T of the student
    """
    patches, firsts, images = torch.zeros(()), torch.zeros(()), 0
    for target in batches:
        theirs = target.class_tokens.float()
        if theirs.shape[1] != class_tokens:
            theirs = theirs.mean(dim=1, keepdim=True)[:, : min(class_tokens, theirs.shape[1])]
        patches = patches + _directions(match_grid(target.patches, grid))
        firsts = firsts + _directions(theirs)
        images += len(theirs)
    of_class = (1 - (firsts / images).norm(dim=-1)).tolist()
    of_class = [sum(of_class) / len(of_class)] if of_class else []
    places = patches / images
    losses = {
        "one token": 1 - float(places.mean(dim=0).norm()),
        "mean of each place": 1 - float(places.norm(dim=-1).mean()),
    }
    return {name: (loss + sum(of_class)) / (1 + len(of_class)) for name, loss in losses.items()}


def trivial_embedding_losses(batches: Iterable[Tokens], grid: tuple[int, int]) -> dict[str, float]:
    """Returns the mean squared errors, as in `embedding_loss`, of an embedding of zeros and of the best constant ones.

    batches  the teacher's tokens
    grid     of the student
    """
    sums, squares, images = torch.zeros(()), torch.zeros(()), 0
    for target in batches:
        theirs = match_grid(target.patches, grid).double().cpu()
        sums, squares = sums + theirs.sum(dim=0), squares + theirs.square().mean(dim=(1, 2)).sum()
        images += len(theirs)
    means, square = sums / images, float(squares) / images
    return {
        "predict 0": square,
        "one token": square - float(means.mean(dim=0).square().mean()),
        "mean of each place": square - float(means.square().mean()),
    }


def _directions(tokens: Tensor) -> Tensor:
    """Sums the directions of tokens over images: [B, n, E] -> [n, E] float64."""
    return F.normalize(tokens.double().cpu(), dim=-1).sum(dim=0)
