"""Feature extraction from a frozen model: pooled vectors, patch tokens, class scores, or the loss of each image under a
mask. Thumbnails are kept beside them to show an image where its features are used.
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
HELD_OUT_STEP = -1  # stands for the step in the mask noise of evaluations


class Features(NamedTuple):
    """Labels and features of some samples, in the order of their numbers.

    samples  int64 [n], ascending; of the tokens of whole photographs each is there as often as it has tokens
    labels   int64 [n]
    values   [n, ...]
    """

    samples: Tensor
    labels: Tensor
    values: Tensor

    def take(self, samples: Tensor) -> "Features":
        """Returns the rows of those of these samples that are there."""
        wanted = torch.isin(self.samples, samples)
        return self if wanted.all() else Features(self.samples[wanted], self.labels[wanted], self.values[wanted])


def number_classes(train: Features, test: Features) -> tuple[Features, Features, int]:
    """Returns both with the labels 0 … C-1 in the order of their own, which may be ids of many digits, and C."""
    found, labels = torch.unique(torch.cat([train.labels, test.labels]), return_inverse=True)
    ours, theirs = labels.split([len(train.labels), len(test.labels)])
    return train._replace(labels=ours), test._replace(labels=theirs), len(found)


def concatenate_by_sample(parts: list[Features]) -> Features:
    """Concatenates the rows of all ranks in the order of their samples; no rows if there are no parts."""
    if not parts:
        return Features(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    samples, labels, values = (torch.cat(column) for column in zip(*parts, strict=True))
    order = samples.argsort(stable=True)
    return Features(samples[order], labels[order], values[order])


def describe(latent: Tensor, class_tokens: int, kind: Kind) -> Tensor:
    """Returns the mean of the patch tokens, that of the class tokens, or all patch tokens in half precision.

    latent   [B, T+N, D], the T class tokens first
    returns  [B, D] float32; tokens: [B, N, D] float16
    """
    if kind == "class_token":
        return latent[:, :class_tokens].float().mean(dim=1)
    tokens = latent[:, class_tokens:]
    return tokens.half() if kind == "tokens" else tokens.float().mean(dim=1)


def at_ratio(config: MAEConfig, mask_ratio: float) -> MAEConfig:
    """Returns the same architecture with another mask ratio. Raises ValueError if it hides nothing or everything."""
    return MAEConfig.model_validate(config.model_dump() | {"mask_ratio": mask_ratio})


def held_out_noise(samples: Tensor, config: MAEConfig) -> Tensor:
    """Draws mask noise [B, N] from the numbers of the samples alone: the same in every evaluation of every run."""
    return uniform_noise(0, HELD_OUT_STEP, samples, config.patches)


def losses(model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """Computes the loss of each image with `ratio` of its patches hidden: [B, C, H, W], [B, N] -> float32 [B]."""
    out = model(images, mask=draw_masking(noise, at_ratio(model.config, ratio)).mask)
    return (out.pred.float() - out.target.float()).square().mean(dim=(1, 2))


def thumbnails(images: Tensor) -> Tensor:
    """Downscales to at most THUMBNAIL pixels: [B, C, H, W] in [0, 1] -> uint8 [B, C, h, w]."""
    height, width = images.shape[-2:]
    shrink = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    small = images if size == (height, width) else F.interpolate(images, size, mode="bilinear", antialias=True)
    return (small.clamp(0, 1) * 255).round().byte()


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Computes the effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023, eq. 1).

    features  [n, D]
    returns   from 1, all on one line, to min(n, D), all directions alike
    """
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum().clamp_min(eps) + eps
    return float(torch.exp(-(share * share.log()).sum()))
