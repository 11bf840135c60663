"""How well a masked autoencoder paints what it has not seen, at several shares of hidden patches."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mae.errors import ConfigError, first_sentence
from mae.models.mae import MaskedAutoencoder
from mae.models.masking import draw_masking
from mae.pictures import reconstruction_grid
from mae.probes.features import at_ratio, held_out_noise
from mae.probes.models_under_probe import Subject, Want
from mae.probes.probe import Outcome, Row
from mae.probes.score_figures import draw_losses_over_ratio
from mae.probes.trivial_losses import trivial_losses


class Reconstruct(BaseModel):
    """The loss over the share of hidden patches, under masks that follow from the sample alone.

    ratios        the model's own is added
    floor_images  for the losses of trivial predictors
    shown         images in each picture
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["reconstruct"]
    test_images: int | None = Field(2000, ge=1)
    ratios: list[float] = Field(min_length=1)
    floor_images: int = Field(256, ge=1)
    shown: int = Field(8, ge=1)

    def refusal(self, subject: Subject) -> str | None:
        if not isinstance(subject.models["trained"], MaskedAutoencoder):
            return "needs a decoder, and the checkpoint holds an encoder only"
        return None if subject.images.has("test") else "needs test images: set data.val_path"

    def _ratios(self, subject: Subject) -> list[float]:
        """Raises ConfigError for one at which nothing or everything would be hidden."""
        config = subject.models["trained"].config
        try:
            return sorted({at_ratio(config, ratio).mask_ratio for ratio in [*self.ratios, config.mask_ratio]})
        except ValidationError as error:
            raise ConfigError(f"probe.ratios={self.ratios}: {first_sentence(error)}") from error

    def wants(self, subject: Subject) -> list[Want]:
        return [Want("test", "loss", self.test_images, ratio=ratio) for ratio in self._ratios(subject)]

    def measure(self, subject: Subject, out: Path) -> Outcome:
        wants = self.wants(subject)
        losses = {
            name: {f"{want.ratio:g}": float(subject.features(name, want).values.double().mean()) for want in wants}
            for name in subject.models
        }
        floors = {f"{want.ratio:g}": self._floors(subject, want.ratio or 0) for want in wants}
        rows = [
            Row(
                f"loss, {float(ratio):.0%} hidden",
                f"{losses['trained'][ratio]:.4f}",
                f"{losses['untrained'][ratio]:.4f}",
                ", ".join(f"{name} {value:.3f}" for name, value in floor.items()),
            )
            for ratio, floor in floors.items()
        ]
        pictures = [self._paint(subject, want.ratio or 0, out / "reconstruct") for want in wants]
        pictures.append(draw_losses_over_ratio(losses, floors, out / "reconstruct.png"))
        test_images = len(subject.features("trained", wants[0]).samples)
        numbers = {name: {"loss": by_ratio} for name, by_ratio in losses.items()}
        return Outcome(self.name, {**numbers, "floors": floors, "test_images": test_images}, rows, pictures)

    def _floors(self, subject: Subject, ratio: float) -> dict[str, float]:
        """Of as many images as are quickly interpolated, under the masks that the model sees."""
        config = at_ratio(subject.models["trained"].config, ratio)
        samples = subject.images.samples("test", self.floor_images)
        images = subject.pixels.normalise(subject.images.crops("test", samples).to(subject.device))
        noise = held_out_noise(samples.to(subject.device), config)
        return trivial_losses(images, noise, config)

    def _paint(self, subject: Subject, ratio: float, folder: Path) -> Path:
        model, pixels = subject.models["trained"], subject.pixels
        assert isinstance(model, MaskedAutoencoder)
        config = at_ratio(model.config, ratio)
        samples = subject.images.samples("test", self.shown)
        images = subject.images.crops("test", samples).to(subject.device)
        mask = draw_masking(held_out_noise(samples.to(subject.device), config), config).mask
        with subject.autocast():
            painted = model.reconstruct(pixels.normalise(images), mask=mask)
        unit = painted._replace(images=pixels.denormalise(painted.images))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"ratio-{ratio:g}.png"
        title = f"{ratio:.0%} masked"
        reconstruction_grid(pixels.unit(images), unit, config.patch_size, config.norm_pix, title).save(path)
        return path
