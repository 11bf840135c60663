"""timm's folders of `samvit_*`: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mae.errors import CheckpointError
from mae.formats import timm_folder
from mae.formats.format import Export
from mae.sam.encoder import SamConfig

# timm wants the name of one of its own models; the arguments beside it decide.
ARCHITECTURES = {768: "samvit_base_patch16", 1024: "samvit_large_patch16", 1280: "samvit_huge_patch16"}
# Theirs, ours.
NAMES = {
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


def timm_arguments(config: SamConfig) -> dict[str, Any]:
    """Returns arguments of timm's VisionTransformerSAM that give our architecture, without a head."""
    fields = config.model_dump(mode="json")
    return {theirs: fields[ours] for theirs, ours in NAMES.items()} | {
        "img_size": fields["image_size"],
        "use_rel_pos": True,
        "norm_layer": None,  # an epsilon of 1e-6, where timm's samvit_* have 1e-5
        "global_pool": "",
        "num_classes": 0,
    }


def read(settings: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields of SamConfig, and weights under our names. Raises CheckpointError if arguments are missing."""
    arguments = settings.get("model_args", {})
    if missing := [name for name in (*NAMES, "img_size") if name not in arguments]:
        raise CheckpointError(f"config.json does not say {', '.join(missing)} of timm's {settings['architecture']}")
    fields = {ours: arguments[theirs] for theirs, ours in NAMES.items()} | {"image_size": arguments["img_size"]}
    return fields, {key.replace(".mlp.fc", ".mlp.lin"): value for key, value in weights.items()}


def write(export: Export, folder: Path) -> dict[str, Any]:
    config = export.sam.config
    architecture = ARCHITECTURES.get(config.width, "samvit_base_patch16")
    state = {key.replace(".mlp.lin", ".mlp.fc"): value for key, value in export.sam.state_dict().items()}
    return timm_folder.write_folder(folder, architecture, timm_arguments(config), export, state)


FORMAT = replace(
    timm_folder.FORMAT,
    sentence="folder for timm's samvit_* models: a SAM-style encoder",
    compared="image embeddings",
    write=write,
    holds="sam",
)
