"""SAM-style image encoder: a ViT with relative positions, windowed but for a few global blocks, for large images."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from einops import rearrange
from pydantic import BaseModel, Field, ValidationError, model_validator
from timm.layers import DropPath, LayerNorm2d, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mae.errors import ConfigError, first_sentence
from mae.models.config import ImageSize, require_multiple_of_patch
from mae.models.patches import require_images
from mae.models.resample import convert_channels, resize_positions
from mae.models.vit import LayerNorm
from mae.sam.attention import relative_attention, relative_terms, resize_relative
from mae.sam.kernels import IN_PLACE, pinned


class SamConfig(BaseModel, frozen=True, extra="forbid"):
    """Architecture of a SAM-style encoder. The defaults are SAM-B (Kirillov et al. 2023, appendix A)."""

    image_size: ImageSize = (1024, 1024)
    patch_size: int = Field(default=16, ge=1)
    in_channels: int = Field(default=3, ge=1)
    width: int = Field(default=768, ge=1)
    depth: int = Field(default=12, ge=1)
    num_heads: int = Field(default=12, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    window: int = Field(default=14, ge=1)
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    out_channels: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "SamConfig":
        require_multiple_of_patch(self.image_size, self.patch_size)
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} cannot be split over {self.num_heads} heads")
        outside = [block for block in self.global_blocks if not 0 <= block < self.depth]
        if outside:
            raise ValueError(f"global_blocks names block {outside[0]}: depth={self.depth} has 0 to {self.depth - 1}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): patches per column and per row of the image."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


SIZES = {
    "sam_base": SamConfig(),
    "sam_large": SamConfig(width=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23)),
    "sam_huge": SamConfig(width=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31)),
}


class SamEncoder(nn.Module):
    """Images to image embeddings, with the parameter names of segment-anything's `image_encoder`.

    checkpointing  activation checkpointing of every block
    drop_path      probability of leaving out the last block in training; rises linearly from 0 at the first (Huang et
                   al. 2016)

    Source: Li et al. 2022 (ViTDet); Kirillov et al. 2023.
    """

    def __init__(self, config: SamConfig, *, checkpointing: bool = False, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        sizes = config.patch_size, config.in_channels, config.width
        self.patch_embed = PatchEmbed(None, *sizes, output_fmt="NHWC")
        self.pos_embed = nn.Parameter(torch.zeros(1, *config.grid, config.width))
        rates = [drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(
            Block(config, index in config.global_blocks, rate) for index, rate in enumerate(rates)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(config.width, config.out_channels, 1, bias=False),
            LayerNorm2d(config.out_channels),
            nn.Conv2d(config.out_channels, config.out_channels, 3, padding=1, bias=False),
            LayerNorm2d(config.out_channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the image embedding.

        images   [B, C, H, W]                   normalised; H and W any multiples of the patch size
        returns  [B, out_channels, H/p, W/p]
        """
        return self.neck(rearrange(self.tokens(images), "b h w d -> b d h w"))

    def tokens(self, images: Tensor) -> Tensor:
        """Returns the output of the last block, before the neck: [B, C, H, W] -> [B, h, w, D]."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False) if self.checkpointing else block(tokens)
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """Embeds patches and adds positions, resized if the image is not of the configured size.

        Raises ConfigError if the image is no whole number of patches, or not of the model's channels and dtype.
        """
        require_images(images, self.config.in_channels, self.patch_embed.proj.weight.dtype)
        height, width = images.shape[-2:]
        try:
            require_multiple_of_patch((height, width), self.config.patch_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        tokens = self.patch_embed(images).contiguous()  # everything after it reads and adds token by token
        return tokens + resize_positions(self.pos_embed, tokens.shape[1:3])

    def at(self, image_size: int | tuple[int, int] | None = None, *, in_channels: int | None = None) -> "SamEncoder":
        """Returns the encoder for images of another size or of other channels: a copy with resampled weights.

        At another size it computes what this one computes on images of that size: positions are resized bicubically,
        the relative positions of global blocks linearly. None: as it is.

        Raises ConfigError if the size is not a multiple of the patch size.
        """
        given = {"image_size": image_size, "in_channels": in_channels}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            config = SamConfig.model_validate(self.config.model_dump() | given)
        except ValidationError as error:
            raise ConfigError(first_sentence(error)) from error
        with torch.device("meta"):
            model = SamEncoder(config, checkpointing=self.checkpointing)
        state = {key: value.clone() for key, value in self.state_dict().items()}
        state["pos_embed"] = resize_positions(state["pos_embed"], config.grid)
        state["patch_embed.proj.weight"] = convert_channels(state["patch_embed.proj.weight"], config.in_channels)
        for side, length in zip("hw", config.grid, strict=True):
            for block in config.global_blocks:
                name = f"blocks.{block}.attn.rel_pos_{side}"
                state[name] = resize_relative(state[name], length)
        model.load_state_dict({key: value.contiguous() for key, value in state.items()}, assign=True)
        return model.train(self.training)

    def attentions(self, images: Tensor) -> Iterator["Projections"]:
        """Yields the queries, keys and relative terms of each block: what fused kernels do not show of attention."""
        tokens = self.embed(images)
        for block in (cast(Block, block) for block in self.blocks):
            yield block.attn.project(block.norm1(tokens))
            tokens = block(tokens)

    def compile_blocks(self) -> None:
        """Compiles each block (`torch.compile`): two graphs at any depth, a windowed and a global one."""
        for block in self.blocks:
            block.compile()


class Block(nn.Module):
    """Pre-norm transformer block over a grid of tokens, [B, h, w, D] -> [B, h, w, D]."""

    def __init__(self, config: SamConfig, is_global: bool, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width)
        self.attn = Attention(config, is_global)
        self.norm2 = LayerNorm(config.width)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class Projections(NamedTuple):
    """Inputs of an attention. G counts (image, window, head), the head running fastest; a global block has one window.

    q, k, v        [G, n, d]             q not scaled; n tokens of a window, row by row
    rows, columns  [G, n, h], [G, n, w]  terms of the relative positions, from `relative_terms`
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    columns: Tensor


