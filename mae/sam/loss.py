"""Loss of promptable segmentation: focal and dice loss of the best mask, squared error of the predicted IoU."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

FOCAL, DICE = 20.0, 1.0


def mask_losses(logits: Tensor, ious: Tensor, masks: Tensor) -> Tensor:
    """Returns the loss of each object, in float32 (Kirillov et al. 2023, section 3 and appendix A).

    20 · focal + dice of the mask for which this sum is lowest, plus the squared error of the predicted IoU, mean over
    all masks: only the best has to be right, and all have to be ranked.

    logits   [N, K, h, w]
    ious     [N, K]  predicted
    masks    [N, h, w]  true inside the object
    returns  [N]
    """
    logits, masks = logits.float(), masks[:, None].expand_as(logits)
    wrong = FOCAL * focal_loss(logits, masks) + DICE * dice_loss(logits, masks)
    with torch.no_grad():
        reached = intersection_over_union(logits > 0, masks)
    return wrong.min(1).values + (ious.float() - reached).square().mean(1)


def focal_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Computes the mean focal loss of the pixels, gamma 2 and alpha 1/4 (Lin et al. 2017): [..., h, w] -> [...]."""
    return sigmoid_focal_loss(logits, masks.to(logits.dtype), alpha=0.25, gamma=2).mean((-2, -1))


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Computes 1 - (2 · overlap + 1) / (area + area + 1) (Milletari et al. 2016): [..., h, w] -> [...]."""
    inside, masks = logits.sigmoid(), masks.to(logits.dtype)
    overlap = (inside * masks).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (inside.sum((-2, -1)) + masks.sum((-2, -1)) + 1)


def intersection_over_union(one: Tensor, other: Tensor) -> Tensor:
    """Computes the IoU of two masks, bool [..., h, w] -> float32 [...]; that of two empty masks is 1."""
    both = (one & other).sum((-2, -1))
    either = (one | other).sum((-2, -1))
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def relevance_alignment_loss(gate: Tensor, masks: Tensor) -> Tensor:
    """Computes the cross-entropy between the gate of a token and the share of it that the masks cover, in float32.

    gate     [B, h, w]     0 to 1
    masks    [B, M, H, W]  true inside the object that a prompt asks for; H and W multiples of h and w
    returns  []
    """
    h, w = gate.shape[-2:]
    covered = F.adaptive_avg_pool2d(masks.any(1).float(), (h, w))
    return F.binary_cross_entropy_with_logits(torch.logit(gate.float(), eps=1e-6), covered)
