"""Position embeddings: the fixed sine-cosine table of a two-dimensional grid."""

import torch
from torch import Tensor


def sincos_positions(width: int, grid: tuple[int, int], class_token: bool) -> Tensor:
    """Returns sine-cosine positions, channels [sin_w | cos_w | sin_h | cos_h], as in the published weights.

    width    D, a multiple of 4
    grid     (rows, columns)
    returns  [1, N, D] float32; with a class token [1, 1+N, D], whose row 0 is zero

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
    if class_token:
        table = torch.cat([torch.zeros(1, width, device=table.device), table])
    return table[None]
