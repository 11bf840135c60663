"""Attention with relative positions as one kernel (Triton), for forward passes on GPUs.

It reads queries, keys and values where the projection has left them and writes where the next one reads: windows are
neither cut out nor padded in memory. A program computes some queries of one window and head; the keys come in tiles,
with the softmax kept up to date (Dao 2023, FlashAttention-2). The relative terms of a query are runs of its products
with all relative positions, `terms`, read at an offset that follows from the query's place. Two ways to add them:

rows     a tile is one row of keys: one number for each query, and one row of column terms that all tiles share
one-hot  a tile is any run of keys: a product of row and column terms with one-hot places
"""

# pyright: reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# Constants of a kernel look like arguments that a caller has left out.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae.sam.attention import relative_tables
from mae.sam.kernels import power_of_two_below


class Tiles(NamedTuple):
    """Sizes of a program's work, and how it is run.

    queries  of a program; a power of two from 16
    keys     in a tile; a power of two from 16. 0: one row of keys
    """

    queries: int
    keys: int
    warps: int
    stages: int


WINDOW = Tiles(64, 256, 4, 1)
GLOBAL = Tiles(128, 0, 8, 3)


def attend_in_place(
    qkv: Tensor,
    padding: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    window: tuple[int, int],
    num_heads: int,
    tiles: Tiles | None = None,
) -> Tensor:
    """Computes the attention inside each window, without gradients.

    qkv        [B, h, w, 3*D]  queries, keys and values, each of num_heads * d
    padding    [3*D]           of the tokens that pad windows at the edge
    rel_pos_h  [2n-1, d]       as in `relative_terms`; also rel_pos_w
    window     rows and columns; those of the grid for global attention
    returns    [B, h, w, D]
    """
    batch, height, width, channels = qkv.shape
    d = channels // 3 // num_heads
    table = relative_tables(rel_pos_h, rel_pos_w, window).to(qkv.dtype)
    q = qkv.view(batch * height * width, 3, num_heads, d)[:, 0].transpose(0, 1)
    terms = torch.bmm(q, table.T.expand(num_heads, -1, -1))
    out = qkv.new_empty(batch, height, width, channels // 3)
    keys = window[0] * window[1]
    if tiles is None:
        tiles = WINDOW if keys <= WINDOW.keys else GLOBAL
    by_row = tiles.keys == 0
    windows = -(-height // window[0]) * -(-width // window[1])
    _attend[(-(-keys // tiles.queries), num_heads, batch * windows)](
        qkv,
        terms,
        padding.to(qkv.dtype),
        out,
        batch,
        height,
        width,
        SCALE=d**-0.5,  # a constant: compiled calls would pass a number in double precision
        HEADS=num_heads,
        ROWS=window[0],
        COLUMNS=window[1],
        PAD=height % window[0] > 0 or width % window[1] > 0,
        WIDE=power_of_two_below(d),
        REST=d - power_of_two_below(d),
        BY_ROW=by_row,
        QUERIES=tiles.queries,
        KEYS=_power_of_two_above(window[1]) if by_row else tiles.keys,
        PLACES=_power_of_two_above(sum(window)),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def _power_of_two_above(number: int) -> int:
    """Returns the smallest power of two from 16 that is not below a number. triton's own cannot be compiled."""
    return 1 << max(4, (number - 1).bit_length())


@triton.jit
def _load_heads(
    qkv,
    padding,
    token,
    inside,
    part,
    head,
    first,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Returns channels first … first+SIZE of a head's queries, keys or values (part 0, 1, 2) of tokens."""
    channel = (part * HEADS + head) * D + first + tl.arange(0, SIZE)
    values = tl.load(qkv + token[:, None] * (3 * HEADS * D) + channel[None, :], mask=inside[:, None], other=0.0)
    if PAD:
        values = tl.where(inside[:, None], values, tl.load(padding + channel)[None, :])
    return values


@triton.jit
def _attend(
    qkv,
    terms,
    padding,
    out,
    batch,
    height,
    width,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAD: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    BY_ROW: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PLACES: tl.constexpr,
):
    D: tl.constexpr = WIDE + REST
    TERMS: tl.constexpr = 2 * ROWS + 2 * COLUMNS
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(1)
    across = tl.cdiv(width, COLUMNS)
    windows = tl.cdiv(height, ROWS) * across
    image = (tl.program_id(2) // windows).to(tl.int64)  # large batches have more than 2^31 numbers
    window = tl.program_id(2) % windows
    top, left = window // across * ROWS, window % across * COLUMNS

    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    query_row, query_column = query // COLUMNS, query % COLUMNS
    asked = (query < ROWS * COLUMNS) & (top + query_row < height) & (left + query_column < width)
    query_token = (image * height + top + query_row) * width + left + query_column
    q = _load_heads(qkv, padding, query_token, asked, 0, head, 0, HEADS, D, False, WIDE)
    if REST > 0:
        q_rest = _load_heads(qkv, padding, query_token, asked, 0, head, WIDE, HEADS, D, False, REST)

    # Runs of this query's terms, from which key rows and key columns count.
    term = terms + (head.to(tl.int64) * batch * height * width + query_token) * TERMS
    row_terms = term + ROWS - 1 - query_row
    column_terms = term + 2 * ROWS + COLUMNS - 1 - query_column
    if BY_ROW:
        of_column = tl.arange(0, KEYS)
        by_column = tl.load(
            column_terms[:, None] + of_column[None, :], mask=asked[:, None] & (of_column < COLUMNS)[None, :], other=0.0
        )
    else:
        place = tl.arange(0, PLACES)
        run = tl.where(
            place[None, :] < ROWS, row_terms[:, None] + place[None, :], column_terms[:, None] + place[None, :] - ROWS
        )
        by_place = tl.load(run, mask=asked[:, None] & (place < ROWS + COLUMNS)[None, :], other=0.0)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDE], tl.float32)
    if REST > 0:
        mixed_rest = tl.zeros([QUERIES, REST], tl.float32)
    for tile in range(0, ROWS if BY_ROW else (ROWS * COLUMNS + KEYS - 1) // KEYS):
        if BY_ROW:
            key_row, key_column = tile + tl.zeros([KEYS], tl.int32), tl.arange(0, KEYS)
            exists = key_column < COLUMNS
        else:
            key = tile * KEYS + tl.arange(0, KEYS)
            key_row, key_column = key // COLUMNS, key % COLUMNS
            exists = key < ROWS * COLUMNS
        inside = exists & (top + key_row < height) & (left + key_column < width)
        key_token = (image * height + top + key_row) * width + left + key_column
        k = _load_heads(qkv, padding, key_token, inside, 1, head, 0, HEADS, D, PAD, WIDE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST > 0:
            k_rest = _load_heads(qkv, padding, key_token, inside, 1, head, WIDE, HEADS, D, PAD, REST)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        scores *= SCALE
        if BY_ROW:
            by_row = tl.load(row_terms + tile, mask=asked, other=0.0)
            scores += by_row.to(tl.float32)[:, None] + by_column.to(tl.float32)
        else:
            at_row, at_column = key_row[None, :] == place[:, None], key_column[None, :] == place[:, None] - ROWS
            wanted = tl.where(place[:, None] < ROWS, at_row, at_column)
            scores = tl.dot(by_place, wanted.to(by_place.dtype), scores, input_precision="ieee")
        scores = tl.where(exists[None, :], scores * LOG2E, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
        weights = weights.to(q.dtype)
        v = _load_heads(qkv, padding, key_token, inside, 2, head, 0, HEADS, D, PAD, WIDE)
        mixed = tl.dot(weights, v, mixed * shrink[:, None], input_precision="ieee")
        if REST > 0:
            v_rest = _load_heads(qkv, padding, key_token, inside, 2, head, WIDE, HEADS, D, PAD, REST)
            mixed_rest = tl.dot(weights, v_rest, mixed_rest * shrink[:, None], input_precision="ieee")

    channel = head * D + tl.arange(0, WIDE)
    to = out + query_token[:, None] * (HEADS * D)
    tl.store(to + channel[None, :], (mixed / total[:, None]).to(q.dtype), mask=asked[:, None])
    if REST > 0:
        channel = head * D + WIDE + tl.arange(0, REST)
        tl.store(to + channel[None, :], (mixed_rest / total[:, None]).to(q.dtype), mask=asked[:, None])
