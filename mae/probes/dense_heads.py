"""Heads of dense probes: from the token of a patch to scores of classes, or to the log of a depth.

linear  BatchNorm and one linear layer per token, on the patch token beside the mean class token (Yang et al. 2025)
knn     mean over the nearest tokens of training photographs; nothing is trained
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mae.probes.windows import Size, merge_windows, upsample

POWER = 0.9  # of the polynomial decay of the learning rate
AT_ONCE = 4096  # tokens whose neighbours are searched together
Target = Literal["classes", "depth"]


class Head(Protocol):
    """A head that is fitted.

    scores  True: softmax makes shares of what it returns; False: they are shares, or logs of depths, already
    """

    scores: bool

    def __call__(self, patches: Tensor, pooled: Tensor | None) -> Tensor:
        """Returns [M, C] for patch tokens [M, D] and the mean class token of the window of each, if there are any."""
        ...


class Table(NamedTuple):
    """Training tokens: values [T, D] with the class token behind, targets [T, C], weights [T] (0: void alone)."""

    values: Tensor
    targets: Tensor
    weights: Tensor


class LinearHead(nn.Module):
    """BatchNorm and a linear layer on tokens."""

    def __init__(self, width: int, outputs: int, target: Target) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, outputs)
        self.scores = target == "classes"
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def standardise(self, values: Tensor, rows: Tensor) -> None:
        """Gives BatchNorm the mean and variance of these rows of [T, D] for good, in the place of a batch's."""
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        total = torch.zeros(2, values.shape[1], dtype=torch.float64)
        for some in rows.split(AT_ONCE):
            part = values[some].double()
            total += torch.stack([part.sum(0), part.square().sum(0)])
        mean, square = total / len(rows)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(square - mean.square())
        self.norm.requires_grad_(False)
        self.norm.eval()

    def forward(self, patches: Tensor, pooled: Tensor | None = None) -> Tensor:
        tokens = patches if pooled is None else torch.cat([patches, pooled], dim=-1)
        return self.linear(self.norm(tokens.float()))


class NeighbourHead:
    """Means over the k nearest training tokens: by cosine of encoder tokens, by distance of standardised others.

    bank  [T, D] and targets [T, C]
    """

    scores = False

    def __init__(self, bank: Tensor, targets: Tensor, k: int, cosine: bool) -> None:
        self.k, self.cosine, self.targets = min(k, len(bank)), cosine, targets
        self.deviation, self.mean = torch.std_mean(bank.float(), dim=0)
        self.bank = self._prepare(bank)

    def _prepare(self, tokens: Tensor) -> Tensor:
        tokens = tokens.float()
        if self.cosine:
            return F.normalize(tokens, dim=-1)
        return (tokens - self.mean) / self.deviation.clamp_min(1e-6)

    def __call__(self, patches: Tensor, pooled: Tensor | None = None) -> Tensor:
        # The nearest of x is the y of the greatest x·y - |y|²/2, which for vectors of length 1 is the cosine less 1/2.
        half_squares = self.bank.square().sum(1) / 2
        found = []
        for tokens in self._prepare(patches).split(AT_ONCE):
            closeness = torch.addmm(-half_squares, tokens, self.bank.T)
            nearest = closeness.topk(self.k, dim=1, sorted=False).indices
            found.append(self.targets[nearest].mean(1))
        return torch.cat(found)


RIDGE = 1e-4  # of the squared weights on standardised tokens, beside the mean squared error


class Windows(NamedTuple):
    """Training windows of one size whole: tokens [W, 1 + N, D], class token first, and their maps [W, h, w]."""

    tokens: Tensor
    truth: Tensor
    grid: Size


def fit_on_tokens(
    table: Table,
    *,
    lr: float,
    weight_decay: float,
    batch: int,
    steps: int,
    seed: int,
    device: torch.device,
) -> LinearHead:
    """Fits a linear head to the shares of the classes in patches by cross-entropy, without patches of void alone."""
    rows = table.weights.nonzero().flatten()
    torch.manual_seed(seed)
    head = LinearHead(table.values.shape[1], table.targets.shape[1], "classes")
    head.standardise(table.values, rows)
    head.to(device)

    def losses() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        order = rows[:0]
        while True:
            while len(order) < batch:
                order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
            chosen, order = order[:batch], order[batch:]
            values, targets = table.values[chosen].to(device), table.targets[chosen].to(device)
            weights = table.weights[chosen].to(device)
            # The shares of a patch sum to its weight.
            yield -(targets * head(values).log_softmax(-1)).sum() / weights.sum()

    return _train(head, losses(), lr, weight_decay, steps)


