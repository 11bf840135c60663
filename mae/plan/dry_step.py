"""A training step without data, memory or time: what it holds and what it multiplies.

The step runs on fake tensors (shapes on the meta device that report a CPU), so that autograd, autocast, activation
checkpointing and the optimiser decide as they do in a run; every storage is counted from its creation to its end.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from mae.train.optim import OptimConfig, adamw

# torch's counter has no formula for a product that is added in place.
FORMULAS = flop_registry | {torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm]}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class DryStep(NamedTuple):
    """What a micro-batch costs on one device, in bytes.

    weights      parameters and buffers
    gradients    of all parameters that learn
    optimiser    AdamW's moments
    copies       of weights in the precision of autocast, which stay from the forward to the backward pass
    activations  whatever else is alive at the highest moment of the two: inputs, what autograd keeps, intermediate
                 results. Grows with the batch; nothing before does
    flops        no bytes: those of the forward and the backward pass, by torch's counter

    Lightning drops the gradients of the step before only after the forward pass, so at its end all five are there.
    """

    weights: int
    gradients: int
    optimiser: int
    copies: int
    activations: int
    flops: int

    def at(self, factor: float) -> "DryStep":
        """The cost of a micro-batch that is `factor` times as large."""
        return self._replace(activations=round(self.activations * factor), flops=round(self.flops * factor))

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.copies + self.activations


def dry_step(build: Callable[[], nn.Module], loss: Callable[[Any], Tensor], precision: str) -> DryStep:
    """The cost of a step of `loss(build())`, from the shapes alone.

    build      makes the model
    loss       makes its inputs, and of them a number
    precision  Lightning's name
    """
    with FakeTensorMode(), torch.device("cpu"):
        model = build()
        optimizer = adamw(model.named_parameters(), OptimConfig.model_validate({}), lr=1e-3)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in learning:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        weights = [*model.parameters(), *model.buffers()]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
        with Tally([*weights, *gradients, *moments]) as tally:
            with autocast(precision):
                value = loss(model)
            value.backward()
    activations = tally.highest - tally.casts
    return DryStep(_bytes(weights), _bytes(gradients), _bytes(moments), tally.casts, activations, tally.flops)


def autocast(precision: str) -> AbstractContextManager:
    return torch.autocast("cpu", AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Tally(TorchDispatchMode):
    """Counts the bytes of the storages that come to life inside it, and the floating-point operations.

    existing  tensors that are not to be counted
    highest   the largest sum of bytes
    casts     the largest sum of those that are whole copies of `existing` ones in another precision
    flops     by torch's own formulas, as its FlopCounterMode has them; that one hooks into the modules beside, which
              keeps tensors alive when they are computed again
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
