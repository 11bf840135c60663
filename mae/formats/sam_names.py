"""Names of a SAM's weights in segment-anything, transformers and timm, to ours and back.

Ours are those of `Segmenter`: the encoder's are segment-anything's after `encoder.`, the others are transformers'.
"""

import re

import torch
from torch import Tensor

from mae.errors import CheckpointError
from mae.sam.segmenter import FOREGROUND, NONE, Prompts

ENCODER = "encoder."
PARTS = ("prompt_encoder.", "mask_decoder.")
SEGMENT_ANYTHING_ENCODER, TRANSFORMERS_ENCODER = "image_encoder.", "vision_encoder."
# transformers ties the embedding of positions to one beside the parts, and saves either or both.
OWN = "prompt_encoder.shared_embedding.positional_embedding"
SHARED = "shared_image_embedding.positional_embedding"
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
# transformers' encoder, ours: parts of a key between dots, replaced from left to right.
VISION_NAMES = {
    "layers.": "blocks.",
    "patch_embed.projection.": "patch_embed.proj.",
    "neck.conv1.": "neck.0.",
    "neck.layer_norm1.": "neck.1.",
    "neck.conv2.": "neck.2.",
    "neck.layer_norm2.": "neck.3.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}
HEADS = r"(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\."
LINEARS = {"proj_in": "layers.0", "layers.0": "layers.1", "proj_out": "layers.2"}


def to_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of a whole SAM, or of its encoder, of any library under our names.

    Raises CheckpointError naming the keys that belong to no part of a SAM.
    """
    names = (ENCODER, SEGMENT_ANYTHING_ENCODER, TRANSFORMERS_ENCODER)
    if not any(key.startswith(names) for key in state):
        return {ENCODER + _our_encoder_name(key): value for key, value in state.items()}
    if unknown := [key for key in state if not key.startswith((*names, *PARTS, SHARED))]:
        raise CheckpointError(f"these keys belong to no part of a SAM: {', '.join(unknown[:8])}")
    encoder = {
        ENCODER + _our_encoder_name(key.split(".", 1)[1]): value
        for key, value in state.items()
        if key.startswith(names)
    }
    others = {key: value for key, value in state.items() if key.startswith(PARTS)}
    if SHARED in state:
        others = {OWN: state[SHARED]} | others
    if any(key.startswith("prompt_encoder.pe_layer.") for key in others):
        others = from_segment_anything(others)
    return encoder | others


def _our_encoder_name(key: str) -> str:
    """layers.0.layer_norm1.weight of transformers, blocks.0.norm1.weight of the others -> blocks.0.norm1.weight"""
    for theirs, ours in VISION_NAMES.items():
        key = key.replace(theirs, ours)
    return key.replace(".mlp.fc", ".mlp.lin")


def to_segment_anything(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a whole SAM's weights, or its encoder's, under segment-anything's names."""
    return {_their_name(key): value for key, value in state.items()}


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a whole SAM's weights, or its encoder's, under transformers' names."""
    renamed = {}
    for key, value in state.items():
        if key.startswith(ENCODER):
            key = TRANSFORMERS_ENCODER + their_encoder_name(key.removeprefix(ENCODER))
        renamed[SHARED if key == OWN else key] = value
    return renamed


def their_encoder_name(key: str) -> str:
    """blocks.0.norm1.weight -> layers.0.layer_norm1.weight of transformers"""
    for theirs, ours in VISION_NAMES.items():
        key = key.replace(ours, theirs)
    return key


def from_segment_anything(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of prompt encoder and mask decoder under our names; others are left out."""
    return {_our_name(key): value for key, value in state.items() if key.startswith(PARTS)}


def _their_name(key: str) -> str:
    if key.startswith(ENCODER):
        return SEGMENT_ANYTHING_ENCODER + key.removeprefix(ENCODER)
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
