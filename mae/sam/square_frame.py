"""Between a photograph and the square frame in which a SAM sees it: its longer side fills the frame, top left."""

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # height, width


def blank_outside(images: Tensor, inside: Tensor) -> Tensor:
    """Normalised images with zeros outside the photograph, as segment-anything pads.

    images  [B, C, S, S]
    inside  [B, 2]  height and width of the photograph in the frame
    """
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (places < inside[:, side, None] for side in (0, 1))
    return images * (rows[:, :, None] & columns[:, None, :])[:, None]


def to_frame(points: Tensor, original: Size, inside: Size) -> Tensor:
    """Pixels of the photograph as pixels of the frame: (x, y) [..., 2], whole numbers being centres of pixels."""
    return (points + 0.5) * _scale(points, original, inside) - 0.5


def edges_to_frame(boxes: Tensor, original: Size, inside: Size) -> Tensor:
    """Boxes (x0, y0, x1, y1) [..., 4] in the photograph as boxes in the frame; their sides are edges of pixels."""
    return boxes * _scale(boxes, original, inside).repeat(2)


def _scale(like: Tensor, original: Size, inside: Size) -> Tensor:
    return like.new_tensor([inside[1] / original[1], inside[0] / original[0]])


def to_photograph(logits: Tensor, side: int, inside: Size, original: Size) -> Tensor:
    """Logits at the resolution of the photograph, by segment-anything's two bilinear steps.

    logits   [N, K, S/4, S/4];  side  S
    returns  [N, K, *original]
    """
    frame = F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)
    return F.interpolate(frame[..., : inside[0], : inside[1]], original, mode="bilinear", align_corners=False)
