"""Coordinates in a photograph and in SAM's square frame, into which data/loader/photograph_dataset.py lays it."""

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # height, width


def size_in_frame(original: Size, side: int) -> Size:
    """Returns height and width of a photograph whose longer side becomes `side`, rounded as segment-anything does."""
    scale = side / max(original)
    height, width = (max(1, int(length * scale + 0.5)) for length in original)
    return height, width


def blank_padding(images: Tensor, inside: Tensor) -> Tensor:
    """Sets normalised images to zero outside the photograph, as segment-anything pads.

    images  [B, C, S, S]
    inside  [B, 2]  height and width of the photograph in the frame
    """
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (places < inside[:, side, None] for side in (0, 1))
    return images * (rows[:, :, None] & columns[:, None, :])[:, None]


def points_to_frame(points: Tensor, original: Size, inside: Size) -> Tensor:
    """Converts (x, y) [..., 2] from pixels of the photograph to those of the frame; 0 is the centre of the first."""
    return (points + 0.5) * _scale(points, original, inside) - 0.5


def boxes_to_frame(boxes: Tensor, original: Size, inside: Size) -> Tensor:
    """Converts boxes (x0, y0, x1, y1) [..., 4] likewise; 0 is the outer edge of the first pixel."""
    return boxes * _scale(boxes, original, inside).repeat(2)


def _scale(like: Tensor, original: Size, inside: Size) -> Tensor:
    return like.new_tensor([inside[1] / original[1], inside[0] / original[0]])


def maps_to_photograph(maps: Tensor, side: int, inside: Size, original: Size) -> Tensor:
    """Resizes maps over the frame, such as logits, to the photograph, by segment-anything's two bilinear steps.

    maps     [N, K, h, w];  side  S
    returns  [N, K, *original]
    """
    frame = F.interpolate(maps.float(), (side, side), mode="bilinear", align_corners=False)
    return F.interpolate(frame[..., : inside[0], : inside[1]], original, mode="bilinear", align_corners=False)
