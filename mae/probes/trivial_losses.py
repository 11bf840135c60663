"""Losses of trivial predictors: baselines that any model which has learned something is below."""

import torch
from einops import rearrange, repeat
from torch import Tensor

from mae.models.config import MAEConfig
from mae.models.loss import normalise_patches, reconstruction_loss
from mae.models.masking import draw_masking
from mae.models.patches import patchify, unpatchify

# Pixels that are interpolated at most, as many as in 64 images of 224 x 224: bounds the time for large images.
MAX_PIXELS = 64 * 224 * 224
# Pixels that are interpolated at a time.
PIXELS_AT_ONCE = 224 * 224


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
    pixels = images[0, 0].numel()
    some, at_once = max(1, min(len(images), MAX_PIXELS // pixels)), max(1, PIXELS_AT_ONCE // pixels)
    pieces = zip(patches[:some].split(at_once), mask[:some].split(at_once), strict=True)
    interpolated = torch.cat([_interpolate(*piece, config) for piece in pieces])
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
    """Interpolates hidden patches from the visible pixels of their image: [B, N, P], [B, N] -> [B(N-K), P].

    By normalised convolution (Knutsson and Westin 1993): the filtered visible pixels over the filtered mask.
    """
    height, width = config.image_size
    visible = repeat(~mask, "b n -> b n q", q=config.patch_size**2)
    seen = patches * repeat(visible, "b n q -> b n (q c)", c=config.in_channels)
    channels = [unpatchify(values.double(), config.patch_size, config.grid) for values in (seen, visible)]
    # Twice the size, so that no pixel reaches another around the border.
    y, x = (torch.fft.fftfreq(2 * n, 0.5 / n, dtype=torch.float64, device=mask.device) for n in (height, width))
    squared_distance = y[:, None].square() + x.square()
    squared_distance[0, 0] = torch.inf
    spectrum = torch.fft.rfft2(torch.cat(channels, 1), (2 * height, 2 * width)) * torch.fft.rfft2(squared_distance**-2)
    filtered = torch.fft.irfft2(spectrum)[..., :height, :width]
    return patchify(filtered[:, :-1] / filtered[:, -1:], config.patch_size)[mask].float()
