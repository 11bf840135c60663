"""Optimisers: their settings, which parameters decay, AdamW with a state dict keyed by names."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import nn
from torch.optim import AdamW

from mae.errors import CheckpointError

Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
COOLDOWN = 0.2  # what Hägele et al. 2024 find to reach a cosine of the same length


class OptimConfig(BaseModel, frozen=True, extra="forbid"):
    """Optimiser settings (He et al. 2022, table 8): lr = base_lr * global_batch / 256.

    warmup_steps  replaces warmup_epochs
    schedule      cosine | linear | wsd | steps: what follows the warm-up (mae/train/schedule.py); None: steps where
                  there are milestones, else cosine
    cooldown      share of a wsd run, at its end, in which the learning rate falls
    milestones    shares of a run of steps after each of which the learning rate is divided by 10
    decay_tokens  weight decay of class tokens, mask token and learned positions too, as in Yang et al. 2025
    layer_decay   layer-wise learning-rate decay, per block of the encoder from the head down; 1: none
    grad_clip     largest norm of the gradient; None: no clipping
    name          adamw | muon: what trains the matrices of the blocks (mae/train/muon.py); AdamW trains the rest
    muon_lr       learning rate of Muon, as a multiple of AdamW's
    muon_beta     share of the momentum that is kept in each step
    muon_dtype    precision of the Newton-Schulz iteration
    """

    base_lr: float = Field(1.5e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    decay_tokens: bool = False
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    warmup_epochs: float = Field(40.0, ge=0)
    warmup_steps: int | None = Field(None, ge=0)
    schedule: Literal["cosine", "linear", "wsd", "steps"] = "cosine"
    cooldown: Share = COOLDOWN
    milestones: tuple[Share, ...] = ()
    layer_decay: float = Field(1.0, gt=0, le=1)
    grad_clip: float | None = Field(None, gt=0)
    name: Literal["adamw", "muon"] = "adamw"
    muon_lr: float = Field(2.0, gt=0)
    muon_beta: Beta = 0.95
    muon_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _schedule_is_named(cls, settings: Any) -> Any:
        # Recipes and checkpoints older than the setting say it by their milestones.
        if isinstance(settings, dict) and settings.get("schedule") is None:
            return settings | {"schedule": "steps" if settings.get("milestones") else "cosine"}
        return settings

    @model_validator(mode="after")
    def _schedule_has_what_it_needs(self) -> Self:
        if self.milestones and self.schedule != "steps":
            raise ValueError(
                f"milestones={list(self.milestones)} are for schedule=steps, and this is schedule={self.schedule}: set "
                "optim.milestones=[], or leave optim.schedule out"
            )
        if self.schedule == "steps" and not self.milestones:
            raise ValueError(
                "schedule=steps needs optim.milestones, shares of the run after each of which the rate falls"
            )
        if self.cooldown != COOLDOWN and self.schedule != "wsd":
            raise ValueError(
                f"cooldown={self.cooldown:g} is for schedule=wsd, and this is schedule={self.schedule}: set "
                "optim.schedule=wsd, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _muon_is_chosen(self) -> Self:
        given = {name: getattr(self, name) for name in self.model_fields_set if name.startswith("muon_")}
        unused = [f"{name}={value}" for name, value in given.items() if value != type(self).model_fields[name].default]
        if self.name != "muon" and unused:
            raise ValueError(f"{', '.join(sorted(unused))} is for Muon alone: set optim=muon, or leave it out")
        return self


def decays(name: str, parameter: nn.Parameter, tokens: bool = False) -> bool:
    """Returns True for matrices, which decay; biases and norms do not, tokens and positions only if `tokens`."""
    return parameter.ndim >= 2 and (tokens or name.endswith("weight"))


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Returns True for the weights of the linear layers inside the blocks, which Muon trains if it is chosen."""
    return parameter.ndim == 2 and "blocks." in name and name.endswith(".weight")


def checkpoint_bytes(model: nn.Module, config: OptimConfig, average: nn.Module | None = None) -> int:
    """Returns the bytes of a checkpoint: weights, their average, and of each that is trained AdamW's two moments or
    Muon's one.
    """
    moments = sum(
        parameter.nbytes * (1 if config.name == "muon" and is_matrix(name, parameter) else 2)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    states = [model.state_dict(), average.state_dict() if average is not None else {}]
    return moments + sum(tensor.nbytes for state in states for tensor in state.values())


class NamedAdamW(AdamW):
    """AdamW whose state dict is keyed by parameter names instead of numbers, whatever the order of the parameters."""

    def _names(self) -> list[str]:
        return [name for group in self.param_groups for name in group["param_names"]]

    def state_dict(self) -> dict[str, Any]:
        """Returns {"state": {name: {...}}, "param_groups": [{"params": [name, ...], ...}]}: torch's, with names."""
        numbered, names = super().state_dict(), self._names()
        for group in numbered["param_groups"]:
            group["params"] = group.pop("param_names")
        numbered["state"] = {names[number]: entry for number, entry in numbered["state"].items()}
        return numbered

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads by name. Raises CheckpointError if the state belongs to other parameters."""
        numbers = {name: number for number, name in enumerate(self._names())}
        groups = []
        for own, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if differing := sorted(set(own["param_names"]) ^ set(stored["params"])):
                raise CheckpointError(
                    f"the optimiser state belongs to other parameters: {', '.join(differing[:8])} differ"
                )
            groups.append(stored | {"params": [numbers[name] for name in own["param_names"]]})
        state = {numbers[name]: entry for name, entry in state_dict["state"].items()}
        super().load_state_dict({"state": state, "param_groups": groups})


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, lr: float) -> NamedAdamW:
    """Returns the optimiser of the trainable parameters, in groups with and without weight decay."""
    trainable, tokens = [(name, one) for name, one in parameters if one.requires_grad], config.decay_tokens
    groups = [
        {"params": [(n, p) for n, p in trainable if decays(n, p, tokens)], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in trainable if not decays(n, p, tokens)], "weight_decay": 0.0},
    ]
    return build_grouped_optimizer(groups, config, lr)


def build_grouped_optimizer(groups: list[dict[str, Any]], config: OptimConfig, lr: float) -> NamedAdamW:
    """Returns fused AdamW over the groups; or Muon with AdamW, which part each group into matrices and the rest.

    groups  "params": [(name, parameter), ...] that are trained, "weight_decay", "lr" where it differs from `lr`
    """
    adamw = {"lr": lr, "betas": config.betas, "fused": True}
    if config.name == "adamw":
        return NamedAdamW(groups, **adamw)
    from mae.train.muon import Muon, part

    return Muon(part(groups, lr, config.muon_lr, config.muon_beta), dtype=getattr(torch, config.muon_dtype), **adamw)
