"""The SAM behind the page: a photograph goes through the encoder once, then clicks and a box are answered."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.demo.photo import fit_to_frame, to_colours
from mae.errors import ConfigError
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import Opened, scale_of
from mae.models.pixels import Pixels
from mae.sam.segmenter import NONE, Prompts, Segmenter
from mae.sam.square_frame import Size, blank_padding, boxes_to_frame, maps_to_photograph, points_to_frame
from mae.train.precision import choose_float32_products

SHOWN = 1024  # pixels of the longer side of a picture, at most

Point = tuple[float, float, int]
Box = tuple[float, float, float, float]


class Marks(NamedTuple):
    """What a user has marked, in pixels of the picture.

    points  (x, y, label): FOREGROUND or BACKGROUND, 0 is the centre of the first pixel
    box     x0, y0, x1, y1: 0 is the outer edge of the first pixel; None without
    """

    points: tuple[Point, ...] = ()
    box: Box | None = None


class Embedded(NamedTuple):
    """A photograph that has been through the encoder.

    picture    as it is shown, uint8 [height, width, 3]
    inside     height and width in the square frame of the model
    embedding  [1, C, h, w]
    """

    picture: np.ndarray
    inside: Size
    embedding: Tensor

    @property
    def size(self) -> Size:
        """Returns height and width of the picture."""
        return self.picture.shape[0], self.picture.shape[1]


class Reply(NamedTuple):
    """The model's answer to marks, the mask with the highest predicted IoU first.

    logits  [K, S/4, S/4]  above 0 inside the mask
    scores  predicted IoU of each mask
    chosen  number of the mask that is shown, and that further marks correct
    """

    marks: Marks
    logits: Tensor
    scores: tuple[float, ...]
    chosen: int = 0


@dataclass(frozen=True)
class DemoSam:
    """A SAM and the normalisation of its photographs.

    path        as it was given
    step        of a checkpoint of this project, else None
    assumed     the normalisation is not on record, ImageNet's is assumed
    mask_input  the logits of the mask that is corrected are a prompt too
    multimask   the first mark is answered by three masks, else by one
    """

    path: Path
    step: int | None
    model: Segmenter
    pixels: Pixels
    assumed: bool
    mask_input: bool = True
    multimask: bool = True

    @property
    def side(self) -> int:
        return self.model.encoder.config.image_size[0]

    @torch.no_grad()
    def embed(self, photograph: Image.Image) -> Embedded:
        """Runs the encoder on a photograph, which no mark repeats."""
        photograph = to_colours(photograph)
        frame, inside = fit_to_frame(photograph, self.side)
        device = self.pixels.mean.device
        images = blank_padding(self.pixels.normalise(frame.to(device)), torch.tensor([inside], device=device))
        photograph.thumbnail((SHOWN, SHOWN), Image.Resampling.BICUBIC)
        return Embedded(np.asarray(photograph), inside, self.model(images))

    @torch.no_grad()
    def answer(self, embedded: Embedded, marks: Marks, before: Reply | None = None) -> Reply:
        """Answers marks: by several masks at first, then by one that corrects the chosen mask of the reply before."""
        device = embedded.embedding.device
        sizes = embedded.size, embedded.inside
        slots = [(0.0, 0.0, NONE)] if marks.box is not None else []  # a box takes the place of a first point
        given = torch.tensor([slots + list(marks.points)], device=device)
        box = torch.tensor([marks.box or (0.0, 0.0, 0.0, 0.0)], device=device)
        prompts = Prompts(
            points_to_frame(given[..., :2], *sizes),
            given[..., 2].long(),
            boxes_to_frame(box, *sizes),
            torch.tensor([marks.box is not None], device=device),
            before.logits[before.chosen][None, None] if before is not None and self.mask_input else None,
        )
        row = torch.zeros(1, dtype=torch.long, device=device)
        answer = self.model.answer(embedded.embedding, row, prompts, several=self.multimask and before is None)
        order = answer.ious[0].argsort(descending=True)
        return Reply(marks, answer.logits[0, order].float(), tuple(answer.ious[0, order].tolist()))

    @torch.no_grad()
    def masks(self, embedded: Embedded, reply: Reply) -> np.ndarray:
        """Returns the masks of a reply at the size of the picture, bool [K, height, width]."""
        return (maps_to_photograph(reply.logits[None], self.side, embedded.inside, embedded.size)[0] > 0).cpu().numpy()


def open_sam(path: Path, opened: Opened, **given: Any) -> DemoSam:
    """Loads the whole SAM in opened weights onto a GPU if there is one.

    given  what the file cannot say, as in `mae.load_sam`

    Raises CheckpointError if there is none, ConfigError if its images have other channels than a photograph.
    """
    model = deepcopy(load_segmenter(opened, **given))  # the file may be overwritten while the page is open
    if (channels := model.encoder.config.in_channels) != 3:
        raise ConfigError(
            f"{path} takes images of {channels} channels, and a photograph has three: it cannot be shown here"
        )
    scale = scale_of(opened, 3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_float32_products(device)
    pixels = Pixels(scale.mean, scale.std).to(device)
    trained = opened.run["recipe"]["task"] if opened.run is not None else {}
    asked = {name: trained.get(name, True) for name in ("mask_input", "multimask")}  # as in training
    return DemoSam(path, opened.step, model.to(device), pixels, assumed=not scale.known, **asked)
