"""The contract of an entry of benchmarks/ten_minutes.py: a program with these arguments and these files.

    python -m benchmarks.entries.NAME --data FOLDER --images FILE --settings own --steps 4000 --seed 0 --device cpu
        --precision bf16 --workers 2 --out OUT [WORDS ...]

It trains for so many steps and writes into OUT:

weights      file or folder that `mae.load` reads without further arguments: encoder and decoder
proof.pt     Proof: what the framework's own forward pass says of some images (not needed for a run of train.py)
report.json  {"batch": images per step, "settings": {...}, "version": "..."}

A program in another file enters as `--entries path/to/file.py`, whatever framework it uses.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PROOF_IMAGES = 16


class TrainingImages(NamedTuple):
    """The contents of FILE, decoded once before the clock starts, as a download of the data set would be.

    images     uint8 [n, H, W, 3]
    mean, std  float [3], of values in [0, 1]: all entries train on pixels scaled by them, since the loss depends on it
    """

    images: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def save(self, file: Path) -> None:
        np.savez(file, images=self.images, mean=self.mean, std=self.std)

    @classmethod
    def load(cls, file: Path) -> "TrainingImages":
        with np.load(file) as contents:
            return cls(contents["images"], tuple(contents["mean"].tolist()), tuple(contents["std"].tolist()))


class Proof(NamedTuple):
    """What a framework computes in float32 from its trained weights, to be compared with what is read from its file.

    images    [B, 3, H, W], scaled
    noise     [B, N]; the lowest quarter of the patches is visible
    loss      of the normalised pixels of the hidden patches
    features  [B, D], the mean of the patch tokens of whole images
    """

    images: Tensor
    noise: Tensor
    loss: Tensor
    features: Tensor

    def save(self, file: Path) -> None:
        torch.save(self._asdict(), file)

    @classmethod
    def load(cls, file: Path) -> "Proof":
        return cls(**torch.load(file, weights_only=True))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of an entry. `words` at the end are its own: those behind its name in `--entries`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--images", type=Path, required=True, help="the training images of these, see TrainingImages")
    parser.add_argument("--settings", choices=["own", "ours"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--precision", choices=["bf16", "float32"], required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("words", nargs="*")
    return parser.parse_args(words)


def write_report(out: Path, batch: int, settings: dict[str, Any], version: str) -> None:
    """Writes report.json."""
    report = {"batch": batch, "settings": settings, "version": version}
    (out / "report.json").write_text(json.dumps(report, indent=1))
