"""A training step never waits for a GPU, nor copies to it: shown on fake CUDA tensors, where there is none.

Without a GPU autocast for CUDA switches itself off and autograd has no device for the backward pass, so that these are
forward passes in float32, and updates. tests/test_gpu.py has real steps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mae
from mae.models.classifier import Classifier
from mae.models.pixels import Pixels
from mae.train.finetuning import FinetuneConfig, Finetuning
from mae.train.optim import OptimConfig
from mae.train.pretraining import Pretraining
from mae.train.schedule import derive_schedule
from mae.train.training import Training

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
COPYING = {aten._to_copy.default, aten.copy_.default}
SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "num_heads": 2}
SMALL |= {"decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 2}


class Crossings(TorchDispatchMode):
    """Notes operations for which the host waits for the GPU, or that copy between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = {leaf.device.type for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)}
        if (func in WAITING and "cuda" in places) or (func in COPYING and len(places) == 2):
            self.found.append(str(func))
        return out


def built(kind: type[Training], model: torch.nn.Module, optim: dict[str, Any], **further: Any) -> Any:
    config = OptimConfig.model_validate(optim)
    sizes = {"samples": 64, "global_batch": 4, "micro_batch": 4, "ranks": 1, "epochs": 100, "max_steps": None}
    schedule = derive_schedule(config, **sizes)
    pixels = Pixels([0.5] * 3, [0.5] * 3)
    return kind(model, config, schedule, seed=0, pixels=pixels, recipe={}, average=None, ema=None, **further)


def pretraining(masking: str, optim: str) -> Training:
    config = mae.MAEConfig.model_validate(SMALL | {"masking": masking})
    return built(Pretraining, mae.MaskedAutoencoder(config, drop_path=0.2), {"name": optim})


def finetuning() -> Training:
    model = Classifier(mae.MAEConfig.model_validate(SMALL), 5, drop_path=0.2)
    return built(Finetuning, model, {}, task=FinetuneConfig(name="finetune"))


@pytest.mark.parametrize(
    "build",
    [
        lambda: pretraining("random", "adamw"),
        lambda: pretraining("grid", "muon"),
        lambda: pretraining("block", "adamw"),
        finetuning,
    ],
    ids=["random, AdamW", "grid, Muon", "block, AdamW", "fine-tuning"],
)
def test_step_neither_waits_for_the_gpu_nor_copies_to_it(build: Callable[[], Any]) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        module = build().train()
        optimizer = module.build_optimizer()
        batch = module.blank_batch(4)
        assert {tensor.device.type for tensor in batch.values()} == {"cuda"}
        with Crossings() as crossings:
            for _ in range(2):
                module.loss(batch)
                for parameter in (one for one in module.parameters() if one.requires_grad):
                    parameter.grad = torch.empty_like(parameter)
                optimizer.found_inf = torch.zeros(())
                optimizer.step()
                optimizer.zero_grad()
    assert crossings.found == []


def test_crossings_are_seen() -> None:
    with FakeTensorMode(), Crossings() as crossings:
        there = torch.zeros(3, device="cuda")
        _ = there + torch.ones(3).to("cuda")
        with pytest.raises(RuntimeError):
            there.sum().item()
    assert crossings.found[0] == "aten._to_copy.default"
