"""Muon: orthogonalised momentum for the matrices of the blocks, AdamW for everything else.

1 momentum   of every matrix, on every rank: of the whole matrix, or of the rank's rows under FSDP
2 gather     each matrix belongs to one rank; under FSDP its rows are sent there
3 iterate    Newton-Schulz, matrices of one shape as one batch; q, k and v are three matrices
4 hand back  every rank receives the updates of all matrices, or its rows of them
5 update     decoupled weight decay, then the step
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import accumulate, islice
from math import sqrt
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mae.train.optim import NamedAdamW, is_matrix

# Of the iterations X <- (a + b XX' + c (XX')^2) X. Each polynomial is the one nearest to 1 on what those before it make
# of singular values in [.001, 1], and 2 % beyond, for rounding (Amsel et al. 2025); at the end they are in [.43, 1.57].
COEFFICIENTS = (
    (8.3051, -23.6631, 16.8756),
    (4.1039, -2.9320, 0.5263),
    (3.9008, -2.7969, 0.5119),
    (3.2783, -2.3690, 0.4666),
)
WIDTHS = 2  # columns per row from which on a matrix is wide
MATCH_ADAMW = 0.2  # root mean square of AdamW's updates, which Muon's are scaled to (Liu et al. 2025)
PARTS = {"qkv": 3, "kv": 2}  # layers whose weight is several matrices, one above the other


def describe(name: str, parameter: nn.Parameter) -> tuple[int, int, int]:
    """Returns number, rows and columns of the matrices that a parameter is made of, one above the other."""
    rows, columns = parameter.shape
    parts = PARTS.get(name.split(".")[-2], 1)
    return parts, rows // parts, columns


def part(groups: list[dict[str, Any]], lr: float, factor: float, beta: float) -> list[dict[str, Any]]:
    """Parts groups of (name, parameter) into AdamW's and Muon's, which learn at `factor` times the rate."""
    parted = []
    for group in groups:
        members: dict[bool, list[tuple[str, nn.Parameter]]] = {False: [], True: []}
        for name, parameter in group["params"]:
            members[is_matrix(name, parameter)].append((name, parameter))
        muon = {"params": members[True], "lr": group.get("lr", lr) * factor, "momentum": beta}
        parted += [group | {"params": members[False]}, group | muon]
    return [group for group in parted if group["params"]]


class Muon(NamedAdamW):
    """AdamW, and Muon for the groups with `momentum` (Jordan et al. 2024; Liu et al. 2025).

    dtype  of the iteration

    The update of a matrix [m, n] has a root mean square of about .2 lr, like AdamW's. Each matrix is iterated by one
    rank alone. A gradient that is not finite (`found_inf`) leaves everything as it was, without asking the device.
    """

    def __init__(self, groups: list[dict[str, Any]], *, dtype: torch.dtype = torch.bfloat16, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.dtype = dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)  # Adam's asks for a step count in the state of every parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._adamw_groups():
            super().step()
        bad: Tensor | None = getattr(self, "found_inf", None)
        if bad is None or bad.device.type != "cpu":
            self._step_matrices(bad)
        elif not bad:
            self._step_matrices(None)
        return loss

    @contextmanager
    def _adamw_groups(self) -> Iterator[None]:
        every = self.param_groups
        self.param_groups = [group for group in every if "momentum" not in group]
        try:
            yield
        finally:
            self.param_groups = every

    @torch.no_grad()
    def _step_matrices(self, bad: Tensor | None) -> None:
        """Updates the matrices, or changes them by nothing if `bad` is one. The host does not wait for the decision."""
        entries = list(self._entries())
        if not entries:
            return
        if (scale := getattr(self, "grad_scale", None)) is not None:
            for entry in entries:
                entry.gradient.div_(scale)
        keep = None if bad is None else 1.0 - bad
        for entry in entries:
            share: Any = 1 - entry.beta
            if bad is not None and keep is not None:
                entry.gradient.masked_fill_(bad.bool(), 0.0)
                share = share * keep
            entry.momentum.lerp_(entry.gradient, share)
        directions = orthogonalise(entries, self.dtype)
        for entry, direction in zip(entries, directions, strict=True):
            if keep is None:
                entry.rows.mul_(1 - entry.lr * entry.weight_decay).add_(direction, alpha=-entry.lr * entry.scale)
            else:
                entry.rows.mul_(1 - keep * entry.lr * entry.weight_decay)
                entry.rows.addcmul_(direction.to(entry.rows.dtype), keep * (-entry.lr * entry.scale))

    def _entries(self) -> "Iterator[Matrix]":
        for group in self.param_groups:
            if "momentum" not in group:
                continue
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                yield Matrix(
                    parameter,
                    _local(parameter),
                    _local(parameter.grad),
                    _local(state["momentum_buffer"]),
                    describe(name, parameter),
                    group["lr"],
                    group["weight_decay"],
                    group["momentum"],
                )


class Matrix(NamedTuple):
    """What an update of one parameter needs.

    rows, gradient, momentum  of this rank: all m under DDP, its share under FSDP; float32
    shape                     number, rows and columns of the matrices that the parameter is made of
    """

    parameter: nn.Parameter
    rows: Tensor
    gradient: Tensor
    momentum: Tensor
    shape: tuple[int, int, int]
    lr: float
    weight_decay: float
    beta: float

    @property
    def scale(self) -> float:
        """Makes the root mean square of an update that of AdamW's: an orthogonal [m, n] has 1 / sqrt(max(m, n))."""
        return MATCH_ADAMW * sqrt(max(self.shape[1:]))

    @property
    def nesterov(self) -> Tensor:
        return self.gradient.lerp(self.momentum, self.beta)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalise(entries: Sequence[Matrix], dtype: torch.dtype) -> list[Tensor]:
    """Returns the directions of the update, in the shape of each entry's rows."""
    sharded = isinstance(entries[0].parameter, DTensor)
    group = entries[0].parameter.device_mesh.get_group() if sharded else None  # pyright: ignore[reportAttributeAccessIssue]
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    if ranks == 1:
        return iterate([entry.nesterov for entry in entries], [entry.shape for entry in entries], dtype)
    owners = assign([entry.shape for entry in entries], ranks)
    by_owner = [[entry for entry, owner in zip(entries, owners, strict=True) if owner == rank] for rank in range(ranks)]
    exchange = _exchange_rows if sharded else _gather_wholes
    found = exchange(by_owner, dist.get_rank(group), group, dtype)
    remaining = [iter(directions) for directions in found]
    return [next(remaining[owner]) for owner in owners]


