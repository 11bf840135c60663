"""What one kind of training says of itself; tasks/train.py does what all kinds have in common."""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from data.datamodule import ShardDataModule
from mae.distributed.launch import Topology
from mae.models.config import MAEConfig
from mae.plan.training_cost import Workload
from mae.train.schedule import Schedule
from mae.train.training import Training
from tasks.config import TrainConfig

# The settings of the data that change what is seen.
PIXELS = {"scale", "flip", "rand_augment", "decode", "bits", "mean", "std"}


class Task(ABC):
    """One run's data, model and Lightning module, made when they are asked for."""

    def __init__(self, config: TrainConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology

    @property
    def architecture(self) -> MAEConfig:
        """That of the encoder, and the size of its images."""
        return self.config.model

    @cached_property
    def data(self) -> ShardDataModule:
        config = self.config
        return ShardDataModule(
            config.data,
            image_size=self.architecture.image_size,
            channels=self.architecture.in_channels,
            seed=config.seed,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch or max(1, config.global_batch // self.topology.ranks),
            bad_samples=config.run / "bad_samples.jsonl",
        )

    def recipe(self, precision: str) -> dict[str, Any]:
        """The settings that decide the result: stored in every checkpoint, and a resume has to have the same."""
        config = self.config
        return {
            "seed": config.seed,
            "global_batch": config.global_batch,
            "precision": precision,
            "model": self.architecture.model_dump(mode="json"),
            "optim": config.optim.model_dump(mode="json"),
            "data": config.data.model_dump(mode="json", include=PIXELS),
            "order": self.data.identity,
        }

    @abstractmethod
    def model(self, start: Path | None) -> nn.Module:
        """The model, its weights from `config.init_from` where the run begins anew (`start` is None)."""

    @abstractmethod
    def module(self, model: nn.Module, schedule: Schedule, recipe: dict[str, Any]) -> Training: ...

    @abstractmethod
    def describe(self, model: nn.Module) -> list[tuple[str, str]]:
        """Rows of the start-up table about the model."""

    @abstractmethod
    def workload(self, precision: str, device: torch.device) -> Workload:
        """What `plan=true` reckons with."""

    def callbacks(self) -> list[pl.Callback]:
        """What this task has done beside measuring and saving, before a step is saved."""
        return []

    @abstractmethod
    def finish(self, module: Training, schedule: Schedule) -> None:
        """The end of a run that has made all its steps, on rank 0: pictures and summary.json."""
