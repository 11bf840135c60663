"""Whether what was written is the same function as what it was written from."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.errors import CheckpointError
from mae.formats.format import Export, Format
from mae.formats.pixel_scale import Scale

TOLERANCE = 1e-4


@torch.inference_mode()
def verify(fmt: Format, source: Export, path: Path) -> dict[str, Any]:
    """Runs a photograph through the source and, where the peer is installed, through what the peer loads.

    returns  what the card says of it: `compared_with` and the largest `difference`, relative to the largest value; or
             `compared_with` null and why

    Raises CheckpointError when the peer answers differently.
    """
    if fmt.answers is None or find_spec(fmt.peer) is None:
        why = f"{fmt.peer} is not installed" if fmt.answers else f"{fmt.peer} is not run here"
        return {"compared_with": None, "why": why, "checked": "names and shapes"}
    images = photograph(source.model.config.image_size, source.scale)
    difference = max(
        float((answer.theirs - answer.ours).abs().max() / answer.ours.abs().max())
        for answer in fmt.answers(source, path, images)
    )
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{fmt.peer} computes something else from the export: {fmt.compared} differ by {difference:.1e} of their "
            f"largest value, more than {TOLERANCE:.0e}. Nothing was written"
        )
    return {
        "compared_with": f"{fmt.peer} {version(fmt.peer)}",
        "compared": f"{fmt.compared}, on a photograph",
        "difference": difference,
        "tolerance": TOLERANCE,
    }


def photograph(image_size: tuple[int, int], scale: Scale) -> Tensor:
    """A portrait (NASA, public domain, from scikit-image) as a model sees it: float32 [1, C, H, W].

    Channels beyond the third repeat the colours.
    """
    from skimage.data import astronaut

    pixels = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, image_size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in scale[:2])
    return (pixels[:, [channel % 3 for channel in range(mean.shape[1])]] - mean) / std
