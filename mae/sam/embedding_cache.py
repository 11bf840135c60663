"""Disk cache of the tokens that a frozen encoder gives for each image of a data set."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae.sam.encoder import SamEncoder


class TokenCache:
    """FOLDER/KEY: the tokens before the neck of each sample, float32 [samples, h, w, D], computed at its first use.

    The key is a hash of the encoder's weights and `identity`: other weights or data get a folder of their own.

    samples   number of samples in the data set
    identity  plain values: fingerprint and scale of the images, precision of the computation
    """

    def __init__(self, folder: Path, encoder: SamEncoder, samples: int, identity: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity | {"config": encoder.config.model_dump()}, sort_keys=True).encode())
        for name, value in encoder.state_dict().items():
            if not name.startswith("neck."):
                digest.update(value.cpu().numpy().tobytes())
        self.folder = folder / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        shape = (samples, *encoder.config.grid, encoder.config.width)
        self.tokens = _map(self.folder / "tokens.bin", np.float32, shape)
        self.present = _map(self.folder / "present.bin", np.bool_, (samples,))

    @torch.no_grad()
    def __call__(self, encoder: SamEncoder, images: Tensor, samples: Tensor) -> Tensor:
        """Returns the tokens [B, h, w, D] of images [B, 3, S, S]; computes those whose number is not kept yet."""
        numbers = samples.cpu().numpy()
        absent = np.flatnonzero(~self.present[numbers])
        if len(absent):
            self.tokens[numbers[absent]] = encoder.tokens(images[absent]).float().cpu().numpy()
            self.present[numbers[absent]] = True
        return torch.from_numpy(self.tokens[numbers]).to(images.device)


def _map(file: Path, dtype: type[np.generic], shape: Sequence[int]) -> np.ndarray:
    """Maps a sparse file as an array; what has not been written is zero and takes no room on disk."""
    with open(file, "ab") as opened:  # "ab" truncates nothing: several ranks may be here at once
        opened.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype, "r+", shape=tuple(shape))
