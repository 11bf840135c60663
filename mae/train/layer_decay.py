"""Layer-wise learning-rate decay, for fine-tuning."""

from collections.abc import Callable, Iterable

from torch import nn

from mae.train.optim import NamedAdamW, OptimConfig, build_grouped_optimizer, decays


def build_layer_decayed_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    lr: float,
    layer: Callable[[str, int], int],
    depth: int,
) -> NamedAdamW:
    """Returns the optimiser with layer-wise learning-rate decay (Clark et al. 2020), over the trainable parameters.

    layer  (name of a parameter, depth) -> number of its layer; layer `depth` + 1 learns at `lr`, each one before it at
           `config.layer_decay` times the rate of the next
    depth  number of the encoder's blocks
    """
    members: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            group = layer(name, depth), decays(name, parameter, config.decay_tokens)
            members.setdefault(group, []).append((name, parameter))
    groups = [
        {
            "params": members[number, decayed],
            "lr": lr * config.layer_decay ** (depth + 1 - number),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for number, decayed in sorted(members)
    ]
    return build_grouped_optimizer(groups, config, lr)
