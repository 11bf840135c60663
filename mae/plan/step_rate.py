"""Speed of real training steps on the device at hand, for a suggestion."""

import time

import torch

from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder
from mae.plan.dry_step import AUTOCAST
from mae.train.optim import OptimConfig, build_optimizer

BATCH = {"cpu": 16, "cuda": 128}  # images of a step
MAX_STEPS = 50


def step_rate(config: MAEConfig, device: torch.device, precision: str, seconds: float = 4.0) -> float:
    """Measures images per second of one device: forward and backward pass and update, on random pixels.

    precision  Lightning's name
    seconds    to measure for after a first step, or MAX_STEPS steps; the mean counts, since where other programs run
               some steps take ten times as long as others
    """
    images = BATCH[device.type]
    with device:
        model = MaskedAutoencoder(config)
        pixels = torch.randn(images, config.in_channels, *config.image_size)
        noise = torch.rand(images, config.patches)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig.model_validate({}), lr=1e-4)
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken[1:]) < seconds and len(taken) <= MAX_STEPS):
        begun = time.perf_counter()
        with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            loss = model(pixels, noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return images * len(taken[1:]) / sum(taken[1:])
