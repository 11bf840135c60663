"""Page of a SAM: clicks and a box on a photograph, and the masks that answer them (Gradio)."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from markupsafe import Markup
from PIL import Image
from skimage.data import astronaut, chelsea, coffee

from mae.demo.html_images import example_row, img, sentence
from mae.demo.page import PICK, html
from mae.demo.photo import read_photograph
from mae.demo.sam_model import DemoSam, Embedded, Marks, Reply
from mae.demo.serve import discard
from mae.errors import ConfigError
from mae.pictures.show import data_url
from mae.sam.pictures import LABEL_COLOURS, MASK_COLOURS, draw_answer, paint_mask
from mae.sam.segmenter import BACKGROUND, FOREGROUND

EXAMPLES = [
    ("a portrait (NASA, public domain)", astronaut),
    ("a cat (S. van der Walt, CC0)", chelsea),
    ("a cup of coffee (R. Michetti, CC0)", coffee),
]
LABELS = [("Object", FOREGROUND), ("Background", BACKGROUND)]
HINT = (
    "Click an object, or drag a box round it. A click with Shift or the right button has the other label. Up to three "
    "masks answer the first mark: choose one. Every further mark corrects it."
)
KEYS = (
    "Arrow keys move a cross, with Shift farther. The space bar marks a point, with Shift one of the other label. B "
    "sets the first and the second corner of a box."
)
NAMES = {FOREGROUND: "object", BACKGROUND: "background"}
QUALITY = 92  # of JPEG
PROMPTS = files("mae.demo").joinpath("prompts.js").read_text()
Replies = tuple[Reply, ...]


class SamPage:
    """The parts of the page and their event handlers, which return new contents of the parts that change.

    State of each visitor: the photograph with its embedding, and the replies so far, the newest last.
    """

    def __init__(self, sam: DemoSam) -> None:
        self.sam = sam
        self.photographs = [(name, Image.fromarray(pixels())) for name, pixels in EXAMPLES]
        first = sam.embed(self.photographs[0][1])
        with gr.Blocks(title=f"{sam.path} demo", analytics_enabled=False) as self.blocks:
            self.embedded, self.replies = gr.State(first), gr.State(())
            html(Markup("<h1>{}</h1>").format(str(sam.path)) + self.heading())
            with gr.Row(elem_classes="halves"):
                self.file = gr.File(label="Photograph", height=172)
                self.examples = html(example_row(thumbnails(self.photographs)), PICK)
            self.message = html("", elem_id="message")
            html("<h2>Masks</h2>")
            picture, said, masks = self.show(first, ())
            with gr.Row(elem_classes="marking"):
                self.picture = html(picture, PROMPTS)
                with gr.Column():
                    self.label = gr.Radio(LABELS, value=FOREGROUND, label="A click marks")
                    with gr.Row():
                        self.undo = gr.Button("Undo", min_width=90)
                        self.clear = gr.Button("Clear", min_width=90)
                    self.said = html(said)
                    self.masks = html(masks, PICK)
                    html(sentence(HINT))
            self._connect()

    def heading(self) -> str:
        """Returns a line about the model and its input."""
        config = self.sam.model.encoder.config
        facts = [
            f"SAM of {config.depth} blocks of width {config.width}",
            f"photographs of any size, the longer side as {self.sam.side} pixels, embedded once",
        ]
        if self.sam.step is not None:
            facts.insert(0, f"step {self.sam.step:,}")
        if self.sam.assumed:
            facts.append("normalised as ImageNet is, for lack of a record")
        return sentence(" · ".join(facts))

    def _connect(self) -> None:
        shown = [self.picture, self.said, self.masks]
        new, now = [self.embedded, self.replies, *shown], [self.embedded, self.replies]
        # Marks are answered in their order, each from the state that the one before has left.
        marks: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_id": "marks", "show_progress": "hidden"}
        self.file.upload(self.upload, self.file, [self.file, self.message, *new], show_progress_on=self.picture)
        self.examples.picked(self.pick_example, None, [self.message, *new], show_progress="hidden")
        self.picture.marked(self.mark_point, [*now, self.label], [self.replies, *shown], **marks)
        self.picture.boxed(self.draw_box, now, [self.replies, *shown], **marks)
        self.masks.picked(self.choose_mask, now, [self.replies, *shown], **marks)
        self.undo.click(self.take_back, now, [self.replies, *shown], **marks)
        self.clear.click(self.take_all_back, self.embedded, [self.replies, *shown], **marks)

    def upload(self, file: str) -> tuple:
        """Embeds an uploaded photograph, or says why the file cannot be read."""
        try:
            photograph = read_photograph(Path(file))
        except ConfigError as error:
            return None, sentence(f"{error}.", "alert"), *(gr.skip() for _ in range(5))
        finally:
            discard(file)
        return None, "", *self.open(photograph)

    def pick_example(self, event: gr.EventData) -> tuple:
        """Embeds one of the examples."""
        return "", *self.open(self.photographs[event.number][1])

    def open(self, photograph: Image.Image) -> tuple:
        embedded = self.sam.embed(photograph)
        return embedded, (), *self.show(embedded, ())

    def mark_point(self, embedded: Embedded, replies: Replies, label: int, event: gr.EventData) -> tuple:
        """Answers a further point."""
        height, width = embedded.size
        point = event.x * width - 0.5, event.y * height - 0.5, 1 - label if event.other else label
        before = replies[-1].marks if replies else Marks()
        return self.answer(embedded, replies, before._replace(points=(*before.points, point)))

    def draw_box(self, embedded: Embedded, replies: Replies, event: gr.EventData) -> tuple:
        """Answers a box, in place of the one before."""
        height, width = embedded.size
        x0, y0, x1, y1 = event.box
        before = replies[-1].marks if replies else Marks()
        box = x0 * width, y0 * height, x1 * width, y1 * height
        return self.answer(embedded, replies, before._replace(box=box))

    def answer(self, embedded: Embedded, replies: Replies, marks: Marks) -> tuple:
        reply = self.sam.answer(embedded, marks, replies[-1] if replies else None)
        return self.with_replies(embedded, (*replies, reply))

    def choose_mask(self, embedded: Embedded, replies: Replies, event: gr.EventData) -> tuple:
        """Shows another mask of the newest reply, for the next mark to correct."""
        if replies:  # "Clear" may have come first
            chosen = min(event.number, len(replies[-1].scores) - 1)
            replies = (*replies[:-1], replies[-1]._replace(chosen=chosen))
        return self.with_replies(embedded, replies)

    def take_back(self, embedded: Embedded, replies: Replies) -> tuple:
        """Forgets the newest mark."""
        return self.with_replies(embedded, replies[:-1])

    def take_all_back(self, embedded: Embedded) -> tuple:
        """Forgets all marks, for another object."""
        return self.with_replies(embedded, ())

    def with_replies(self, embedded: Embedded, replies: Replies) -> tuple:
        return replies, *self.show(embedded, replies)

    def show(self, embedded: Embedded, replies: Replies) -> tuple[str, str, str]:
        """Returns the photograph with mask and marks, what is said of the mask, and all masks of the newest reply."""
        if not replies:
            return marking(embedded.picture, Marks()), sentence("Nothing is marked.", "said"), mask_buttons([])
        reply = replies[-1]
        masks = self.sam.masks(embedded, reply)
        chosen = masks[reply.chosen]
        share, score = float(chosen.mean()), reply.scores[reply.chosen]
        said = f"Predicted IoU {score:.2f}, {share:.1%} of the photograph."
        painted = paint_mask(embedded.picture, chosen, MASK_COLOURS["mask"])
        return marking(painted, reply.marks), sentence(said, "said"), mask_row(embedded.picture, masks, reply)


def marking(pixels: np.ndarray, marks: Marks) -> Markup:
    """Returns a picture for prompts.js, uint8 [height, width, 3], with its marks."""
    height, width = pixels.shape[:2]
    radius = max(height, width) / 90
    drawn = [
        Markup(
            f'<circle class="{NAMES[label]}" cx="{x + 0.5:.2f}" cy="{y + 0.5:.2f}" r="{radius:.2f}" '
            f'fill="rgb{LABEL_COLOURS[label]}"></circle>'
        )
        for x, y, label in marks.points
    ]
    if marks.box is not None:
        x0, y0, x1, y1 = marks.box
        place = f'x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}"'
        drawn.insert(0, Markup(f'<rect {place} fill="none" stroke="rgb{LABEL_COLOURS[FOREGROUND]}"></rect>'))
    source = data_url(Image.fromarray(pixels), "JPEG", quality=QUALITY)
    return Markup(
        '<figure><div class="prompts" tabindex="0" role="application" aria-label="Photograph. {}">'
        '<img src="{}" alt="Photograph" draggable="false">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg>'
        '<i class="cross"></i><i class="band" hidden></i></div></figure>'
    ).format(KEYS, source, width, height, Markup("").join(drawn))


def mask_row(pixels: np.ndarray, masks: np.ndarray, reply: Reply) -> Markup:
    """Returns a button for each mask of a reply, with its predicted IoU."""
    buttons = []
    for number, (mask, score) in enumerate(zip(masks, reply.scores, strict=True)):
        picture = img(draw_answer(pixels, mask, MASK_COLOURS["mask"]), f"Mask {number + 1}")
        pressed = "true" if number == reply.chosen else "false"
        start = f'<button type="button" data-number="{number}" aria-pressed="{pressed}">'
        buttons.append(Markup(start) + picture + Markup(f"<b>IoU {score:.2f}</b></button>"))
    return mask_buttons(buttons)


def mask_buttons(buttons: list[Markup]) -> Markup:
    return Markup('<div class="pictures masks">{}</div>').format(Markup("").join(buttons))


def thumbnails(photographs: list[tuple[str, Image.Image]]) -> list[tuple[str, Image.Image]]:
    small = [(name, photograph.copy()) for name, photograph in photographs]
    for _, photograph in small:
        photograph.thumbnail((200, 200))
    return small
