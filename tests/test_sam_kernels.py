"""Each candidate for the attention on GPUs computes what the reference does, forward and backward."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mae.sam.attention import relative_attention, relative_terms
from mae.sam.kernels import CHUNKS, KERNELS, fits_in_place
from tests.conftest import ROOT

GRIDS = {"window": (14, 14), "global": (10, 12)}
HEADS = {"SAM-B": 64, "SAM-H": 80}
NO_BACKWARD = ("flex",)  # has none on CPUs


def inputs(grid: tuple[int, int], width: int, groups: int = 3) -> list[Tensor]:
    """Returns q, k, v [G, h*w, d] and the relative positions of rows and columns, which need gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(groups, grid[0] * grid[1], width)] * 3 + [(2 * side - 1, width) for side in grid]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attend(kernel: str, grid: tuple[int, int], given: list[Tensor]) -> Tensor:
    q, k, v, *positions = given
    return relative_attention(q, k, v, *relative_terms(q, *positions, grid), kernel)


def exact(grid: tuple[int, int], given: list[Tensor]) -> Tensor:
    """Computes the definition, with the relative positions of each pair of tokens."""
    q, k, v, rel_pos_h, rel_pos_w = given
    row, column = (place.flatten() for place in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    pairs = rel_pos_h[row[:, None] - row + grid[0] - 1] + rel_pos_w[column[:, None] - column + grid[1] - 1]
    scores = q @ k.mT * q.shape[-1] ** -0.5 + torch.einsum("gnd,nmd->gnm", q, pairs)
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize("width", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(
    "kernel", [CHUNKS, *(pytest.param(name, marks=pytest.mark.slow if name == "flex" else ()) for name in KERNELS)]
)
def test_kernel_equals_the_definition(kernel: str, grid: tuple[int, int], width: int) -> None:
    given = inputs(grid, width)
    expected = exact(grid, given)

    mixed = attend(kernel, grid, [x.detach() for x in given] if kernel in NO_BACKWARD else given)

    assert (mixed - expected).norm() <= 1e-5 * expected.norm()
    if kernel not in NO_BACKWARD:
        weight = torch.randn_like(expected)
        gradients = torch.autograd.grad((mixed * weight).sum(), given)
        for gradient, its in zip(gradients, torch.autograd.grad((expected * weight).sum(), given), strict=True):
            assert (gradient - its).norm() <= 1e-5 * its.norm()


@pytest.mark.slow
def test_kernel_in_place_equals_the_blocks_attention_when_interpreted() -> None:
    pytest.importorskip("triton", reason="no triton, which comes with torch for CUDA")
    words = [sys.executable, "-m", "tests.interpreted_kernel"]
    finished = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout.splitlines()) == 4


@pytest.mark.parametrize(
    ("width", "columns", "fits"), [(64, 64, True), (80, 64, True), (80, 200, False), (72, 64, False), (8, 14, False)]
)
def test_heads_and_rows_that_the_kernel_in_place_takes(width: int, columns: int, fits: bool) -> None:
    assert fits_in_place(width, (64, columns)) is fits
