"""probe=embeddings of eval.py: vectors of every image in files, by all ranks together, continued after a kill.

1 open      the images: training and validation shards, or a plain folder of photographs
2 card      card.json says what makes the files; a folder of others is refused
3 extract   shard s is written by rank s mod ranks, unless it is there
4 complete  rank 0 reads the numbers of the samples in all files, and names what is missing
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.evaluation import left_out_sentence
from data.index.index import ShardIndex
from data.loader.dataset import Batch, CropSpec
from data.single_pass import Photographs, is_plain_folder, read_once
from mae.distributed.launch import Topology
from mae.distributed.rank_zero import is_rank_zero, say
from mae.distributed.ranks import broadcast_from_rank_zero, gather_to_rank_zero
from mae.errors import CheckpointError, ConfigError
from mae.formats.opened import Opened
from mae.models.mae import MaskedAutoencoder
from mae.models.pixels import Pixels
from mae.models.vit import Encoder
from mae.probes.embeddings import (
    Embeddings,
    Format,
    Rows,
    collect_rows,
    extract,
    finite,
    images_per_shard,
    is_written,
    read_samples,
    rows_of,
    write_shard,
)
from mae.probes.feature_cache import weights_fingerprint
from mae.run.checkpoint_files import flatten
from mae.run.folder import read_mapping, write_json
from mae.train.precision import choose_float32_products, resolve_precision
from tasks.evaluation_folder import PLACES, choose_folder, read_data_settings, record_data


class Images(NamedTuple):
    """A folder of photographs in the place of a data module."""

    config: DataConfig
    train_index: ShardIndex
    val_index: ShardIndex | None = None


class Files(NamedTuple):
    """Files in the folders of the parts, each with the vectors of `size` images, the last with the rest."""

    folder: Path
    format: Format
    size: int

    def of(self, part: str, index: ShardIndex) -> list[Path]:
        """Returns the files of a part, without the ending of their format."""
        return [self.folder / part / f"part-{number:05d}" for number in range(-(-len(index) // self.size))]


def write_embeddings(
    probe: Embeddings,
    checkpoint: Path,
    opened: Opened,
    model: Encoder | MaskedAutoencoder,
    given: dict[str, Any],
    *,
    out: Path | None,
    batch: int,
    topology: Topology,
    device: torch.device,
) -> None:
    """Writes the vectors of all images to embeddings/ among the results.

    given  data settings in place of the run's; None: unchanged
    batch  images per forward pass

    Raises ConfigError if the folder holds others, CheckpointError if a vector is not finite.
    """
    columns, (fmt, remark) = probe.columns(model), probe.choose_format()
    config = read_data_settings(checkpoint, opened, model.config.in_channels, given)
    crop = CropSpec(
        model.config.image_size,
        model.config.in_channels,
        keep=config.val_crop,
        exact=config.decode == "exact",
        bits=config.bits,
    )
    images = open_images(config, crop)
    if remark:
        say(remark)
    folder = (out or choose_folder(checkpoint, opened, images, out=None)) / "embeddings"
    files = Files(folder, fmt, images_per_shard(probe, columns))
    precision = torch.bfloat16 if resolve_precision("auto") == "bf16-mixed" else torch.float32
    made_of = {
        "weights": weights_fingerprint(model),
        "model": model.config.model_dump(mode="json"),
        "vectors": {name: list(shape) for name, shape in columns.items()},
        "data": {name: value for name, value in record_data(images).items() if name not in PLACES},
        "precision": f"{precision} {device.type}".removeprefix("torch."),
        "format": fmt,
        "shard_images": files.size,
    }
    card = {"made_by": f"mae-pretrain {version('mae-pretrain')}", "checkpoint": str(checkpoint), "step": opened.step}
    card |= {"path": config.path or config.source, "classes": class_names(images), "made_of": made_of}
    if is_rank_zero():
        begin(folder, card)
    broadcast_from_rank_zero(None)  # nobody writes before the card is there
    model.to(device).eval()
    choose_float32_products(device)
    pixels = Pixels(config.mean, config.std).to(device)

    def read(index: ShardIndex, samples: np.ndarray) -> Rows:
        return collect_rows([vectors(rows) for rows in read_once(index, crop, samples, batch, config.workers)])

    def vectors(rows: Batch) -> Rows:
        with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            found = extract(model, pixels.normalise(rows["images"].to(device)), probe)
        return rows_of(rows, found)

    parts = parts_of(images)
    for part, index in parts.items():
        write_part(files, part, index, read, checkpoint, topology)
    gather_to_rank_zero(None)  # all ranks are through
    if is_rank_zero():
        complete(files, card, parts)


def write_part(
    files: Files,
    part: str,
    index: ShardIndex,
    read: Callable[[ShardIndex, np.ndarray], Rows],
    checkpoint: Path,
    topology: Topology,
) -> None:
    """Writes this rank's files of a part that are not there yet. Raises CheckpointError if a vector is not finite."""
    (files.folder / part).mkdir(exist_ok=True)
    mine = [*enumerate(files.of(part, index))][topology.rank :: topology.ranks]
    todo = [(number, file) for number, file in mine if not is_written(file, files.format)]
    if len(todo) < len(mine):
        say(f"{part}: {len(mine) - len(todo)} of {len(mine)} files are there already")
    for number, file in track(todo, f"embeddings of {part}", transient=True, disable=not is_rank_zero()):
        rows = read(index, np.arange(number * files.size, min((number + 1) * files.size, len(index))))
        if not finite(rows):
            raise CheckpointError(
                f"embeddings of {checkpoint} are not finite, in {part}, file {number}: it is not written. The weights "
                "hold NaN or overflow; take an earlier checkpoint"
            )
        write_shard(file, files.format, rows)


