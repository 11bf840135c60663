"""Features of training images beside their thumbnails: what `mae.demo` looks for the neighbours of a photograph in."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mae.probes.models_under_probe import Subject, Want
from mae.probes.probe import Outcome, Row


class Neighbours(BaseModel):
    """No measurement: labels are not needed, and the untrained encoder is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["neighbours"]
    train_images: int | None = Field(10_000, ge=1)

    def refusal(self, subject: Subject) -> str | None:
        config, limit = subject.models["trained"].config, subject.cache.limit
        if config.in_channels not in (1, 3):
            return f"shows images, and those of {config.in_channels} channels cannot be"
        needed = 4 * config.width * len(subject.images.samples("train", self.train_images))
        if needed > limit:
            return f"keeps features of {needed / 1e9:.3g} GB, and cache_gb={limit / 1e9:g} keeps less: raise cache_gb"
        return None

    def wants(self, subject: Subject) -> list[Want]:
        return [
            Want("train", subject.pool, self.train_images, twin=False),
            Want("train", "thumbnails", self.train_images, twin=False),
        ]

    def measure(self, subject: Subject, out: Path) -> Outcome:
        count = len(subject.features("trained", self.wants(subject)[0]).samples)
        return Outcome(self.name, {"train_images": count}, [Row("images kept for mae.demo", f"{count:,}", "")], [])
