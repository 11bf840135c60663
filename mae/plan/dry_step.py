"""Dry run of a training step: its memory and its FLOPs, without data and without allocating either.

The step runs on fake tensors (shapes on the meta device that report a CPU), so that autograd, autocast, activation
checkpointing and the optimiser decide as they do in a run. Every storage is counted from its creation to its release.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from mae.train.optim import OptimConfig, build_optimizer

# torch's counter lacks a formula for a product that is added in place.
FORMULAS = flop_registry | {torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm]}
ADAMW = OptimConfig.model_validate({})
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Workload(NamedTuple):
    """A model to build, and its loss as far as shapes go, for a dry step or a real one.

    build  makes the model; True for activation checkpointing of all blocks
    loss   makes a number of images with any pixels, and returns the model's loss on them
    optim  settings of the optimiser
    """

    build: Callable[[bool], nn.Module]
    loss: Callable[[Any, int], Tensor]
    optim: OptimConfig = ADAMW


class DryStep(NamedTuple):
    """Cost of a micro-batch on one device: bytes, and FLOPs of the forward and backward pass by torch's counter.

    weights      parameters and buffers
    gradients    of all trained parameters
    optimiser    moments
    copies       of weights in the precision of autocast, kept from the forward to the backward pass
    activations  everything else at the peak: inputs, tensors saved for the backward pass, intermediate results.
                 Grows with the batch, as the rows above do not

    Lightning frees the gradients of the previous step only after the forward pass, so all five coexist at its end.
    """

    weights: int
    gradients: int
    optimiser: int
    copies: int
    activations: int
    flops: int

    def at(self, factor: float) -> "DryStep":
        """Returns the cost of a micro-batch `factor` times as large."""
        return self._replace(activations=round(self.activations * factor), flops=round(self.flops * factor))

    @property
    def peak(self) -> int:
        """Bytes at the end of the forward pass."""
        return self.weights + self.gradients + self.optimiser + self.copies + self.activations


def dry_step(workload: Workload, images: int, precision: str, *, recompute: bool) -> DryStep:
    """Returns the cost of one step of a workload, from shapes alone.

    images     of the micro-batch
    precision  Lightning's name
    recompute  activation checkpointing of all blocks
    """
    with FakeTensorMode(), torch.device("cpu"):
        model = workload.build(recompute)
        optimizer = build_optimizer(model.named_parameters(), workload.optim, lr=1e-3)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        weights = [*model.parameters(), *model.buffers()]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        with Tally([*weights, *gradients, *moments]) as tally:
            with autocast(precision):
                value = workload.loss(model, images)
            value.backward()
    return DryStep(
        weights=sum(tensor.nbytes for tensor in weights),
        gradients=sum(tensor.nbytes for tensor in gradients),
        optimiser=sum(tensor.nbytes for tensor in moments),
        copies=tally.casts,
        activations=tally.highest - tally.casts,
        flops=tally.flops,
    )


def autocast(precision: str) -> torch.autocast:
    """Returns the context in which Lightning computes a loss on a CPU in this precision."""
    return torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST)


class Tally(TorchDispatchMode):
    """Counts bytes of the storages created inside it, and FLOPs.

    existing  tensors that are not counted
    highest   peak sum of bytes
    casts     peak sum of bytes of copies of `existing` tensors in another precision
    flops     by the formulas of torch's FlopCounterMode, whose module hooks would keep checkpointed tensors alive
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.highest = self.casts = self.flops = 0
        self._now = self._casts_now = 0
        self._existing = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in existing})
        self._counted = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self._existing
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), cast)
        return out

    def _count(self, storage: torch.UntypedStorage, cast: bool) -> None:
        if storage in self._existing or storage in self._counted:
            return
        self._counted[storage] = True
        self._add(storage.nbytes(), cast)
        weakref.finalize(storage, self._add, -storage.nbytes(), cast)

    def _add(self, size: int, cast: bool) -> None:
        self._now += size
        self._casts_now += size * cast
        self.highest = max(self.highest, self._now)
        self.casts = max(self.casts, self._casts_now)
