"""Attention with relative positions: which kernel runs where, and those that torch supplies.

Each computes softmax(q·k + rows + columns) · v for q [G, n, d], already scaled, over a grid of n = h*w keys; rows
[G, n, h] and columns [G, n, w] are those of `relative_terms`. They differ in what a library's kernel is given:

augmented  [q, rows, columns] and [k, one-hot row, one-hot column], whose product is the whole score
padded     the same, and v padded with zeros to that width: flash attention wants one width for all
bias       rows + columns as a matrix [G, n, n] beside q, k and v
flex       rows and columns, which the kernel adds to each score

Two more are ours: "chunks" for CPUs (mae/sam/attention.py) and "in place" for GPUs (mae/sam/triton_attention.py). That
is the fastest at one image and not pinned yet: eight ended in an illegal memory access (docs/results.md).
A kernel is pinned in code and never chosen by a timing, so that all ranks and every resume compute alike.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
CHUNKS, IN_PLACE = "chunks", "in place"
LONGEST_ROW = 128  # keys of a row that "in place" holds


def pinned(like: Tensor) -> str:
    """Returns the name of the kernel for tensors of this device."""
    if like.device.type == "cpu" and not torch.compiler.is_compiling():
        return CHUNKS
    return "augmented"  # one operation that every device has


def fits_in_place(width: int, window: tuple[int, int]) -> bool:
    """Returns whether "in place" takes heads of this width: a power of two, or the sum of two, from 16."""
    rest = width - power_of_two_below(width)
    return width >= 16 and (rest == 0 or (rest >= 16 and rest.bit_count() == 1)) and window[1] <= LONGEST_ROW


def power_of_two_below(number: int) -> int:
    """Returns the largest power of two that is not above a number from 1."""
    return 1 << (number.bit_length() - 1)


def augmented(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    q, k = augment(q, k, rows, columns)
    return _fused(q, k, v)


def padded(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, backend: SDPBackend | None = None) -> Tensor:
    width = v.shape[-1]
    q, k = augment(q, k, rows, columns)
    return _fused(q, k, F.pad(v, (0, q.shape[-1] - width)), backend=backend)[..., :width]


def bias(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # Kernels read whole vectors of the bias, so its rows have to begin at multiples of 8 elements.
    keys = k.shape[1]
    matrix = F.pad((rows[..., None] + columns[..., None, :]).flatten(2), (0, -keys % 8))
    return _fused(q, k, v, matrix[..., :keys], backend=SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else None)


def flex(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Adds to scores inside the kernel. Gradients of rows and columns are atomic sums: runs differ in the last bit."""
    width = columns.shape[-1]

    def add_positions(score: Tensor, batch: Tensor, group: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[group, query, key // width] + columns[group, query, key % width]

    attend = flex_attention if torch.compiler.is_compiling() else torch.compile(flex_attention, dynamic=False)
    return attend(q[None], k[None], v[None], score_mod=add_positions, scale=1.0)[0]


KERNELS: dict[str, Kernel] = {"augmented": augmented, "padded": padded, "bias": bias, "flex": flex}


def augment(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns q' = [q, rows, columns] and k' = [k, one-hot row, one-hot column], whose product is the whole score.

    q  [G, n, d]  scaled
    """
    place = one_hot_places(rows.shape[-1], columns.shape[-1], k)
    # Fused kernels need widths that are multiples of 8.
    spare = -(k.shape[-1] + place.shape[-1]) % 8
    q = torch.cat([q, rows, columns, *([q.new_zeros(*q.shape[:2], spare)] if spare else [])], dim=-1)
    k = torch.cat([k, place, *([k.new_zeros(*k.shape[:2], spare)] if spare else [])], dim=-1)
    return q, k


def one_hot_places(h: int, w: int, like: Tensor) -> Tensor:
    """Returns row and column of each key as one-hot vectors, [G, h*w, h+w]."""
    row = torch.eye(h, dtype=like.dtype, device=like.device).repeat_interleave(w, dim=0)
    column = torch.eye(w, dtype=like.dtype, device=like.device).repeat(h, 1)
    return torch.cat([row, column], dim=1).expand(like.shape[0], -1, -1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: SDPBackend | None = None) -> Tensor:
    # Fused kernels take [batch, heads, tokens, width].
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], None if mask is None else mask[None], scale=1.0
        )[0]
