"""timm's folders, laid out as on the hub: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor

from mae.errors import CheckpointError
from mae.formats.format import Comparison, Export, Format
from mae.formats.timm import timm_arguments, timm_state
from mae.models.classifier import Classifier
from mae.models.vit import Encoder
from mae.sam.encoder import SamConfig

# By width: timm wants the name of one of its own models; the arguments beside it decide.
ARCHITECTURES = {192: "tiny_patch16", 384: "small_patch16", 768: "base_patch16", 1024: "large_patch16"}
SAM_ARCHITECTURES = {768: "samvit_base_patch16", 1024: "samvit_large_patch16", 1280: "samvit_huge_patch16"}
# Theirs, ours.
SAM_NAMES = {
    "patch_size": "patch_size",
    "in_chans": "in_channels",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "window_size": "window",
    "global_attn_indexes": "global_blocks",
    "neck_chans": "out_channels",
}


def read(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns fields of MAEConfig that config.json says. Raises CheckpointError if the model is no plain Vision
    Transformer.
    """
    if not settings["architecture"].startswith("vit_"):
        raise CheckpointError(f"this is timm's {settings['architecture']}: only plain vit_* are encoders here")
    arguments = settings.get("model_args", {})
    names = {"img_size": "image_size", "num_heads": "num_heads"}
    fields = {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments}
    if arguments.get("reg_tokens") and arguments.get("class_token", True) and not arguments.get("no_embed_class"):
        fields["class_tokens"] = 1 + arguments["reg_tokens"]
    return fields


def read_sam(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of SamConfig that config.json says. Raises CheckpointError if arguments are missing."""
    arguments = settings.get("model_args", {})
    if missing := [name for name in (*SAM_NAMES, "img_size") if name not in arguments]:
        raise CheckpointError(f"config.json does not say {', '.join(missing)} of timm's {settings['architecture']}")
    return {ours: arguments[theirs] for theirs, ours in SAM_NAMES.items()} | {"image_size": arguments["img_size"]}


def write(export: Export, folder: Path) -> dict[str, Any]:
    model = export.encoder
    architecture = f"vit_{ARCHITECTURES.get(model.config.width, 'base_patch16')}_224"
    return write_folder(folder, architecture, timm_arguments(model), export, timm_state(model))


def write_sam(export: Export, folder: Path) -> dict[str, Any]:
    config = export.sam.config
    architecture = SAM_ARCHITECTURES.get(config.width, "samvit_base_patch16")
    state = {key.replace(".mlp.lin", ".mlp.fc"): value for key, value in export.sam.state_dict().items()}
    return write_folder(folder, architecture, sam_arguments(config), export, state)


def sam_arguments(config: SamConfig) -> dict[str, Any]:
    """Returns arguments of timm's VisionTransformerSAM that give our architecture, without a head."""
    fields = config.model_dump(mode="json")
    return {theirs: fields[ours] for theirs, ours in SAM_NAMES.items()} | {
        "img_size": fields["image_size"],
        "use_rel_pos": True,
        "norm_layer": None,  # an epsilon of 1e-6, where timm's samvit_* have 1e-5
        "global_pool": "",
        "num_classes": 0,
    }


def write_folder(
    folder: Path, architecture: str, arguments: dict[str, Any], export: Export, state: dict[str, Tensor]
) -> dict[str, Any]:
    """Writes config.json and model.safetensors. Returns what the card says of loading them.

    architecture  the name of one of timm's models
    arguments     what replaces that model's own
    """
    config = export.model.config
    settings = {
        "architecture": architecture,
        "num_classes": arguments["num_classes"],
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        # transformers gives num_classes by itself, and would give it twice.
        "model_args": {name: value for name, value in arguments.items() if name != "num_classes"},
        "pretrained_cfg": {
            "input_size": [config.in_channels, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": export.scale.mean,
            "std": export.scale.std,
            "num_classes": arguments["num_classes"],
            "first_conv": "patch_embed.proj",
            # The layer that a model of another num_classes starts afresh, also where there is none yet.
            "classifier": "head" if isinstance(export.model, Encoder) else "head.fc",
        },
    }
    if isinstance(export.model, Classifier) and export.model.class_names:
        settings["label_names"] = export.model.class_names
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return {"call": f'timm.create_model("local-dir:{folder.name}", pretrained=True)'}


def compare(export: Export, folder: Path, images: Tensor) -> Iterator[Comparison]:
    # timm loads strictly: its error names a key that is on one side only.
    peer: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if isinstance(export.model, Classifier):
        yield Comparison(peer(images), export.model(images))
    yield Comparison(peer.forward_features(images), export.features(images))


FORMAT = Format(
    sentence='folder for timm.create_model("local-dir:FOLDER", pretrained=True): the encoder, or a classifier',
    peer="timm",
    write=write,
    compare=compare,
    heads=True,
)

SAM = replace(
    FORMAT,
    sentence="folder for timm's samvit_* models: a SAM-style encoder",
    compared="image embeddings",
    write=write_sam,
    holds="sam",
    heads=False,
)
