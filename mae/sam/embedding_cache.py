"""Disk cache of what a frozen encoder gives for each image of a data set."""

import hashlib
import json
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.sam.encoder import SamEncoder

FORMAT = 2  # the first one could hold tokens of black images for the samples 0 and 1
SAMPLES_PER_FOLDER = 1000
CHECKSUM_BYTES = 4


class OutputCache:
    """FOLDER/KEY/…/NUMBER.tokens: the output for a sample, bfloat16 of `shape`, and its CRC-32.

    Several ranks and runs may share a folder. Outputs are rounded when they are first computed too, so that each epoch
    is alike.

    key      of everything that decides the outputs: another one gets a folder of its own
    samples  number of samples in the data set
    setting  name of the setting that gave the folder, for messages

    Raises ConfigError if the folder cannot be written.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, ...], samples: int, setting: str) -> None:
        self.folder = folder / key
        self.samples = samples
        self.shape = shape
        self.setting = setting
        self.bytes = 2 * torch.Size(shape).numel()
        self._make(self.folder)

    def path(self, sample: int) -> Path:
        return self.folder / f"{sample // SAMPLES_PER_FOLDER:06d}" / f"{sample:09d}.tokens"

    def read(self, sample: int) -> Tensor | None:
        """Returns the output for a sample; None if it is not kept, damaged, or cannot be read."""
        try:
            contents = self.path(sample).read_bytes()
        except OSError:
            return None
        data, checksum = contents[:-CHECKSUM_BYTES], contents[-CHECKSUM_BYTES:]
        if len(data) != self.bytes or zlib.crc32(data).to_bytes(CHECKSUM_BYTES) != checksum:
            return None
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(self.shape)

    def keep(self, sample: int, tokens: Tensor) -> Tensor:
        """Writes the output for a sample, and returns it as it is kept. Images outside of the data are not kept."""
        tokens = tokens.detach().to("cpu", torch.bfloat16).contiguous()
        if sample < 0:
            return tokens
        data = tokens.view(torch.uint8).numpy().tobytes()
        self._make(self.path(sample).parent)
        # Not flushed to the disk: what a power failure cuts off, the checksum finds.
        temporary = self.path(sample).with_suffix(f".{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_bytes(data + zlib.crc32(data).to_bytes(CHECKSUM_BYTES))
            os.replace(temporary, self.path(sample))
        except OSError as error:
            raise ConfigError(
                f"{self.setting}={self.folder.parent} cannot be written ({error.strerror}): the tokens of "
                f"{self.samples:,} images take {self.samples * self.bytes / 1e9:,.1f} GB. Make room, choose another "
                "folder, or leave it out"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return tokens

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.setting}={self.folder.parent} cannot be made ({error.strerror}): choose another folder, or "
                "leave it out"
            ) from error


class TokenCache(OutputCache):
    """Tokens [h, w, D] before the neck of a SAM-style encoder.

    The key is a hash of the encoder's weights and `identity`.

    identity  plain values: fingerprint and scale of the images, precision of the computation
    """

    def __init__(self, folder: Path, encoder: SamEncoder, samples: int, identity: dict[str, Any]) -> None:
        about = identity | {"config": encoder.config.model_dump(), "format": FORMAT}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, value in encoder.state_dict().items():
            if not name.startswith("neck."):
                digest.update(value.cpu().numpy().tobytes())
        shape = (*encoder.config.grid, encoder.config.width)
        super().__init__(folder, digest.hexdigest()[:16], shape, samples, "task.embeddings")
