"""Objective: mean squared error on hidden patches, each normalised by its own mean and deviation."""

import torch
from torch import Tensor

# Settings that change what the loss measures: a mean over other patches, or of another target.
CHANGES_THE_LOSS = ("model.mask_ratio", "model.masking", "model.patch_size", "model.image_size", "model.norm_pix")


def patch_statistics(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each patch; the deviation is sqrt(unbiased variance + eps).

    patches  [..., P]
    returns  two tensors [..., 1], float32 whatever the input
    """
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return mean, (variance + eps).sqrt()


def normalise_patches(patches: Tensor) -> Tensor:
    """Normalises each patch by its own mean and deviation (He et al. 2022, section 4.2).

    patches  [B, n, p*p*C]  pixels, any scale
    returns  [B, n, p*p*C]  float32 whatever the input
    """
    mean, deviation = patch_statistics(patches)
    return (patches.float() - mean) / deviation


def reconstruction_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error over hidden patches, in float32 (He et al. 2022, section 3).

    pred, target  [B, N-K, p*p*C]  hidden patches only; as many in every image, so the plain mean is the paper's
    returns       []
    """
    return (pred.float() - target.float()).square().mean()
