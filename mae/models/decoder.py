"""The decoder: a light transformer from visible latents and mask tokens to pixels. Used in pre-training only."""

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from mae.models.config import MAEConfig
from mae.models.vit import LayerNorm, attend, initialise, last_tokens, position_parameter, transformer_blocks


class Decoder(nn.Module):
    """MAE decoder with the parameter names of the published checkpoints (decoder_embed, mask_token, decoder_blocks);
    a cross decoder has q and kv in its blocks where that has qkv.

    Source: He et al. 2022, section 3; Fu et al. 2024, section 3.
    """

    config: MAEConfig

    def _add_decoder(self, config: MAEConfig) -> None:
        width = config.decoder_width
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = position_parameter(config, width)
        self.decoder_blocks = decoder_blocks(config)
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_values)
        initialise(self.decoder_embed, self.decoder_blocks, self.decoder_pred)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, latent: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """Predictions for hidden patches: all of them, for a cross decoder any.

        latent      [B, 1+K, D]
        ids_keep    [B, K]
        ids_hidden  [B, n]
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
        """Predictions for all patches in the order of the grid, [B, N, p*p*C]; arguments as in `decode`.

        A cross decoder is asked for visible patches as for hidden ones: it does not see at which it looks.
        """
        order = torch.cat([ids_keep, ids_hidden], dim=1)
        if self.config.decoder == "cross":
            return self.decode(latent, ids_keep, order.sort(dim=1).values)
        tokens = self.decoder_blocks[-1](self._all_but_last(*self._place(latent, ids_keep, ids_hidden)))
        decoded = self.decoder_pred(self.decoder_norm(tokens))[:, -order.shape[1] :]
        return torch.empty_like(decoded).scatter_(1, order[..., None].expand_as(decoded), decoded)

    def _place(self, latent: Tensor, ids_keep: Tensor, ids_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with positions: of class token and visible patches [B, 1+K, d], of hidden ones [B, n, d]."""
        first = latent.shape[1] - ids_keep.shape[1]
        class_position, positions = self.decoder_pos_embed[:, :first], self.decoder_pos_embed[0, first:]
        visible = self.decoder_embed(latent)
        visible = torch.cat([visible[:, :first] + class_position, visible[:, first:] + positions[ids_keep]], dim=1)
        return visible, (self.mask_token + positions[ids_hidden]).to(visible.dtype)

    def _all_but_last(self, visible: Tensor, hidden: Tensor) -> Tensor:
        """All tokens through all blocks of self-attention but the last.

        The published decoder moves the tokens back into grid order first. Attention is blind to order and every token
        carries its position, so they stay where they are: the same function without the moves.
        """
        tokens = torch.cat([visible, hidden], dim=1)
        for block in self.decoder_blocks[:-1]:
            tokens = block(tokens)
        return tokens


def decoder_blocks(config: MAEConfig) -> nn.ModuleList:
    depth, width, heads = config.decoder_depth, config.decoder_width, config.decoder_num_heads
    if config.decoder == "cross":
        return nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
    return transformer_blocks(depth, width, heads)


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