def parts_of(images: ShardDataModule | Images) -> dict[str, ShardIndex]:
    """Returns the parts that there are, by the names of their folders."""
    if not isinstance(images, ShardDataModule):
        return {"images": images.train_index}
    validation = {} if images.val_index is None else {"val": images.val_index}
    return {"train": images.train_index} | validation


def open_images(config: DataConfig, crop: CropSpec) -> ShardDataModule | Images:
    """Opens the shards, or the photographs if `data.path` is a folder of them and no other is named."""
    if is_plain_folder(config.path) and config.val_path is None:
        photographs = Photographs(str(config.path))
        if photographs.passed_over:
            say(f"passed over in {config.path}: {photographs.passed_over}")
        return Images(config, photographs)
    return ShardDataModule(config, image_size=crop.size, channels=crop.channels, seed=0, global_batch=1, micro_batch=1)


def class_names(images: ShardDataModule | Images) -> list[str]:
    """Returns the names of the classes by label, [] if nothing says them."""
    if isinstance(images, ShardDataModule):
        return images.class_names
    return images.train_index.class_names if isinstance(images.train_index, Photographs) else []


def begin(folder: Path, card: dict[str, Any]) -> None:
    """Makes the folder, or takes up one that was begun with the same card. Removes what a kill has left half written.

    Raises ConfigError if it holds other embeddings, or files without a card.
    """
    there = read_mapping(folder / "card.json")
    if there is None and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds files and no card.json of embeddings. Choose another out=, or move them")
    if there is not None:
        old, new = dict(flatten(there.get("made_of", {}))), dict(flatten(json.loads(json.dumps(card["made_of"]))))
        if differing := [name for name in (*new, *old) if old.get(name) != new.get(name)]:
            name = differing[0]
            raise ConfigError(
                f"{folder} holds embeddings of another kind: {name} is {old.get(name)} there and {new.get(name)} now. "
                "Choose another out=, or remove that folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*/part-*.tmp"):
        left.unlink(missing_ok=True)
    if there is None or not there.get("complete"):
        write_json(folder / "card.json", card | {"complete": False})


def complete(files: Files, card: dict[str, Any], parts: dict[str, ShardIndex]) -> None:
    """Counts what is in the files, writes the card and prints it. Raises CheckpointError if a file is missing."""
    counts: dict[str, Any] = {}
    for part, index in parts.items():
        written = files.of(part, index)
        if missing := [file for file in written if not is_written(file, files.format)]:
            raise CheckpointError(f"{missing[0]} was not written. Run the same command again")
        found = np.concatenate([read_samples(file, files.format) for file in written])
        left_out = [index.key(int(sample)) for sample in np.setdiff1d(np.arange(len(index)), found)]
        counts[part] = {"images": len(found), "files": len(written), "left_out": left_out}
        say(f"{files.folder / part}: {len(found):,} images in {len(written)} files")
        if left_out:
            say(left_out_sentence(part, left_out, len(index)))
    write_json(files.folder / "card.json", card | {"complete": True, "parts": counts})
