"""Pictures of a run for its page: reconstructions cut out of their grids, and what the encoder attends to."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from mae.errors import CheckpointError
from mae.formats.load import load
from mae.models.attention_maps import attention_weights, rollout
from mae.models.pixels import Pixels
from mae.pictures import enlargement, heat, read_grid
from mae.report.axes import spread
from mae.report.gather import Run
from mae.run.checkpoint_files import newest_valid
from mae.run.folder import step_of

LARGEST = 224  # pixels of a picture on the page
STEPS = 24  # shown of all runs together
ATTENDED = 4  # images whose attention is shown


@dataclass(frozen=True)
class Reconstructions:
    """Pictures as data: URLs.

    rows     [images] original, masked, reconstructed at the last of the steps
    rebuilt  [steps][images]
    pixels   small images, whose pixels are to be seen
    """

    steps: list[int]
    rows: list[list[str]]
    rebuilt: list[list[str]]
    size: tuple[int, int]
    pixels: bool


@dataclass(frozen=True)
class Attention:
    """For some images: the image, the attention in the last block, and the rollout through all, as data: URLs."""

    step: int
    rows: list[list[str]]
    size: tuple[int, int]
    pixels: bool


def reconstructions(run: Run, runs: int) -> Reconstructions | None:
    """The reconstructions of a run at some of its steps; None when there are none.

    runs  that share the page
    """
    grids = {}
    for step in spread(list(run.pictures), max(3, STEPS // runs)):
        grid = read_grid(run.pictures[step], image_size(run))
        if grid is not None:
            grids[step] = grid
    if not grids:
        return None
    newest = next(reversed(grids.values()))
    return Reconstructions(
        steps=list(grids),
        rows=[[data_url(cell) for cell in row] for row in newest],
        rebuilt=[[data_url(row[2]) for row in grid] for grid in grids.values()],
        size=image_size(run),
        pixels=enlargement(image_size(run)[1]) > 1,
    )


def image_size(run: Run) -> tuple[int, int]:
    height, width = run.config["model"]["image_size"]
    return height, width


def data_url(image: Image.Image) -> str:
    """The picture as WebP, at most LARGEST pixels wide; small ones without loss."""
    shown = image.copy()
    shown.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    shown.save(file, "WEBP", quality=75, method=2, lossless=max(shown.size) <= 64)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def attention(run: Run) -> Attention | str | None:
    """What the encoder of the newest checkpoint attends to on the images of the reconstructions.

    returns  the reason where it cannot be shown; None where there is nothing to look at
    """
    if not run.pictures:
        return None
    channels = run.config["model"]["in_channels"]
    if channels not in (1, 3):
        return f"the pictures do not show all of the {channels} channels"
    whole = (read_grid(file, image_size(run)) for file in reversed(run.pictures.values()))
    grid = next((grid for grid in whole if grid is not None), None)
    try:
        checkpoint = newest_valid(run.path)
        if checkpoint is None or grid is None:
            return None
        encoder = load(checkpoint)
    except CheckpointError as error:
        return str(error)
    originals = [row[0] for row in grid[:ATTENDED]]
    pixels = np.stack([np.asarray(image)[..., :channels] for image in originals])
    data = run.config["data"]
    images = Pixels(data["mean"], data["std"]).normalise(rearrange(torch.from_numpy(pixels), "b h w c -> b c h w"))
    weights = attention_weights(encoder, images)
    looking = torch.stack([weights[:, -1], rollout(weights)], 1)
    received = looking.mean(-2)[..., 1 if encoder.config.class_token else 0 :]
    maps = rearrange(received, "b k (h w) -> b k h w", h=encoder.config.grid[0]).numpy()
    rows = [
        [data_url(image), *(data_url(heat(image, one)) for one in of_image)]
        for image, of_image in zip(originals, maps, strict=True)
    ]
    return Attention(step_of(checkpoint), rows, image_size(run), enlargement(image_size(run)[1]) > 1)
