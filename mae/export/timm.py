"""timm's plain Vision Transformer: the same names and, checked on every export, the same function."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from mae.errors import CheckpointError
from mae.models.config import MAEConfig
from mae.models.vit import Encoder, LayerNorm

TOLERANCE = 1e-5


def timm_arguments(config: MAEConfig) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer that give the architecture of our encoder, without a head."""
    return {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "class_token": config.class_token,
        "global_pool": "token" if config.class_token else "",
        "num_classes": 0,
    }


def write(encoder: Encoder, out: Path) -> dict[str, Any]:
    """Writes the encoder as safetensors, loads it back through timm, and compares the features of both.

    returns  what the card says of the format: constructor arguments and the largest difference

    Raises CheckpointError, and leaves no file, when a key is left over or missing or the features differ.
    """
    wanted = Encoder(encoder.config).state_dict()
    state = {key: value.contiguous() for key, value in encoder.state_dict().items() if key in wanted}
    arguments = timm_arguments(encoder.config)
    temporary = out.with_name(out.name + ".tmp")
    try:
        save_file(state, temporary, metadata={"format": "pt"})
        difference = _compare(encoder, temporary, arguments)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "class": "timm.models.vision_transformer.VisionTransformer",
        "arguments": arguments,
        "difference": difference,
    }


@torch.inference_mode()
def _compare(encoder: Encoder, file: Path, arguments: dict[str, Any]) -> float:
    """Largest difference of the features, relative to their largest value."""
    theirs = VisionTransformer(**arguments, norm_layer=LayerNorm).eval()
    problems = theirs.load_state_dict(load_file(file), strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise CheckpointError(
            f"timm's model and ours do not have the same keys: missing {problems.missing_keys}, left over "
            f"{problems.unexpected_keys}"
        )
    images = torch.randn(2, encoder.config.in_channels, *encoder.config.image_size, generator=torch.manual_seed(0))
    ours = encoder.eval().encode(images)
    difference = float((theirs.forward_features(images) - ours).abs().max() / ours.abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"timm's features differ from ours by {difference:.1e} of their largest value, more than {TOLERANCE:.0e}"
        )
    return difference
