"""Attention of the blocks, each time computed in the way that is faster where its input lies."""

from einops import rearrange
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

# Keys up to which batched products are not slower on a CPU, by whether gradients are wanted (benchmarks/attention.py).
LONGEST_PRODUCTS = {True: 1280, False: 160}


class SelfAttention(Attention):
    """timm's multi-head self-attention, [B, n, D] -> [B, n, D], without its masks, norms of q and k, gates and dropout.

    fused  how `attend` computes it; None: as it chooses
    """

    fused: bool | None = None

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj(rearrange(attend(q, k, v, fused=self.fused), "b h n d -> b n (h d)"))


def attend(q: Tensor, k: Tensor, v: Tensor, *, fused: bool | None = None) -> Tensor:
    """Computes attention of queries [B, H, n, d] to keys and values [B, H, m, d]: [B, H, n, d].

    fused  True: torch's fused attention; False: batched products; None: products for short sequences on a CPU, where
           they take .6 of a whole training step (ViT-tiny, 65 tokens), else fused. The same function either way
    """
    if fused is None:
        fused = q.device.type != "cpu" or k.shape[-2] > LONGEST_PRODUCTS[q.requires_grad]
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


def set_attention(*models: nn.Module, fused: bool | None) -> None:
    """Sets how all attention of the models is computed, for a graph or a plan of another device than this one."""
    for module in (module for model in models for module in model.modules()):
        if hasattr(module, "fused"):
            module.fused = fused  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
