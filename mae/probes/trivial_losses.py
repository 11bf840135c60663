"""Losses of trivial predictors: baselines that any model which has learned something is below."""

import torch
from einops import rearrange
from torch import Tensor

from mae.models.config import MAEConfig
from mae.models.loss import normalise_patches, reconstruction_loss
from mae.models.masking import draw_masking
from mae.models.patches import patchify

# Weights between hidden and visible pixels that are worked out at most: bounds the time for large images.
MAX_WEIGHTS = 1_000_000_000
# Hidden pixels whose weights are held at a time: 50 MB at 224.
PIXELS_AT_ONCE = 1024


@torch.no_grad()
def trivial_losses(images: Tensor, noise: Tensor, config: MAEConfig) -> dict[str, float]:
    """Computes the losses of predictors without parameters under the masks of `noise`, in units of the model's loss.

    images   [B, C, H, W]  normalised
    noise    [B, N]
    returns  with norm_pix: "predict 0", "scaled interpolation"; without: "data set mean", "mean of the visible",
             "interpolation". Interpolation weights every visible pixel by the inverse fourth power of its distance;
             under norm_pix its result is scaled by the one factor that fits best
    """
    mask = draw_masking(noise, config).mask.bool()
    patches = patchify(images, config.patch_size)
    hidden_pixels = config.patches * config.patch_size**2 - config.visible * config.patch_size**2
    weights = hidden_pixels * config.visible * config.patch_size**2
    some = max(1, min(len(images), MAX_WEIGHTS // weights))
    interpolated = torch.cat([_interpolate(p, m, config) for p, m in zip(patches[:some], mask[:some], strict=True)])
    target, some_target = patches[mask], patches[:some][mask[:some]]
    if config.norm_pix:
        target, some_target = normalise_patches(target), normalise_patches(some_target)
        interpolated = normalise_patches(interpolated)
        interpolated *= (interpolated * some_target).sum() / interpolated.square().sum()
        return {
            "predict 0": float(target.square().mean()),
            "scaled interpolation": float(reconstruction_loss(interpolated, some_target)),
        }
    visible_mean = rearrange(patches[~mask], "(b k) (q c) -> b (k q) c", b=len(images), c=config.in_channels).mean(1)
    mean_patch = visible_mean.repeat(1, config.patch_size**2).repeat_interleave(config.patches - config.visible, dim=0)
    return {
        "data set mean": float(target.square().mean()),
        "mean of the visible": float(reconstruction_loss(mean_patch, target)),
        "interpolation": float(reconstruction_loss(interpolated, some_target)),
    }


def _interpolate(patches: Tensor, mask: Tensor, config: MAEConfig) -> Tensor:
    """Interpolates the hidden patches of one image from its visible pixels: [N, P], [N] -> [N-K, P]."""
    height, width = config.image_size
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
    places = patchify(places[None].to(patches.device), config.patch_size)[0]  # [N, p*p*2]
    seen_at = rearrange(places[~mask], "n (q d) -> (n q) d", d=2)
    seen = rearrange(patches[~mask], "n (q c) -> (n q) c", c=config.in_channels)
    predicted = []
    for pixels in rearrange(places[mask], "n (q d) -> (n q) d", d=2).split(PIXELS_AT_ONCE):
        weight = torch.cdist(pixels, seen_at).pow(-4)
        predicted.append(weight @ seen / weight.sum(1, keepdim=True))
    return rearrange(torch.cat(predicted), "(n q) c -> n (q c)", q=config.patch_size**2)
