"""What the page shows of a photograph, a mask and a patch, as HTML."""

from dataclasses import dataclass

from PIL import Image
from skimage.data import astronaut
from torch import Tensor

from mae.demo.gallery import Gallery
from mae.demo.html_images import example_row, figure, neighbour_row, patches, sentence, to_image
from mae.demo.model import DemoModel
from mae.errors import ConfigError
from mae.pictures import TRUE_STATISTICS, heat, read_grid

NEIGHBOURS = 8
EXAMPLES = 7  # of the run's own, beside the portrait


@dataclass(frozen=True)
class Views:
    """The parts of the page, each a function of what the user has chosen.

    photo  uint8 [1, C, H, W]
    mask   [N], 1 hidden
    """

    model: DemoModel
    gallery: Gallery | None
    examples: list[tuple[str, Image.Image]]

    def heading(self) -> str:
        """Which model this is, and what it takes."""
        model, config = self.model, self.model.config
        (height, width), (rows, columns) = config.image_size, config.grid
        facts = [
            f"{config.depth} blocks of width {config.width}",
            f"{rows} x {columns} patches of {config.patch_size} pixels",
            f"{height} x {width} pixels, {'grey' if config.in_channels == 1 else 'RGB'}",
        ]
        if model.step is not None:
            facts.insert(0, f"step {model.step:,}")
        if model.decodes:
            facts.append(f"trained with {config.mask_ratio:.0%} hidden")
        if model.assumed:
            facts.append("normalised as ImageNet is, since nobody says otherwise")
        return sentence(" · ".join(facts))

    def choice(self) -> str:
        return example_row(self.examples)

    def reconstruction(self, photo: Tensor, mask: Tensor) -> tuple[str, str, str, str, str]:
        """The original, the picture to paint on, the reconstruction, the whole prediction, and the loss."""
        config = self.model.config
        original = figure(to_image(photo), "Original", "as the model sees it")
        painting = patches(to_image(photo), config, "Masked", "drag to hide or show patches", mask=mask)
        if not self.model.decodes:
            reason = f"{self.model.path} holds an encoder only: there is no decoder to reconstruct with."
            return original, painting, "", "", sentence(reason)
        try:
            painted = self.model.paint(photo, mask)
        except ConfigError as error:
            return original, painting, "", "", sentence(f"{error}.", "alert")
        hidden = int(mask.sum())
        said = (
            f"{hidden} of {config.patches} patches hidden ({hidden / config.patches:.0%}); "
            f"loss on them {painted.loss:.3f}, of predicting zero {painted.zero:.3f}."
        )
        statistics = sentence(f"{TRUE_STATISTICS.capitalize()}.") if config.norm_pix else ""
        return (
            original,
            painting,
            figure(to_image(painted.pasted), "Reconstruction", "with what is visible"),
            figure(to_image(painted.predicted), "Prediction", "of every patch"),
            sentence(said, "said") + statistics,
        )

    def attention(self, photo: Tensor, patch: int, block: int | None) -> tuple[str, str]:
        """The picture to choose a patch in, and what that patch attends to."""
        config, image = self.model.config, to_image(photo)
        row, column = divmod(patch, config.grid[1])
        received = self.model.attention(photo, patch, block).numpy()
        through = "through all blocks" if block is None else f"in block {block + 1}"
        return (
            patches(image, config, "Patch", "click one", chosen=patch),
            figure(heat(image, received), "Attention", f"of row {row + 1}, column {column + 1} {through}"),
        )

    def neighbours(self, photo: Tensor) -> str:
        """The images of the data set that are most like the photograph, or how to have them."""
        if self.gallery is None:
            command = f"python eval.py checkpoint={self.model.path} probe=neighbours"
            return sentence(f"No features of these weights are kept. To have them: {command}, then start this again.")
        found = self.gallery.nearest(self.model.feature(photo, self.gallery.kind), NEIGHBOURS)
        count = f"Cosine similarity, of {len(self.gallery.thumbnails):,} training images."
        return sentence(count) + neighbour_row(found)


def examples_of(model: DemoModel) -> list[tuple[str, Image.Image]]:
    """Pictures to begin with: those of the run's newest reconstructions, and a portrait."""
    found: list[tuple[str, Image.Image]] = []
    for file in sorted((model.path / "reconstructions").glob("step-*.png"), reverse=True):
        rows = read_grid(file, model.config.image_size)
        if rows:
            found = [(f"image {number + 1} of the run", row[0]) for number, row in enumerate(rows[:EXAMPLES])]
            break
    return [*found, ("a portrait (NASA, public domain)", Image.fromarray(astronaut()))]
