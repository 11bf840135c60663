"""The settings of a training run; conf/ holds their values."""

import math
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from data.config import DataConfig
from data.index.samples import FIRST
from data.storage.credentials import hide_all
from mae.callbacks.hang_watch import HangConfig
from mae.callbacks.save_checkpoints import CheckpointConfig
from mae.callbacks.time_limit import time_limit
from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.models.mae import Statistics
from mae.run.checkpoint_files import Weights
from mae.run.folder import stored_settings
from mae.train.average import AverageConfig
from mae.train.optim import OptimConfig
from tasks.words import GROUPS, choose_one, names_in, unknown

TaskSettings = TypeVar("TaskSettings", bound=AverageConfig)
Settings = TypeVar("Settings", bound=BaseModel)

# Settings that name a file or folder on this machine, or on a disk that it mounts.
PATHS = {"runs", "out", "data.root", "data.cache", "data.sampling", "task.embeddings", "plan.json", "sweep.sweeps"}
PATHS |= {"init_from", "resume", "checkpoint", "task.teacher", "task.outputs"}
HOME = re.compile(r"~[\w.-]*/|~$")
LONGEST_NAME = 255  # bytes, of file systems


def _spelt(name: Any) -> Any:
    """Returns a whole number as text: a job's id, a date. Of other numbers the spelling is lost."""
    if isinstance(name, float):
        raise ValueError("it was read as a number, and its spelling is lost. Write it in quotes")
    return str(name) if isinstance(name, int) and not isinstance(name, bool) else name


def _of_allowed_characters(name: str) -> str:
    if wrong := re.sub(r"[\w.+=,@-]", "", name):
        raise ValueError(f"{name!r} holds {wrong[0]!r}. Letters, digits and . _ + - = , @ are allowed: it is a folder")
    return _names_a_folder(name)


def _names_a_folder(name: str) -> str:
    if not name.strip("."):
        raise ValueError(f"{name!r} names no folder of its own: give it a letter or a digit")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"{name!r} is longer than the {LONGEST_NAME} bytes that the name of a folder can have")
    return name


def _counted(devices: Any) -> Any:
    if devices != "auto" and not (str(devices).isdecimal() and int(devices) > 0):
        raise ValueError(
            f"{devices} has to be how many devices the run takes, or auto for all. Which ones is said by "
            "CUDA_VISIBLE_DEVICES in the environment"
        )
    return devices


Name = Annotated[str, BeforeValidator(_spelt), AfterValidator(_of_allowed_characters)]


class TrainerConfig(BaseModel, frozen=True, extra="forbid"):
    """Arguments of Lightning's Trainer that are the user's to set: the others follow from the recipe and the ranks."""

    target: str = Field("lightning.pytorch.Trainer", alias="_target_", exclude=True)
    accelerator: str = "auto"
    devices: Annotated[int | Literal["auto"], BeforeValidator(_counted)] = 1
    strategy: str = "auto"
    max_time: Annotated[timedelta | None, BeforeValidator(time_limit)] = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    detect_anomaly: bool = False
    inference_mode: bool = True


class OnlineProbeConfig(BaseModel, frozen=True, extra="forbid"):
    """Evaluation of the features while the run is under way: every how many steps, and on at most how many images.

    dense_images  photographs of the training and of the validation part each, with label maps; None: none
    """

    every: int | None = Field(None, ge=1)
    train_images: int = Field(2000, ge=1)
    test_images: int = Field(1000, ge=2)
    k: int = Field(20, ge=1)
    dense_images: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _is_measured(self) -> Self:
        if self.dense_images is not None and self.every is None:
            raise ValueError(
                f"dense_images={self.dense_images} are measured every online_probe.every steps, and that is null: set "
                "it, or leave dense_images out"
            )
        return self


class PlanConfig(BaseModel, frozen=True, extra="forbid"):
    """Whether the forecast is wanted instead of the run, and for which machine.

    memory, tflops  GiB and TFLOP/s of a device, of one that is not in the table of devices say; None: as known
    network         GB/s that each device sends to another node
    """

    show: bool = False
    gpus: int | None = Field(None, ge=1)
    gpu: str | None = None
    memory: float | None = Field(None, gt=0)
    tflops: float | None = Field(None, gt=0)
    network: float = Field(25, gt=0)
    mfu: float = Field(0.4, gt=0, le=1)
    samples: int | None = Field(None, ge=1)
    price: float | None = Field(None, gt=0)
    file: str | None = Field(None, alias="json")

    @property
    def described(self) -> bool:
        """Returns whether the settings say all that a plan needs of a device."""
        return self.memory is not None and self.tflops is not None


class SuggestConfig(BaseModel, frozen=True, extra="forbid"):
    """Whether a recipe is wanted instead of the run, and for how many hours of training (tasks/suggest.py)."""

    show: bool = False
    hours: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _go_together(self) -> "SuggestConfig":
        if self.hours is not None and not self.show:
            raise ValueError(
                f"hours={self.hours:g} is for suggest=true, which writes a recipe. Add it, or leave it out"
            )
        return self


