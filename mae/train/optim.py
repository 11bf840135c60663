"""AdamW and its schedule: which parameters decay, and the learning rate as a pure function of the step."""

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import AdamW

from mae.errors import CheckpointError


class OptimConfig(BaseModel):
    """Optimiser settings (He et al. 2022, table 8): lr = base_lr * global_batch / 256.

    warmup_steps  in the place of warmup_epochs
    milestones    shares of the run after each of which the learning rate is a tenth; none: half a cosine
    layer_decay   factor of the learning rate from each block of the encoder to the one before
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_lr: float = Field(1.5e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = Field(40.0, ge=0)
    warmup_steps: int | None = Field(None, ge=0)
    milestones: tuple[float, ...] = ()
    layer_decay: float = Field(1.0, gt=0, le=1)
    grad_clip: float | None = Field(None, gt=0)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for biases, norms, tokens or positions."""
    return parameter.ndim >= 2 and name.endswith("weight")


class NamedAdamW(AdamW):
    """AdamW over named parameters, whose state dict is keyed by the names instead of by an order."""

    def _names(self) -> list[str]:
        return [name for group in self.param_groups for name in group["param_names"]]

    def state_dict(self) -> dict[str, Any]:
        """torch's, with names for numbers: {"state": {name: {...}}, "param_groups": [{"params": [name, ...], ...}]}."""
        numbered, names = super().state_dict(), self._names()
        for group in numbered["param_groups"]:
            group["params"] = group.pop("param_names")
        numbered["state"] = {names[number]: entry for number, entry in numbered["state"].items()}
        return numbered

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of other parameters."""
        numbers = {name: number for number, name in enumerate(self._names())}
        groups = []
        for own, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if differing := sorted(set(own["param_names"]) ^ set(stored["params"])):
                raise CheckpointError(f"the optimiser state is of other parameters: {', '.join(differing[:8])} differ")
            groups.append(stored | {"params": [numbers[name] for name in own["param_names"]]})
        state = {numbers[name]: entry for name, entry in state_dict["state"].items()}
        super().load_state_dict({"state": state, "param_groups": groups})


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, lr: float) -> NamedAdamW:
    """Fused AdamW over the trainable parameters, those that decay and those that do not."""
    trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in trainable if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in trainable if not decays(n, p)], "weight_decay": 0.0},
    ]
    return NamedAdamW(groups, lr=lr, betas=config.betas, fused=True)


def layer_decayed_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    lr: float,
    layer: Callable[[str], int],
    last: int,
) -> NamedAdamW:
    """Fused AdamW over the trainable parameters, in groups of a layer, decaying or not (Clark et al. 2020).

    layer  number of the layer by the name of a parameter; the rate of layer `last` is `lr`, of each one before
           `config.layer_decay` times that of the next
    """
    members: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            members.setdefault((layer(name), decays(name, parameter)), []).append((name, parameter))
    groups = [
        {
            "params": members[number, decayed],
            "lr": lr * config.layer_decay ** (last - number),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for number, decayed in sorted(members)
    ]
    return NamedAdamW(groups, lr=lr, betas=config.betas, fused=True)
