"""probe=losses of eval.py: a table with loss, colour entropy and size of every training image, by all ranks together.

1 measure  part p of the images is written by rank p mod ranks, unless it is there
2 join     rank 0 writes losses.npy (data/index/sample_table.py) and losses.json, and removes the parts
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from data.datamodule import ShardDataModule
from data.evaluation import explain_unreadable, left_out_sentence
from data.index.sample_table import keep_groups, new_rows, read_rows, write_rows
from data.loader.measured import MeasuredDataset
from data.single_pass import is_plain_folder, read_once
from mae.distributed.launch import Topology
from mae.distributed.rank_zero import is_rank_zero, say
from mae.distributed.ranks import gather_to_rank_zero
from mae.errors import CheckpointError, ConfigError
from mae.formats.opened import Opened
from mae.models.mae import MaskedAutoencoder
from mae.models.pixels import Pixels
from mae.models.vit import Encoder
from mae.probes.feature_cache import weights_fingerprint
from mae.probes.features import held_out_noise, losses
from mae.probes.losses import Losses
from mae.run.folder import read_mapping, write_json
from mae.train.precision import choose_float32_products, resolve_precision
from tasks.evaluation_folder import PLACES, choose_folder, read_data_settings, record_data

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def write_losses(
    probe: Losses,
    checkpoint: Path,
    opened: Opened,
    model: Encoder | MaskedAutoencoder,
    given: dict[str, Any],
    *,
    out: Path | None,
    batch: int,
    topology: Topology,
    device: torch.device,
    check: Callable[[], None],
) -> None:
    """Writes losses.npy and losses.json among the results.

    given  data settings in place of the run's; None: unchanged
    batch  images per forward pass
    check  raises if the run has been overwritten meanwhile

    Masks follow from the number of the sample alone. An image that cannot be read has size 0 and no loss. Raises
    ConfigError without a decoder or shards, CheckpointError if a loss is not finite.
    """
    if reason := probe.refusal(model):
        raise ConfigError(f"probe=losses {reason}")
    assert isinstance(model, MaskedAutoencoder)
    config = read_data_settings(checkpoint, opened, model.config.in_channels, given)
    if is_plain_folder(config.path):
        raise ConfigError(
            f"probe=losses writes a table for training from shards, and data.path={config.path} has none: pack its "
            "images with python -m data.pack"
        )
    shape = {"image_size": model.config.image_size, "channels": model.config.in_channels}
    data = ShardDataModule(config, **shape, seed=0, global_batch=1, micro_batch=batch)
    results = choose_folder(checkpoint, opened, data, out=out)
    precision = torch.bfloat16 if resolve_precision("auto") == "bf16-mixed" else torch.float32
    made_of = {
        "weights": weights_fingerprint(model),
        "model": model.config.model_dump(mode="json"),
        "data": {name: value for name, value in record_data(data).items() if name not in (*PLACES, "test")},
        "precision": f"{precision} {device.type}".removeprefix("torch."),
    }
    table, card = results / "losses.npy", results / "losses.json"
    if table.is_file() and (read_mapping(card) or {}).get("made_of") == json.loads(json.dumps(made_of)):
        say(f"{table} is there already, of these weights and images")
        return
    digest = hashlib.sha256(json.dumps([made_of, probe.part_images, batch]).encode()).hexdigest()[:12]
    parts = results / f"losses-{digest}"
    model.to(device).eval()
    choose_float32_products(device)
    measure = partial(measure_part, model, data, Pixels(config.mean, config.std).to(device), precision, batch)
    files = write_parts(parts, probe.part_images, len(data.train_index), measure, topology)
    gather_to_rank_zero(None)  # all ranks are through
    if not is_rank_zero():
        return
    check()
    about = {"probe": "losses", "checkpoint": str(checkpoint), "step": opened.step, "weights": opened.taken}
    about |= {"made_by": f"mae-pretrain {version('mae-pretrain')}", "path": config.path or config.source}
    join_parts(files, table, card, data, about | {"made_of": made_of})
    shutil.rmtree(parts)


def write_parts(
    folder: Path, size: int, images: int, measure: Callable[[np.ndarray], np.ndarray], topology: Topology
) -> list[Path]:
    """Writes this rank's parts, of `size` images each, that are not there yet. Returns the files of all ranks."""
    files = [folder / f"part-{number:05d}.npy" for number in range(-(-images // size))]
    mine = [*enumerate(files)][topology.rank :: topology.ranks]
    todo = [(number, file) for number, file in mine if not file.is_file()]
    if len(todo) < len(mine):
        say(f"{folder}: {len(mine) - len(todo)} of {len(mine)} parts are there already")
    for number, file in track(todo, "losses", transient=True, disable=not is_rank_zero()):
        write_rows(file, measure(np.arange(number * size, min((number + 1) * size, images))))
    return files


@torch.inference_mode()
def measure_part(
    model: MaskedAutoencoder,
    data: ShardDataModule,
    pixels: Pixels,
    precision: torch.dtype,
    batch: int,
    samples: np.ndarray,
) -> np.ndarray:
    """Returns the rows of these training samples. Raises CheckpointError if a loss is not finite."""
    index, device = data.train_index, pixels.mean.device
    rows, ratio = new_rows(index, samples), model.config.mask_ratio
    for found in read_once(index, data.crop, samples, batch, data.config.workers, MeasuredDataset):
        if not len(positions := found["positions"]):
            continue
        images = pixels.normalise(found["images"].to(device))
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            values = losses(model, images, held_out_noise(positions.to(device), model.config), ratio).cpu()
        if not values.isfinite().all():
            key = index.key(int(positions[~values.isfinite()][0]))
            raise CheckpointError(
                f"the loss of {key} is not finite: no table is written. The weights hold NaN or overflow; take an "
                "earlier checkpoint"
            )
        places = positions.numpy() - samples[0]
        rows["loss"][places], rows["size"][places] = values.float().numpy(), found["sizes"].numpy()
        rows["entropy"][places] = found["entropies"].numpy()
    return rows


def join_parts(files: list[Path], table: Path, card: Path, data: ShardDataModule, about: dict[str, Any]) -> None:
    """Writes the table and what it holds, and says both. Raises CheckpointError if a part is missing."""
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{missing[0]} was not written. Run the same command again")
    rows = np.concatenate([read_rows(file) for file in files])
    lost = np.flatnonzero(rows["size"] == 0)
    if len(lost) == len(rows):
        reason = explain_unreadable(data, data.train_index, 0)
        raise ConfigError(f"none of the {len(rows):,} training images can be read; the first: {reason}")
    if table.is_file():
        keep_groups(read_rows(table), rows)
    write_rows(table, rows)
    columns = {name: rows[name][rows["size"] > 0] for name in ("loss", "entropy", "size")}
    spread = {name: np.quantile(values, QUANTILES).tolist() for name, values in columns.items()}
    keys = [data.train_index.key(int(sample)) for sample in lost]
    found = {"images": len(rows), "unreadable": keys, "mean_loss": float(columns["loss"].mean(dtype=np.float64))}
    found["quantiles"] = {"of": QUANTILES, **spread}
    write_json(card, about | found)
    say(f"{table}: {len(rows):,} images")
    for name, values in spread.items():
        shown = ", ".join(f"{share:.0%} {value:.4g}" for share, value in zip(QUANTILES, values, strict=True))
        say(f"{name:<8}  {shown}")
    if keys:
        reason = explain_unreadable(data, data.train_index, int(lost[0]))
        say(left_out_sentence("train", keys, len(rows), reason))
