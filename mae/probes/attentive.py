"""Attentive probe: accuracy of a classifier on attention-pooled tokens of a frozen encoder."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from mae.probes.features import Features, number_classes
from mae.probes.held_out import Choice, choose
from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Fitted, Outcome, Probe, measure_accuracy
from mae.train.schedule import learning_rate


class Setting(NamedTuple):
    """Learning rate and weight decay of one of several probes."""

    lr: float
    weight_decay: float


class AttentiveConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of the fit; the best pair of `lrs` × `weight_decays` is chosen on held-out training images.

    lrs  go on while the best is at their end
    """

    lrs: list[PositiveFloat] = Field(min_length=1)
    weight_decays: list[NonNegativeFloat] = Field(min_length=1)
    steps: int = Field(1500, ge=1)
    batch: int = Field(128, ge=1)


class AttentivePool(nn.Module):
    """S independent attentive probes on the same tokens.

    Each is multi-head attention of one learned query to the patch tokens (Chen et al. 2024; El-Nouby et al. 2024) and a
    linear classifier. Since q·(K x) = (Kᵀq)·x, the projection of the keys is a part of the query; values are projected
    after pooling, which is the same function for an N-th of the work.
    """

    def __init__(self, probes: int, width: int, heads: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()

        def parameters(*shape: int, std: float) -> nn.ParameterList:
            start = torch.randn(shape, generator=generator) * std  # the same for all probes
            return nn.ParameterList(start.clone() for _ in range(probes))

        self.query = parameters(heads, width, std=0.02)
        self.value = parameters(heads, width, width // heads, std=width**-0.5)
        self.head = parameters(width, classes, std=0.01)
        self.bias = parameters(classes, std=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classifies: tokens [B, N, D] -> logits [S, B, classes]."""
        query, value, head, bias = (torch.stack(list(part)) for part in (self.query, self.value, self.head, self.bias))
        scores = einsum(tokens, query, "b n d, s h d -> b s h n")
        pooled = einsum(scores.softmax(dim=-1), tokens, "b s h n, b n d -> s b h d")
        values = rearrange(einsum(pooled, value, "s b h d, s h d e -> s b h e"), "s b h e -> s b (h e)")
        return einsum(values, head, "s b d, s d c -> s b c") + bias[:, None]

    def groups(self, settings: list[Setting]) -> list[dict]:
        """Returns the parameter groups of AdamW: per probe its matrices, and its bias without weight decay."""
        groups = []
        for (lr, decay), *matrices, bias in zip(settings, self.query, self.value, self.head, self.bias, strict=True):
            groups.append({"params": matrices, "lr": lr, "peak": lr, "weight_decay": decay})
            groups.append({"params": [bias], "lr": lr, "peak": lr, "weight_decay": 0.0})
        return groups


class Fitter:
    """Trains attentive probes on tokens standardised by the training images.

    train  tokens [n, N, D] of any floating type, which may lie in a file
    """

    def __init__(
        self, train: Features, classes: int, heads: int, config: AttentiveConfig, seed: int, device: torch.device
    ) -> None:
        self.train, self.classes, self.heads = train, classes, heads
        self.config, self.seed, self.device = config, seed, device
        tokens = train.values
        sums = torch.zeros(2, tokens.shape[2], dtype=torch.float64)
        for part in tokens.split(1024):
            sums += torch.stack([part.double().sum((0, 1)), part.double().square().sum((0, 1))])
        mean, square = sums / (tokens.shape[0] * tokens.shape[1])
        self.mean = mean.float().to(device)
        self.deviation = (square - mean.square()).clamp_min(1e-6).sqrt().float().to(device)

    def standardise(self, tokens: Tensor) -> Tensor:
        return (tokens.to(self.device).float() - self.mean) / self.deviation

    def fit(self, rows: Tensor, settings: list[Setting]) -> AttentivePool:
        """Trains a probe per setting on these images: warm-up for a tenth of the steps, then a cosine."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens, labels = self.train.values, self.train.labels
        probes = AttentivePool(len(settings), tokens.shape[2], self.heads, self.classes, generator).to(self.device)
        optimizer = torch.optim.AdamW(probes.groups(settings), fused=True)
        total = self.config.steps
        order = torch.empty(0, dtype=torch.int64)
        for step in range(total):
            if len(order) < self.config.batch:
                order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
            chosen, order = order[: self.config.batch], order[self.config.batch :]
            logits = probes(self.standardise(tokens[chosen]))
            truth = labels[chosen].to(self.device).expand(len(settings), -1)
            optimizer.zero_grad()
            # The sum over probes gives each the gradient of its own mean loss.
            (F.cross_entropy(logits.flatten(0, 1), truth.flatten()) * len(settings)).backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak_lr=group["peak"], warmup_steps=total // 10, total_steps=total)
            optimizer.step()
        return probes

    @torch.no_grad()
    def accuracy(self, probes: AttentivePool, test: Features) -> Tensor:
        """Returns the accuracy of each probe, [S]."""
        batches = zip(test.values.split(self.config.batch), test.labels.split(self.config.batch), strict=True)
        right = [(probes(self.standardise(part)).argmax(-1).cpu() == truth).sum(1) for part, truth in batches]
        return torch.stack(right).sum(0).double() / len(test.labels)


def attentive_accuracy(
    train: Features, test: Features, heads: int, config: AttentiveConfig, seed: int, device: torch.device
) -> tuple[float, Setting, str]:
    """Returns the test accuracy of an attentive probe on tokens [n, N, D] and [m, N, D], its setting, and a remark.

    The setting is chosen on held-out training images, then the probe is fitted to all. See `Choice` for the remark.
    """
    train, test, classes = number_classes(train, test)
    fitter = Fitter(train, classes, heads, config, seed, device)
    decays = dict.fromkeys(config.lrs, config.weight_decays[0])  # the best for each learning rate

    def accuracies(lrs: list[float], fit: Tensor, held: Tensor) -> list[float]:
        settings = [Setting(lr, decay) for lr in lrs for decay in config.weight_decays]
        held_out = Features(train.samples[held], train.labels[held], train.values[held])
        found = fitter.accuracy(fitter.fit(fit, settings), held_out).view(len(lrs), -1)
        decays.update(zip(lrs, (config.weight_decays[best] for best in found.argmax(1)), strict=True))
        return found.amax(1).tolist()

    lr, remark = Choice(config.lrs[0])
    if len(config.lrs) * len(config.weight_decays) > 1:
        lr, remark = choose("lr", config.lrs, train.labels, seed, accuracies)
    best = Setting(lr, decays[lr])
    rows = torch.arange(len(train.labels))
    return float(fitter.accuracy(fitter.fit(rows, [best]), test)), best, remark


class Attentive(AttentiveConfig, Probe, frozen=True):
    """Attentive probe (`probe=attentive`)."""

    name: Literal["attentive"]
    train_images: int | None = Field(10_000, ge=5)
    test_images: int | None = Field(10_000, ge=1)

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        return [Want("train", "tokens", self.train_images), Want("test", "tokens", self.test_images)]

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        heads = probed.models["trained"].config.num_heads

        def fit(views: list[Features], test: Features) -> Fitted:
            accuracy, setting, remark = attentive_accuracy(views[0], test, heads, self, probed.seed, probed.device)
            return Fitted({"top1": accuracy, **setting._asdict()}, remark)

        return measure_accuracy(self.name, probed, self.wants(probed), fit)
