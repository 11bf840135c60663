"""The settings of a training run; conf/ holds their values."""

import re
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from omegaconf import OmegaConf
from pydantic import BaseModel, Field, field_validator

from data.datamodule import DataConfig
from data.index.samples import FIRST
from data.storage.credentials import hide
from mae.callbacks.save_checkpoints import CheckpointConfig
from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.train.optim import OptimConfig

TaskSettings = TypeVar("TaskSettings", bound=BaseModel)


class OnlineProbeConfig(BaseModel, frozen=True, extra="forbid"):
    """Evaluation of the features while the run is under way: every how many steps, and on at most how many images."""

    every: int | None = Field(None, ge=1)
    train_images: int = Field(2000, ge=1)
    test_images: int = Field(1000, ge=2)
    k: int = Field(20, ge=1)


class PlanConfig(BaseModel, frozen=True, extra="forbid"):
    """Whether the forecast is wanted instead of the run, and for which machine."""

    show: bool = False
    gpus: int | None = Field(None, ge=1)
    gpu: str | None = None
    mfu: float = Field(0.4, gt=0, le=1)
    samples: int | None = Field(None, ge=1)
    file: str | None = Field(None, alias="json")


class TrainConfig(BaseModel, Generic[TaskSettings], frozen=True, extra="forbid"):
    """All settings of a training run, those of its task by the task's own model (see `tasks.task.read_settings`)."""

    name: str = Field(pattern=r"^[\w.+=,@-]+$")
    runs: str = "runs"
    trial: str | None = None  # what differs among the runs of a multirun
    seed: int = Field(0, ge=0, lt=2**31)
    epochs: float = Field(800, gt=0)
    max_steps: int | None = Field(None, ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int | None = Field(None, ge=1)
    resume: str = "auto"
    overwrite: bool = False
    init_from: str | None = None
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    val_every: int | None = Field(None, ge=1)
    log_every: int = Field(50, ge=1)
    pictures_every: int = Field(1000, ge=1)
    profile: bool = False
    task: TaskSettings
    model: MAEConfig
    blocks: BlocksConfig
    data: DataConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    online_probe: OnlineProbeConfig
    trainer: dict[str, Any]
    logger: dict[str, Any]
    plan: PlanConfig

    @field_validator("resume", mode="before")
    @classmethod
    def _is_no_switch(cls, resume: Any) -> Any:
        if isinstance(resume, bool):
            raise ValueError(
                f"{str(resume).lower()} is none of auto (the newest checkpoint of this run, if there is one), never "
                "and the path of a checkpoint"
            )
        return resume

    @field_validator("name", "trial")
    @classmethod
    def _names_a_folder(cls, name: str | None) -> str | None:
        if name is not None and not name.strip("."):
            raise ValueError(f"{name} names no folder of its own: give it a letter or a digit")
        return name

    @field_validator("trial")
    @classmethod
    def _hide_credentials(cls, trial: str | None) -> str | None:
        return trial and hide(trial)

    @property
    def run(self) -> Path:
        """RUNS/NAME, or sweeps/NAME/TRIAL for one of several runs of a multirun, each with a folder of its own."""
        if self.trial is None:
            return Path(self.runs) / self.name
        return Path("sweeps") / self.name / re.sub(r"[^\w.+=,@-]", "-", self.trial)


def keep_image(config: TrainConfig) -> TrainConfig:
    """Returns the settings with the data.image of the run that is resumed, where it is not set anew.

    Runs older than the setting took the first image of a sample.
    """
    stored = config.run / "config.yaml"
    if config.data.image is not None or config.overwrite or not stored.is_file():
        return config
    image = OmegaConf.select(OmegaConf.load(stored), "data.image", default=FIRST)
    return config.model_copy(update={"data": config.data.model_copy(update={"image": image})})


def evaluation_data(run: Path | None, overrides: dict[str, Any]) -> DataConfig:
    """Returns the data settings of a run under the overrides that are not None, with each image once.

    Raises ConfigError if the run read a stream.
    """
    stored: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml").data) if run else {}
    changed = {name: value for name, value in overrides.items() if value is not None}
    if run and "path" not in changed:
        stored.setdefault("image", FIRST)  # as runs older than the setting did
    if stored.get("mode") == "stream" and "path" not in changed:
        raise ConfigError(
            f"{run} read a stream, whose samples have no numbers: set data.path to shards that can be indexed"
        )
    each_image_once = {"mode": "index", "samples": None, "views_per_image": 1, "weights": None}
    return DataConfig.model_validate(stored | changed | each_image_once)
