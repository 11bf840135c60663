"""Names of a SAM's prompt encoder and mask decoder: transformers', which are ours, and segment-anything's."""

import re

import torch
from torch import Tensor

from mae.sam.segmenter import FOREGROUND, NONE, Prompts

PARTS = ("prompt_encoder.", "mask_decoder.")
# Ours, theirs: parts of a key, replaced from top to bottom, or from bottom to top on the way back.
NAMES = {
    "prompt_encoder.shared_embedding.positional_embedding": (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    ),
    ".point_embed.": ".point_embeddings.",
    ".mask_embed.conv1.": ".mask_downscaling.0.",
    ".mask_embed.layer_norm1.": ".mask_downscaling.1.",
    ".mask_embed.conv2.": ".mask_downscaling.3.",
    ".mask_embed.layer_norm2.": ".mask_downscaling.4.",
    ".mask_embed.conv3.": ".mask_downscaling.6.",
    ".upscale_conv1.": ".output_upscaling.0.",
    ".upscale_layer_norm.": ".output_upscaling.1.",
    ".upscale_conv2.": ".output_upscaling.3.",
    ".layer_norm": ".norm",
}
HEADS = r"(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\."
LINEARS = {"proj_in": "layers.0", "layers.0": "layers.1", "proj_out": "layers.2"}


def to_segment_anything(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the two parts' weights under segment-anything's names."""
    return {_their_name(key): value for key, value in state.items()}


def from_segment_anything(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the two parts' weights under our names; other keys of a whole SAM are left out."""
    return {_our_name(key): value for key, value in state.items() if key.startswith(PARTS)}


def _their_name(key: str) -> str:
    key = re.sub(HEADS + "(proj_in|layers.0|proj_out)", lambda found: f"{found[1]}.{LINEARS[found[2]]}", key)
    for ours, theirs in NAMES.items():
        key = key.replace(ours, theirs)
    return key


def _our_name(key: str) -> str:
    back = {theirs: ours for ours, theirs in LINEARS.items()}
    key = re.sub(HEADS + r"(layers\.\d)", lambda found: f"{found[1]}.{back[found[2]]}", key)
    for ours, theirs in NAMES.items():
        key = key.replace(theirs, ours)
    return key


def example_prompts(side: int) -> tuple[Prompts, Prompts]:
    """Returns a point, and a box, in a frame of this side, on which libraries are compared."""
    point, box = torch.tensor([[[0.4, 0.3]]]) * side, torch.tensor([[0.2, 0.1, 0.7, 0.8]]) * side
    return (
        Prompts(point, torch.tensor([[FOREGROUND]]), box, torch.tensor([False])),
        Prompts(point, torch.tensor([[NONE]]), box, torch.tensor([True])),
    )
