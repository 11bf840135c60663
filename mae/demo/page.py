"""Layout of the page, and the events that connect its parts (Gradio)."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from markupsafe import Markup
from torch import Tensor

from mae.demo.html_images import example_row, sentence
from mae.demo.model import draw_mask, max_mask_percent
from mae.demo.photo import fit_to_model, read_photograph
from mae.demo.serve import discard
from mae.demo.views import Views
from mae.errors import ConfigError
from mae.pictures.draw import to_image

MASK_KINDS = ["random", "block", "grid"]
ROLLOUT = -1  # stands for all blocks where a block number is expected
ATTENTION = (
    "Attention of the patch to the whole photograph, mean over the heads, from the lowest value to the highest. "
    "Rollout follows the attention through all blocks (Abnar & Zuidema 2020)."
)
PATCHES = files("mae.demo").joinpath("patches.js").read_text()
PICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("picked", { number: Number(button.dataset.number) });
});"""


class Page:
    """The parts of the page and their event handlers, which return new contents of the parts that change.

    State of each visitor: photo uint8 or uint16 [1, C, H, W], mask [N] with 1 hidden, patch whose attention is shown.
    """

    def __init__(self, views: Views) -> None:
        self.views = views
        self.config = views.model.config
        rows, columns = self.config.grid
        first = views.examples[0][1]
        mask = draw_mask(self.config, self.config.mask_ratio, self.config.masking, 0)
        patch = rows // 2 * columns + columns // 2
        with gr.Blocks(title=f"{views.model.path} demo", analytics_enabled=False) as self.blocks:
            self.photo, self.mask, self.patch = gr.State(first), gr.State(mask), gr.State(patch)
            html(Markup("<h1>{}</h1>").format(str(views.model.path)) + views.heading())
            self._lay_out_photograph()
            self._lay_out_reconstruction(views.reconstruction(first, mask))
            self._lay_out_attention(views.attention(first, patch, None))
            html("<h2>Nearest neighbours</h2>")
            self.neighbours = html(views.neighbours(first))
            self._connect()

    def _lay_out_photograph(self) -> None:
        with gr.Row(elem_classes="halves"):
            self.file = gr.File(label="Photograph", height=172)
            self.examples = html(example_row((name, to_image(photo[0])) for name, photo in self.views.examples), PICK)
        self.message = html(self.views.remark(self.views.examples[0][1]), elem_id="message")

    def _lay_out_reconstruction(self, shown: tuple[str, ...]) -> None:
        config = self.config
        html("<h2>Reconstruction</h2>")
        largest = max_mask_percent(config)
        percent = min(largest, max(1, round(config.mask_ratio * 100)))
        with gr.Row():
            self.ratio = gr.Slider(1, largest, percent, step=1, label="Mask ratio, %", scale=3, min_width=200)
            self.kind = gr.Radio(MASK_KINDS, value=config.masking, label="Kind of mask", scale=3, min_width=280)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=90)
            with gr.Column(min_width=140):
                self.new = gr.Button("New mask", variant="primary")
                self.clear = gr.Button("Show all")
        original, painting, pasted, predicted, loss = shown
        with gr.Row(elem_classes="four"):
            self.original, self.painting = html(original), html(painting, PATCHES)
            self.pasted, self.predicted = html(pasted), html(predicted)
        self.loss = html(loss)

    def _lay_out_attention(self, shown: tuple[str, str]) -> None:
        html("<h2>Attention</h2>")
        blocks = [("rollout through all blocks", ROLLOUT)]
        blocks += [(f"block {number + 1}", number) for number in range(self.config.depth)]
        with gr.Row(elem_classes="four"):
            self.choosing = html(shown[0], PATCHES)
            self.overlay = html(shown[1])
            with gr.Column(elem_classes="two"):
                self.block = gr.Dropdown(blocks, value=ROLLOUT, label="Attention of", filterable=False)
                html(sentence(ATTENTION))

    def _connect(self) -> None:
        reconstruction = [self.original, self.painting, self.pasted, self.predicted, self.loss]
        attention = [self.choosing, self.overlay]
        everything = [self.message, self.photo, *reconstruction, *attention, self.neighbours]
        chosen = [self.mask, self.patch, self.block]
        newest: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
        self.file.upload(self.upload, [self.file, *chosen], [self.file, *everything], show_progress_on=self.original)
        self.examples.picked(self.pick_example, chosen, everything, show_progress="hidden")
        gr.on(
            [self.ratio.change, self.kind.change, self.seed.change],
            self.draw_mask,
            [self.ratio, self.kind, self.seed, self.photo],
            [self.mask, *reconstruction],
            **newest,
        )
        self.new.click(lambda seed: int(seed or 0) + 1, self.seed, self.seed, show_progress="hidden")
        self.clear.click(self.hide_nothing, self.photo, [self.mask, *reconstruction], show_progress="hidden")
        self.painting.painted(self.paint_mask, self.photo, [self.mask, *reconstruction], **newest)
        self.choosing.chosen(self.choose_patch, [self.photo, self.block], [self.patch, *attention], **newest)
        self.block.change(self.attention, [self.photo, self.patch, self.block], attention, **newest)

    def upload(self, file: str, mask: Tensor, patch: int, block: int) -> tuple:
        """Shows an uploaded photograph, or says why the file cannot be read."""
        try:
            bits = self.views.model.bits
            photo = fit_to_model(read_photograph(Path(file), bits), self.config, bits)
        except ConfigError as error:
            return None, sentence(f"{error}.", "alert"), *(gr.skip() for _ in range(9))
        finally:
            discard(file)
        return None, *self.show_photo(photo, mask, patch, block)

    def pick_example(self, mask: Tensor, patch: int, block: int, event: gr.EventData) -> tuple:
        """Shows one of the examples."""
        return self.show_photo(self.views.examples[event.number][1], mask, patch, block)

    def show_photo(self, photo: Tensor, mask: Tensor, patch: int, block: int) -> tuple:
        """Shows all views of a new photograph."""
        reconstruction, attention = self.views.reconstruction(photo, mask), self.attention(photo, patch, block)
        return self.views.remark(photo), photo, *reconstruction, *attention, self.views.neighbours(photo)

    def draw_mask(self, percent: float, kind: str, seed: float | None, photo: Tensor) -> tuple:
        """Reconstructs under a drawn mask."""
        return self.reconstruction(photo, draw_mask(self.config, percent / 100, kind, int(seed or 0)))

    def paint_mask(self, photo: Tensor, event: gr.EventData) -> tuple:
        """Reconstructs under a mask painted by hand."""
        return self.reconstruction(photo, torch.tensor([float(hidden == "1") for hidden in event.mask]))

    def hide_nothing(self, photo: Tensor) -> tuple:
        """Clears the mask, to begin painting with."""
        return self.reconstruction(photo, torch.zeros(self.config.patches))

    def reconstruction(self, photo: Tensor, mask: Tensor) -> tuple:
        return mask, *self.views.reconstruction(photo, mask)

    def choose_patch(self, photo: Tensor, block: int, event: gr.EventData) -> tuple:
        """Shows the attention of another patch."""
        return event.patch, *self.attention(photo, event.patch, block)

    def attention(self, photo: Tensor, patch: int, block: int) -> tuple[str, str]:
        return self.views.attention(photo, patch, None if block == ROLLOUT else block)


def html(value: str, script: str | None = None, elem_id: str | None = None) -> gr.HTML:
    """Returns an HTML part of the page, styled by page.css alone.

    script  JavaScript that runs once, when the part is on the page
    """
    return gr.HTML(value, js_on_load=script, elem_id=elem_id, apply_default_css=False)