class Attention(nn.Module):
    """Multi-head attention with relative positions, over the whole grid or inside windows."""

    def __init__(self, config: SamConfig, is_global: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.kernel: str | None = None  # a name in mae/sam/kernels.py; None: the pinned one
        self.window = None if is_global else config.window
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        h, w = config.grid if self.window is None else (self.window, self.window)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * h - 1, config.width // config.num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * w - 1, config.width // config.num_heads))

    def forward(self, tokens: Tensor) -> Tensor:
        _, h, w, _ = tokens.shape
        wh, ww = self._window_size(h, w)
        qkv = self.qkv(tokens)
        kernel = self.kernel or pinned(qkv)
        if kernel == IN_PLACE:
            from mae.sam.triton_attention import attend_in_place

            positions = self.rel_pos_h, self.rel_pos_w
            return self.proj(attend_in_place(qkv, self.qkv.bias, *positions, (wh, ww), self.num_heads))
        mixed = relative_attention(*self._split(qkv), kernel)
        mixed = rearrange(
            mixed,
            "(b y x n) (h w) d -> b (y h) (x w) (n d)",
            n=self.num_heads, y=-(-h // wh), x=-(-w // ww), h=wh, w=ww,
        )  # fmt: skip
        return self.proj(mixed[:, :h, :w])

    def project(self, tokens: Tensor) -> Projections:
        """Projects to queries, keys and values of every window, [B, h, w, D] -> [G, n, d] each, and relative terms."""
        return self._split(self.qkv(tokens))

    def _split(self, qkv: Tensor) -> Projections:
        """Cuts [B, h, w, 3*D] into the windows and heads of q, k and v, and adds the relative terms.

        Windows at the edge are padded with zero tokens, which are keys like others; their projection is the bias.
        """
        _, h, w, _ = qkv.shape
        wh, ww = self._window_size(h, w)
        if h % wh or w % ww:
            whole = (qkv.shape[0], -(-h // wh) * wh, -(-w // ww) * ww, -1)
            filled = self.qkv.bias.to(qkv.dtype).expand(whole).clone()
            filled[:, :h, :w] = qkv
            qkv = filled
        pattern = "b (y h) (x w) (three n d) -> three (b y x n) (h w) d"
        q, k, v = rearrange(qkv, pattern, three=3, n=self.num_heads, h=wh, w=ww)
        return Projections(q, k, v, *relative_terms(q, self.rel_pos_h, self.rel_pos_w, (wh, ww)))

    def _window_size(self, h: int, w: int) -> tuple[int, int]:
        return (h, w) if self.window is None else (self.window, self.window)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, under segment-anything's names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(tokens)))
