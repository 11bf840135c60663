"""Features of frozen encoders over a stream of labelled batches."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from mae.models.vit import Encoder, choose_attention
from mae.precision import choose_float32_products

Pool = Literal["patches", "class_token"]


@torch.inference_mode()
def extract(
    encoders: dict[str, Encoder],
    batches: Iterable[dict[str, Any]],
    normalise: Callable[[Tensor], Tensor],
    pool: Pool,
    device: torch.device,
    precision: torch.dtype,
) -> tuple[dict[str, Tensor], Tensor]:
    """One feature per image for each encoder; an image is decoded once for all of them.

    batches    `images` uint8 [B, C, H, W], `labels` int64 [B]
    normalise  uint8 or uint16 [B, C, H, W] -> float32
    pool       mean of the patch tokens, or the class token
    returns    name -> float32 [n, D] on the CPU, and the labels [n]
    """
    choose_float32_products(device)
    for encoder in encoders.values():
        choose_attention(encoder.blocks, device=device)
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels = []
    for batch in batches:
        images = normalise(batch["images"].to(device))
        for name, encoder in encoders.items():
            with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                latent = encoder.encode(images)
            features[name].append(pooled(latent.float(), encoder.config.class_token, pool).cpu())
        labels.append(batch["labels"])
    return {name: torch.cat(parts) for name, parts in features.items()}, torch.cat(labels)


def pooled(latent: Tensor, class_token: bool, pool: Pool) -> Tensor:
    """[B, 1+N, D] (or [B, N, D] without a class token) -> [B, D]."""
    if pool == "class_token":
        return latent[:, 0]
    return latent[:, int(class_token) :].mean(dim=1)
