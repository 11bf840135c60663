"""Losses of trivial predictors: baselines that any model which has learned something is below."""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from mae.models.config import MAEConfig
from mae.models.loss import normalise_patches
from mae.models.masking import draw_masking
from mae.models.patches import patchify, unpatchify

# Pixels that are looked at together: bounds the memory, whatever the size and number of the images.
PIXELS_AT_ONCE = 224 * 224
# Distance up to which weights are summed directly. They are most of the sum: in float32 their rounding would drown the
# weights of distant pixels in a Fourier transform.
NEAR = 3


@torch.no_grad()
def trivial_losses(
    images: Tensor, noise: Tensor, config: MAEConfig, normalise: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Computes the losses of predictors without parameters under the masks of `noise`, in units of the model's loss.

    images     [B, C, H, W]  normalised, or as `normalise` takes them, which is called on a few at a time
    noise      [B, N]
    returns    with norm_pix: "predict 0", "scaled interpolation"; without: "data set mean", "mean of the visible",
               "interpolation". Interpolation weights every visible pixel by the inverse fourth power of its distance;
               under norm_pix its result is scaled by the one factor that fits best
    """
    at_once = max(1, PIXELS_AT_ONCE // images[0, 0].numel())
    sums = torch.zeros(5, dtype=torch.float64)
    for some, of_some in zip(images.split(at_once), noise.split(at_once), strict=True):
        normalised = some if normalise is None else normalise(some)
        sums += _sums(normalised, of_some.to(normalised.device), config).cpu()
    squares, mean_errors, interpolated, products, values = sums.tolist()
    if config.norm_pix:
        best = squares - products**2 / interpolated if interpolated else squares
        return {"predict 0": squares / values, "scaled interpolation": best / values}
    return {
        "data set mean": squares / values,
        "mean of the visible": mean_errors / values,
        "interpolation": (squares - 2 * products + interpolated) / values,
    }


def _sums(images: Tensor, noise: Tensor, config: MAEConfig) -> Tensor:
    """Sums over the values of hidden patches, from which all losses follow.

    returns  [5]  squares of the target, squared errors of the visible pixels' mean, squares of the interpolation,
                  products of both, number
    """
    mask = draw_masking(noise, config).mask.bool()
    patches = patchify(images, config.patch_size)
    target, interpolated = patches[mask], _interpolate(patches, mask, config)
    mean = rearrange(patches[~mask], "(b k) (q c) -> b (k q) c", b=len(images), c=config.in_channels).mean(1)
    mean_patch = mean.repeat(1, config.patch_size**2).repeat_interleave(config.patches - config.visible, dim=0)
    if config.norm_pix:
        target, interpolated = normalise_patches(target), normalise_patches(interpolated)
    target, interpolated, error = target.double(), interpolated.double(), (mean_patch - target).double()
    sums = target.square().sum(), error.square().sum(), interpolated.square().sum(), (interpolated * target).sum()
    return torch.stack([*sums, torch.tensor(target.numel(), dtype=torch.float64, device=target.device)])


def _interpolate(patches: Tensor, mask: Tensor, config: MAEConfig) -> Tensor:
    """Interpolates hidden patches from the visible pixels of their image: [B, N, P], [B, N] -> [B(N-K), P].

    By normalised convolution (Knutsson and Westin 1993): the filtered visible pixels over the filtered mask.
    """
    height, width = config.image_size
    visible = repeat(~mask, "b n -> b n q", q=config.patch_size**2)
    seen = patches * repeat(visible, "b n q -> b n (q c)", c=config.in_channels)
    channels = [unpatchify(values.float(), config.patch_size, config.grid) for values in (seen, visible)]
    filtered = _filter(torch.cat(channels, 1), height, width)
    return patchify(filtered[:, :-1] / filtered[:, -1:], config.patch_size)[mask]


def _filter(images: Tensor, height: int, width: int) -> Tensor:
    """Sums for each pixel all others of its image [B, C, H, W], weighted by the inverse fourth power of distance."""
    # Twice the size, so that no pixel reaches another around the border.
    y, x = (torch.fft.fftfreq(2 * n, 0.5 / n, dtype=torch.float64, device=images.device) for n in (height, width))
    squared_distance = y[:, None].square() + x.square()
    squared_distance[0, 0] = torch.inf
    weights = squared_distance**-2
    near = torch.arange(-NEAR, NEAR + 1, device=images.device)
    kernel = weights[near[:, None] % (2 * height), near % (2 * width)].float().expand(images.shape[1], 1, -1, -1)
    weights[(y.abs() <= NEAR)[:, None] & (x.abs() <= NEAR)] = 0
    transform = torch.fft.rfft2(weights).real.float()  # weights are even, so that it is real
    spectrum = torch.fft.rfft2(images, (2 * height, 2 * width)) * transform
    far = torch.fft.irfft2(spectrum, (2 * height, 2 * width))[..., :height, :width]
    return far + F.conv2d(images, kernel, padding=NEAR, groups=images.shape[1])
