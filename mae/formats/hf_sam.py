"""Hugging Face `SamModel` and `SamVisionModel` folders: a whole SAM, or its encoder, with the names used on the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Comparison, Export, Format, require
from mae.formats.huggingface import load_peer, preprocessor_settings, write_folder
from mae.formats.sam_names import example_prompts, to_transformers
from mae.sam.encoder import SamConfig
from mae.sam.segmenter import transformers_config

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


def read(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of SamConfig that config.json says. Raises CheckpointError if the model is no SAM of ours."""
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
    return fields


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Writes a SamVisionModel, or a whole SamModel."""
    config = export.sam.config
    require(config, "transformers' SAM", "square images")
    if export.segmenter is not None:
        kind, settings = "SamModel", transformers_config(config).to_dict() | {"architectures": ["SamModel"]}
        settings["vision_config"] |= vision_settings(config)
    else:
        kind = "SamVisionModel"
        settings = {"architectures": [kind], "model_type": "sam_vision_model"} | vision_settings(config)
    state = to_transformers(export.sam_weights)
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
    if export.segmenter is None:
        yield Comparison(load_peer(SamVisionModel, folder)(images).last_hidden_state, embedding, "image embeddings")
        return
    peer = load_peer(SamModel, folder)
    yield Comparison(peer.get_image_embeddings(images), embedding, "image embeddings")
    point, box = example_prompts(export.sam.config.image_size[0])
    asked = {"input_points": point.points[None], "input_labels": point.labels[None]}
    for prompts, arguments, of in (
        (point, asked, "masks of a point"),
        (box, {"input_boxes": box.boxes[None]}, "masks of a box"),
    ):
        theirs = peer(image_embeddings=embedding, multimask_output=True, **arguments).pred_masks[0]
        row = torch.zeros(1, dtype=torch.long)
        yield Comparison(theirs, export.segmenter.answer(embedding, row, prompts, several=True).logits, of)


FORMAT = Format(
    sentence="folder for transformers' SamModel of a whole SAM (or with --merge-into SAM), else for SamVisionModel",
    peer="transformers",
    compared="image embeddings",
    write=write,
    compare=compare,
    holds="sam",
    whole_sam=True,
)
