"""Reconstruction loss of a masked autoencoder at several mask ratios, beside trivial predictors."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from mae.errors import ConfigError, first_sentence
from mae.models.mae import MaskedAutoencoder, Statistics
from mae.models.masking import draw_masking
from mae.pictures.draw import STATISTICS, reconstruction_columns, save_grid, shown_range
from mae.probes.features import at_ratio, held_out_noise
from mae.probes.models_under_probe import ModelsUnderProbe, Want
from mae.probes.probe import Outcome, Probe, Row
from mae.probes.score_figures import draw_losses_over_ratio
from mae.probes.trivial_losses import trivial_losses


class Reconstruct(Probe, frozen=True):
    """Loss on test images over the mask ratio (`probe=reconstruct`). Masks follow from the number of the sample.

    ratios        mask ratios; the model's own is added
    floor_images  number of images for the losses of trivial predictors
    shown         number of images in each picture
    statistics    in pictures under norm_pix, as of `MaskedAutoencoder.reconstruct`
    """

    name: Literal["reconstruct"]
    test_images: int | None = Field(2000, ge=1)
    ratios: list[float] = Field(min_length=1)
    floor_images: int = Field(256, ge=1)
    shown: int = Field(8, ge=1)
    statistics: Statistics = "original"

    def refusal(self, probed: ModelsUnderProbe) -> str | None:
        if not isinstance(probed.models["trained"], MaskedAutoencoder):
            return "needs a decoder, and the checkpoint holds an encoder only"
        if not probed.images.has("test"):
            return "needs test images: set data.val_path"
        if self.statistics != "original" and not probed.models["trained"].config.norm_pix:
            return f"probe.statistics={self.statistics} is for model.norm_pix=true. Leave it out"
        try:
            self._ratios(probed)
        except ConfigError as error:
            return str(error)
        return None

    def _ratios(self, probed: ModelsUnderProbe) -> list[float]:
        """Returns all mask ratios, ascending. Raises ConfigError if one hides nothing or everything."""
        config = probed.models["trained"].config
        try:
            return sorted({at_ratio(config, ratio).mask_ratio for ratio in [*self.ratios, config.mask_ratio]})
        except ValidationError as error:
            raise ConfigError(f"probe.ratios={self.ratios}: {first_sentence(error)}") from error

    def wants(self, probed: ModelsUnderProbe) -> list[Want]:
        return [Want("test", "loss", self.test_images, ratio=ratio) for ratio in self._ratios(probed)]

    def measure(self, probed: ModelsUnderProbe, out: Path) -> Outcome:
        wants = self.wants(probed)
        losses = {
            name: {f"{want.ratio:g}": float(probed.features(name, want).values.double().mean()) for want in wants}
            for name in probed.models
        }
        some = probed.crops("test", self.floor_images, probed.features("trained", wants[0]))
        baselines = {f"{want.ratio:g}": self._baselines(probed, want.ratio or 0, *some) for want in wants}
        baseline_images = len(some[1])
        rows = [
            Row(
                f"loss, {float(ratio):.0%} hidden",
                f"{losses['trained'][ratio]:.4f}",
                f"{losses['untrained'][ratio]:.4f}",
                ", ".join(f"{name} {value:.3f}" for name, value in by_name.items()) + f" ({baseline_images:,} images)",
            )
            for ratio, by_name in baselines.items()
        ]
        pictures = [self._draw(probed, want.ratio or 0, out / "reconstruct") for want in wants]
        pictures.append(draw_losses_over_ratio(losses, baselines, out / "reconstruct.png"))
        test_images = len(probed.features("trained", wants[0]).samples)
        numbers = {name: {"loss": by_ratio} for name, by_ratio in losses.items()}
        about = {"floors": baselines, "floor_images": baseline_images, "test_images": test_images}
        return Outcome(self.name, {**numbers, **about}, rows, pictures)

    def _baselines(self, probed: ModelsUnderProbe, ratio: float, crops: Tensor, samples: Tensor) -> dict[str, float]:
        """Computes the losses of trivial predictors under the masks that the model sees."""
        config = at_ratio(probed.models["trained"].config, ratio)
        noise = held_out_noise(samples.to(probed.device), config)
        device, normalise = probed.device, probed.pixels.normalise
        return trivial_losses(crops, noise, config, lambda some: normalise(some.to(device)))

    def _draw(self, probed: ModelsUnderProbe, ratio: float, folder: Path) -> Path:
        model, pixels = probed.models["trained"], probed.pixels
        assert isinstance(model, MaskedAutoencoder)
        config = at_ratio(model.config, ratio)
        crops, samples = probed.crops("test", self.shown, probed.features("trained", self.wants(probed)[0]))
        images = crops.to(probed.device)
        mask = draw_masking(held_out_noise(samples.to(probed.device), config), config).mask
        with probed.autocast():
            painted = model.reconstruct(pixels.normalise(images), mask=mask, statistics=self.statistics)
        shown = shown_range(images)
        unit = painted._replace(images=pixels.denormalise(painted.images))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"ratio-{ratio:g}.png"
        lines = [f"{ratio:.0%} of each image is hidden, and painted by the model"]
        columns = reconstruction_columns(pixels.unit(images), unit, config.patch_size, shown)
        save_grid(columns, path, lines + [STATISTICS[self.statistics]] * config.norm_pix, shown)
        return path
