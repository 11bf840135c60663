"""An encoder as a graph of tensor operations that runs without this package: what .pt2 and ONNX files are made of."""

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mae.formats.format import Export
from mae.models.vit import Encoder, choose_attention
from mae.sam.encoder import SamEncoder

INPUT, OUTPUT = "images", "features"


class Features(nn.Module):
    """A plain encoder whose forward pass is `encode`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder.encode(images)


@torch.no_grad()
def traced(source: Export) -> ExportedProgram:
    """The encoder as torch.export sees it, for images of its size in batches of any size.

    Attention stays one operation, which each device does in its own way.
    """
    config = source.model.config
    if isinstance(source.model, SamEncoder):
        model = source.model
    else:
        choose_attention(source.encoder.blocks, device=torch.device("cuda"))
        model = Features(source.encoder)
    # Two, because a batch of one would be taken for a constant.
    images = torch.zeros(2, config.in_channels, *config.image_size)
    return torch.export.export(model, (images,), dynamic_shapes={INPUT: {0: Dim("batch")}})


def description(source: Export) -> dict[str, list[str | int]]:
    """What the card says of the graph's input and output."""
    config = source.model.config
    if isinstance(source.model, SamEncoder):
        output = [source.sam.config.out_channels, *source.sam.config.grid]
    else:
        output = [source.encoder.config.patches + source.encoder.config.class_token, config.width]
    return {"input": [INPUT, "batch", config.in_channels, *config.image_size], "output": [OUTPUT, "batch", *output]}
