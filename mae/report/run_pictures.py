"""Pictures on the report: reconstructions cut out of their grids, and attention maps of the encoder."""

from typing import NamedTuple

import torch
from einops import rearrange
from PIL import Image

from mae.errors import CheckpointError
from mae.formats.load import load
from mae.models.attention_maps import attention_weights, rollout
from mae.models.pixels import Pixels
from mae.pictures.show import data_url, overlay_attention, read_grid, read_picture
from mae.report.axes import spread_evenly
from mae.report.runs import Run
from mae.run.checkpoint_files import newest_valid, step_of

MAX_SIDE = 224  # pixels of a picture on the page
MAX_LOSSLESS = 64  # pixels of a picture whose single pixels have to stay as they are
MAX_STEPS = 24  # with reconstructions, of all runs together
ATTENTION_IMAGES = 4
MAX_EVALUATION_PICTURES = 12  # of all runs together
MAX_EVALUATION_WIDTH = 1200  # pixels


class Reconstructions(NamedTuple):
    """Reconstructions at some steps, as data: URLs.

    rows     [images] original, masked, reconstruction at the last of the steps
    rebuilt  [steps][images] reconstructions
    """

    steps: list[int]
    rows: list[list[str]]
    rebuilt: list[list[str]]


class AttentionMaps(NamedTuple):
    """Attention on some images, as data: URLs.

    rows   [images] original, attention in the last block, rollout through all blocks
    shown  for an encoder that was trained on 16 bits: the values that are drawn black and white, between which it sees
           256 here; None for 8 bits
    """

    step: int
    rows: list[list[str]]
    shown: tuple[int, int] | None


def reconstructions(run: Run, runs: int) -> Reconstructions | None:
    """Reads the reconstructions of a run at some of its steps. Returns None if there are none.

    runs  number of runs that share the page
    """
    grids = {}
    for step in spread_evenly(list(run.pictures), max(3, MAX_STEPS // runs)):
        if grid := read_grid(run.pictures[step], run.image_size):
            grids[step] = grid
    if not grids:
        return None
    newest = next(reversed(grids.values()))
    return Reconstructions(
        steps=list(grids),
        rows=[[picture_url(cell) for cell in row] for row in newest.rows],
        rebuilt=[[picture_url(row[2]) for row in grid.rows] for grid in grids.values()],
    )


def evaluation_pictures(run: Run, runs: int) -> list[tuple[str, str, tuple[int, int]]]:
    """Returns name, data: URL, and width and height of what eval.py has drawn; damaged pictures are left out."""
    files = [(evaluation.name, file) for evaluation in run.evaluations for file in evaluation.pictures]
    found = []
    for name, file in files[: max(1, MAX_EVALUATION_PICTURES // runs)]:
        if (picture := read_picture(file)) is not None:
            picture.thumbnail((MAX_EVALUATION_WIDTH, 2 * MAX_EVALUATION_WIDTH))
            title = name if file.stem == name.split()[0] else f"{name}: {file.stem.replace('_', ' ')}"
            found.append((title, data_url(picture, "WEBP", quality=75, method=2), picture.size))
    return found


def picture_url(image: Image.Image) -> str:
    """Returns the picture as WebP, reduced to at most MAX_SIDE pixels, lossless up to MAX_LOSSLESS."""
    shown = image.copy()
    shown.thumbnail((MAX_SIDE, MAX_SIDE))
    return data_url(shown, "WEBP", quality=75, method=2, lossless=max(shown.size) <= MAX_LOSSLESS)


def attention_maps(run: Run) -> AttentionMaps | str | None:
    """Draws attention of the newest checkpoint's encoder on the images of the reconstructions, mean over all queries.

    returns  the reason if they cannot be drawn; None if there are no images or no checkpoint
    """
    if not run.pictures:
        return None
    channels = run.config["model"]["in_channels"]
    if channels not in (1, 3):
        return f"the pictures do not show all of the {channels} channels"
    whole = (read_grid(file, run.image_size) for file in reversed(run.pictures.values()))
    grid = next((grid for grid in whole if grid is not None), None)
    try:
        checkpoint = newest_valid(run.path)
        if checkpoint is None or grid is None:
            return None
        encoder = load(checkpoint)
    except CheckpointError as error:
        return str(error)
    data = run.config["data"]
    bits = data.get("bits", 8)
    grid = grid._replace(rows=grid.rows[:ATTENTION_IMAGES])
    images = Pixels(data["mean"], data["std"]).normalise(grid.originals(channels, bits))
    weights = attention_weights(encoder, images)
    received = torch.stack([weights[:, -1], rollout(weights)], 1).mean(-2)[..., encoder.config.class_tokens :]
    maps = rearrange(received, "b k (h w) -> b k h w", h=encoder.config.grid[0]).numpy()
    rows = [
        [picture_url(image), *(picture_url(overlay_attention(image, one)) for one in maps_of_image)]
        for (image, *_), maps_of_image in zip(grid.rows, maps, strict=True)
    ]
    low, high = (round(65535 * value) for value in grid.shown)
    return AttentionMaps(step_of(checkpoint), rows, (low, high) if bits == 16 else None)
