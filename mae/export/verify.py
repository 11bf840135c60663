"""Step 4 of an export: compares what the other library computes from it with what the model computes."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.errors import CheckpointError
from mae.formats.format import Export, Format, Scale
from mae.models.classifier import Classifier

TOLERANCE = 1e-4  # largest difference, relative to the largest value
HALF_TOLERANCE = 1e-2  # of a float16 graph from the float32 model: ten times the spacing of float16 numbers


@torch.inference_mode()
def verify(fmt: Format, export: Export, path: Path) -> dict[str, Any]:
    """Runs a photograph through the model and, if the peer is installed, through what the peer loads from `path`.

    returns  what the card says of it: `compared_with` and the largest `difference`, relative to the largest value; or
             `compared_with` null and why

    Raises CheckpointError if the outputs differ.
    """
    if fmt.compare is None or find_spec(fmt.peer) is None:
        why = f"{fmt.peer} is not installed" if fmt.compare else f"{fmt.peer} is not run here"
        return {"compared_with": None, "why": why, "checked": "names and shapes"}
    images = photograph(export.model.config.image_size, export.scale)
    usual = "class scores" if isinstance(export.model, Classifier) else fmt.compared
    outputs, differences = [], []
    for theirs, ours, of in fmt.compare(export, path, images):
        outputs.append(of or usual)
        differences.append((theirs - ours).abs().max() / ours.abs().max())
    compared = ", ".join(dict.fromkeys(outputs))
    difference = float(torch.stack(differences).max())  # NaN if one of them is, which Python's max may pass over
    tolerance = HALF_TOLERANCE if export.half else TOLERANCE
    if not difference <= tolerance:
        raise CheckpointError(
            f"{fmt.peer} computes something else from the export: {compared} differ by {difference:.1e} of their "
            f"largest value, more than {tolerance:.0e}. Nothing was written"
        )
    return {
        "compared_with": f"{fmt.peer} {version(fmt.peer)}",
        "compared": f"{compared}, on a photograph",
        "difference": difference,
        "tolerance": tolerance,
    }


def photograph(image_size: tuple[int, int], scale: Scale) -> Tensor:
    """Returns a portrait (NASA, public domain, from scikit-image), normalised: float32 [1, C, H, W].

    Channels beyond the third repeat the colours.
    """
    from skimage.data import astronaut

    pixels = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, image_size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in scale[:2])
    return (pixels[:, [channel % 3 for channel in range(mean.shape[1])]] - mean) / std
