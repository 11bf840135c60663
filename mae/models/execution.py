"""How blocks are computed: what is kept for the backward pass, and whether they are compiled."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WHERE = ("none", "attention", "all")


class BlocksConfig(BaseModel):
    """How the transformer blocks are computed: the same function whatever stands here, so a resume may change it.

    recompute  activations that the backward pass computes a second time instead of keeping: "none", "attention" (inside
               the attention of every block), "all" (inside every block), or N (inside every N-th block)
    compile    torch.compile for every block, in training
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recompute: str | int = "none"
    compile: bool = False

    @field_validator("recompute")
    @classmethod
    def _known(cls, value: str | int) -> str | int:
        if value not in WHERE if isinstance(value, str) else value < 1:
            raise ValueError(f"recompute={value} is none of {', '.join(WHERE)} or a number of blocks from 1")
        return value


def prepare_blocks(blocks: Sequence[nn.Module], config: BlocksConfig) -> None:
    """Has transformer blocks computed as `config` says, wherever gradients are wanted.

    blocks  those that are computed as a whole. A decoder's last one may stay out: the backward pass begins there, so
            that nothing would be saved by throwing its activations away
    """
    for number, block in enumerate(blocks):
        if config.recompute == "attention":
            _prepare(block.attn, compiled=False, recomputed=True)  # pyright: ignore[reportArgumentType]
        whole = config.recompute == "all" or (isinstance(config.recompute, int) and number % config.recompute == 0)
        if whole or config.compile:
            _prepare(block, compiled=config.compile, recomputed=whole)


def _prepare(module: nn.Module, *, compiled: bool, recomputed: bool) -> None:
    """Replaces `forward` of this one module; its class, hooks and parameter names stay."""
    plain = module.forward
    # Shapes never change in training, and validation, whose last batch is smaller, computes the plain function.
    trained: Callable[..., Tensor] = torch.compile(plain, dynamic=False) if compiled else plain
    if recomputed:
        draws = any(isinstance(part, DropPath) for part in module.modules())
        trained = partial(checkpoint, trained, use_reentrant=False, preserve_rng_state=draws)

    def forward(*arguments: Any, **named: Any) -> Tensor:
        return trained(*arguments, **named) if torch.is_grad_enabled() else plain(*arguments, **named)

    module.forward = forward
