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

from mae.sam.kernels import CHUNKS, KERNELS, one_hot_places

SCORES_PER_THREAD = 2**20  # that a CPU holds at a time: 2 MiB in bfloat16
SHORT_ROW = 32  # keys per row, below which the bias is a part of the product


def resize_relative(rel_pos: Tensor, length: int) -> Tensor:
    """Interpolates relative positions linearly to another length: [2n-1, d] -> [2*length-1, d]."""
    wanted = 2 * length - 1
    if rel_pos.shape[0] == wanted:
        return rel_pos
    return F.interpolate(rel_pos.float().T[None], size=wanted, mode="linear")[0].T


def relative_tables(rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the relative positions of rows, then of columns, from key minus query = 1-n to n-1: [2h + 2w, d].

    Each table ends with zeros, so that the runs of n keys lie 2n apart.
    """
    tables = zip((rel_pos_h, rel_pos_w), grid, strict=True)
    return torch.cat([F.pad(resize_relative(table, length).flip(0), (0, 0, 0, 1)) for table, length in tables])


def relative_terms(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the relative terms of the scores: `rows[..., k] + columns[..., l]` for the key in row k, column l.

    q          [G, h*w, d]  not scaled
    rel_pos_h  [2n-1, d]    entry n-1+δ belongs to query row minus key row = δ; interpolated to the grid's h
    rel_pos_w  [2n-1, d]    the same for columns
    returns    [G, h*w, h], [G, h*w, w]

    One product of all queries with all relative positions, of which each query then takes its own ones: a table for
    every pair of rows would be products with few columns, and its gradient a sum of atomic additions on GPUs.
    """
    h = grid[0]
    terms = rearrange(q @ relative_tables(rel_pos_h, rel_pos_w, grid).to(q.dtype).T, "g (h w) k -> g h w k", h=h)
    rows = _shift(terms[..., : 2 * h].transpose(1, 2)).transpose(1, 2)
    columns = _shift(terms[..., 2 * h :])
    return rows.flatten(1, 2), columns.flatten(1, 2)


def _shift(terms: Tensor) -> Tensor:
    """Takes the n keys of each of n queries from all differences: [..., n, 2n] -> [..., n, n], (i, k) of n-1-i+k.

    Source: Huang et al. 2018 (Music Transformer), "skewing".
    """
    n = terms.shape[-2]
    return terms.flatten(-2).narrow(-1, n - 1, n * (2 * n - 1)).unflatten(-1, (n, 2 * n - 1))[..., :n]


def relative_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, kernel: str = CHUNKS) -> Tensor:
    """Computes softmax(q·k/√d + rows + columns) · v over a grid of keys.

    q, k, v        [G, h*w, d]
    rows, columns  [G, h*w, h], [G, h*w, w]  from `relative_terms`
    kernel         as `pinned` names it. "chunks", for CPUs: scores that stay in their caches, and are computed again in
                   the backward pass
    returns        [G, h*w, d]
    """
    attend = _in_chunks if kernel == CHUNKS else KERNELS[kernel]
    return attend(q * q.shape[-1] ** -0.5, k, v, rows, columns)


def attention_probabilities(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the probabilities of `relative_attention`, [G, n, h*w], for any n of the queries."""
    return _scores(q * q.shape[-1] ** -0.5, k.mT, rows, columns).softmax(dim=-1)


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
        return torch.cat([q, rows, columns], dim=2) @ torch.cat([k, one_hot_places(h, w, k).mT], dim=1)
    return (rows[..., None] + columns[..., None, :]).flatten(2).baddbmm_(q, k)
