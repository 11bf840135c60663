"""Plain training loop of the peers: torch's loader, torchvision's transforms, fused AdamW, half a cosine, autocast.

Everything but the settings is the same for all peers, so that a difference between two of them is the library's.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from math import cos, pi
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import normalize

from benchmarks.entries.contract import PROOF_IMAGES, Proof, TrainingImages, parse_arguments, write_report
from mae.models.config import MAEConfig

# The model of cifar10_tiny.
MODEL = MAEConfig.model_validate(
    {
        "image_size": 32,
        "patch_size": 4,
        "width": 192,
        "depth": 6,
        "num_heads": 3,
        "decoder_width": 128,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
    }
)


class Recipe(NamedTuple):
    """Settings that an entry is free to choose.

    base_lr  lr = base_lr * batch / 256
    warmup   share of the steps
    end      learning rate at the end of the cosine, as a share of the peak
    clip     largest norm of the gradient
    scale    share of the area of random crops
    """

    batch: int
    base_lr: float
    betas: tuple[float, float]
    warmup: float
    end: float = 0.0
    clip: float | None = None
    weight_decay: float = 0.05
    scale: tuple[float, float] = (0.2, 1.0)


# AdamW as it was found for cifar10_tiny; a recipe with another optimiser has no counterpart in the peers' scripts.
OURS = Recipe(batch=64, base_lr=6e-3, betas=(0.9, 0.95), warmup=0.1, scale=(0.4, 1.0))


class Peer(Protocol):
    """A masked autoencoder of another library."""

    def loss(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Computes the loss with the library's own random mask, or the one that `noise` [B, N] ranks."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Returns the mean of the patch tokens of whole images, [B, D]."""
        ...

    def save(self, path: Path) -> None:
        """Writes a file or folder that `mae.load` reads."""
        ...

    @property
    def module(self) -> nn.Module: ...


class RandomCrops(Dataset[Tensor]):
    """Images in memory, a random crop and flip of each."""

    def __init__(self, data: TrainingImages, scale: tuple[float, float]) -> None:
        self.images = data.images
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(MODEL.image_size, scale=scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        crop = self.transform(Image.fromarray(self.images[number]))
        assert isinstance(crop, Tensor)
        return crop


def run_entry(build: Callable[..., Peer], own: Recipe, version: str, known: tuple[str, ...] = ()) -> None:
    """Trains a peer as the command line says, and writes its weights, proof and report.

    build  gets one of the words `known` as True if it stands behind the name of the entry
    """
    given = parse_arguments()
    if unknown := set(given.words) - set(known):
        raise SystemExit(f"this entry takes {', '.join(known) or 'no words'} and not {' '.join(sorted(unknown))}")
    recipe = own if given.settings == "own" else OURS
    data = TrainingImages.load(given.images)
    torch.manual_seed(given.seed)
    peer = build(**dict.fromkeys(given.words, True))
    train(peer, recipe, data, given)
    given.out.mkdir(parents=True, exist_ok=True)
    peer.module.cpu().eval()
    peer.save(given.out / "weights")
    prove(peer, data).save(given.out / "proof.pt")
    write_report(given.out, recipe.batch, recipe._asdict(), version)


def train(peer: Peer, recipe: Recipe, data: TrainingImages, given: argparse.Namespace) -> None:
    """Makes `given.steps` steps of AdamW on random crops."""
    device = torch.device(given.device)
    module = peer.module.to(device).train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=recipe.base_lr * recipe.batch / 256, betas=recipe.betas, fused=True)
    schedule = LambdaLR(optimizer, lambda step: rate(step, given.steps, recipe))
    batches = load(data, recipe, given)
    for _ in range(given.steps):
        images = next(batches).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
            loss = peer.loss(images)
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Returns the learning rate as a share of its peak: linear warm-up, then half a cosine."""
    warmup = round(steps * recipe.warmup)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return recipe.end + (1 - recipe.end) * (1 + cos(pi * progress)) / 2


def load(data: TrainingImages, recipe: Recipe, given: argparse.Namespace) -> Iterator[Tensor]:
    """Yields batches [B, 3, H, W] without end, each epoch in another order."""
    loader = DataLoader(
        RandomCrops(data, recipe.scale),
        batch_size=recipe.batch,
        shuffle=True,
        drop_last=True,
        num_workers=given.workers,
        persistent_workers=given.workers > 0,
        pin_memory=given.device == "cuda",
    )
    if not len(loader):
        raise SystemExit(f"{len(data.images)} images are less than one batch of {recipe.batch}")
    return chain.from_iterable(repeat(loader))


@torch.no_grad()
def prove(peer: Peer, data: TrainingImages) -> Proof:
    """Computes the loss and features of the first images, in float32 on the CPU."""
    pixels = torch.from_numpy(np.ascontiguousarray(data.images[:PROOF_IMAGES].transpose(0, 3, 1, 2))).float() / 255
    images = normalize(pixels, list(data.mean), list(data.std))
    noise = torch.rand(len(images), MODEL.patches, generator=torch.Generator().manual_seed(0))
    return Proof(images, noise, peer.loss(images, noise), peer.features(images))
