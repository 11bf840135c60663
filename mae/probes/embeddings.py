"""Embeddings as files: keys, labels and vectors of images, in shards of parquet or npy (`probe=embeddings`).

1 extract  images → vectors of the last layer or of chosen blocks
2 write    PART/part-00000.parquet, or part-00000.NAME.npy for each column; whole or not at all
3 read     the numbers of the samples again, to see which are there
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from mae.atomic import write_atomically
from mae.errors import ConfigError
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import Encoder
from mae.probes.features import describe

SHARD_BYTES = 256e6  # of the vectors in a shard, at most
Vector = Literal["patches", "class_token", "tokens"]
Format = Literal["parquet", "npy"]
Rows = dict[str, np.ndarray]


class Embeddings(BaseModel, frozen=True, extra="forbid"):
    """Settings of the files; measures nothing, needs no labels.

    vectors       "patches": mean patch token, "class_token", "tokens": all patch tokens in half precision
    layers        numbers of blocks, from 1, whose output is taken as it is; None: the last, behind the final norm
    format        None: parquet if pyarrow is installed, else npy
    shard_images  images in a file, at most
    """

    name: Literal["embeddings"]
    vectors: list[Vector] = Field(min_length=1)
    layers: list[PositiveInt] | None = Field(None, min_length=1)
    format: Format | None = None
    shard_images: int = Field(2000, ge=1)

    def columns(self, encoder: Encoder | MaskedAutoencoder) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each column of vectors. Raises ConfigError if the encoder has no such vector."""
        config = encoder.config
        if "class_token" in self.vectors and not config.class_tokens:
            raise ConfigError("probe.vectors has class_token, and this encoder has none: take patches or tokens")
        if beyond := [layer for layer in self.layers or () if layer > config.depth]:
            raise ConfigError(f"probe.layers has {beyond[0]}, and this encoder has {config.depth} blocks, from 1")
        shapes = {"tokens": (config.patches, config.width)}
        return {
            name if layer is None else f"{name}.{layer}": shapes.get(name, (config.width,))
            for layer in dict.fromkeys(self.layers or [None])
            for name in dict.fromkeys(self.vectors)
        }

    def choose_format(self) -> tuple[Format, str]:
        """Returns the format, and a sentence if pyarrow is missing. Raises ConfigError if it is asked for."""
        if self.format is not None and (self.format == "npy" or find_spec("pyarrow")):
            return self.format, ""
        if find_spec("pyarrow"):
            return "parquet", ""
        missing = "pyarrow is not installed (pip install -e '.[embeddings]')"
        if self.format == "parquet":
            raise ConfigError(f"probe.format=parquet: {missing}. Or take probe.format=npy")
        return "npy", f"{missing}: the files are npy"


def extract(model: Encoder | MaskedAutoencoder, images: Tensor, probe: Embeddings) -> dict[str, Tensor]:
    """Returns each column of vectors of normalised images [B, C, H, W], on the CPU."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_block: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[layer] = output

        return hook

    hooks = [model.blocks[layer - 1].register_forward_hook(keep(layer)) for layer in probe.layers or ()]
    try:
        latent = model.encode(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = {f".{layer}": outputs[layer] for layer in probe.layers} if probe.layers else {"": latent}
    return {
        f"{name}{layer}": describe(tokens, model.config.class_tokens, name).cpu()
        for layer, tokens in found.items()
        for name in probe.vectors
    }


def images_per_shard(probe: Embeddings, columns: dict[str, tuple[int, ...]]) -> int:
    """Returns how many images a file holds, so that its vectors take SHARD_BYTES at most."""
    size = sum(int(np.prod(shape)) * (2 if name.startswith("tokens") else 4) for name, shape in columns.items())
    return max(1, min(probe.shard_images, int(SHARD_BYTES // size)))


def write_shard(base: Path, fmt: Format, rows: Rows) -> None:
    """Writes the columns sample, label, key and the vectors; the file that `is_written` asks for comes last."""
    if fmt == "npy":
        for name in sorted(rows, key=lambda name: name == "sample"):
            with write_atomically(Path(f"{base}.{name}.npy")) as temporary, open(temporary, "wb") as file:
                np.save(file, rows[name])
        return
    import pyarrow as pa
    from pyarrow import parquet

    def column(values: np.ndarray) -> Any:
        if values.ndim == 1:
            return pa.array(values.tolist(), pa.string()) if values.dtype.kind == "U" else pa.array(values)
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))

    table = pa.table({name: column(values) for name, values in rows.items()})
    with write_atomically(Path(f"{base}.parquet")) as temporary:
        parquet.write_table(table, temporary, compression="none")


def is_written(base: Path, fmt: Format) -> bool:
    """Returns whether a shard is there: files are whole or not at all, and this is the last of them."""
    return Path(f"{base}.parquet" if fmt == "parquet" else f"{base}.sample.npy").is_file()


def read_samples(base: Path, fmt: Format) -> np.ndarray:
    """Returns the numbers of the samples in a shard."""
    if fmt == "npy":
        return np.load(f"{base}.sample.npy")
    from pyarrow import parquet

    return parquet.read_table(f"{base}.parquet", columns=["sample"])["sample"].to_numpy()


def finite(rows: Rows) -> bool:
    """Returns whether all vectors are finite."""
    return all(np.isfinite(values).all() for values in rows.values() if values.dtype.kind == "f")


def collect_rows(parts: list[Rows]) -> Rows:
    """Returns the columns of several batches as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def rows_of(batch: dict[str, Any], vectors: dict[str, Tensor]) -> Rows:
    """Returns a batch as columns: sample and label int64, key, vectors."""
    rows: Rows = {"sample": batch["positions"].numpy(), "label": batch["labels"].numpy()}
    rows["key"] = np.array(batch["keys"], dtype=str)
    return rows | {name: values.numpy() for name, values in vectors.items()}
