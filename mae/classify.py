"""How often a classifier is right."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mae.models.classifier import Classifier
from mae.models.vit import choose_attention
from mae.precision import choose_float32_products


def hits(scores: Tensor, labels: Tensor, k: int) -> int:
    """For how many images [B, classes] the label [B] is among the k highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels[:, None]).sum())


@torch.inference_mode()
def classify(
    model: Classifier,
    batches: Iterable[dict[str, Any]],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, float]:
    """The share of images whose label has the highest score (top1), or one of the five highest (top5).

    batches    `images` uint8 or uint16 [B, C, H, W], `labels` int64 [B]
    normalise  uint8 or uint16 [B, C, H, W] -> float32
    """
    choose_float32_products(device)
    model.to(device).eval()
    choose_attention(model.blocks, device=device)
    counted, right = 0, {1: 0, 5: 0}
    for batch in batches:
        images, labels = normalise(batch["images"].to(device)), batch["labels"].to(device)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            scores = model(images)
        counted += len(labels)
        for k in right:
            right[k] += hits(scores.float(), labels, k)
    return {f"top{k}": number / counted for k, number in right.items()}
