"""Evaluate a frozen encoder beside the same encoder untrained: python eval.py checkpoint=runs/NAME probe=knn|linear"""

from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mae
from command_line import readable_errors, run_program
from data.datamodule import DataConfig, ShardDataModule
from data.index import ShardIndex
from mae.errors import ConfigError
from mae.features import Pool, extract
from mae.models.vit import Encoder
from mae.pixels import Pixels
from mae.precision import resolve_precision
from mae.probes import knn_accuracy, linear_accuracy
from mae.run import write_json


class KNN(BaseModel):
    """Nearest neighbours by cosine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["knn"]
    train_images: int | None = Field(None, ge=1)
    k: int = Field(20, ge=1)

    def measure(self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
        return {"top1": knn_accuracy(train, train_labels, test, test_labels, self.k)}


class Linear(BaseModel):
    """Logistic regression by L-BFGS."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["linear"]
    train_images: int | None = Field(10_000, ge=2)
    strengths: list[float] = Field(min_length=1)

    def measure(self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
        accuracy, strength = linear_accuracy(train, train_labels, test, test_labels, self.strengths)
        return {"top1": accuracy, "C": strength}


class EvalConfig(BaseModel):
    """All settings of an evaluation; conf/eval.yaml holds their values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    probe: KNN | Linear = Field(discriminator="name")
    data: dict[str, Any]
    pool: Pool
    batch_size: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    out: str | None


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="eval")
def main(raw: DictConfig) -> None:
    with readable_errors():
        evaluate(raw)


def evaluate(raw: DictConfig) -> None:
    """One probe of a checkpoint and of its untrained twin, on the images of the run."""
    config = EvalConfig.model_validate(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
    path = Path(config.checkpoint)
    trained = mae.load(path)
    if config.pool == "class_token" and not trained.config.class_token:
        raise ConfigError(f"pool=class_token, but {path} has no class token. Use pool=patches")
    torch.manual_seed(config.seed)
    untrained = Encoder(trained.config)
    data = open_data(config, trained)
    encoders = {"trained": trained, "untrained": untrained}
    if data.val_index is None:
        raise ConfigError(f"probe={config.probe.name} needs test images: set data.val_path")
    train, train_labels = features(config, data, data.train_index, encoders, config.probe.train_images)
    test, test_labels = features(config, data, data.val_index, encoders, None)
    if (train_labels < 0).any() or (test_labels < 0).any():
        raise ConfigError(f"probe={config.probe.name} needs labels, and some images have none (no .cls in the shards)")
    results = {name: config.probe.measure(train[name], train_labels, test[name], test_labels) for name in encoders}
    report(config, path, results, len(train_labels), len(test_labels))


def open_data(config: EvalConfig, model: Encoder) -> ShardDataModule:
    """The images of the run that the checkpoint belongs to, with what config.data says instead."""
    path = Path(config.checkpoint)
    run = next((folder for folder in (path, *path.parents) if (folder / "config.yaml").is_file()), None)
    of_run: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml")) if run else {"data": {}}
    return ShardDataModule(
        DataConfig.model_validate(of_run["data"] | config.data | {"views_per_image": 1, "weights": None}),
        image_size=model.config.image_size,
        channels=model.config.in_channels,
        seed=0,
        global_batch=1,
        micro_batch=config.batch_size,
    )


def features(
    config: EvalConfig, data: ShardDataModule, index: ShardIndex, encoders: dict[str, Encoder], at_most: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if resolve_precision("auto") == "bf16-mixed" else torch.float32
    pixels = Pixels(data.config.mean, data.config.std).to(device)
    for encoder in encoders.values():
        encoder.to(device).eval()
    loader = data.frozen_loader(index, config.batch_size, at_most=at_most)
    batches = track(loader, description="features", transient=True)
    return extract(encoders, batches, pixels.normalise, config.pool, device, precision)


def report(config: EvalConfig, path: Path, results: dict[str, Any], train_images: int, test_images: int) -> None:
    """A table on the screen and PROBE.json beside the run."""
    table = Table(title=f"{config.probe.name} of {path}, {train_images:,} training and {test_images:,} test images")
    table.add_column("encoder")
    table.add_column("top-1", justify="right")
    for name, result in results.items():
        table.add_row(name, f"{result['top1']:.2%}")
    Console().print(table)
    out = Path(config.out) if config.out else (path if path.is_dir() else path.parent) / "eval"
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{config.probe.name}.json"
    settings = config.probe.model_dump() | {"pool": config.pool, "seed": config.seed}
    counts = {"train_images": train_images, "test_images": test_images}
    write_json(file, {"probe": config.probe.name, "checkpoint": str(path), **results, **counts, "settings": settings})
    print(file)


if __name__ == "__main__":
    run_program(main)
