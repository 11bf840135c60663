"""Attention with decomposed relative positions, without a matrix of biases for all pairs of tokens.

The score of query (i, j) and key (k, l) is q·k/√d + q·R_h[i-k] + q·R_w[j-l] (Li et al. 2022, MViTv2, eq. 4; used by
ViTDet and SAM): two short terms per query, one for each row and one for each column of the keys.
"""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SCORES_PER_THREAD = 2**20  # that a CPU holds at a time: 2 MiB in bfloat16
SHORT_ROW = 32  # keys per row, below which the bias is a part of the product


def relative_table(rel_pos: Tensor, length: int) -> Tensor:
    """Returns the relative position of every pair of rows (or of columns), interpolated linearly to another length.

    rel_pos  [2n-1, d]            entry n-1+δ belongs to query minus key = δ
    returns  [length, length, d]  (query, key)
    """
    rel_pos = resize_relative(rel_pos, length)
    place = torch.arange(length, device=rel_pos.device)
    return rel_pos[place[:, None] - place + length - 1]


def resize_relative(rel_pos: Tensor, length: int) -> Tensor:
    """Interpolates relative positions linearly to another length: [2n-1, d] -> [2*length-1, d]."""
    wanted = 2 * length - 1
    if rel_pos.shape[0] == wanted:
        return rel_pos
    return F.interpolate(rel_pos.float().T[None], size=wanted, mode="linear")[0].T


def relative_terms(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the relative terms of the scores: `rows[..., k] + columns[..., l]` for the key in row k, column l.

    q        [G, h*w, d]  not scaled
    returns  [G, h*w, h], [G, h*w, w]
    """
    h, w = grid
    q = rearrange(q, "g (h w) d -> g h w d", h=h)
    rows = torch.einsum("ghwd,hkd->ghwk", q, relative_table(rel_pos_h, h).to(q.dtype))
    columns = torch.einsum("ghwd,wkd->ghwk", q, relative_table(rel_pos_w, w).to(q.dtype))
    return rows.flatten(1, 2), columns.flatten(1, 2)


def relative_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes softmax(q·k/√d + rows + columns) · v over a grid of keys.

    q, k, v        [G, h*w, d]
    rows, columns  [G, h*w, h], [G, h*w, w]  from `relative_terms`
    returns        [G, h*w, d]

    Accelerators, compilers and exporters get one fused attention over augmented vectors. CPUs compute chunks of scores
    that stay in their caches, and compute them again in the backward pass.
    """
    q = q * q.shape[-1] ** -0.5
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        q, k = augment(q, k, rows, columns)
        # Fused kernels take [batch, heads, tokens, width].
        return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0]
    return _in_chunks(q, k, v, rows, columns)


def attention_probabilities(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the probabilities of `relative_attention`, [G, n, h*w], for any n of the queries."""
    return _scores(q * q.shape[-1] ** -0.5, k.mT, rows, columns).softmax(dim=-1)


def augment(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns q' = [q, rows, columns] and k' = [k, one-hot row, one-hot column], whose product is the whole score.

    q  [G, n, d]  scaled
    """
    place = _places(rows.shape[-1], columns.shape[-1], k)
    # Fused kernels need widths that are multiples of 8.
    spare = -(k.shape[-1] + place.shape[-1]) % 8
    q = torch.cat([q, rows, columns, *([q.new_zeros(*q.shape[:2], spare)] if spare else [])], dim=-1)
    k = torch.cat([k, place, *([k.new_zeros(*k.shape[:2], spare)] if spare else [])], dim=-1)
    return q, k


def _places(h: int, w: int, like: Tensor) -> Tensor:
    """Returns row and column of each key as one-hot vectors, [G, h*w, h+w]."""
    row = torch.eye(h, dtype=like.dtype, device=like.device).repeat_interleave(w, dim=0)
    column = torch.eye(w, dtype=like.dtype, device=like.device).repeat(h, 1)
    return torch.cat([row, column], dim=1).expand(like.shape[0], -1, -1)


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    threads, keys = torch.get_num_threads(), k.shape[1]
    # A batched product is split among the threads by its groups.
    groups = max(threads, threads * SCORES_PER_THREAD // keys**2)
    queries = max(1, threads * SCORES_PER_THREAD // (groups * keys))
    attend = partial(checkpoint, _attend, use_reentrant=False) if torch.is_grad_enabled() else _attend
    # Without this layout, each chunk would copy all keys and values into it.
    k, v = k.mT.contiguous(), v.contiguous()
    done = []
    for group in zip(*(x.split(groups) for x in (q, k, v, rows, columns)), strict=True):
        q, k, v, rows, columns = group
        chunks = zip(*(x.split(queries, dim=1) for x in (q, rows, columns)), strict=True)
        done.append(torch.cat([attend(q, k, v, rows, columns) for q, rows, columns in chunks], dim=1))
    return torch.cat(done)


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _scores(q, k, rows, columns).softmax(dim=-1) @ v


def _scores(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Adds the product to the terms of the positions in one pass: [G, n, d], [G, d, h*w] -> [G, n, h*w].

    Additions along the short rows of a window would take longer than the product, so there they are a part of it.
    """
    h, w = rows.shape[-1], columns.shape[-1]
    if w < SHORT_ROW:
        return torch.cat([q, rows, columns], dim=2) @ torch.cat([k, _places(h, w, k).mT], dim=1)
    return (rows[..., None] + columns[..., None, :]).flatten(2).baddbmm_(q, k)
