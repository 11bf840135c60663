"""The settings of a training run."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data.datamodule import DataConfig
from mae.callbacks.online_probe import OnlineProbeConfig
from mae.callbacks.save_checkpoints import CheckpointConfig
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.plan.forecast import PlanConfig
from mae.sam.config import SegmentConfig
from mae.train.finetuning import FinetuneConfig
from mae.train.optim import OptimConfig
from mae.train.pretraining import PretrainConfig


class TrainConfig(BaseModel):
    """All settings of a training run; conf/ holds their values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w.+=,@-]+$")
    runs: str = "runs"
    trial: str | None = None  # of a multirun: what differs
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
    task: PretrainConfig | FinetuneConfig | SegmentConfig = Field(discriminator="name")
    model: MAEConfig
    blocks: BlocksConfig
    data: DataConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    online_probe: OnlineProbeConfig
    trainer: dict[str, Any]
    logger: dict[str, Any]
    plan: PlanConfig

    @property
    def run(self) -> Path:
        """RUNS/NAME, or sweeps/NAME/TRIAL for one of several runs of a multirun, each with a folder of its own."""
        if self.trial is None:
            return Path(self.runs) / self.name
        return Path("sweeps") / self.name / re.sub(r"[^\w.+=,@-]", "-", self.trial)
