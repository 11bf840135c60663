"""Interprets the kernel of mae/sam/triton_attention.py on a CPU: TRITON_INTERPRET=1 python -m tests.interpreted_kernel

The variable has to stand before triton is imported, so this is a program of its own. Prints a line for each case.
"""

import torch

from mae.sam.encoder import Attention, SamConfig
from mae.sam.triton_attention import GLOBAL, WINDOW, Tiles, attend_in_place

# head width, grid, window (None: global), tiles
CASES = {
    "SAM-H's windows, two of four reach over the edge": (80, (18, 16), 14, WINDOW),
    "SAM-H's global blocks, rows of keys that fill no tile": (80, (10, 12), None, GLOBAL),
    "SAM-B's global blocks, several tiles of any keys": (64, (8, 16), None, Tiles(32, 64, 4, 1)),
    "windows as rows of keys, all four at the edge": (48, (6, 7), 5, Tiles(32, 0, 4, 1)),
}


@torch.no_grad()
def difference(width: int, grid: tuple[int, int], window: int | None, tiles: Tiles) -> float:
    """Returns the relative difference from the encoder's own attention, in float32."""
    torch.manual_seed(0)
    size = grid[0] * 16, grid[1] * 16
    config = SamConfig(image_size=size, width=2 * width, num_heads=2, depth=1, window=window or 1, global_blocks=())
    attention = Attention(config, is_global=window is None)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randn(2, *grid, config.width)
    expected = attention(tokens)
    sides = grid if window is None else (window, window)
    positions = attention.rel_pos_h, attention.rel_pos_w
    mixed = attend_in_place(attention.qkv(tokens), attention.qkv.bias, *positions, sides, 2, tiles)
    return float((attention.proj(mixed) - expected).norm() / expected.norm())


if __name__ == "__main__":
    for name, case in CASES.items():
        found = difference(*case)
        assert found <= 1e-5, (name, found)
        print(f"{name}: {found:.0e}")
