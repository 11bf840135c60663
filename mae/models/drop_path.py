"""Stochastic depth (Huang et al. 2016) whose draws are arguments: which images leave out which branch."""

from torch import Tensor, nn

from mae.models.noise import further_noise


class DropPath(nn.Module):
    """Leaves out a residual branch for the images that `draw` has chosen, and scales the others up; none in evaluation.

    rate  probability of leaving out
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factor: Tensor | None = None

    def draw(self, numbers: Tensor | None) -> None:
        """Chooses by a uniform number for each image of the batch, [B]; None: no branch is left out."""
        self.factor = None if numbers is None else (numbers >= self.rate).float()[:, None, None] / (1 - self.rate)

    def forward(self, branch: Tensor) -> Tensor:
        """Returns the branch [B, n, D] scaled by 0 or 1 / (1 - rate) per image."""
        return branch if self.factor is None or not self.training else branch * self.factor.to(branch.dtype)


def add_drop_path(blocks: nn.ModuleList, rate: float) -> None:
    """Adds stochastic depth to both branches of blocks: `rate` at the last, falling linearly to 0 at the first."""
    for number, block in enumerate(blocks):
        own = rate * number / max(1, len(blocks) - 1)
        if own > 0:
            block.drop_path1, block.drop_path2 = DropPath(own), DropPath(own)


def draw_paths(blocks: nn.ModuleList, noise: Tensor | None) -> None:
    """Draws the branches that each image leaves out from its own mask noise [B, N]: the same on any number of ranks."""
    branches = [module for block in blocks for module in block.modules() if isinstance(module, DropPath)]
    if branches:
        drawn = [None] * len(branches) if noise is None else further_noise(noise, len(branches)).unbind(1)
        for branch, numbers in zip(branches, drawn, strict=True):
            branch.draw(numbers)
