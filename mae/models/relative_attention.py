"""Attention with decomposed relative positions that never holds a bias for all pairs of tokens.

The score of query (i, j) and key (k, l) is q·k/√d + q·R_h[i-k] + q·R_w[j-l] (Li et al. 2022, MViTv2, eq. 4; used by
ViTDet and SAM): two short terms per query, one for each row and one for each column of the keys.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Scores that one chunk of queries holds at a time on a CPU.
CHUNK = 2**21


def relative_table(rel_pos: Tensor, length: int) -> Tensor:
    """The relative position of every pair of rows (or of columns), interpolated linearly when the length is another.

    rel_pos  [2n-1, d]            entry n-1+δ belongs to query minus key = δ
    returns  [length, length, d]  (query, key)
    """
    wanted = 2 * length - 1
    if rel_pos.shape[0] != wanted:
        rel_pos = F.interpolate(rel_pos.float().T[None], size=wanted, mode="linear")[0].T
    place = torch.arange(length, device=rel_pos.device)
    return rel_pos[place[:, None] - place + length - 1]


def relative_terms(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the relative positions add to the scores: `rows[..., k] + columns[..., l]` for the key in row k, column l.

    q        [G, h*w, d]  not scaled
    returns  [G, h*w, h], [G, h*w, w]
    """
    h, w = grid
    table_h, table_w = relative_table(rel_pos_h, h).to(q.dtype), relative_table(rel_pos_w, w).to(q.dtype)
    q = rearrange(q, "g (h w) d -> g h w d", h=h)
    rows = q @ table_h.mT
    columns = (q.transpose(1, 2) @ table_w.mT).transpose(1, 2)
    return rows.flatten(1, 2), columns.flatten(1, 2)


def relative_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """softmax(q·k/√d + rows + columns) · v over a grid of keys.

    q, k, v        [G, h*w, d]
    rows, columns  [G, h*w, h], [G, h*w, w]  from `relative_terms`
    returns        [G, h*w, d]

    Accelerators take a fused kernel over augmented vectors. CPUs multiply: short sequences at once, long ones in
    chunks of queries, whose scores are recomputed in the backward pass.
    """
    q = q * q.shape[-1] ** -0.5
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(*augment(q, k, rows, columns), v, scale=1.0)
    queries = max(1, CHUNK // (q.shape[0] * k.shape[1]))
    if queries >= q.shape[1] // 2:
        q, k = augment(q, k, rows, columns)
        return (q @ k.mT).softmax(dim=-1) @ v
    parts = zip(q.split(queries, 1), rows.split(queries, 1), columns.split(queries, 1), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_attend(part, k, v, r, c) for part, r, c in parts], dim=1)
    return torch.cat([checkpoint(_attend, part, k, v, r, c, use_reentrant=False) for part, r, c in parts], dim=1)


def attention_weights(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The probabilities that `relative_attention` mixes with, [G, n, h*w], for any n of the queries."""
    return _scores(q * q.shape[-1] ** -0.5, k, rows, columns).softmax(dim=-1)


def augment(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors whose plain product is the whole score: q' = [q, rows, columns], k' = [k, one-hot row, one-hot column].

    q  [G, n, d]  scaled
    """
    h, w = rows.shape[-1], columns.shape[-1]
    row = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, dim=0)
    column = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
    place = torch.cat([row, column], dim=1).expand(k.shape[0], -1, -1)
    # Fused kernels want widths that are multiples of 8.
    spare = -(q.shape[-1] + h + w) % 8
    q = torch.cat([q, rows, columns, *([q.new_zeros(*q.shape[:2], spare)] if spare else [])], dim=-1)
    k = torch.cat([k, place, *([k.new_zeros(*k.shape[:2], spare)] if spare else [])], dim=-1)
    return q, k


def _scores(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    scores = q @ k.mT
    grid = rearrange(scores, "g n (h w) -> g n h w", h=rows.shape[-1])
    grid += rows[..., None]
    grid += columns[..., None, :]
    return scores


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _scores(q, k, rows, columns).softmax(dim=-1) @ v
