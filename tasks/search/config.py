"""The settings of a sweep; conf/sweep/ holds their values."""

from pathlib import Path
from typing import Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, Field, model_validator

from mae.models.loss import CHANGES_THE_LOSS


class Range(BaseModel, frozen=True, extra="forbid"):
    """Numbers from `low` to `high`, whole if both are; `log` draws them by their logarithm."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def distribution(self) -> BaseDistribution:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


class SweepConfig(BaseModel, frozen=True, extra="forbid"):
    """All settings of a sweep."""

    name: str = Field(pattern=r"^[\w.+=,@-]+$")
    sweeps: str
    settings: list[str]
    evaluation: list[str]
    space: dict[str, Range | list[bool | int | float | str]] = Field(min_length=1)
    sampler: Literal["tpe", "random", "grid"]
    n_trials: int | None = Field(ge=1)
    objective: str = Field(pattern=r"^\w+/\w+$")
    direction: Literal["maximize", "minimize"]
    prune_by: str | None
    prune_after: int = Field(ge=0)
    jobs: int = Field(ge=1)
    launch: list[str]
    storage: str | None
    max_failure_rate: float = Field(ge=0, le=1)
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "SweepConfig":
        varied = [name for name in self.space if name in CHANGES_THE_LOSS]
        if self.objective.endswith("/loss") and varied:
            raise ValueError(
                f"objective={self.objective} cannot rank trials that differ in {', '.join(varied)}: their losses are "
                "of different quantities. Use objective=linear/top1 or knn/top1"
            )
        ranges = [name for name, values in self.space.items() if isinstance(values, Range)]
        if self.sampler == "grid" and ranges:
            raise ValueError(f"sampler=grid takes values in space.{ranges[0]}, not a range: list them, or use tpe")
        if self.sampler != "grid" and self.n_trials is None:
            raise ValueError(f"sampler={self.sampler} has no end of its own: set n_trials")
        if fixed := [name for name in self.space if any(given.startswith(f"{name}=") for given in self.settings)]:
            raise ValueError(f"{fixed[0]} is in both space and settings: remove it from one of them")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.sweeps) / self.name

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            name: values.distribution() if isinstance(values, Range) else CategoricalDistribution(values)
            for name, values in self.space.items()
        }

    def trial_folder(self, number: int) -> Path:
        """Returns the run folder of a trial, always the same, so that the trial resumes from its checkpoints."""
        return self.folder / f"trial-{number:04d}"
