"""Views of a photograph as HTML: reconstruction under a mask, attention of a patch, nearest neighbours."""

from dataclasses import dataclass

import torch
from PIL import Image
from skimage.data import astronaut
from torch import Tensor

from mae.demo.gallery import Gallery
from mae.demo.html_images import figure, neighbour_row, patch_picker, sentence
from mae.demo.model import DemoModel
from mae.demo.photo import fit_to_model
from mae.errors import ConfigError
from mae.pictures.draw import STATISTICS, shown_range, to_image
from mae.pictures.show import overlay_attention, read_grid

NEIGHBOURS = 8
RUN_EXAMPLES = 7  # images of the run, beside the portrait


@dataclass(frozen=True)
class Views:
    """Parts of the page, each a function of what the user has chosen.

    photo  uint8 or uint16 [1, C, H, W]
    mask   [N], 1 hidden

    Pictures of 16 bits are drawn from the darkest to the brightest value of the photograph.
    """

    model: DemoModel
    gallery: Gallery | None
    examples: list[tuple[str, Tensor]]

    def heading(self) -> str:
        """Returns a line about the model and its input."""
        model, config = self.model, self.model.config
        (height, width), (rows, columns) = config.image_size, config.grid
        facts = [
            f"{config.depth} blocks of width {config.width}",
            f"{rows} x {columns} patches of {config.patch_size} pixels",
            f"{height} x {width} pixels, {'grey' if config.in_channels == 1 else 'RGB'}",
        ]
        if model.step is not None:
            facts.insert(0, f"step {model.step:,}")
        if model.bits == 16:
            facts.append("16 bits, drawn from the darkest to the brightest value")
        if model.decodes:
            facts.append(f"trained with {config.mask_ratio:.0%} hidden")
        if model.assumed:
            facts.append("normalised as ImageNet is, for lack of a record")
        return sentence(" · ".join(facts))

    def reconstruction(self, photo: Tensor, mask: Tensor) -> tuple[str, str, str, str, str]:
        """Returns original, picture to paint on, reconstruction, prediction of all patches, and the loss."""
        config, shown = self.model.config, shown_range(photo)
        original = figure(to_image(photo[0]), "Original", "as the model sees it")
        painting = patch_picker(to_image(photo[0]), config, "Masked", "drag to hide or show patches", mask=mask)
        if not self.model.decodes:
            reason = f"{self.model.path} holds an encoder only: there is no decoder to reconstruct with."
            return original, painting, "", "", sentence(reason)
        try:
            rebuilt = self.model.reconstruct(photo, mask)
        except ConfigError as error:
            return original, painting, "", "", sentence(f"{error}.", "alert")
        hidden = int(mask.sum())
        about_loss = (
            f"{hidden} of {config.patches} patches hidden ({hidden / config.patches:.0%}); "
            f"loss on them {rebuilt.loss:.3f}, of predicting zero {rebuilt.zero_loss:.3f}."
        )
        statistics = sentence(f"{STATISTICS['original']}.") if config.norm_pix else ""
        return (
            original,
            painting,
            figure(to_image(rebuilt.pasted[0], shown), "Reconstruction", "with what is visible"),
            figure(to_image(rebuilt.predicted[0], shown), "Prediction", "of every patch"),
            sentence(about_loss, "said") + statistics,
        )

    def remark(self, photo: Tensor) -> str:
        """Says that a model of 16 bits sees a photograph of 8; else ""."""
        if self.model.bits == 8 or photo.dtype == torch.uint16:
            return ""
        return sentence("The model was trained on 16 bits, and this photograph has 8: 256 values are seen of 65,536.")

    def attention(self, photo: Tensor, patch: int, block: int | None) -> tuple[str, str]:
        """Returns a picture to choose a patch in, and the attention of that patch."""
        config, image = self.model.config, to_image(photo[0])
        row, column = divmod(patch, config.grid[1])
        received = self.model.attention(photo, patch, block).numpy()
        through = "through all blocks" if block is None else f"in block {block + 1}"
        return (
            patch_picker(image, config, "Patch", "click one", chosen=patch),
            figure(overlay_attention(image, received), "Attention", f"of row {row + 1}, column {column + 1} {through}"),
        )

    def neighbours(self, photo: Tensor) -> str:
        """Returns the training images most similar to the photograph, or the command that makes them available."""
        if self.gallery is None:
            command = f"python eval.py checkpoint={self.model.path} probe=neighbours"
            return sentence(f"No features of these weights are kept. Run {command} and start this page again.")
        found = self.gallery.nearest(self.model.feature(photo, self.gallery.kind), NEIGHBOURS)
        count = f"Cosine similarity, of {len(self.gallery.thumbnails):,} training images."
        return sentence(count) + neighbour_row(found)


def load_examples(model: DemoModel) -> list[tuple[str, Tensor]]:
    """Returns names and photographs to begin with: images of the run's newest reconstructions, and a portrait."""
    found: list[tuple[str, Tensor]] = []
    for file in sorted((model.path / "reconstructions").glob("step-*.png"), reverse=True):
        if grid := read_grid(file, model.config.image_size):
            images = grid.originals(model.config.in_channels, model.bits)[:RUN_EXAMPLES]
            found = [(f"image {number + 1} of the run", one) for number, one in enumerate(images.split(1))]
            break
    portrait = fit_to_model(Image.fromarray(astronaut()), model.config, model.bits)
    return [*found, ("a portrait (NASA, public domain)", portrait)]
