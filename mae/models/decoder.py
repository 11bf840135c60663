"""Decoder: a light transformer from the latent and mask tokens to pixels. Used in pre-training only."""

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from mae.models.attention import attend
from mae.models.config import MAEConfig
from mae.models.vit import LayerNorm, initialise, last_tokens, position_parameter, transformer_blocks


class Decoder(nn.Module):
    """MAE decoder with the parameter names of the published checkpoints (decoder_embed, mask_token, decoder_blocks).

    A cross decoder has q and kv in its blocks instead of qkv.

    Source: He et al. 2022, section 3; Fu et al. 2024, section 3.
    """

    config: MAEConfig

    def _add_decoder(self, config: MAEConfig) -> None:
        width = config.decoder_width
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = position_parameter(config, width)
        depth, heads = config.decoder_depth, config.decoder_num_heads
        if config.decoder == "cross":
            self.decoder_blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
        else:
            self.decoder_blocks = transformer_blocks(depth, width, heads)
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_values)
        initialise(self.decoder_embed, self.decoder_blocks, self.decoder_pred)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, latent: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """Predicts the hidden patches.

        latent      [B, T+K, D]
        ids_keep    [B, K]
        ids_hidden  [B, n]  all N-K of them; any, for a cross decoder
        returns     [B, n, p*p*C]
        """
        visible, hidden = self._place(latent, ids_keep, ids_hidden)
        if self.config.decoder == "cross":
            for block in self.decoder_blocks:
                hidden = block(hidden, visible)
        else:
            tokens = self._all_but_last(visible, hidden)
            hidden = last_tokens(self.decoder_blocks[-1], tokens, ids_hidden.shape[1])
        return self.decoder_pred(self.decoder_norm(hidden))

    def decode_all(self, latent: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """Predicts all patches, [B, N, p*p*C] in the order of the grid; arguments as in `decode`.

        A cross decoder predicts visible patches like hidden ones: a query holds its position and no pixels.
        """
        order = torch.cat([ids_keep, ids_hidden], dim=1)
        if self.config.decoder == "cross":
            return self.decode(latent, ids_keep, order.sort(dim=1).values)
        tokens = self.decoder_blocks[-1](self._all_but_last(*self._place(latent, ids_keep, ids_hidden)))
        decoded = self.decoder_pred(self.decoder_norm(tokens))[:, -order.shape[1] :]
        return torch.empty_like(decoded).scatter_(1, order[..., None].expand_as(decoded), decoded)

    def _place(self, latent: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens with positions: class tokens and visible patches [B, T+K, d], hidden patches [B, n, d]."""
        first = latent.shape[1] - ids_keep.shape[1]
        class_positions, positions = self.decoder_pos_embed[:, :first], self.decoder_pos_embed[0, first:]
        visible = self.decoder_embed(latent)
        visible = torch.cat([visible[:, :first] + class_positions, visible[:, first:] + positions[ids_keep]], dim=1)
        return visible, (self.mask_token + positions[ids_hidden]).to(visible.dtype)

    def _all_but_last(self, visible: Tensor, hidden: Tensor) -> Tensor:
        """Runs all tokens through all self-attention blocks but the last.

        The published decoder first moves the tokens back into grid order. Attention does not depend on order, and each
        token carries its position, so they stay in the order (visible, hidden): the same function without the moves.
        """
        tokens = torch.cat([visible, hidden], dim=1)
        for block in self.decoder_blocks[:-1]:
            tokens = block(tokens)
        return tokens


class CrossAttention(nn.Module):
    """Multi-head cross-attention; queries and visible tokens have the same width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused: bool | None = None  # as in SelfAttention
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, visible: Tensor) -> Tensor:
        """Returns [B, n, D] for queries [B, n, D] and visible tokens [B, m, D]."""
        q = rearrange(self.q(queries), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(visible), "b m (two h d) -> two b h m d", two=2, h=self.num_heads)
        return self.proj(rearrange(attend(q, k, v, fused=self.fused), "b h n d -> b n (h d)"))


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
        """Returns [B, n, D] for queries [B, n, D] and visible tokens [B, m, D]."""
        queries = queries + self.attn(self.norm1(queries), self.norm_visible(visible))
        return queries + self.mlp(self.norm2(queries))
