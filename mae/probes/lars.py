"""The paper's linear probe: batch norm without affine, one linear layer, LARS (He et al. 2022, table 10)."""

from typing import Annotated

import torch
from pydantic import BaseModel, Field, PositiveFloat
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from mae.probes.features import Features, number_classes
from mae.probes.held_out import Choice, choose
from mae.train.schedule import learning_rate


class LarsConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of the fit.

    base_lr  a list is searched on held-out training images
    batch    cut to the number of training images
    views    augmented passes over the training images whose features are kept; epoch e sees pass e modulo `views`, so
             that as many as `epochs` are what a loader with augmentation would give
    """

    base_lr: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = 0.1
    batch: int = Field(16_384, ge=2)
    epochs: int = Field(90, ge=1)
    warmup_epochs: int = Field(10, ge=0)
    views: int = Field(8, ge=1)


def linear_head(width: int, classes: int, generator: torch.Generator) -> nn.Sequential:
    """Builds batch norm without affine and a linear layer, weights from N(0, .01) truncated at ±2, biases 0."""
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), head)


def lars(head: nn.Module) -> Lars:
    """Builds LARS with momentum .9, trust coefficient .001 and no weight decay.

    Rates adapt to matrices, not to vectors (You et al. 2017): timm takes that by group, and without weight decay adapts
    only if told so.
    """
    matrices = [parameter for parameter in head.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": others, "always_adapt": False}]
    return Lars([group | {"momentum": 0.9} for group in groups], lr=0.0, trust_coeff=0.001)


def fit_lars(
    views: list[Tensor],
    labels: Tensor,
    classes: int,
    base_lr: float,
    config: LarsConfig,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """Trains a head for `epochs` passes in random order, learning rate `base_lr` · batch / 256.

    views  features [n, D] of the training images under other crops and flips
    """
    generator = torch.Generator().manual_seed(seed)
    head = linear_head(views[0].shape[1], classes, generator).to(device)
    optimizer = lars(head)
    images = len(labels)
    batch = min(config.batch, images)
    steps = images // batch
    for step in range(config.epochs * steps):
        if step % steps == 0:
            values, order = views[step // steps % len(views)], torch.randperm(images, generator=generator)
        rows = order[step % steps * batch :][:batch]
        optimizer.zero_grad()
        F.cross_entropy(head(values[rows].to(device)), labels[rows].to(device)).backward()
        peak = base_lr * batch / 256
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak_lr=peak, warmup_steps=config.warmup_epochs * steps, total_steps=config.epochs * steps
            )
        optimizer.step()
    return head.eval()


@torch.no_grad()
def _accuracy(head: nn.Module, values: Tensor, labels: Tensor, batch: int, device: torch.device) -> float:
    guesses = torch.cat([head(part.to(device)).argmax(1).cpu() for part in values.split(batch)])
    return float((guesses == labels).double().mean())


def lars_accuracy(
    views: list[Features], test: Features, config: LarsConfig, seed: int, device: torch.device
) -> tuple[float, Choice]:
    """Returns the test accuracy, and the `base_lr` that it was trained with.

    views  the training images under other crops and flips
    """
    first, test, classes = number_classes(views[0], test)
    values, labels = [view.values for view in views], first.labels

    def accuracies(rates: list[float], fit: Tensor, held: Tensor) -> list[float]:
        some = [view[fit] for view in values]
        heads = [fit_lars(some, labels[fit], classes, rate, config, seed, device) for rate in rates]
        return [_accuracy(head, values[0][held], labels[held], config.batch, device) for head in heads]

    rates = config.base_lr if isinstance(config.base_lr, list) else [config.base_lr]
    best = Choice(rates[0])
    if len(rates) > 1:
        best = choose("base_lr", rates, labels, seed, accuracies)
    head = fit_lars(values, labels, classes, best.value, config, seed, device)
    return _accuracy(head, test.values, test.labels, config.batch, device), best
