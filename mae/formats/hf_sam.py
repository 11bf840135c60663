"""Hugging Face `SamModel` and `SamVisionModel` folders: a whole SAM, or its encoder, with the names used on the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Comparison, Export, Format, require
from mae.formats.huggingface import load_peer, preprocessor_settings, read_settings, read_weights, write_folder
from mae.formats.sam_names import PARTS, example_prompts
from mae.formats.segment_anything import replace_encoder
from mae.sam.encoder import SamConfig
from mae.sam.segmenter import transformers_config

PREFIX = "vision_encoder."
OWN = "prompt_encoder.shared_embedding.positional_embedding"
SHARED = "shared_image_embedding.positional_embedding"
# Theirs, ours: parts of a key between dots, replaced from left to right.
NAMES = {
    "layers.": "blocks.",
    "patch_embed.projection.": "patch_embed.proj.",
    "neck.conv1.": "neck.0.",
    "neck.layer_norm1.": "neck.1.",
    "neck.conv2.": "neck.2.",
    "neck.layer_norm2.": "neck.3.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
}
SETTINGS = {
    "image_size": ("image_size", 1024),
    "patch_size": ("patch_size", 16),
    "num_channels": ("in_channels", 3),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("num_heads", 12),
    "window_size": ("window", 14),
    "global_attn_indexes": ("global_blocks", (2, 5, 8, 11)),
    "output_channels": ("out_channels", 256),
}
# Properties of our encoder that the library leaves open.
FIXED = {"use_rel_pos": True, "use_abs_pos": True, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-6}


def read(settings: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields of SamConfig, and the encoder's weights under our names. Raises CheckpointError if it has none."""
    kind = settings.get("model_type")
    if kind not in ("sam", "sam_vision_model"):
        raise CheckpointError(f"this is a model of type {kind}: only sam and sam_vision_model have a SAM encoder")
    vision = settings.get("vision_config", settings)
    for name, value in FIXED.items():
        if vision.get(name, value) != value:
            raise CheckpointError(f"{name}={vision[name]} where a SAM-style encoder has {value}")
    # Saved configurations leave defaults out in some releases; these are the library's.
    fields = {ours: vision.get(theirs, default) for theirs, (ours, default) in SETTINGS.items()}
    hidden = vision.get("mlp_dim")
    fields["mlp_ratio"] = hidden / fields["width"] if hidden else vision.get("mlp_ratio", 4.0)
    unknown = [key for key in weights if not key.startswith((PREFIX, *PARTS, SHARED))]
    if unknown:
        raise CheckpointError(f"these keys belong to no part of a SAM: {', '.join(unknown[:8])}")
    return fields, {our_name(key): value for key, value in weights.items() if key.startswith(PREFIX)}


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Writes a SamVisionModel, or a whole SamModel; with `merge_into`, that SamModel with its encoder replaced."""
    config = export.sam.config
    require(config, "transformers' SAM", "square images")
    state = {their_name(key): value for key, value in export.sam.state_dict().items()}
    settings = {"architectures": ["SamVisionModel"], "model_type": "sam_vision_model"} | vision_settings(config)
    kind = "SamVisionModel"
    if export.merge_into is not None:
        settings, weights = read_settings(export.merge_into), read_weights(export.merge_into)
        fields, _ = read(settings, weights)
        state = replace_encoder(weights, state, PREFIX, export.merge_into)
        if SamConfig.model_validate(fields) != config:
            raise CheckpointError(f"the encoder of {export.merge_into} is {fields}, and ours {config}")
        kind = "SamModel"
    elif export.segmenter is not None:
        kind, settings = "SamModel", transformers_config(config).to_dict() | {"architectures": ["SamModel"]}
        settings["vision_config"] |= vision_settings(config)
        state |= export.segmenter.other_parts()
        state[SHARED] = state.pop(OWN)  # tied in the library
    size = {"height": config.image_size[0], "width": config.image_size[1]}
    preprocessing = preprocessor_settings(config.image_size, export.scale) | {
        "image_processor_type": "SamImageProcessor",
        "size": {"longest_edge": config.image_size[0]},
        "resample": 2,  # PIL's bilinear, as SAM's own
        "do_pad": True,
        "pad_size": size,
    }
    write_folder(folder, settings, state, preprocessing)
    return {"class": f"transformers.{kind}", "merged_into": export.merge_into and str(export.merge_into)}


def vision_settings(config: SamConfig) -> dict[str, Any]:
    """Returns config.json of a SamVisionModel."""
    fields = config.model_dump(mode="json") | {"image_size": config.image_size[0]}
    mlp_dim = int(config.width * config.mlp_ratio)
    return FIXED | {theirs: fields[ours] for theirs, (ours, _) in SETTINGS.items()} | {"mlp_dim": mlp_dim}


def compare(export: Export, folder: Path, images: Tensor) -> Iterator[Comparison]:
    from transformers import SamModel, SamVisionModel

    embedding = export.features(images)
    if export.merge_into is None and export.segmenter is None:
        yield Comparison(load_peer(SamVisionModel, folder)(images).last_hidden_state, embedding)
        return
    peer = load_peer(SamModel, folder)
    yield Comparison(peer.get_image_embeddings(images), embedding)
    if export.segmenter is not None and export.merge_into is None:
        point, box = example_prompts(export.sam.config.image_size[0])
        asked = {"input_points": point.points[None], "input_labels": point.labels[None]}
        for prompts, arguments in ((point, asked), (box, {"input_boxes": box.boxes[None]})):
            theirs = peer(image_embeddings=embedding, multimask_output=True, **arguments).pred_masks[0]
            row = torch.zeros(1, dtype=torch.long)
            yield Comparison(theirs, export.segmenter.answer(embedding, row, prompts, several=True).logits)


def our_name(key: str) -> str:
    """vision_encoder.layers.0.layer_norm1.weight -> blocks.0.norm1.weight"""
    key = key.removeprefix(PREFIX)
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return key


def their_name(key: str) -> str:
    """blocks.0.norm1.weight -> vision_encoder.layers.0.layer_norm1.weight"""
    for theirs, ours in NAMES.items():
        key = key.replace(ours, theirs)
    return PREFIX + key


FORMAT = Format(
    sentence="folder for transformers' SamVisionModel, of a whole SAM (or with --merge-into FOLDER) for SamModel",
    peer="transformers",
    compared="image embeddings (and masks of a whole SAM)",
    write=write,
    compare=compare,
    holds="sam",
    merges=True,
)
