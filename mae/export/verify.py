"""Whether what was written is the same function as what it was written from."""

from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mae.errors import CheckpointError
from mae.export.format import Format, Source
from mae.export.photograph import photograph

TOLERANCE = 1e-4


@torch.inference_mode()
def verify(fmt: Format, source: Source, path: Path) -> dict[str, Any]:
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


def refuse_other_keys(peer: str, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Raises CheckpointError naming the keys that are on one side only."""
    sides = {"missing": sorted(missing), "left over": sorted(left_over)}
    complaints = [f"{side}: {', '.join(keys[:8])}" for side, keys in sides.items() if keys]
    if complaints:
        raise CheckpointError(f"{peer}'s model and the export do not have the same keys; {'; '.join(complaints)}")
