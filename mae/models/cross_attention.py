"""Blocks whose tokens attend to the visible patches and not to each other (Fu et al. 2024, section 3)."""

from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from mae.models.vit import LayerNorm, attend


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other tokens of the same width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, visible: Tensor) -> Tensor:
        """[B, n, D], [B, m, D] -> [B, n, D]"""
        q = rearrange(self.q(queries), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(visible), "b m (two h d) -> two b h m d", two=2, h=self.num_heads)
        return self.proj(rearrange(attend(q, k, v, fused=self.fused_attn), "b h n d -> b n (h d)"))


class CrossBlock(nn.Module):
    """Pre-norm block: cross-attention, then the MLP of the other blocks."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.norm_visible = LayerNorm(width)
        self.attn = CrossAttention(width, num_heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, queries: Tensor, visible: Tensor) -> Tensor:
        """[B, n, D], [B, m, D] -> [B, n, D]"""
        queries = queries + self.attn(self.norm1(queries), self.norm_visible(visible))
        return queries + self.mlp(self.norm2(queries))
