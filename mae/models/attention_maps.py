"""Attention maps of a Vision Transformer: weights of each block, and attention rollout."""

from typing import cast

import torch
from einops import rearrange
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from mae.models.vit import Encoder


@torch.no_grad()
def attention_weights(encoder: Encoder, images: Tensor) -> Tensor:
    """Returns the attention weights of every block on unmasked images, averaged over heads.

    images   [B, C, H, W]        normalised
    returns  [B, depth, n, n]    rows are queries and sum to one; n = T+N, class tokens first
    """
    tokens = encoder.embed(encoder.patchify(images))
    weights = []
    for block in (cast(Block, block) for block in encoder.blocks):
        attention = cast(Attention, block.attn)
        qkv = attention.qkv(block.norm1(tokens))
        q, k, _ = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)
        weights.append((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).mean(1))
        tokens = block(tokens)
    return torch.stack(weights, 1)


def rollout(weights: Tensor) -> Tensor:
    """Returns the attention rollout from the last block to the input (Abnar & Zuidema 2020): the product over blocks of
    (I + attention) / 2, where I stands for the residual connection.

    weights  [..., depth, n, n]
    returns  [..., n, n]  rows sum to one
    """
    mixed = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    for attention in weights.unbind(-3):
        mixed = rollout_step(mixed, attention)
    return mixed


def rollout_step(mixed: Tensor, attention: Tensor) -> Tensor:
    """Carries a rollout [..., n, N] through one block: the residual half stays, the other half mixes as `attention`
    [..., n, n] does, among tokens that attend to each other alone (all of them, or those of a window)."""
    return (mixed + attention @ mixed) / 2
