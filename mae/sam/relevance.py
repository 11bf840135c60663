"""Relevance-aware encoder: a SAM-style encoder whose embedding is gated by prompts, with maps of its attention."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mae.models.attention_maps import rollout_step
from mae.sam.attention import attention_probabilities
from mae.sam.encoder import Attention, Block, Projections, SamEncoder


class RelevanceMaps(NamedTuple):
    """The four ways of knowing (propositional, participatory, perspectival, procedural), on the grid of the embedding.

    propositional  [B, C, h, w]               projected features, before the gate
    gate           [B, h, w]                  participatory: relevance of each token to the prompts, 0 to 1; None
                                              without prompts
    prompts        [B, heads, M, h, w]        attention of each token to the prompts; None without prompts
    perspectival   [B, heads, C/heads, h, w]  features as each head of the gate sees them
    procedural     attention of the encoder's blocks, or None
    """

    propositional: Tensor
    gate: Tensor | None
    prompts: Tensor | None
    perspectival: Tensor
    procedural: "BlockMaps | None"


class BlockMaps(NamedTuple):
    """Attention of the blocks, as shares of the image: each map sums to one.

    attention  [B, depth, heads, h, w]  received by each token, mean over all tokens that look
    rollout    [B, depth, h, w]         the same from the image to the output of each block (Abnar & Zuidema 2020), by
                                        the mean of the heads
    """

    attention: Tensor
    rollout: Tensor

    @property
    def mean(self) -> Tensor:
        """Returns the attention, mean over heads: [B, depth, h, w]."""
        return self.attention.mean(2)


class PromptGate(nn.Module):
    """Scales the tokens of an embedding by their relevance to prompts; the identity until it is trained.

    width  of the embedding and of the prompts
    heads  of the attention over prompts
    """

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        # Added to the features: zeros are the identity in any precision, and weight decay leads there.
        self.projection = nn.Conv2d(width, width, 1)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.gate = nn.Linear(width, 1)
        for module in (self.projection, self.gate):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))

    @property
    def is_identity(self) -> bool:
        """Returns True if embeddings stay as they are for all prompts, as at the start of training."""
        return not any(weight.any() for layer in (self.projection, self.gate) for weight in layer.parameters())

    def propose(self, embedding: Tensor) -> Tensor:
        """Projects an embedding to the features before the gate, [B, C, h, w]."""
        return embedding + self.projection(embedding)

    def participate(self, proposition: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gated features, the gate [B, h, w] and the attention over prompts [B, heads, M, h, w].

        proposition  [B, C, h, w];  prompts [B, M, C]
        """
        h, w = proposition.shape[-2:]
        tokens = rearrange(proposition, "b c h w -> b (h w) c")
        answer, shares = self.attention(tokens, prompts, prompts, average_attn_weights=False)
        gate = rearrange(self.gate(answer), "b (h w) 1 -> b h w", h=h).float().sigmoid()
        # Doubled, so that an undecided gate of one half leaves the features as they are.
        return proposition * (2 * gate[:, None]), gate, rearrange(shares, "b n (h w) m -> b n m h w", h=h, w=w)


class RelevanceAwareEncoder(PromptGate):
    """Wraps a SAM-style encoder, and gives the same embedding as it until trained, with or without prompts.

    heads  of the attention over prompts
    """

    def __init__(self, encoder: SamEncoder, heads: int = 8) -> None:
        super().__init__(encoder.config.out_channels, heads)
        self.encoder = encoder

    def forward(
        self, images: Tensor, prompts: Tensor | None = None, *, procedural: bool = False
    ) -> tuple[Tensor, RelevanceMaps]:
        """Returns the embedding and its maps.

        images      [B, 3, H, W]  normalised
        prompts     [B, M, C]     embedded prompts, such as the sparse ones of SAM's prompt encoder
        procedural  add the maps of the blocks, which computes their attention a second time
        returns     [B, C, h, w]
        """
        proposition = self.propose(self.encoder(images))
        views = rearrange(proposition, "b (n d) h w -> b n d h w", n=self.heads)
        blocks = self.block_maps(images) if procedural else None
        if prompts is None:
            return proposition, RelevanceMaps(proposition, None, None, views, blocks)
        features, gate, shares = self.participate(proposition, prompts)
        return features, RelevanceMaps(proposition, gate, shares, views, blocks)

    @torch.no_grad()
    def block_maps(self, images: Tensor) -> BlockMaps:
        """Returns the maps of all blocks. The rollout holds two square matrices over the tokens of the image."""
        patch = self.encoder.config.patch_size
        h, w = images.shape[-2] // patch, images.shape[-1] // patch
        received, rolled = [], []
        for attention, rollout in self.rollouts(images):
            received.append(attention)
            rolled.append(rollout.mean(1))
        return BlockMaps(
            rearrange(torch.stack(received, 1), "b l n (h w) -> b l n h w", h=h, w=w),
            rearrange(torch.stack(rolled, 1), "b l (h w) -> b l h w", h=h, w=w),
        )

    @torch.no_grad()
    def rollouts(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields per block the attention received [B, heads, N] and the rollout [B, N (looking), N (looked at)].

        The zero tokens that pad a window are keys, but no part of the image: their share is left out, and the rows are
        scaled to sum to one without it.
        """
        patch = self.encoder.config.patch_size
        grid = images.shape[-2] // patch, images.shape[-1] // patch
        tokens = grid[0] * grid[1]
        rollout = torch.eye(tokens, device=images.device).expand(len(images), -1, -1)
        for block, projections in zip(self.encoder.blocks, self.encoder.attentions(images), strict=True):
            attention = cast(Block, block).attn
            received = torch.empty(len(images), attention.num_heads, tokens, device=images.device)
            mixed = torch.empty_like(rollout)
            for places, by_head, mean in _windows(attention, projections, grid):
                received[..., places] = by_head / tokens
                mixed[:, places] = rollout_step(rollout[:, places], mean)
            rollout = mixed
            yield received, rollout


def _windows(
    attention: Attention, projections: Projections, grid: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields per window the numbers of its tokens in the image [n], the sum of the attention that each of them receives
    [B, heads, n], and the attention as the mean of the heads [B, n (looking), n (looked at)].
    """
    h, w = grid
    wh, ww = grid if attention.window is None else (attention.window, attention.window)
    numbers = torch.arange(h * w, device=projections.q.device).view(h, w)
    numbers = F.pad(numbers, (0, -w % ww, 0, -h % wh), value=-1)
    numbers = rearrange(numbers, "(y h) (x w) -> (y x) (h w)", h=wh, w=ww)
    pattern = "(b y n) q d -> y n b q d"
    parts = [rearrange(x.float(), pattern, y=len(numbers), n=attention.num_heads) for x in projections]
    for window, places in enumerate(numbers):
        inside = places >= 0
        received = []
        mean = torch.zeros((), device=numbers.device)
        for q, k, _, rows, columns in zip(*(part[window] for part in parts), strict=True):
            weights = attention_probabilities(q, k, rows, columns)[:, inside][..., inside]
            weights /= weights.sum(-1, keepdim=True)
            received.append(weights.sum(1))
            mean = mean + weights / attention.num_heads
        yield places[inside], torch.stack(received, 1), mean