class TrainConfig(BaseModel, Generic[TaskSettings], frozen=True, extra="forbid"):
    """All settings of a training run, those of its task by the task's own model (see `tasks.task.read_settings`)."""

    name: Name
    runs: str = "runs"
    recipe: str | None = None  # that of experiment=, or the default; None for settings composed elsewhere
    trial: Annotated[str, AfterValidator(_names_a_folder)] | None = None  # what differs among the runs of a multirun
    seed: int = Field(0, ge=0, lt=2**31)
    epochs: float = Field(800, gt=0)
    max_steps: int | None = Field(None, ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int | None = Field(None, ge=1)
    resume: str = "auto"
    overwrite: bool = False
    init_from: str | None = None
    init_weights: Weights | None = None
    branch: str | None = None  # RUN@STEP of init_from=RUN@STEP (tasks/branch.py)
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    val_every: int | None = Field(None, ge=1)
    log_every: int = Field(50, ge=1)
    pictures_every: int = Field(1000, ge=1)
    pictures_statistics: Statistics = "original"
    profile: bool = False
    task: TaskSettings
    model: MAEConfig
    blocks: BlocksConfig
    data: DataConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    hang: HangConfig = HangConfig(step=600, other=3600)
    online_probe: OnlineProbeConfig
    trainer: TrainerConfig
    logger: dict[str, dict[str, Any]] = {}
    plan: PlanConfig
    suggest: SuggestConfig = SuggestConfig(show=False, hours=None)

    @field_validator("resume", mode="before")
    @classmethod
    def _is_no_switch(cls, resume: Any) -> Any:
        if isinstance(resume, bool):
            raise ValueError(
                f"{str(resume).lower()} is none of auto (the newest checkpoint of this run, if there is one), never "
                "and the path of a checkpoint"
            )
        return resume

    @model_validator(mode="after")
    def _statistics_are_those_of_patches(self) -> Self:
        if self.pictures_statistics != "original" and not self.model.norm_pix:
            raise ValueError(
                f"pictures_statistics={self.pictures_statistics} is for model.norm_pix=true, under which the model "
                "does not predict them. Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _weights_have_a_source(self) -> Self:
        if self.init_weights is not None and self.init_from is None:
            raise ValueError(f"init_weights={self.init_weights} says which weights of init_from=, which is not set")
        return self

    @model_validator(mode="after")
    def _artifacts_have_a_place(self) -> Self:
        if self.checkpoint.artifacts != "none" and "wandb" not in self.logger:
            raise ValueError(f"checkpoint.artifacts={self.checkpoint.artifacts} is kept by W&B: add logger=wandb")
        return self

    @property
    def branched(self) -> tuple[Path, int] | None:
        """Returns the run that this one branched off, and the step."""
        run, _, step = (self.branch or "").rpartition("@")
        return (Path(run), int(step)) if run else None

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
    stored = stored_settings(config.run)
    if config.data.image is not None or config.overwrite or stored is None:
        return config
    image = stored.get("data", {}).get("image", FIRST)
    return config.model_copy(update={"data": config.data.model_copy(update={"image": image})})


def plain_settings(raw: DictConfig) -> dict[str, Any]:
    """Returns composed settings as plain values, the credentials of URLs hidden.

    Raises ConfigError if a number is not finite, a text is empty, a path begins with ~, or a URL is where only a path
    can be.
    """
    settings = hide_all(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
    for name, value in _values(settings):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value} is no finite number: give one, or null where null is a choice")
        if not isinstance(value, str):
            continue
        if not value and not name.startswith("logger."):
            raise ConfigError(
                f"{name} is empty, as from a variable of the shell that is not set: give a value, or null"
            )
        if HOME.match(value):
            raise ConfigError(f"{name}={value}: nobody expands ~ behind =. Write $HOME instead, or the whole path")
        if name in PATHS and "://" in value:
            raise ConfigError(f"{name} is a URL, and has to be a path on this machine: download what it names first")
    return settings


def _values(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of all settings; the values of a list under its name."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _values(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _values(value, name)
    else:
        yield name, node


def validate(model: type[Settings], settings: dict[str, Any]) -> Settings:
    """Validates plain settings. Raises ConfigError for an unknown or left-out name, else ValidationError."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        found = [(detail["type"], detail["loc"]) for detail in error.errors(include_url=False)]
        if extra := [_name(loc, settings) for kind, loc in found if kind == "extra_forbidden"]:
            reason = unknown(extra[0], set(names_in(settings)) - set(extra))
            raise ConfigError(reason) from error
        if left_out := [loc[0] for kind, loc in found if kind == "missing" and len(loc) == 1 and loc[0] in GROUPS]:
            reason = choose_one(str(left_out[0]))
            raise ConfigError(reason) from error
        raise


def _name(loc: tuple[int | str, ...], settings: Any) -> str:
    """Returns the name of a setting; pydantic's place names the kind of a probe too."""
    parts = []
    for part in loc:
        if isinstance(settings, dict) and part in settings:
            settings = settings[part]
            parts.append(str(part))
    return ".".join(parts)


def evaluation_data(run: Path | None, overrides: dict[str, Any]) -> DataConfig:
    """Returns the data settings of a run under the overrides that are not None, with each image once.

    Raises ConfigError if the run read a stream.
    """
    stored: dict[str, Any] = ((run and stored_settings(run)) or {}).get("data", {})
    changed = {name: value for name, value in overrides.items() if value is not None}
    if run and "path" not in changed:
        stored.setdefault("image", FIRST)  # as runs older than the setting did
    if stored.get("mode") == "stream" and "path" not in changed:
        raise ConfigError(
            f"{run} read a stream, whose samples have no numbers: set data.path to shards that can be indexed"
        )
    each_image_once = {"mode": "index", "samples": None, "views_per_image": 1, "weights": None}
    each_image_once |= {"sampling": None, "rule": {}}
    return DataConfig.model_validate(stored | changed | each_image_once)
