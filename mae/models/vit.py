"""Encoder: a plain pre-norm Vision Transformer on the patches that it is given, visible ones or all."""

from functools import partial
from typing import Any, Self, cast

import torch
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mae.models.attention import SelfAttention, attend
from mae.models.config import MAEConfig
from mae.models.drop_path import draw_paths
from mae.models.patches import patchify, require_images, require_size

# The paper uses 1e-6; torch's default is 1e-5.
LayerNorm = cast(type[nn.LayerNorm], partial(nn.LayerNorm, eps=1e-6))


class Encoder(nn.Module):
    """ViT encoder with the parameter names of the published checkpoints (cls_token, pos_embed, patch_embed, blocks).

    Source: Dosovitskiy et al. 2021; He et al. 2022, section 3.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self._add_encoder(config)

    def _add_encoder(self, config: MAEConfig) -> None:
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, config.in_channels, config.width)
        tokens = config.class_tokens
        self.cls_token = nn.Parameter(torch.empty(1, tokens, config.width)) if tokens else None
        self.pos_embed = position_parameter(config, config.width)
        self.blocks = transformer_blocks(config.depth, config.width, config.num_heads, config.mlp_ratio)
        self.norm = LayerNorm(config.width)
        initialise(self.patch_embed, self.blocks)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, patches: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embeds patches and adds their positions, class tokens first.

        patches  [B, n, p*p*C]
        ids      [B, n]  number of each patch in the grid; None: all N patches in order
        returns  [B, T+n, D]  with T class tokens

        One matrix product per patch equals the published convolution, and computes the given patches only.
        """
        weight = rearrange(self.patch_embed.proj.weight, "d c p q -> d (p q c)")
        tokens = F.linear(patches, weight, self.patch_embed.proj.bias)
        first = self.config.class_tokens
        positions = self.pos_embed[:, first:]
        tokens = tokens + (positions if ids is None else positions[0][ids])
        if self.cls_token is None:
            return tokens
        class_tokens = (self.cls_token + self.pos_embed[:, :first]).to(tokens.dtype)
        return torch.cat([class_tokens.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def encode_tokens(self, tokens: Tensor, noise: Tensor | None = None) -> Tensor:
        """Runs embedded tokens through all blocks and the final norm: [B, n, D] -> [B, n, D].

        noise  [B, N]  draws the branches that stochastic depth leaves out in training; None: all are kept
        """
        draw_paths(self.blocks, noise)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def encode(self, images: Tensor) -> Tensor:
        """Encodes whole images, without a mask.

        images   [B, C, H, W]  normalised, of the model's size: `at` gives the model for another one
        returns  [B, T+N, D]   class tokens first

        Raises ConfigError as `patchify` does.
        """
        return self.encode_tokens(self.embed(self.patchify(images)))

    def patchify(self, images: Tensor) -> Tensor:
        """Cuts images [B, C, H, W] into patches [B, N, p*p*C].

        Raises ConfigError if their size, channels or dtype are not the model's.
        """
        require_images(images, self.config.in_channels, self.patch_embed.proj.weight.dtype)
        require_size(images, self.config.image_size, self.config.patch_size)
        return patchify(images, self.config.patch_size)

    def at(
        self,
        image_size: int | tuple[int, int] | None = None,
        *,
        patch_size: int | None = None,
        in_channels: int | None = None,
    ) -> Self:
        """Returns the model for images of another size, of other patches or channels: a copy with resampled weights.

        Positions are resized bicubically, and learned from then on; the patch embedding by pseudo-inverse, predicted
        patches bicubically; channels are summed into one or spread over several. None: as it is.

        Raises ConfigError if the size is not a multiple of the patch size.
        """
        from mae.models.resample import resample

        given = {"image_size": image_size, "patch_size": patch_size, "in_channels": in_channels}
        return resample(self, {name: value for name, value in given.items() if value is not None})

    def like(self, config: MAEConfig) -> Self:
        """Builds a model of the same class with another config, of random weights."""
        return type(self)(config)


def position_parameter(config: MAEConfig, width: int) -> nn.Parameter:
    """Returns positions [1, T+N, width], class tokens first: the sine-cosine table, or learned from N(0, .02).

    Yang et al. 2025 truncate at -2 and 2, a hundred deviations away: the same numbers.
    """
    if config.positions == "sincos":
        return nn.Parameter(sincos_positions(width, config.grid, config.class_tokens), requires_grad=False)
    positions = nn.Parameter(torch.empty(1, config.class_tokens + config.patches, width))
    nn.init.normal_(positions, std=0.02)
    return positions


def sincos_positions(width: int, grid: tuple[int, int], class_tokens: int) -> Tensor:
    """Returns sine-cosine positions, channels [sin_w | cos_w | sin_h | cos_h], as in the published weights.

    width    D, a multiple of 4
    grid     (rows, columns)
    returns  [1, T+N, D] float32; the rows of the T class tokens are zero, so that only their own values tell them apart

    Angles are computed in float64, so that the table equals NumPy's to the last bits of float32.
    """
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angle_w = column.reshape(-1, 1) * frequency
    angle_h = row.reshape(-1, 1) * frequency
    table = torch.cat([angle_w.sin(), angle_w.cos(), angle_h.sin(), angle_h.cos()], dim=1).float()
    return torch.cat([torch.zeros(class_tokens, width, device=table.device), table])[None]


def transformer_blocks(depth: int, width: int, num_heads: int, mlp_ratio: float = 4.0) -> nn.ModuleList:
    """Returns `depth` pre-norm blocks of timm with biases on q, k and v, and the paper's LayerNorm epsilon."""
    given: dict[str, Any] = {"qkv_bias": True, "norm_layer": LayerNorm, "attn_layer": SelfAttention}
    return nn.ModuleList(Block(width, num_heads, mlp_ratio, **given) for _ in range(depth))


def last_tokens(block: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """Computes the outputs of a block for its last `count` tokens: all tokens are keys, only those are queries.

    tokens   [B, n, D]
    returns  [B, count, D], equal to block(tokens)[:, -count:]
    """
    block = cast(Block, block)
    attention, mlp = cast(SelfAttention, block.attn), cast(nn.Module, block.mlp)
    normed = block.norm1(tokens)
    weight_q, weight_kv = attention.qkv.weight.tensor_split([tokens.shape[-1]])
    bias_q, bias_kv = attention.qkv.bias.tensor_split([tokens.shape[-1]])
    heads = attention.num_heads
    q = rearrange(F.linear(normed[:, -count:], weight_q, bias_q), "b n (h d) -> b h n d", h=heads)
    k, v = rearrange(F.linear(normed, weight_kv, bias_kv), "b n (two h d) -> two b h n d", two=2, h=heads)
    mixed = attend(q, k, v, fused=attention.fused)
    tokens = tokens[:, -count:] + attention.proj(rearrange(mixed, "b h n d -> b n (h d)"))
    return tokens + mlp(block.norm2(tokens))


def initialise(*modules: nn.Module) -> None:
    """Sets Xavier-uniform weights, the patch embedding's as a linear layer's, and zero biases (He et al. 2022, A.1)."""
    for root in modules:
        for module in root.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