def fit_depths(table: Table) -> LinearHead:
    """Fits a linear head to the log depths of patches by least squares, exactly: no step, no learning rate."""
    rows = table.weights.nonzero().flatten()
    head = LinearHead(table.values.shape[1], table.targets.shape[1], "depth")
    head.standardise(table.values, rows)
    width = table.values.shape[1] + 1
    products, answers = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, 1, dtype=torch.float64)
    with torch.no_grad():
        for some in rows.split(AT_ONCE):
            tokens = head.norm(table.values[some].float()).double()
            tokens = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1)
            weighted = tokens.T * table.weights[some].double()
            products += weighted @ tokens
            answers += weighted @ table.targets[some].double()
        ridge = torch.full((width,), RIDGE * float(table.weights.sum()), dtype=torch.float64)
        ridge[-1] = 0  # of the bias
        solved = torch.linalg.solve(products + ridge.diag(), answers)
        head.linear.weight.copy_(solved[:-1].T)
        head.linear.bias.copy_(solved[-1])
    return head.eval()


def fit_on_pixels(
    windows: Windows,
    outputs: int,
    void: int,
    *,
    lr: float,
    weight_decay: float,
    batch: int,
    epochs: int,
    pooled: bool,
    seed: int,
    device: torch.device,
) -> LinearHead:
    """Fits a linear head as published for Pixio: cross-entropy of each pixel under logits resized to the window.

    pooled  whether the mean class token stands beside the patch token
    """
    torch.manual_seed(seed)
    width = windows.tokens.shape[-1] * (2 if pooled else 1)
    head = LinearHead(width, outputs, "classes").to(device).train()
    count = len(windows.tokens)
    batch = min(batch, count)
    rows, columns = windows.grid

    def losses() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(count, generator=generator).split(batch)[: count // batch]:
                tokens, truth = windows.tokens[chosen].to(device), windows.truth[chosen].to(device).long()
                found = rearrange(head(*split_windows(tokens, pooled)), "(w r c) k -> w k r c", r=rows, c=columns)
                logits = upsample(found, (truth.shape[1], truth.shape[2]), align_corners=True)
                loss = F.cross_entropy(logits, truth, ignore_index=void, reduction="sum")
                yield loss / (truth != void).sum().clamp_min(1)

    return _train(head, losses(), lr, weight_decay, epochs * (count // batch))


@torch.no_grad()
def predict_pixels(
    head: Head,
    tokens: Tensor,
    places: Sequence[tuple[int, int]],
    grid: Size,
    window: Size,
    shown: Size,
    size: Size,
    *,
    pooled: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """Returns what a head says of each pixel of a photograph, [C, *size].

    tokens         [W, 1 + N, D] of its windows, class token first, N = rows · columns of `grid`
    places         (top, left) of the windows, of size `window`, in the photograph of size `shown`
    pooled         whether the head takes the class token
    align_corners  of the resize from the grid to the window
    """
    rows, columns = grid
    values = rearrange(head(*split_windows(tokens, pooled)), "(w r c) k -> w k r c", r=rows, c=columns)
    values = upsample(values, window, align_corners)
    merged = merge_windows(values.softmax(1) if head.scores else values, places, shown)
    return upsample(merged[None], size, align_corners=False)[0].clone()


def split_windows(tokens: Tensor, pooled: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the patch tokens of windows [W, 1 + N, D] as [W·N, D], and beside each the class token of its window."""
    patches = tokens[:, 1:]
    beside = tokens[:, :1].expand_as(patches).flatten(0, 1) if pooled else None
    return patches.flatten(0, 1), beside


def _train(head: LinearHead, losses: Iterator[Tensor], lr: float, weight_decay: float, steps: int) -> LinearHead:
    """Takes steps of AdamW at a learning rate that decays polynomially to 0."""
    learned = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=weight_decay)
    decay: Callable[[int], float] = lambda step: (1 - step / steps) ** POWER  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    for _ in range(steps):
        optimizer.zero_grad()
        next(losses).backward()
        optimizer.step()
        schedule.step()
    return head.eval()
