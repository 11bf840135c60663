"""AdamW whose learning rate falls from the last layer of an encoder to the first."""

from collections.abc import Callable, Iterable

from torch import nn

from mae.optim import NamedAdamW, OptimConfig, decays


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
