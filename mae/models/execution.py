"""Execution of the blocks: activation checkpointing and compilation, which change no result."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, field_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "attention", "all")


class BlocksConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of the execution; the function stays the same, so a resume may change them.

    recompute  activation checkpointing: "none", "attention" (the attention of every block), "all" (every block), or N
               (every N-th block)
    compile    torch.compile for every block, in training
    """

    recompute: str | int = "none"
    compile: bool = False

    @field_validator("recompute")
    @classmethod
    def _known(cls, value: str | int) -> str | int:
        if value not in RECOMPUTE if isinstance(value, str) else value < 1:
            raise ValueError(f"recompute={value} is none of {', '.join(RECOMPUTE)} or a number of blocks from 1")
        return value


def prepare_blocks(blocks: Sequence[nn.Module], config: BlocksConfig) -> None:
    """Wraps the `forward` of transformer blocks for checkpointing or compilation, where gradients are enabled.

    blocks  those whose `forward` is called. The last block of a decoder may be left out: the backward pass starts
            there, so that checkpointing it would save no memory
    """
    for number, block in enumerate(blocks):
        if config.recompute == "attention":
            _prepare(block.attn, compiled=False, recomputed=True)  # pyright: ignore[reportArgumentType]
        whole = config.recompute == "all" or (isinstance(config.recompute, int) and number % config.recompute == 0)
        if whole or config.compile:
            _prepare(block, compiled=config.compile, recomputed=whole)


def _prepare(module: nn.Module, *, compiled: bool, recomputed: bool) -> None:
    """Replaces the module's `forward`; its class, hooks and parameter names stay."""
    plain = module.forward
    # Shapes never change in training. The last validation batch is smaller, and validation runs the plain function.
    # As a whole graph a block is never left uncompiled in silence: torch ends the step, and says why.
    trained: Callable[..., Tensor] = torch.compile(plain, dynamic=False, fullgraph=True) if compiled else plain
    if recomputed:  # nothing in a block draws: stochastic depth is drawn before it
        trained = partial(checkpoint, trained, use_reentrant=False, preserve_rng_state=False)

    def forward(*arguments: Any, **named: Any) -> Tensor:
        return trained(*arguments, **named) if torch.is_grad_enabled() else plain(*arguments, **named)

    module.forward = forward
