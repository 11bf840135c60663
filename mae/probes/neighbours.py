"""Keeps features and thumbnails of training images, among which `mae.demo` finds a photograph's neighbours."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Outcome, Probe, Row


class Neighbours(Probe, frozen=True):
    """Measures nothing (`probe=neighbours`): no labels are needed, and the untrained encoder is left out."""

    name: Literal["neighbours"]
    train_images: int | None = Field(10_000, ge=1)

    def refusal(self, probed: ModelsUnderProbe) -> str | None:
        config, limit = probed.models["trained"].config, probed.cache.limit
        if config.in_channels not in (1, 3):
            return f"shows images, and those of {config.in_channels} channels cannot be"
        needed = 4 * config.width * len(probed.images.samples("train", self.train_images))
        if needed > limit:
            return f"keeps features of {needed / 1e9:.3g} GB, and cache_gb={limit / 1e9:g} keeps less: raise cache_gb"
        return None

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        return [
            Want("train", probed.pool, self.train_images, twin=False),
            Want("train", "thumbnails", self.train_images, twin=False),
        ]

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        count = len(probed.features("trained", self.wants(probed)[0]).samples)
        about = {"train_images": count, "images": probed.images.identity("train", None)}
        about["classes"] = probed.images.class_names("train")
        return Outcome(self.name, about, [Row("images kept for mae.demo", f"{count:,}", "")], [])
