"""What a frozen model makes of whole images: a vector for each, the tokens of its patches, or its masked losses.

Thumbnails go with them, so that an image can be shown where its features are.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import draw_masking
from mae.models.noise import uniform_noise

Kind = Literal["patches", "class_token", "tokens", "loss", "scores", "thumbnails"]
THUMBNAIL = 64  # pixels of the longer side
HELD_OUT = -1  # in the place of the step


class Features(NamedTuple):
    """Rows of some samples, in the order of their numbers.

    samples  int64 [n]
    labels   int64 [n]
    values   [n, ...]
    """

    samples: Tensor
    labels: Tensor
    values: Tensor

    def take(self, samples: Tensor) -> "Features":
        """The rows of these samples, all of which have to be there."""
        if torch.equal(samples, self.samples):
            return self
        rows = torch.searchsorted(self.samples, samples)
        return Features(samples, self.labels[rows], self.values[rows])


def merged(parts: list[Features]) -> Features:
    """All rows in the order of their samples, whichever rank they come from."""
    samples, labels, values = (torch.cat(column) for column in zip(*parts, strict=True))
    order = samples.argsort()
    return Features(samples[order], labels[order], values[order])


def describe(latent: Tensor, class_token: bool, kind: Kind) -> Tensor:
    """Of the encoder's output the mean of the patch tokens, the class token, or all patch tokens in half precision.

    latent   [B, 1+N, D], or [B, N, D] without a class token
    returns  [B, D] float32; tokens: [B, N, D] float16
    """
    if kind == "class_token":
        return latent[:, 0].float()
    tokens = latent[:, int(class_token) :]
    return tokens.half() if kind == "tokens" else tokens.float().mean(dim=1)


def at_ratio(config: MAEConfig, mask_ratio: float) -> MAEConfig:
    """The same architecture with so much hidden; raises ValueError where nothing or everything would be."""
    return MAEConfig.model_validate(config.model_dump() | {"mask_ratio": mask_ratio})


def held_out_noise(samples: Tensor, config: MAEConfig) -> Tensor:
    """Mask noise [B, N] that follows from the number of the sample: the same in every evaluation of every run."""
    return uniform_noise(0, HELD_OUT, samples, config.patches)


def losses(model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """The loss of each image with `ratio` of its patches hidden: [B, C, H, W], [B, N] -> float32 [B]."""
    out = model(images, mask=draw_masking(noise, at_ratio(model.config, ratio)).mask)
    return (out.pred.float() - out.target.float()).square().mean(dim=(1, 2))


def thumbnails(images: Tensor) -> Tensor:
    """Copies of at most THUMBNAIL pixels: [B, C, H, W] in [0, 1] -> uint8 [B, C, h, w]."""
    height, width = images.shape[-2:]
    shrink = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    small = images if size == (height, width) else F.interpolate(images, size, mode="bilinear", antialias=True)
    return (small.clamp(0, 1) * 255).round().byte()


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """The exponential of the entropy of the normalised singular values (Garrido et al. 2023, equation 1).

    features  [n, D]
    returns   from 1, all on one line, to min(n, D), all directions alike
    """
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum().clamp_min(eps) + eps
    return float(torch.exp(-(share * share.log()).sum()))