def assign(shapes: Sequence[tuple[int, int, int]], ranks: int) -> list[int]:
    """Returns the owner of each parameter, the same on all ranks: the dearest first, each to who has least to do."""
    work = [0] * ranks
    owners = [0] * len(shapes)
    for number in sorted(range(len(shapes)), key=lambda number: -_operations(shapes[number])):
        owners[number] = work.index(min(work))
        work[owners[number]] += _operations(shapes[number])
    return owners


def _operations(shape: tuple[int, int, int]) -> int:
    """Returns the FLOPs of an update's products."""
    parts, *sides = shape
    short, long = sorted(sides)
    rounds = _rounds(short, long)
    small = sum(1 + 3 * (count - 1) for count in rounds)
    return parts * 2 * (2 * len(rounds) * short * short * long + small * short**3)


def _rounds(short: int, long: int) -> tuple[int, ...]:
    """Returns the numbers of iterations between two looks at XX'."""
    count = len(COEFFICIENTS)
    return (2, count - 2) if long >= WIDTHS * short else (1,) * count


def update_flops(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    """Returns the FLOPs of the iterations of one update, which the ranks share."""
    matrices = (describe(name, parameter) for name, parameter in parameters if is_matrix(name, parameter))
    return sum(_operations(shape) for shape in matrices)


def iterate(updates: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Returns the orthogonalised matrices, in `dtype`: one batch for each shape."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (_, rows, columns) in enumerate(shapes):
        alike.setdefault((rows, columns), []).append(number)
    found: list[Tensor | None] = [None] * len(updates)
    for sides, numbers in alike.items():
        batch = torch.cat([updates[number].to(dtype).view(-1, *sides) for number in numbers])
        done = newton_schulz(batch)
        parts = done.split([shapes[number][0] for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            found[number] = part.reshape(updates[number].shape)
    return [tensor for tensor in found if tensor is not None]


def newton_schulz(matrices: Tensor) -> Tensor:
    """Returns the matrices [k, m, n] with singular values near 1, by the iterations of COEFFICIENTS in their precision.

    Of a square matrix each iteration begins with X X', as published. Where n is larger the products with X are the dear
    ones: two iterations at a time are made on X X' [m, m] alone, and X is multiplied by their product. Not all at once:
    an eigenvalue that rounding has made negative moves away from 0 with each of them.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return newton_schulz(matrices.mT).mT
    found = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    coefficients = iter(COEFFICIENTS)
    for count in _rounds(*matrices.shape[1:]):
        gram = found @ found.mT
        if count == 1:
            a, b, c = next(coefficients)
            found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
            continue
        factors: list[Tensor] = []
        for a, b, c in islice(coefficients, count):
            if factors:
                gram = factors[-1] @ gram @ factors[-1]
            factors.append(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
            factors[-1].diagonal(dim1=1, dim2=2).add_(a)
        found = reduce(lambda product, factor: factor @ product, factors) @ found
    return found


def _gather_wholes(by_owner: list[list[Matrix]], rank: int, group: Any, dtype: torch.dtype) -> list[list[Tensor]]:
    """Iterates the matrices of this rank and returns those of every rank."""
    sizes = [sum(entry.rows.numel() for entry in entries) for entries in by_owner]
    mine = by_owner[rank]
    done = iterate([entry.nesterov for entry in mine], [entry.shape for entry in mine], dtype)
    device = by_owner[0][0].rows.device
    sent = torch.zeros(max(sizes), dtype=dtype, device=device)  # all ranks send as much
    if done:
        torch.cat([tensor.flatten() for tensor in done], out=sent[: sizes[rank]])
    received = torch.empty(len(by_owner) * max(sizes), dtype=dtype, device=device)
    dist.all_gather_into_tensor(received.view(torch.uint8), sent.view(torch.uint8), group)  # gloo knows no bfloat16
    shares = received.view(len(by_owner), -1)
    return [
        [
            part.view(entry.rows.shape)
            for entry, part in zip(entries, shares[owner][: sizes[owner]].split(_counts(entries)), strict=True)
        ]
        for owner, entries in enumerate(by_owner)
    ]


def _counts(entries: list[Matrix]) -> list[int]:
    return [entry.rows.numel() for entry in entries]


def _exchange_rows(by_owner: list[list[Matrix]], rank: int, group: Any, dtype: torch.dtype) -> list[list[Tensor]]:
    """Sends the rows of each matrix to its owner, and returns this rank's rows of all directions."""
    ranks, mine = len(by_owner), by_owner[rank]
    rows_of = [[_rows_of(entry, other, ranks) for entry in mine] for other in range(ranks)]
    to_owner = [sum(_counts(entries)) for entries in by_owner]
    from_rank = [sum(n * entry.shape[2] for n, entry in zip(rows, mine, strict=True)) for rows in rows_of]
    sent = torch.cat([entry.nesterov.to(dtype).flatten() for entries in by_owner for entry in entries])
    received = _all_to_all(sent, to_owner, from_rank, group)
    # From [rank, matrix, rows] to [matrix, all rows], and back.
    pieces = [
        part.split([n * entry.shape[2] for n, entry in zip(rows, mine, strict=True)])
        for part, rows in zip(received.split(from_rank), rows_of, strict=True)
    ]
    wholes = [torch.cat([piece[number] for piece in pieces]) for number in range(len(mine))]
    done = iterate(
        [whole.view(entry.parameter.shape) for whole, entry in zip(wholes, mine, strict=True)],
        [entry.shape for entry in mine],
        dtype,
    )
    starts = [list(accumulate((rows[number] for rows in rows_of), initial=0)) for number in range(len(mine))]
    answer = [
        done[number][starts[number][other] : starts[number][other + 1]].flatten()
        for other in range(ranks)
        for number in range(len(mine))
    ]
    returned = _all_to_all(torch.cat(answer) if answer else sent[:0], from_rank, to_owner, group)
    return [
        [part.view(entry.rows.shape) for entry, part in zip(entries, all_parts.split(_counts(entries)), strict=True)]
        for entries, all_parts in zip(by_owner, returned.split(to_owner), strict=True)
    ]


def _rows_of(entry: Matrix, rank: int, ranks: int) -> int:
    """Returns how many rows of a matrix FSDP keeps on a rank."""
    rows = entry.parameter.shape[0]
    share = -(-rows // ranks)
    return max(0, min(share, rows - rank * share))


def _all_to_all(sent: Tensor, counts: list[int], expected: list[int], group: Any) -> Tensor:
    received = sent.new_empty(sum(expected))
    size = sent.element_size()
    dist.all_to_all_single(  # gloo knows no bfloat16
        received.view(torch.uint8),
        sent.view(torch.uint8),
        [size * count for count in expected],
        [size * count for count in counts],
        group,
    )
    return received
